"""The same plan, cut three ways: the ONNX graph, the torch module, and the module with the lost channels zeroed.

Their outputs agree: masked module = cut module = cut graph (the parity ladder).
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from edgeprune.channels import Count, Groups, Owners, Take
from edgeprune.coupling import CONVOLUTIONS, PER_CHANNEL, Axis, is_depthwise
from edgeprune.errors import ExportError
from edgeprune.plan import Plan
from edgeprune.structure import Structure, without


class GraphCutter:
    """Cuts one exported graph, again and again: slices of its initializers, nothing is exported twice."""

    def __init__(self, graph: onnx.ModelProto, structure: Structure) -> None:
        self._structure = structure
        self._values = {each.name: numpy_helper.to_array(each) for each in graph.graph.initializer}
        self._skeleton = onnx.ModelProto()
        self._skeleton.CopyFrom(graph)
        del self._skeleton.graph.initializer[:]
        del self._skeleton.graph.value_info[:]
        for each in self._skeleton.graph.output:  # a cut never changes it
            assert each.type.tensor_type.shape.dim

    def with_weights(self, state: Mapping[str, torch.Tensor]) -> "GraphCutter":
        """Return a cutter of the same graph with other values of its parameters and running statistics.

        Args:
            state: a state dict of the unpruned shapes; entries that are not in the graph are passed over.
        """
        other = copy.copy(self)
        other._values = dict(self._values)
        for name, value in state.items():
            if name in other._values:
                other._values[name] = value.detach().cpu().numpy().astype(other._values[name].dtype)
        return other

    def cut(self, plan: Plan) -> onnx.ModelProto:
        """Return the graph without the channels a plan removes.

        Raises:
            PlanError: if the plan does not fit the space.
        """
        alive = self._structure.alive(plan)
        values = self._sliced(alive)
        model = onnx.ModelProto()
        model.CopyFrom(self._skeleton)
        self._write_groups(model, alive)
        aliases: dict[str, str] = {}
        for removal in self._structure.removed(plan):
            aliases |= removal.aliases
        if aliases:
            _drop_branches(model.graph, aliases)
        used = {name for node in model.graph.node for name in node.input}
        model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items() if k in used)
        return model

    def assemble(self, plan: Plan, state: Mapping[str, torch.Tensor]) -> onnx.ModelProto:
        """Return the cut graph holding the weights of a cut module.

        Args:
            plan: what was cut.
            state: state dict of `cut_module(..., plan)`, perhaps trained since.

        Raises:
            ExportError: if a shape differs from the graph's.
        """
        model = self.cut(plan)
        for tensor in model.graph.initializer:
            value = state.get(tensor.name)
            if value is None:
                continue
            if tuple(value.shape) != tuple(tensor.dims):
                raise ExportError(
                    f"{tensor.name} is {tuple(value.shape)}", why=f"the cut graph has {tuple(tensor.dims)}"
                )
            dtype = numpy_helper.to_array(tensor).dtype
            tensor.CopyFrom(numpy_helper.from_array(value.detach().cpu().float().numpy().astype(dtype), tensor.name))
        return model

    def _sliced(self, alive: NDArray[np.bool_]) -> dict[str, NDArray[np.generic]]:
        values = dict(self._values)
        for edit in self._structure.channels.edits:
            if isinstance(edit, Take):
                keep = _kept(edit.owners, alive)
                if len(keep) != len(edit.owners):
                    values[edit.initializer] = np.take(values[edit.initializer], keep, axis=edit.axis)
            elif isinstance(edit, Count) and not alive[edit.owners].all():
                value = values[edit.initializer].copy()
                value.reshape(-1)[edit.place] = len(_kept(edit.owners, alive)) + edit.plus
                values[edit.initializer] = value
        return values

    def _write_groups(self, model: onnx.ModelProto, alive: NDArray[np.bool_]) -> None:
        counts = {
            each.node: len(_kept(each.owners, alive))
            for each in self._structure.channels.edits
            if isinstance(each, Groups)
        }
        for node in model.graph.node:
            if node.name in counts:
                next(each for each in node.attribute if each.name == "group").i = counts[node.name]


def _kept(owners: Owners, alive: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.flatnonzero(alive[owners])


def _drop_branches(graph: onnx.GraphProto, aliases: Mapping[str, str]) -> None:
    """Let every reader of a dead addition read what is left of it, then drop the nodes nobody reads."""

    def settled(name: str) -> str:
        while name in aliases:
            name = aliases[name]
        return name

    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = settled(name)
    needed = {each.name for each in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output) and not aliases.keys() & set(node.output):
            needed.update(node.input)
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(reversed(kept))


class Silence(nn.Module):
    """What is left of a convolution of a removed branch: zeros of the shape it would have given."""

    def __init__(self, convolution: nn.Module, channels: int) -> None:
        super().__init__()
        assert isinstance(convolution, CONVOLUTIONS)
        self.channels = channels
        self.reach = [d * (k - 1) for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)]
        self.padded = _padded(convolution.padding, self.reach)
        self.stride = convolution.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros, [N, channels, ...]."""
        sides = zip(x.shape[2:], self.padded, self.reach, self.stride, strict=True)
        size = [(n + padded - reach - 1) // stride + 1 for n, padded, reach, stride in sides]
        return x.new_zeros((x.shape[0], self.channels, *size))


def _padded(padding: str | tuple[int, ...], reach: list[int]) -> list[int]:
    """Return the padding of each spatial axis, both ends together."""
    if isinstance(padding, str):
        return list(reach) if padding == "same" else [0] * len(reach)
    return [2 * each for each in padding]


def cut_module(module: nn.Module, structure: Structure, plan: Plan) -> nn.Module:
    """Return a copy of a module without the channels a plan removes; the original is untouched.

    Raises:
        PlanError: if the plan does not fit the space.
    """
    alive = structure.alive(plan)
    silent = {name for removal in structure.removed(plan) for name in removal.silent_layers}
    result = copy.deepcopy(module)
    for name, layer in list(result.named_modules()):
        if name in silent:
            result.set_submodule(name, _silenced(layer, len(_kept(structure.classes[name, "out"], alive))))
        elif (name, "out") in structure.classes:
            into = structure.classes.get((name, "in"), structure.classes[name, "out"])
            _shrink(layer, into, structure.classes[name, "out"], alive)
    return result


def _silenced(layer: nn.Module, channels: int) -> nn.Module:
    return Silence(layer, channels) if isinstance(layer, CONVOLUTIONS) else nn.Identity()


def _shrink(layer: nn.Module, into: Owners, out: Owners, alive: NDArray[np.bool_]) -> None:
    keep_in, keep_out = _kept(into, alive), _kept(out, alive)
    if len(keep_in) == len(into) and len(keep_out) == len(out):
        return
    if isinstance(layer, CONVOLUTIONS):
        _shrink_convolution(layer, into, keep_in, keep_out, alive)
    elif isinstance(layer, nn.Linear):
        _take(layer, "weight", keep_out, 0)
        _take(layer, "weight", keep_in, 1)
        _take(layer, "bias", keep_out, 0)
        layer.in_features, layer.out_features = len(keep_in), len(keep_out)
    elif isinstance(layer, PER_CHANNEL):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _take(layer, name, keep_out, 0)
        size = "num_parameters" if isinstance(layer, nn.PReLU) else "num_features"
        setattr(layer, size, len(keep_out))


def _shrink_convolution(
    layer: nn.Module, into: Owners, keep_in: NDArray[np.int64], keep_out: NDArray[np.int64], alive: NDArray[np.bool_]
) -> None:
    assert isinstance(layer, CONVOLUTIONS)
    place_in, place_out = (0, 1) if layer.transposed else (1, 0)
    groups = layer.groups
    if is_depthwise(layer):
        _take(layer, "weight", keep_out, 0)
        layer.groups = len(keep_out)
    elif groups > 1 and layer.transposed:
        _take(layer, "weight", keep_in, place_in)
        _take(layer, "weight", keep_out[: len(keep_out) // groups], place_out)
    else:
        _take(layer, "weight", keep_out, place_out)
        _take(layer, "weight", _kept(into[: len(into) // groups], alive), place_in)
    _take(layer, "bias", keep_out, 0)
    layer.in_channels, layer.out_channels = len(keep_in), len(keep_out)


def _take(layer: nn.Module, name: str, keep: NDArray[np.int64], axis: int) -> None:
    tensor = getattr(layer, name, None)
    if tensor is None:
        return
    value = tensor.detach().index_select(axis, torch.from_numpy(keep).to(tensor.device)).clone()
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    setattr(layer, name, value)


def mask_module(module: nn.Module, structure: Structure, plan: Plan) -> nn.Module:
    """Return a copy of a module with the channels a plan removes set to zero wherever they are made or read.

    Raises:
        PlanError: if the plan does not fit the space.
    """
    alive = structure.alive(plan)
    silent = {name for removal in structure.removed(plan) for name in removal.silent_layers}
    result = copy.deepcopy(module)
    with torch.no_grad():
        for name, layer in result.named_modules():
            if (name, "out") in structure.classes:
                _zero(layer, structure.classes, name, alive, entirely=name in silent)
    return result


def _zero(
    layer: nn.Module, classes: Mapping[Axis, Owners], name: str, alive: NDArray[np.bool_], *, entirely: bool
) -> None:
    out = classes[name, "out"]
    lost_out = np.arange(len(out)) if entirely else np.flatnonzero(~alive[out])
    transposed = getattr(layer, "transposed", False)
    for parameter in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
        if parameter is None or isinstance(layer, nn.PReLU):
            continue
        if parameter.dim() > 1 and transposed:
            per_group = parameter.shape[1]
            parameter[:, np.unique(lost_out % per_group)] = 0
        else:
            parameter[lost_out] = 0
    if (name, "in") in classes and not is_depthwise(layer):
        groups = getattr(layer, "groups", 1)
        into = classes[name, "in"]
        lost_in = np.flatnonzero(~alive[into[: len(into) // groups] if not transposed else into])
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if transposed:
            weight[lost_in] = 0
        else:
            weight[:, lost_in] = 0


def proven(module: nn.Module, example: torch.Tensor, structure: Structure, *, tolerance: float = 1e-3) -> Structure:
    """Return the structure without the groups that do not survive a trial cut, each with the reason.

    Every group is cut alone to its narrowest allowed width; the cut module must run and agree with the masked one.
    This is where sizes written into a forward method show.

    Args:
        module: in eval mode.
        example: an input, [N, ...].
        structure: of that module.
        tolerance: largest difference of outputs, relative to the largest output.
    """
    reasons: dict[str, str] = {}
    full = structure.space.full()
    for group in structure.space.groups:
        for width in {group.choices[0], max(group.choices[:-1])}:
            units = tuple(range(group.width - width, group.width))
            plan = replace(full, kept={**full.kept, group.name: units})
            reason = _disagreement(module, example, structure, plan, tolerance)
            if reason is not None:
                reasons.setdefault(group.name, reason)
    return without(structure, reasons)


def _disagreement(
    module: nn.Module, example: torch.Tensor, structure: Structure, plan: Plan, tolerance: float
) -> str | None:
    with torch.no_grad():
        wanted = mask_module(module, structure, plan)(example)
        try:
            seen = cut_module(module, structure, plan)(example)
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises when its sizes no longer fit
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            return f"the module does not run without some of it, its forward holds fixed sizes ({first[:120]})"
    if seen.shape != wanted.shape:
        return f"cutting it changes the output from {tuple(wanted.shape)} to {tuple(seen.shape)}"
    gap = float((seen - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    return None if gap <= tolerance else f"cutting it differs from zeroing it by {gap:.1e} of the output"
