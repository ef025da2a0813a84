"""The prunable structure of one model: its channel groups, its layers, and for everything else the reason why not.

module, example, onnx ─couple, trace─▶ classes of coupled channels ─gather─▶ Structure(space, layers, unprunable)
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import gcd

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from edgeprune.channels import ChannelMap, Owners, Removal, find_removal, trace_channels
from edgeprune.coupling import CONVOLUTIONS, Axis, Coupling, couple, is_depthwise, tied
from edgeprune.layer import Layer
from edgeprune.plan import Group, Plan, Space


@dataclass(frozen=True, kw_only=True)
class Unprunable:
    """Output channels of one layer that stay, and why; `channels` of the layer's `of`."""

    layer: str
    channels: int
    of: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Everything that cutting needs to know about a model.

    Attributes:
        space: the channel groups, in forward order.
        units: group → class of coupled channels of each unit.
        members: group → axes it touches, in the order of the module.
        layers: convolutions and linear layers, in graph order.
        reasons: class of coupled channels that must stay → why.
        removals: group → what is left of the graph when it keeps nothing.
        classes: axis → class of coupled channels that each channel belongs to; -1: none.
        channels: the same for the ONNX graph, with the edits a plan fills in.
    """

    space: Space
    units: Mapping[str, tuple[int, ...]]
    members: Mapping[str, tuple[Axis, ...]]
    layers: tuple[Layer, ...]
    reasons: Mapping[int, str]
    removals: Mapping[str, Removal]
    classes: Mapping[Axis, Owners]
    channels: ChannelMap

    def alive(self, plan: Plan) -> NDArray[np.bool_]:
        """Return whether each class of coupled channels is kept; indexed by class, and -1 (fixed) is kept.

        Raises:
            PlanError: if the plan does not fit the space.
        """
        self.space.check(plan)
        kept = np.ones(self.class_count + 1, dtype=np.bool_)
        for name, units in self.units.items():
            lost = np.array(units, dtype=np.int64)
            kept[np.delete(lost, plan.kept[name])] = False
        return kept

    @cached_property
    def class_count(self) -> int:
        """Return one more than the highest class."""
        owners = [*self.classes.values(), *(edit.owners for edit in self.channels.edits)]
        return 1 + max((int(each.max()) for each in owners if len(each)), default=0)

    def removed(self, plan: Plan) -> tuple[Removal, ...]:
        """Return the residual branches a plan removes."""
        return tuple(self.removals[name] for name, units in plan.kept.items() if not units)

    @cached_property
    def unprunable(self) -> tuple[Unprunable, ...]:
        """Return every output channel that no plan may remove, by layer and reason, in graph order."""
        grouped = {unit for units in self.units.values() for unit in units}
        found = []
        for layer in self.layers:
            owners = self.classes[layer.name, "out"].tolist()
            why = Counter(self.reasons.get(owner, _NO_DEPENDENCY) for owner in owners if owner not in grouped)
            found += [Unprunable(layer=layer.name, channels=n, of=len(owners), reason=each) for each, n in why.items()]
        return tuple(found)

    @cached_property
    def full(self) -> dict[str, int]:
        """Return group → width of the unpruned model."""
        return {group.name: group.width for group in self.space.groups}


_NO_DEPENDENCY = "torch-pruning finds no dependency of these channels"


def build_structure(
    module: nn.Module,
    example: torch.Tensor,
    graph: onnx.ModelProto,
    *,
    multiple: int,
    minimum_ratio: float = 0.0,
    exclude: Sequence[str] = (),
) -> Structure:
    """Return the prunable structure of a module.

    Groups that do not survive a trial cut are left out with the reason; see `edgeprune.cut.proven`.

    Args:
        module: in eval mode.
        example: an input, [1, ...].
        graph: what `edgeprune.export.export` wrote for the two.
        multiple: kept channel counts are multiples of it.
        minimum_ratio: smallest share of its width a group keeps.
        exclude: glob patterns of layer names whose output channels must stay.
    """
    coupling = couple(module, example)
    channels = trace_channels(graph, coupling)
    if channels.halves:
        coupling = tied(coupling, channels.halves)
        channels = trace_channels(graph, coupling)
    frozen = dict(channels.frozen) | _excluded(coupling, exclude)
    return _gather(module, graph, coupling, channels, frozen, multiple, minimum_ratio)


def without(structure: Structure, frozen: Mapping[str, str]) -> Structure:
    """Return the structure with some groups frozen: group name → reason."""
    if not frozen:
        return structure
    lost = {unit: reason for name, reason in frozen.items() for unit in structure.units[name]}
    groups = tuple(group for group in structure.space.groups if group.name not in frozen)
    return Structure(
        space=Space(groups=groups),
        units={group.name: structure.units[group.name] for group in groups},
        members={group.name: structure.members[group.name] for group in groups},
        layers=tuple(_without_groups(layer, frozen) for layer in structure.layers),
        reasons={**structure.reasons, **lost},
        removals={name: each for name, each in structure.removals.items() if name not in frozen},
        classes=structure.classes,
        channels=structure.channels,
    )


def _without_groups(layer: Layer, names: Collection[str]) -> Layer:
    return replace(
        layer,
        in_units={name: count for name, count in layer.in_units.items() if name not in names},
        out_units={name: count for name, count in layer.out_units.items() if name not in names},
    )


def _excluded(coupling: Coupling, patterns: Sequence[str]) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for (layer, side), owners in coupling.classes.items():
        hits = [pattern for pattern in patterns if fnmatchcase(layer, pattern)]
        if side == "out" and hits:
            reasons |= {int(owner): f"excluded by {hits[0]!r}" for owner in owners if owner >= 0}
    return reasons


def _gather(
    module: nn.Module,
    graph: onnx.ModelProto,
    coupling: Coupling,
    channels: ChannelMap,
    frozen: Mapping[int, str],
    multiple: int,
    minimum_ratio: float,
) -> Structure:
    signatures = _signatures(coupling)
    bundles: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for owner, touched in signatures.items():
        bundles[tuple(sorted(Counter(touched).items()))].append(owner)
    order = {layer: place for place, layer in enumerate(channels.nodes)}
    groups: list[Group] = []
    units: dict[str, tuple[int, ...]] = {}
    members: dict[str, tuple[Axis, ...]] = {}
    removals: dict[str, Removal] = {}
    reasons = dict(frozen)
    for owners in sorted(bundles.values(), key=lambda each: _first_place(signatures[each[0]], order)):
        axes = tuple(dict.fromkeys(signatures[owners[0]]))
        leading = [layer for layer, side in axes if side == "out" and layer in order]
        reason = next((frozen[each] for each in owners if each in frozen), None)
        if not leading or reason is not None:
            reasons |= dict.fromkeys(owners, reason or "it has no output channel in the graph")
            continue
        name = _unused(min(leading, key=order.__getitem__), units)
        removal = find_removal(graph, channels, frozenset(owners))
        group = _group(name, owners, coupling.classes[name.partition("#")[0], "out"], multiple, minimum_ratio, removal)
        if len(group.choices) == 1:
            reasons |= dict.fromkeys(owners, _too_narrow(group, multiple))
            continue
        groups.append(group)
        units[name], members[name] = tuple(owners), axes
        removals |= {name: removal} if removal else {}
    return _assembled(module, graph, coupling, channels, groups, units, members, removals, reasons)


def _signatures(coupling: Coupling) -> dict[int, list[Axis]]:
    """Return class → every axis it touches, once for each channel."""
    signatures: dict[int, list[Axis]] = defaultdict(list)
    for axis, owners in coupling.classes.items():
        for owner in owners.tolist():
            if owner >= 0:
                signatures[owner].append(axis)
    return signatures


def _first_place(axes: Collection[Axis], order: Mapping[str, int]) -> int:
    return min((order[layer] for layer, side in axes if side == "out" and layer in order), default=len(order))


def _unused(name: str, taken: Collection[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}#{number}", number + 1
    return candidate


def _group(
    name: str, owners: Sequence[int], axis: Owners, multiple: int, minimum_ratio: float, removal: Removal | None
) -> Group:
    unit_channels = int(np.count_nonzero(axis == owners[0]))
    step = multiple // gcd(multiple, unit_channels)
    minimum = max(step, int(np.ceil(minimum_ratio * len(owners))))
    return Group(
        name=name,
        width=len(owners),
        minimum=minimum,
        multiple=step,
        unit_channels=unit_channels,
        removable=removal is not None,
    )


def _too_narrow(group: Group, multiple: int) -> str:
    channels = group.width * group.unit_channels
    return f"its {channels} channels leave no smaller multiple of {multiple}"


def _assembled(
    module: nn.Module,
    graph: onnx.ModelProto,
    coupling: Coupling,
    channels: ChannelMap,
    groups: list[Group],
    units: dict[str, tuple[int, ...]],
    members: dict[str, tuple[Axis, ...]],
    removals: dict[str, Removal],
    reasons: Mapping[int, str],
) -> Structure:
    group_of = {owner: name for name, owners in units.items() for owner in owners}
    nodes = {node.name: node for node in graph.graph.node}
    modules = dict(module.named_modules())
    layers = (
        _layer(name, nodes[node], modules[name], coupling, channels, group_of) for name, node in channels.nodes.items()
    )
    return Structure(
        space=Space(groups=tuple(groups)),
        units=units,
        members=members,
        layers=tuple(layers),
        reasons=reasons,
        removals=removals,
        classes=coupling.classes,
        channels=channels,
    )


def _layer(
    name: str,
    node: onnx.NodeProto,
    module: nn.Module,
    coupling: Coupling,
    channels: ChannelMap,
    group_of: Mapping[int, str],
) -> Layer:
    shape = channels.shapes[node.output[0]]
    weight = channels.shapes[node.input[1]]
    into, out = coupling.classes[name, "in"], coupling.classes[name, "out"]
    return Layer(
        name=name,
        node=node.name,
        kind=_kind(module),
        in_channels=len(into),
        out_channels=len(out),
        kernel=int(np.prod(weight[2:])),
        stride=next((int(each.ints[0]) for each in node.attribute if each.name == "strides"), 1),
        height=shape[2] if len(shape) > 2 else 1,
        width=shape[3] if len(shape) > 3 else 1,
        groups=getattr(module, "groups", 1),
        in_units=_per_unit(into, group_of),
        out_units=_per_unit(out, group_of),
    )


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if is_depthwise(module):
        return "depthwise"
    if isinstance(module, CONVOLUTIONS) and module.transposed:
        return "transposed"
    return "grouped" if getattr(module, "groups", 1) > 1 else "conv"


def _per_unit(owners: Owners, group_of: Mapping[int, str]) -> dict[str, int]:
    counts = Counter(owners.tolist())
    return {group_of[owner]: count for owner, count in counts.items() if owner in group_of}
