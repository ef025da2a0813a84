"""The same plan, cut three ways: the ONNX graph, the torch module, and the module with the lost channels zeroed.

Their outputs agree: masked module = cut module = cut graph (the parity ladder).
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn
from torch.func import functional_call

from edgeprune.channels import Count, Groups, Owners, Take
from edgeprune.coupling import CONVOLUTIONS, PER_CHANNEL, is_depthwise
from edgeprune.errors import ExportError
from edgeprune.plan import Group, Plan
from edgeprune.removal import settled
from edgeprune.silence import Silence
from edgeprune.structure import Structure, never_empty, without

Kept = NDArray[np.int64]
"""Places on a channel axis, ascending."""


# -- the graph -------------------------------------------------------------------------------------------------------


class GraphCutter:
    """Cuts one exported graph, again and again: slices of its initializers, nothing is exported twice."""

    def __init__(self, graph: onnx.ModelProto, structure: Structure) -> None:
        self._structure = structure
        self._frame = onnx.ModelProto()  # the graph without what a plan changes; its outputs never do
        self._frame.CopyFrom(graph)
        for field in ("node", "initializer", "value_info"):
            self._frame.graph.ClearField(field)
        self._nodes = list(graph.graph.node)
        self._tensors = {each.name: each for each in graph.graph.initializer}
        self._takes: dict[str, list[Take]] = defaultdict(list)
        self._counts: dict[str, list[Count]] = defaultdict(list)
        self._groups: dict[str, Groups] = {}
        for edit in structure.channels.edits:
            if isinstance(edit, Take):
                self._takes[edit.initializer].append(edit)
            elif isinstance(edit, Count):
                self._counts[edit.initializer].append(edit)
            else:
                self._groups[edit.node] = edit
        self._values = {name: numpy_helper.to_array(self._tensors[name]) for name in (*self._takes, *self._counts)}

    def with_weights(self, state: Mapping[str, torch.Tensor]) -> "GraphCutter":
        """Return a cutter of the same graph with other values of its parameters and running statistics.

        Args:
            state: a state dict of the unpruned shapes; entries that are not in the graph are passed over.

        Raises:
            ExportError: if an entry is missing or its shape differs from the graph's.
        """
        other = copy.copy(self)
        other._tensors = _with_state(self._tensors, state)
        other._values = {name: numpy_helper.to_array(other._tensors[name]) for name in self._values}
        return other

    def cut(self, plan: Plan) -> onnx.ModelProto:
        """Return the graph without the channels a plan removes.

        Raises:
            PlanError: if the plan does not fit the space.
        """
        kept = _Keeper(self._structure.alive(plan))
        aliases = self._structure.removal(plan).aliases
        model = onnx.ModelProto()
        model.CopyFrom(self._frame)
        model.graph.node.extend(_living(self._nodes, aliases, self._structure.channels.outputs))
        self._write_nodes(model.graph.node, kept, aliases)
        used = {name for node in model.graph.node for name in node.input}
        model.graph.initializer.extend(self._sliced(name, kept) for name in self._tensors if name in used)
        return model

    def assemble(self, plan: Plan, state: Mapping[str, torch.Tensor]) -> onnx.ModelProto:
        """Return the cut graph holding the weights of a cut module.

        Args:
            plan: what was cut.
            state: state dict of `cut_module(..., plan)`, perhaps trained since.

        Raises:
            ExportError: if an entry is missing or its shape differs from the graph's.
        """
        model = self.cut(plan)
        tensors = _with_state({each.name: each for each in model.graph.initializer}, state)
        model.graph.ClearField("initializer")
        model.graph.initializer.extend(tensors.values())
        return model

    def _sliced(self, name: str, kept: "_Keeper") -> onnx.TensorProto:
        """Return one initializer of the cut graph."""
        if name not in self._values:
            return self._tensors[name]
        value = self._values[name]
        if name in self._counts:
            value = value.copy()
            for count in self._counts[name]:
                value.reshape(-1)[count.place] = len(kept(count.owners))
        for take in self._takes.get(name, ()):
            places = kept(take.owners)
            if len(places) < len(take.owners):
                value = np.take(value, places, axis=take.axis)
        return self._tensors[name] if value is self._values[name] else _tensor(value, self._tensors[name])

    def _write_nodes(self, nodes: Iterable[onnx.NodeProto], kept: "_Keeper", aliases: Mapping[str, str]) -> None:
        for node in nodes:
            if node.name in self._groups:
                owners = self._groups[node.name].owners
                next(each for each in node.attribute if each.name == "group").i = len(kept(owners))
            for place, name in enumerate(node.input) if aliases else ():
                node.input[place] = settled(name, aliases)


class _Keeper:
    """Which places of a channel axis are kept; every distinct axis is looked up once."""

    def __init__(self, alive: NDArray[np.bool_]) -> None:
        self._alive = alive
        self._known: dict[int, tuple[Owners, Kept]] = {}  # the axis is held too: its id must not be given away

    def __call__(self, owners: Owners) -> Kept:
        known = self._known.get(id(owners))
        if known is None:
            known = self._known[id(owners)] = (owners, np.flatnonzero(self._alive[owners]))
        return known[1]


def _tensor(value: NDArray[np.generic], like: onnx.TensorProto) -> onnx.TensorProto:
    return onnx.TensorProto(name=like.name, data_type=like.data_type, dims=value.shape, raw_data=value.tobytes())


def _with_state(
    tensors: Mapping[str, onnx.TensorProto], state: Mapping[str, torch.Tensor]
) -> dict[str, onnx.TensorProto]:
    """Return the tensors with the values of a state dict; those with a slash in their name are no parameters."""
    missing = [name for name in tensors if "/" not in name and name not in state]
    if missing:
        raise ExportError(f"the weights lack {missing[0]!r}", why=f"the graph holds it, and {len(missing) - 1} others")
    return {name: _filled(tensor, state[name]) if name in state else tensor for name, tensor in tensors.items()}


def _filled(tensor: onnx.TensorProto, value: torch.Tensor) -> onnx.TensorProto:
    sides = [side for side in tensor.dims if side != 1]  # the slopes of a PReLU have axes of length one in the graph
    if [side for side in value.shape if side != 1] != sides:
        raise ExportError(f"{tensor.name} is {tuple(value.shape)}", why=f"the graph has {tuple(tensor.dims)}")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    array = value.detach().cpu().float().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    return _tensor(array.astype(dtype).reshape(tuple(tensor.dims)), tensor)


def _living(
    nodes: Sequence[onnx.NodeProto], aliases: Mapping[str, str], outputs: Iterable[str]
) -> Sequence[onnx.NodeProto]:
    """Return the nodes that somebody still reads when dead additions are read past."""
    if not aliases:
        return nodes
    needed = set(outputs)
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(settled(name, aliases) for name in node.input)
            kept.append(node)
    return kept[::-1]


# -- the module ------------------------------------------------------------------------------------------------------


def cut_module(module: nn.Module, structure: Structure, plan: Plan) -> nn.Module:
    """Return a copy of a module without the channels a plan removes; the original is untouched.

    Raises:
        PlanError: if the plan does not fit the space.
    """
    kept = _Keeper(structure.alive(plan))
    dead = structure.removal(plan).dead_layers
    result = copy.deepcopy(module)
    for name, layer in list(result.named_modules()):
        if (name, "out") not in structure.classes:
            continue
        into, out = _sides(structure, name)
        if name in dead:
            _replace(result, layer, _silenced(layer, len(kept(out))))
        else:
            _shrink(layer, into, out, kept)
    return result


def _sides(structure: Structure, name: str) -> tuple[Owners, Owners]:
    out = structure.classes[name, "out"]
    return structure.classes.get((name, "in"), out), out


def _silenced(layer: nn.Module, channels: int) -> nn.Module:
    return nn.Identity() if isinstance(layer, PER_CHANNEL) else Silence(layer, channels)


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is; one layer may go by several names."""
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if layer is old:
            module.set_submodule(name, new)


