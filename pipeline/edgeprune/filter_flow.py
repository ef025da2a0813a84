"""Follows the units of every channel group forward through the graph, and lets a rule change who reads what.

    conv1 ─bn1─relu─┬─▶ conv2 reads units of "conv1" as filters of conv1 with bn1 folded: its columns may change here,
                    │   and what it makes is then described with its new weights
                    └─▶ every reader sees the group as it is at its own place: behind its own batch norm, or after
                        those producers of a residual stream that come before it

One pass in the order of the graph. Activations are passed over: exact where they keep a unit's positive scale (ReLU,
leaky ReLU, pooling), an approximation elsewhere (ReLU6, SiLU, GELU). Channels that a plan removes count as gone in the
filters of later layers. Where two maps are multiplied, or something mixes channels, the units behind it are not
described, with the reason; a layer that reads them keeps its weights, as it would without reconstruction.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune.channels import BINARY, REDUCTIONS, UNARY, Owners
from edgeprune.coupling import is_depthwise
from edgeprune.filters import Array, Filters
from edgeprune.plan import Plan
from edgeprune.removal import Step
from edgeprune.structure import Structure

Places = NDArray[np.int64]
"""Where a group's units are on a channel axis, [units, channels of a unit]."""

Known = Filters | str
"""The filters of a group's units at one tensor, or why nothing is known of them there."""

Move = Callable[[str, str, Filters], Array | None]
"""reader, group, its filters there → what each removed unit gives to each kept one, [removed, kept], in unit order."""

POOLS = frozenset("MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool".split())
ACTIVATIONS = (UNARY - POOLS) | {"PRelu"}
REARRANGERS = (
    POOLS | REDUCTIONS | frozenset("Reshape Flatten Expand Squeeze Unsqueeze Transpose Resize Slice Split".split())
)
LAYERS = frozenset("Conv ConvTranspose Gemm".split())


def follow(module: nn.Module, structure: Structure, plan: Plan, move: Move) -> "Flow":
    """Return what became of the weights of a module when every reader was asked, in forward order.

    Args:
        module: the unpruned model; left as it is.
        structure: of that model.
        plan: what goes.
        move: asked at each layer for each group it reads; the columns of removed units, times the shares it returns,
            are added to the columns of kept ones.

    Raises:
        PlanError: if the plan does not fit the space.
    """
    flow = Flow(module, structure, plan, move)
    last = {name: place for place, step in enumerate(structure.channels.steps) for name in step.inputs}
    for place, step in enumerate(structure.channels.steps):
        flow.take(step)
        flow.forget(name for name in step.inputs if last[name] == place)
    return flow


