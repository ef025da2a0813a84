"""The prunable structure of one model: its channel groups, its layers, and for everything else the reason why not.

module, example ─couple─▶ classes of coupled channels ─trace through the graph─▶ bundles of alike classes
                                                            └─▶ Structure(space, layers, unprunable)
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import ceil, gcd

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from edgeprune.channels import ChannelMap, Owners, trace_channels
from edgeprune.coupling import CONVOLUTIONS, CUTTABLE, Axis, Coupling, couple, is_depthwise, tied, uncoupled
from edgeprune.errors import ConfigError, ModelError, PlanError
from edgeprune.layer import Layer
from edgeprune.plan import Group, Plan, Space
from edgeprune.removal import NOTHING, Removal


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
        classes: axis → class of coupled channels that each channel belongs to; -1: none.
        channels: the same for the ONNX graph, with the edits a plan fills in.
        coupled_by: who says which channels are coupled: "torch-pruning", or "the graph" where the two disagree.
        bystanders: modules and bare parameters of no kind that edgeprune cuts, in the order of the module.
    """

    space: Space
    units: Mapping[str, tuple[int, ...]]
    members: Mapping[str, tuple[Axis, ...]]
    layers: tuple[Layer, ...]
    reasons: Mapping[int, str]
    classes: Mapping[Axis, Owners]
    channels: ChannelMap
    coupled_by: str
    bystanders: tuple[Unprunable, ...] = ()

    def alive(self, plan: Plan) -> NDArray[np.bool_]:
        """Return whether each class of coupled channels is kept; indexed by class, and -1 (fixed) is kept.

        Raises:
            PlanError: if the plan does not fit the space.
        """
        self.space.check(plan)
        kept = np.ones(self.class_count + 1, dtype=np.bool_)
        for name, units in self._unit_arrays.items():
            if len(plan.kept[name]) < len(units):
                kept[np.delete(units, plan.kept[name])] = False
        return kept

    def removal(self, plan: Plan) -> Removal:
        """Return what a plan's groups of width 0 make of the graph, all of them together.

        Raises:
            PlanError: if they silence more than residual branches.
        """
        emptied = [name for name, units in plan.kept.items() if not units]
        if not emptied:
            return NOTHING
        found = self.channels.removal(frozenset(unit for name in emptied for unit in self.units[name]))
        if found is None:
            raise PlanError(
                f"groups {emptied[:3]} cannot all keep nothing",
                why="together they silence more than residual branches",
                next_step="keep at least the minimum width of one of them",
            )
        return found

    @cached_property
    def class_count(self) -> int:
        """Return one more than the highest class."""
        owners = [*self.classes.values(), *(edit.owners for edit in self.channels.edits)]
        return 1 + max((int(each.max()) for each in owners if len(each)), default=0)

    @cached_property
    def unprunable(self) -> tuple[Unprunable, ...]:
        """Return every output channel that no plan may remove, by layer and reason, in graph order.

        After the layers of the graph come those it does not hold, batch norms and slopes that no group takes along,
        and the bystanders; weights that belong to no layer come last, under the name of their node. Every parameter of
        the module is in a group or in here: what is passed over in silence looks like a mistake.
        """
        known = {each.layer for each in self.bystanders}
        named = [layer.name for layer in self.layers if layer.name not in known]
        named += [name for name, side in self.classes if side == "in" and name not in {*self.channels.nodes, *known}]
        named += [name for name in self._per_channel if name not in known and not self._moves(name)]
        strays = [
            Unprunable(layer=node, channels=size, of=size, reason="its weight belongs to no layer of the module")
            for node, size in self.channels.strays.items()
        ]
        return (*(each for name in named for each in self._staying(name)), *self.bystanders, *strays)

    @property
    def _per_channel(self) -> list[str]:
        return [name for name, side in self.classes if side == "out" and (name, "in") not in self.classes]

    def _moves(self, layer: str) -> bool:
        return not self._grouped.isdisjoint(self.classes[layer, "out"].tolist())

    def _staying(self, layer: str) -> Iterable[Unprunable]:
        owners = self.classes[layer, "out"].tolist()
        unseen = self.channels.unseen.get(layer)
        staying = [owner for owner in owners if owner not in self._grouped]
        why = Counter(unseen or self.reasons.get(owner, "nothing is known to depend on it") for owner in staying)
        return [Unprunable(layer=layer, channels=n, of=len(owners), reason=each) for each, n in why.items()]

    @cached_property
    def _grouped(self) -> frozenset[int]:
        return frozenset(unit for units in self.units.values() for unit in units)

    @cached_property
    def _unit_arrays(self) -> dict[str, NDArray[np.int64]]:
        return {name: np.array(units, dtype=np.int64) for name, units in self.units.items()}

    @cached_property
    def full(self) -> dict[str, int]:
        """Return group → width of the unpruned model."""
        return {group.name: group.width for group in self.space.groups}


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

    Groups that do not survive a trial cut are still in it; see `edgeprune.cut.proven`.

    Args:
        module: in eval mode.
        example: an input, [1, ...].
        graph: what `edgeprune.export.export` wrote for the two.
        multiple: kept channel counts are multiples of it.
        minimum_ratio: smallest share of its width a group keeps, unless it goes altogether.
        exclude: glob patterns of layer names whose output channels must stay.

    Raises:
        ConfigError: if a pattern names no layer.
    """
    coupled_by, coupling, channels = _settled(module, example, graph)
    bundles = _bundles(coupling, tuple(channels.nodes))
    bystanders = tuple(_bystanders(module))
    frozen = dict(channels.frozen) | _held(coupling, bystanders) | _excluded(coupling, exclude, bystanders)
    reasons = _whole(bundles, frozen)
    free = [bundle for bundle in bundles if bundle.units[0] not in reasons]
    chosen: list[tuple[Group, _Bundle]] = []
    for bundle, removable in zip(free, _removable(free, channels), strict=True):
        group = _group(bundle, multiple, minimum_ratio, removable=removable, taken=[each.name for each, _ in chosen])
        if len(group.choices) > 1:
            chosen.append((group, bundle))
        else:
            reasons |= dict.fromkeys(bundle.units, _too_narrow(group, multiple))
    return Structure(
        space=Space(groups=tuple(group for group, _ in chosen)),
        units={group.name: bundle.units for group, bundle in chosen},
        members={group.name: bundle.axes for group, bundle in chosen},
        layers=_layers(module, graph, coupling, channels, chosen),
        reasons=reasons,
        classes=coupling.classes,
        channels=channels,
        coupled_by=coupled_by,
        bystanders=bystanders,
    )


def without(structure: Structure, frozen: Mapping[str, str]) -> Structure:
    """Return the structure with some groups frozen: group name → reason."""
    if not frozen:
        return structure
    lost = {unit: reason for name, reason in frozen.items() for unit in structure.units[name]}
    groups = tuple(group for group in structure.space.groups if group.name not in frozen)
    return replace(
        structure,
        space=Space(groups=groups),
        units={group.name: structure.units[group.name] for group in groups},
        members={group.name: structure.members[group.name] for group in groups},
        layers=tuple(_without_groups(layer, frozen) for layer in structure.layers),
        reasons={**structure.reasons, **lost},
    )


def never_empty(structure: Structure, names: Mapping[str, str]) -> Structure:
    """Return the structure with some groups that may no longer be removed altogether: group name → reason.

    A group that is left without a choice is frozen.
    """
    if not names:
        return structure
    groups = tuple(replace(each, removable=False) if each.name in names else each for each in structure.space.groups)
    kept = replace(
        structure,
        space=Space(groups=groups),
        layers=tuple(
            replace(each, gone_with=tuple(name for name in each.gone_with if name not in names))
            for each in structure.layers
        ),
    )
    stuck = [group.name for group in groups if len(group.choices) == 1]
    return without(kept, {name: names[name] for name in stuck})


def _without_groups(layer: Layer, names: Collection[str]) -> Layer:
    return replace(
        layer,
        in_units={name: count for name, count in layer.in_units.items() if name not in names},
        out_units={name: count for name, count in layer.out_units.items() if name not in names},
        gone_with=tuple(name for name in layer.gone_with if name not in names),
    )


# -- classes into groups ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Bundle:
    """Classes that touch the same axes equally often: the units of one group, unless something freezes them.

    Attributes:
        units: the classes, in the order of the leader's channels.
        axes: what they touch, in the order of the module.
        leader: the first layer in forward order whose output channels they are; None if the graph holds no such layer.
        unit_channels: channels of the leader in one unit.
    """

    units: tuple[int, ...]
    axes: tuple[Axis, ...]
    leader: str | None
    unit_channels: int


def _settled(module: nn.Module, example: torch.Tensor, graph: onnx.ModelProto) -> tuple[str, Coupling, ChannelMap]:
    """Return who says which channels are coupled, the coupling, and the walk through the graph that confirms it.

    torch-pruning proposes. Where it cannot follow the module, or channels meet in the graph that it does not couple,
    the graph decides alone. Either way, every tie that the walk finds makes two classes one.
    """
    coupled_by = "torch-pruning"
    try:
        coupling = couple(module, example)
    except ModelError:
        coupled_by, coupling = "the graph", uncoupled(module)
    channels = trace_channels(graph, coupling)
    if channels.conflict:
        coupled_by, coupling = "the graph", uncoupled(module)
        channels = trace_channels(graph, coupling)
    while channels.ties:
        coupling = tied(coupling, channels.ties)
        channels = trace_channels(graph, coupling)
    return coupled_by, coupling, channels


def _held(coupling: Coupling, bystanders: Iterable[Unprunable]) -> dict[int, str]:
    """Return the classes of bystanders that are layers of a kind edgeprune could cut, were they elsewhere."""
    none = np.empty(0, dtype=np.int64)
    owners = ((each.reason, coupling.classes.get((each.layer, "out"), none)) for each in bystanders)
    return {owner: reason for reason, held in owners for owner in held.tolist() if owner >= 0}


def _excluded(coupling: Coupling, patterns: Sequence[str], bystanders: Iterable[Unprunable]) -> dict[int, str]:
    layers = {layer for layer, _ in coupling.classes} | {each.layer for each in bystanders}
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ConfigError(
                f"space.exclude {pattern!r} names no layer", next_step="edgeprune space lists every layer by its name"
            )
    reasons: dict[int, str] = {}
    for (layer, side), owners in coupling.classes.items():
        hits = [pattern for pattern in patterns if fnmatchcase(layer, pattern)]
        if side == "out" and hits:
            reasons |= {int(owner): f"excluded by {hits[0]!r}" for owner in owners if owner >= 0}
    return reasons


def _bundles(coupling: Coupling, forward: Sequence[str]) -> list[_Bundle]:
    """Return the bundles in the order in which the graph makes their channels."""
    touched: dict[int, list[Axis]] = defaultdict(list)
    for axis, owners in coupling.classes.items():
        for owner in owners.tolist():
            if owner >= 0:
                touched[owner].append(axis)
    alike: dict[tuple[Axis, ...], list[int]] = defaultdict(list)
    for owner, axes in touched.items():
        alike[tuple(axes)].append(owner)
    place = {layer: number for number, layer in enumerate(forward)}
    found = [_bundle(owners, axes, coupling, place) for axes, owners in alike.items()]
    return sorted(found, key=lambda each: place[each.leader] if each.leader is not None else len(place))


def _bundle(owners: list[int], touched: Sequence[Axis], coupling: Coupling, place: Mapping[str, int]) -> _Bundle:
    axes = tuple(dict.fromkeys(touched))
    makers = [layer for layer, side in axes if side == "out" and layer in place]
    leader = min(makers, key=place.__getitem__, default=None)
    if leader is None:
        return _Bundle(units=tuple(owners), axes=axes, leader=None, unit_channels=0)
    mine = set(owners)
    units = dict.fromkeys(owner for owner in coupling.classes[leader, "out"].tolist() if owner in mine)
    return _Bundle(units=tuple(units), axes=axes, leader=leader, unit_channels=touched.count((leader, "out")))


def _whole(bundles: Iterable[_Bundle], frozen: Mapping[int, str]) -> dict[int, str]:
    """Return the reasons of all classes that must stay: where one of a bundle must, the others stay with it."""
    reasons = dict(frozen)
    for bundle in bundles:
        first = next((frozen[unit] for unit in bundle.units if unit in frozen), None)
        if bundle.leader is None:
            first = first or "no convolution or linear layer of the graph makes it"
        if first is not None:
            reasons = dict.fromkeys(bundle.units, first) | reasons
    return reasons


def _removable(bundles: Iterable[_Bundle], channels: ChannelMap) -> Iterable[bool]:
    """Yield whether each bundle may keep nothing, alone and together with all those before it that may."""
    emptied: frozenset[int] = frozenset()
    for bundle in bundles:
        units = frozenset(bundle.units)
        together = channels.removal(units) is not None and channels.removal(emptied | units) is not None
        emptied |= units if together else frozenset()
        yield together


def _group(bundle: _Bundle, multiple: int, minimum_ratio: float, *, removable: bool, taken: Collection[str]) -> Group:
    assert bundle.leader is not None
    step = multiple // gcd(multiple, bundle.unit_channels)
    name = _unused(bundle.leader, taken)
    minimum = max(step, ceil(minimum_ratio * len(bundle.units)))
    return Group(
        name=name,
        width=len(bundle.units),
        minimum=minimum,
        multiple=step,
        unit_channels=bundle.unit_channels,
        removable=removable,
    )


def _unused(name: str, taken: Collection[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}#{number}", number + 1
    return candidate


def _too_narrow(group: Group, multiple: int) -> str:
    channels = group.width * group.unit_channels
    if group.width == 1:
        return f"its {channels} channels can only go together"
    return f"its {channels} channels leave no smaller multiple of {multiple} that is allowed"


# -- what edgeprune never cuts ---------------------------------------------------------------------------------------

_NEVER_CUT: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layers"),
    ((nn.MultiheadAttention,), "attention"),
    ((nn.Embedding, nn.EmbeddingBag), "embeddings"),
    (
        (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        "normalisations other than batch norm",
    ),
)


def _bystanders(module: nn.Module) -> Iterable[Unprunable]:
    """Yield what holds parameters and is of no kind that edgeprune cuts."""
    attention = (each for each in module.modules() if isinstance(each, nn.MultiheadAttention))
    inside: dict[nn.Module, nn.Module] = {each.out_proj: each for each in attention}
    for name, layer in module.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        reason = _never_cut(inside.get(layer, layer))
        if reason and own:
            yield _whole_layer(name, layer, reason)
        elif not isinstance(layer, CUTTABLE):
            yield from (_bare(_below(name, each), tensor, layer) for each, tensor in own.items())


def _never_cut(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        return "it has one slope for all channels"
    what = next((what for kinds, what in _NEVER_CUT if isinstance(layer, kinds)), None)
    return what and f"edgeprune does not cut {what} ({type(layer).__name__})"


def _whole_layer(name: str, layer: nn.Module, reason: str) -> Unprunable:
    width = _width(layer)
    return Unprunable(layer=name, channels=width, of=width, reason=reason)


def _bare(name: str, tensor: torch.Tensor, holder: nn.Module) -> Unprunable:
    size, shape = _last_side(tensor), " x ".join(map(str, tensor.shape)) or "one number"
    reason = f"edgeprune does not cut parameters that {type(holder).__name__} holds itself ({shape})"
    return Unprunable(layer=name, channels=size, of=size, reason=reason)


def _width(layer: nn.Module) -> int:
    if isinstance(layer, nn.RNNBase):
        return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    if isinstance(layer, nn.RNNCellBase):
        return layer.hidden_size
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return _last_side(next(layer.parameters(recurse=False)))


def _last_side(tensor: torch.Tensor) -> int:
    """Return the last side longer than one: the channels of a token, a scale, a row of an embedding."""
    return next((side for side in reversed(tensor.shape) if side > 1), 1)


def _below(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


# -- layers ----------------------------------------------------------------------------------------------------------


def _layers(
    module: nn.Module,
    graph: onnx.ModelProto,
    coupling: Coupling,
    channels: ChannelMap,
    chosen: Iterable[tuple[Group, _Bundle]],
) -> tuple[Layer, ...]:
    nodes = {node.name: node for node in graph.graph.node}
    group_of = {unit: group.name for group, bundle in chosen for unit in bundle.units}
    gone_with: dict[str, list[str]] = defaultdict(list)
    for group, bundle in chosen:
        removal = channels.removal(frozenset(bundle.units)) if group.removable else None
        for dead in removal.dead_layers if removal else ():
            gone_with[dead].append(group.name)
    return tuple(
        replace(
            _layer(name, nodes[node], module.get_submodule(name), channels.shapes, coupling.classes),
            in_units=_per_unit(coupling.classes[name, "in"], group_of),
            out_units=_per_unit(coupling.classes[name, "out"], group_of),
            gone_with=tuple(gone_with[name]),
        )
        for name, node in channels.nodes.items()
    )


def _layer(
    name: str,
    node: onnx.NodeProto,
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    classes: Mapping[Axis, Owners],
) -> Layer:
    area = shapes[node.input[0] if getattr(module, "transposed", False) else node.output[0]][2:]
    return Layer(
        name=name,
        node=node.name,
        kind=_kind(module),
        in_channels=len(classes[name, "in"]),
        out_channels=len(classes[name, "out"]),
        kernel=int(np.prod(shapes[node.input[1]][2:])),
        stride=next((int(each.ints[0]) for each in node.attribute if each.name == "strides"), 1),
        height=area[0] if area else 1,
        width=int(np.prod(area[1:])),
        groups=getattr(module, "groups", 1),
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
    """Return channel group → channels that one of its units contributes to an axis."""
    counts = Counter(owners.tolist())
    return {group_of[owner]: count for owner, count in counts.items() if owner in group_of}