def _axes(layer: nn.Module, into: Owners, out: Owners) -> dict[str, tuple[Owners, ...]]:
    """Return tensor of a layer → the classes along its first axes."""
    if isinstance(layer, PER_CHANNEL):
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (out,))
    if is_depthwise(layer):
        return {"weight": (out,), "bias": (out,)}
    if isinstance(layer, CONVOLUTIONS):
        per_in, per_out = into[: len(into) // layer.groups], out[: len(out) // layer.groups]
        return {"weight": (into, per_out) if layer.transposed else (out, per_in), "bias": (out,)}
    return {"weight": (out, into), "bias": (out,)}


def _shrink(layer: nn.Module, into: Owners, out: Owners, kept: _Keeper) -> None:
    keep_in, keep_out = kept(into), kept(out)
    if len(keep_in) == len(into) and len(keep_out) == len(out):
        return
    for tensor, axes in _axes(layer, into, out).items():
        for axis, owners in enumerate(axes):
            _take(layer, tensor, kept(owners), axis)
    _write_sizes(layer, len(keep_in), len(keep_out))


def _write_sizes(layer: nn.Module, inputs: int, outputs: int) -> None:
    if isinstance(layer, CONVOLUTIONS):
        layer.groups = outputs if is_depthwise(layer) else layer.groups
        layer.in_channels, layer.out_channels = inputs, outputs
    elif isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = inputs, outputs
    else:
        setattr(layer, "num_parameters" if isinstance(layer, nn.PReLU) else "num_features", outputs)


def _take(layer: nn.Module, name: str, keep: Kept, axis: int) -> None:
    tensor = getattr(layer, name, None)
    if tensor is None or len(keep) == tensor.shape[axis]:
        return
    value = tensor.detach().index_select(axis, torch.from_numpy(keep).to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    setattr(layer, name, value)


def mask_module(module: nn.Module, structure: Structure, plan: Plan) -> nn.Module:
    """Return a copy of a module with the channels a plan removes set to zero wherever they are made or read.

    Raises:
        PlanError: if the plan does not fit the space.
    """
    result = copy.deepcopy(module)
    with torch.no_grad():
        for name, value in masked_state(module, structure, plan).items():
            layer, _, tensor = name.rpartition(".")
            getattr(result.get_submodule(layer), tensor).copy_(value)
    return result


def masked_state(module: nn.Module, structure: Structure, plan: Plan) -> dict[str, torch.Tensor]:
    """Return the parameters and statistics that masking changes, by name: copies with zeros in the lost channels.

    Raises:
        PlanError: if the plan does not fit the space.
    """
    alive = structure.alive(plan)
    dead = structure.removal(plan).dead_layers
    changed: dict[str, torch.Tensor] = {}
    for name, layer in module.named_modules():
        if (name, "out") not in structure.classes:
            continue
        for tensor, axes in _axes(layer, *_sides(structure, name)).items():
            value = getattr(layer, tensor, None)
            if value is None or tensor == "running_var":  # dividing zero by what it was stays zero
                continue
            masked = torch.zeros_like(value) if name in dead else _masked(value.detach(), axes, alive)
            if masked is not None:
                changed[f"{name}.{tensor}" if name else tensor] = masked
    return changed


def _masked(value: torch.Tensor, axes: Sequence[Owners], alive: NDArray[np.bool_]) -> torch.Tensor | None:
    result = None
    for axis, owners in enumerate(axes):
        lost = np.flatnonzero(~alive[owners])
        if len(lost):
            result = value.clone() if result is None else result
            result.index_fill_(axis, torch.from_numpy(lost).to(value.device), 0)
    return result


# -- the proof -------------------------------------------------------------------------------------------------------


def proven(module: nn.Module, example: torch.Tensor, structure: Structure, *, tolerance: float = 1e-3) -> Structure:
    """Return the structure without the groups that do not survive a trial cut, each with the reason.

    All groups are cut to their narrowest width, then again and again one half of them to the narrowest and the other
    half as little as possible, halves such that any two groups differ once; then they are removed in the same halves.
    The cut module must run and agree with the masked one. Where it does not, the groups at fault are found by halving.
    This is where sizes written into a forward method show.

    Args:
        module: in eval mode.
        example: an input, [N, ...].
        structure: of that module.
        tolerance: largest difference of outputs, relative to the largest output.
    """

    def trial(widths: Mapping[str, int]) -> str | None:
        return _disagreement(module, example, structure, _last_units(structure, widths), tolerance)

    for narrow in _halves([group.name for group in structure.space.groups]):
        widths = {group.name: _narrowed(group, group.name in narrow) for group in structure.space.groups}
        structure = without(structure, _at_fault(trial, widths))
    for gone in _halves([group.name for group in structure.space.groups if group.removable]):
        removable = {group.name: 0 for group in structure.space.groups if group.removable and group.name in gone}
        structure = never_empty(structure, _at_fault(trial, removable))
    return structure


def _halves(names: Sequence[str]) -> Iterable[set[str]]:
    """Yield all names, then for each binary digit of their places those that have it."""
    yield set(names)
    for digit in range((len(names) - 1).bit_length()):
        yield {name for place, name in enumerate(names) if place >> digit & 1}


def _narrowed(group: Group, narrowest: bool) -> int:
    """Return the smallest width that keeps something, or the largest other one below the full width."""
    widths = [choice for choice in group.choices if choice > 0]
    return widths[0] if narrowest else max(widths[1:-1], default=group.width)


def _last_units(structure: Structure, widths: Mapping[str, int]) -> Plan:
    """Return the plan that keeps the last units of these groups and everything of the others."""
    full = structure.full
    kept = {name: tuple(range(width - widths.get(name, width), width)) for name, width in full.items()}
    return Plan(kept=kept)


def _at_fault(trial: Callable[[Mapping[str, int]], str | None], widths: Mapping[str, int]) -> dict[str, str]:
    """Return the groups whose cut makes the trial fail, with what it says; the others survive it together."""
    survivors: dict[str, int] = {}
    failed: dict[str, str] = {}
    waiting = [list(widths)]
    while waiting:
        names = waiting.pop()
        added = {name: widths[name] for name in names}
        reason = trial(survivors | added) if names else None
        if reason is None:
            survivors |= added
        elif len(names) == 1:
            failed[names[0]] = reason
        else:
            waiting += [names[len(names) // 2 :], names[: len(names) // 2]]
    return failed


def _disagreement(
    module: nn.Module, example: torch.Tensor, structure: Structure, plan: Plan, tolerance: float
) -> str | None:
    """Return what is wrong with the module cut by a plan, None if it runs and agrees with the masked one."""
    with torch.no_grad():
        wanted = functional_call(module, masked_state(module, structure, plan), (example,))
        try:
            seen = cut_module(module, structure, plan)(example)
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises when its sizes no longer fit
            first = str(error).strip().partition("\n")[0]
            return f"the module does not run without some of it, its forward holds fixed sizes ({first[:120]})"
    if seen.shape != wanted.shape:
        return f"cutting it changes the output from {tuple(wanted.shape)} to {tuple(seen.shape)}"
    gap = float((seen - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    return None if gap <= tolerance else f"cutting it differs from zeroing it by {gap:.1e} of the output"