class Flow:
    """One pass: what is known of each group at each tensor, and the weights that changed.

    Attributes:
        changed: layer → its new weight, in the layer's layout, float64.
        kept_as_they_are: (reader, group) → why nothing is known of the group there.
    """

    def __init__(self, module: nn.Module, structure: Structure, plan: Plan, move: Move) -> None:
        self.changed: dict[str, Array] = {}
        self.kept_as_they_are: dict[tuple[str, str], str] = {}
        self._module, self._structure, self._move = module, structure, move
        self._alive = structure.alive(plan)
        self._dead = set(structure.removal(plan).dead_layers)
        self._kept = {name: np.array(units, dtype=np.int64) for name, units in plan.kept.items()}
        self._lost = {name: np.delete(np.arange(structure.full[name]), units) for name, units in self._kept.items()}
        self._known: dict[str, dict[str, Known]] = {}
        self._origin: dict[str, str] = {}
        self._numbering = _Numbering(structure)
        self._weights: dict[str, Array] = {}
        runs = [step.layer for step in structure.channels.steps if step.layer is not None]
        self._run_twice = {layer for layer in runs if runs.count(layer) > 1}

    def take(self, step: Step) -> None:
        """Take in one node: what is known behind it, and what its layer reads from now on."""
        known = self._behind(step)
        for name in step.outputs:
            owners = self._structure.channels.owners.get(name)
            groups = () if owners is None else self._numbering.places(owners)
            lost = f"it passes through {step.op}"
            self._known[name] = {group: known.get(group, lost) for group in groups}

    def forget(self, names: Iterable[str]) -> None:
        """Drop what is known of tensors that nobody reads any more: a wide group's Gram matrices are large."""
        for name in names:
            self._known.pop(name, None)

    def _behind(self, step: Step) -> Mapping[str, Known]:
        if step.layer in self._dead:
            return self._silence(step)
        if step.op in LAYERS:
            return self._layer(step) if (step.layer, "in") in self._structure.classes else {}
        if step.op == "BatchNormalization":
            return self._norm(step)
        if step.op in BINARY:
            return self._binary(step)
        if step.op == "Concat":
            return self._concat(step)
        if step.op == "Pad":
            return self._silence(step) | dict(self._at(step))
        if step.op in ACTIVATIONS:
            self._same_origin(step)
        return self._at(step) if step.op in ACTIVATIONS | REARRANGERS else {}

    def _at(self, step: Step) -> Mapping[str, Known]:
        return self._known.get(step.inputs[0], {}) if step.inputs else {}

    def _same_origin(self, step: Step) -> None:
        self._origin[step.outputs[0]] = self._origin.get(step.inputs[0], step.inputs[0])

    def _silence(self, step: Step) -> dict[str, Known]:
        """Return zeros for every group of the output: of a branch that is gone, of padded channels."""
        places = self._numbering.places(self._structure.channels.owners[step.outputs[0]])
        return {group: Filters.silent(each.shape[1], each.shape[0]) for group, each in places.items()}

    # -- layers ------------------------------------------------------------------------------------------------

    def _layer(self, step: Step) -> Mapping[str, Known]:
        name = cast(str, step.layer)
        layer = self._module.get_submodule(name)
        if is_depthwise(layer):
            return self._depthwise(name, layer, self._at(step))
        self._read(name, layer, self._at(step))
        rows = self._rows(name, layer)
        bias = _values(layer.bias, len(rows))
        places = self._numbering.places(self._structure.classes[name, "out"])
        return {group: Filters.of(rows[each.T], bias[each.T]) for group, each in places.items()}

    def _read(self, name: str, layer: nn.Module, known: Mapping[str, Known]) -> None:
        """Ask the rule about every group the layer reads, and change the layer's columns."""
        owners, columns = self._columns(name, layer)
        for group, places in self._numbering.places(owners).items():
            found = known.get(group, "it is read in another order than it is made")
            if name in self._run_twice:
                found = "the layer reads two maps with the same weights"
            if isinstance(found, str):
                self.kept_as_they_are[name, group] = found
                continue
            shares = self._move(name, group, found)
            if shares is not None and shares.size:
                moved = columns[places[self._lost[group]]]
                columns[places[self._kept[group]]] += np.tensordot(shares, moved, axes=(0, 0))
                self.changed[name] = self._weight(name)

    def _weight(self, name: str) -> Array:
        return self._weights.setdefault(name, _double(self._module.get_submodule(name).weight))

    def _columns(self, name: str, layer: nn.Module) -> tuple[Owners, Array]:
        """Return the classes along the input axis of a layer's weight, and a view of the weight with it in front."""
        into, weight = self._structure.classes[name, "in"], self._weight(name)
        if getattr(layer, "transposed", False):
            return into, weight
        return into[: weight.shape[1]], weight.swapaxes(0, 1)

    def _rows(self, name: str, layer: nn.Module) -> Array:
        """Return one filter an output channel, [out, features], over the input channels that stay."""
        owners, columns = self._columns(name, layer)
        columns = columns[self._alive[owners]]
        if not getattr(layer, "transposed", False):
            return columns.swapaxes(0, 1).reshape(columns.shape[1], -1)
        groups = cast(int, layer.groups)
        by_group = columns.reshape(groups, -1, *columns.shape[1:]).swapaxes(1, 2)
        return by_group.reshape(groups * columns.shape[1], -1)

    def _depthwise(self, name: str, layer: nn.Module, known: Mapping[str, Known]) -> Mapping[str, Known]:
        kernels = _double(cast(Tensor, layer.weight)).reshape(len(self._structure.classes[name, "out"]), -1)
        bias = _values(layer.bias, len(kernels))
        return self._per_channel(name, known, lambda filters, at: filters.convolved(kernels[at], bias[at]))

    def _norm(self, step: Step) -> Mapping[str, Known]:
        name = step.layer
        if name is None or (name, "out") not in self._structure.classes:
            return {}
        scales, shifts, spreads, means = _norm_numbers(self._module.get_submodule(name))

        def normalised(filters: Filters, at: Places) -> Filters:
            return filters.normalised(scales[at], shifts[at], means=means[at], spreads=spreads[at])

        return self._per_channel(name, self._at(step), normalised)

    def _per_channel(
        self, name: str, known: Mapping[str, Known], change: Callable[[Filters, Places], Filters]
    ) -> Mapping[str, Known]:
        """Change what is known by a layer's numbers for each channel."""
        behind: dict[str, Known] = {}
        for group, places in self._numbering.places(self._structure.classes[name, "out"]).items():
            found = known.get(group, "it is read in another order than it is made")
            if isinstance(found, Filters):
                times, rest = divmod(places.shape[1], found.channels)
                found = f"{name} reads a part of it" if rest else change(found.repeated(times), places.T)
            behind[group] = found
        return behind

    # -- where tensors meet ------------------------------------------------------------------------------------

    def _binary(self, step: Step) -> Mapping[str, Known]:
        shapes = self._structure.channels.shapes
        origins = {self._origin.get(name, name) for name in step.inputs}
        if any(np.prod(shapes[name]) > 1 for name in step.held):
            return {}
        if len(origins) == 1:  # x / (1 + exp(-x)), written out: an activation
            self._same_origin(step)
            return self._at(step)
        return self._joined(step, _summed) if step.op == "Add" else {}

    def _concat(self, step: Step) -> Mapping[str, Known]:
        return self._joined(step, Filters.beside)

    def _joined(self, step: Step, join: Callable[[Filters, Filters], Known]) -> Mapping[str, Known]:
        behind: dict[str, Known] = {}
        for name in step.inputs:
            for group, found in self._known.get(name, {}).items():
                behind[group] = _join(behind[group], found, join) if group in behind else found
        return behind


def _join(one: Known, other: Known, join: Callable[[Filters, Filters], Known]) -> Known:
    if isinstance(one, str):
        return one
    return other if isinstance(other, str) else join(one, other)


def _summed(one: Filters, other: Filters) -> Known:
    return one + other if one.channels == other.channels else "maps that hold it differently are added"


class _Numbering:
    """Which group and unit the classes along an axis are; every distinct axis is looked up once."""

    def __init__(self, structure: Structure) -> None:
        self._names = tuple(structure.units)
        self._group = np.full(structure.class_count + 1, -1, dtype=np.int64)
        self._unit = np.zeros(structure.class_count + 1, dtype=np.int64)
        for number, units in enumerate(structure.units.values()):
            self._group[list(units)] = number
            self._unit[list(units)] = np.arange(len(units))
        self._widths = np.array([len(units) for units in structure.units.values()], dtype=np.int64)
        self._seen: dict[bytes, dict[str, Places]] = {}

    def places(self, owners: Owners) -> dict[str, Places]:
        """Return group → where its units are, for the groups all of whose units are there equally often."""
        key = owners.tobytes()
        if key not in self._seen:
            self._seen[key] = {self._names[group]: each for group, each in self._found(np.maximum(owners, -1))}
        return self._seen[key]

    def _found(self, owners: Owners) -> Iterator[tuple[int, Places]]:
        groups, units = self._group[owners], self._unit[owners]
        for group in np.unique(groups[groups >= 0]).tolist():
            width = self._widths[group]
            mine = np.flatnonzero(groups == group)
            if (np.bincount(units[mine], minlength=width) * width == len(mine)).all():
                yield group, mine[np.argsort(units[mine], kind="stable")].reshape(width, -1)


def _norm_numbers(norm: nn.Module) -> tuple[Array, Array, Array, Array]:
    """Return γ / σ, β − γ μ / σ, γ and β of a batch norm with running statistics, [channels] each, float64."""
    mean = _double(norm.running_mean)
    spreads, means = _values(norm.weight, len(mean), 1.0), _values(norm.bias, len(mean))
    scales = spreads / np.sqrt(_double(norm.running_var) + cast(float, norm.eps))
    return scales, means - scales * mean, spreads, means


def _double(value: Tensor | nn.Module) -> Array:
    """Return a copy in float64."""
    return cast(Array, cast(Tensor, value).detach().cpu().double().numpy().copy())


def _values(value: Tensor | nn.Module | None, count: int, otherwise: float = 0.0) -> Array:
    return np.full(count, otherwise) if value is None else _double(value)
