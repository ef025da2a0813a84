"""Which channels must go together: torch-pruning's dependency graph, folded into classes of coupled channels.

torch-pruning answers, for one layer, which channels of which other layers fall with it. Uniting those answers over
all layers gives equivalence classes of (layer, side, channel). Two things it does not couple are added here:
constant padding of the channel axis (option-A shortcuts shift positions) and the equal sizes that the groups of a
grouped convolution must keep. Whether the answer is right is checked by `edgeprune.channels`; where it is not, that
walk starts from channels that nothing couples (`uncoupled`) and couples what meets.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode
from torch_pruning import _helpers

from edgeprune.errors import ModelError

Side = Literal["in", "out"]
Axis = tuple[str, Side]
"""A layer's module path and one of its channel axes."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PER_CHANNEL = (*BATCH_NORMS, nn.PReLU)
CUTTABLE = (*CONVOLUTIONS, nn.Linear, *PER_CHANNEL)


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """Classes of channels that must be kept or cut together.

    Attributes:
        classes: axis → class number of each of its channels, int64; -1 for channels that no dependency reaches.
        frozen: class number → why it must stay.
    """

    classes: Mapping[Axis, NDArray[np.int64]]
    frozen: Mapping[int, str]


def tied(coupling: Coupling, sides: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Coupling:
    """Return the coupling with the classes at the same place of each pair of axes made one."""
    parent: dict[int, int] = {}

    def find(one: int) -> int:
        while one in parent:
            one = parent[one]
        return one

    for first, second in sides:
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            if min(one, other) >= 0 and find(one) != find(other):
                parent[find(other)] = find(one)
    classes = {
        axis: np.array([find(each) for each in owners.tolist()], dtype=np.int64)
        for axis, owners in coupling.classes.items()
    }
    return Coupling(classes=classes, frozen={find(each): reason for each, reason in coupling.frozen.items()})


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether every input channel of a convolution has its own output channel."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def couple(module: nn.Module, example: torch.Tensor) -> Coupling:
    """Return the coupled channels of a module.

    Args:
        module: in eval mode; left as it was.
        example: an input, [N, ...].

    Raises:
        ModelError: if torch-pruning cannot follow the module.
    """
    trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.requires_grad_(True)  # the dependency graph is read off autograd's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Maximum recursive depth reached!" at recurrent layers
            return _fold(module, _dependencies(module, example))
    except Exception as error:  # torch-pruning raises whatever its guesses run into, and the user's forward its own
        raise ModelError(
            "the model's channel dependencies cannot be read",
            why=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            next_step="make torch_pruning.DependencyGraph().build_dependency(model, example) work first",
        ) from error
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trainable[name])


def uncoupled(module: nn.Module) -> Coupling:
    """Return the channels of a module with nothing coupled but what every grouped convolution ties within itself."""
    union = _Union(_axes(module))
    union.touched = [True] * len(union.touched)
    _tie_grouped(module, union)
    return Coupling(classes=union.classes(), frozen={})


def _dependencies(module: nn.Module, example: torch.Tensor) -> Any:
    """Return torch-pruning's graph of the module with constant padding mapped."""
    with torch.enable_grad(), _PadRecorder() as recorder:
        # a bare tensor would be unpacked: a batch of one would run as an image without a batch
        graph = _DependencyGraph(recorder).build_dependency(module, (example,), verbose=False)
    _map_padding(graph, recorder)
    return graph


class _Union:
    """Disjoint sets of channels with the reasons that freeze them."""

    def __init__(self, axes: Mapping[Axis, int]) -> None:
        sizes = list(axes.values())
        starts = np.concatenate([[0], np.cumsum(sizes)])
        self.start = {axis: int(start) for axis, start in zip(axes, starts, strict=False)}
        self.size = dict(axes)
        self.parent = list(range(int(starts[-1])))
        self.touched = [False] * len(self.parent)
        self.reason: dict[int, str] = {}

    def element(self, axis: Axis, channel: int) -> int:
        return self.start[axis] + channel

    def find(self, element: int) -> int:
        while self.parent[element] != element:
            self.parent[element] = self.parent[self.parent[element]]
            element = self.parent[element]
        return element

    def tie(self, one: int, other: int) -> None:
        """Make two channels one class, without saying that any dependency reaches them."""
        root, into = self.find(other), self.find(one)
        if root != into:
            self.parent[root] = into

    def unite(self, one: int, other: int) -> None:
        """Make two channels one class because a dependency joins them."""
        self.touched[one] = self.touched[other] = True
        self.tie(one, other)

    def covered(self, axis: Axis) -> bool:
        start = self.start[axis]
        return all(self.touched[start : start + self.size[axis]])

    def classes(self) -> dict[Axis, NDArray[np.int64]]:
        """Return axis → class of each channel; -1 for classes that no dependency reaches."""
        roots = np.array([self.find(each) for each in range(len(self.parent))], dtype=np.int64)
        reached = np.isin(roots, np.unique(roots[np.array(self.touched, dtype=np.bool_)]))
        owners = np.where(reached, roots, -1)
        return {axis: owners[start : start + self.size[axis]] for axis, start in self.start.items()}

    def frozen(self) -> dict[int, str]:
        """Return class → the first reason that one of its channels must stay."""
        reasons: dict[int, str] = {}
        for element, reason in self.reason.items():
            reasons.setdefault(self.find(element), reason)
        return reasons


def _axes(module: nn.Module) -> dict[Axis, int]:
    axes: dict[Axis, int] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, CONVOLUTIONS):
            axes[name, "out"] = layer.out_channels
            axes[name, "in"] = layer.in_channels
        elif isinstance(layer, nn.Linear):
            axes[name, "out"] = layer.out_features
            axes[name, "in"] = layer.in_features
        elif isinstance(layer, nn.PReLU):
            axes[name, "out"] = layer.num_parameters
        elif isinstance(layer, PER_CHANNEL):
            assert isinstance(layer.num_features, int)
            axes[name, "out"] = layer.num_features
    return axes


def _fold(module: nn.Module, graph: Any) -> Coupling:
    union = _Union(_axes(module))
    names = {layer: name for name, layer in module.named_modules()}
    _tie_grouped(module, union)
    for layer, name in names.items():
        if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)) or layer not in graph.module2node:
            continue
        if not union.covered((name, "out")):
            _fold_group(graph, name, layer, names, union)
    return Coupling(classes=union.classes(), frozen=union.frozen())


def _tie_grouped(module: nn.Module, union: _Union) -> None:
    """Tie the channels at the same place of every convolution group, and both sides of a depthwise layer."""
    for name, layer in module.named_modules():
        if not isinstance(layer, CONVOLUTIONS) or layer.groups == 1:
            continue
        if is_depthwise(layer):
            for channel in range(layer.out_channels):
                union.tie(union.element((name, "out"), channel), union.element((name, "in"), channel))
        else:
            for one, other in _same_place(name, layer):
                union.tie(union.element(*one), union.element(*other))


def _same_place(name: str, layer: Any) -> Iterator[tuple[tuple[Axis, int], tuple[Axis, int]]]:
    sides: tuple[tuple[Side, int], ...] = (("out", layer.out_channels), ("in", layer.in_channels))
    for side, channels in sides:
        per_group = channels // layer.groups
        for channel in range(per_group, channels):
            yield ((name, side), channel % per_group), ((name, side), channel)


def _fold_group(graph: Any, name: str, layer: nn.Module, names: Mapping[nn.Module, str], union: _Union) -> None:
    size = union.size[name, "out"]
    pruner = graph.get_pruner_of_module(layer)
    for item in graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(size))):
        member, roots = item.dep.target.module, item.root_idxs
        axis = _axis_of(graph, item.dep, names)
        if axis is None:
            reason = _freezing_reason(member)
            if reason:
                for root in roots:
                    union.reason.setdefault(union.element((name, "out"), root), reason)
            continue
        for index, root in zip(item.idxs, roots, strict=True):
            union.unite(union.element((name, "out"), root), union.element(axis, index))


def _axis_of(graph: Any, dependency: Any, names: Mapping[nn.Module, str]) -> Axis | None:
    member = dependency.target.module
    if not isinstance(member, CUTTABLE) or member not in names:
        return None
    if isinstance(member, nn.PReLU) and member.num_parameters == 1:  # one slope for all channels: nothing to cut
        return None
    per_channel = isinstance(member, PER_CHANNEL) or is_depthwise(member)
    outward = per_channel or graph.is_out_channel_pruning_fn(dependency.handler)
    return names[member], "out" if outward else "in"


def _freezing_reason(member: object) -> str | None:
    if isinstance(member, nn.PReLU):
        return None
    if isinstance(member, nn.Parameter):
        return "it meets a parameter that belongs to no layer"
    kind = type(member).__name__
    if kind == "_OutputOp":
        return "it is the model's output"
    if kind.startswith("_"):  # torch-pruning's own nodes for operations without parameters
        return None
    return f"it passes through {kind}, which edgeprune cannot cut"


class _PadMapping:
    """Shift of channel positions by constant padding, in torch-pruning's index-mapping protocol."""

    def __init__(self, before: int, channels: int, *, towards_input: bool) -> None:
        self.before, self.channels, self.towards_input = before, channels, towards_input

    def __call__(self, indices: list[Any]) -> list[Any]:
        if not self.towards_input:
            return [_helpers._HybridIndex(idx=i.idx + self.before, root_idx=i.root_idx) for i in indices]
        inside = [i for i in indices if self.before <= i.idx < self.before + self.channels]
        return [_helpers._HybridIndex(idx=i.idx - self.before, root_idx=i.root_idx) for i in inside]


class _PadRecorder(TorchFunctionMode):
    """Remembers, for every padded tensor, what it was padded from: autograd keeps the amounts but not the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, tuple[tuple[int, ...], list[int]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "pad" and isinstance(result, torch.Tensor) and result.grad_fn is not None:
            pads = args[1] if len(args) > 1 else (kwargs or {})["pad"]
            self.seen[result.grad_fn] = (tuple(args[0].shape), list(pads))
        return result


class _DependencyGraph(tp.DependencyGraph):  # type: ignore[misc]
    """torch-pruning's graph, told how many channels a padded tensor has: it would guess from before the padding."""

    def __init__(self, recorder: _PadRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def get_out_channels(self, module_or_node: Any) -> int | None:
        """Return a node's output channels, None where torch-pruning must infer them from its inputs."""
        seen = self._recorder.seen.get(getattr(module_or_node, "grad_fn", None))
        if seen is None:
            return cast(int | None, super().get_out_channels(module_or_node))
        shape, pads = seen
        return shape[1] + sum(_channel_pads(shape, pads))


def _channel_pads(shape: tuple[int, ...], pads: list[int]) -> tuple[int, int]:
    place = 2 * (len(shape) - 2)  # pads run from the last axis to the first, two numbers an axis
    return (pads[place], pads[place + 1]) if len(pads) > place + 1 else (0, 0)


def _map_padding(graph: Any, recorder: _PadRecorder) -> None:
    """Give constant padding of the channel axis its true index mapping; torch-pruning takes it for element-wise."""
    for node in list(graph.module2node.values()):
        if node.grad_fn not in recorder.seen:
            continue
        shape, pads = recorder.seen[node.grad_fn]
        before, after = _channel_pads(shape, pads)
        if not (before or after):
            continue
        for source in node.inputs:
            _set_mapping(node, source, _PadMapping(before, shape[1], towards_input=True))
            _set_mapping(source, node, _PadMapping(before, shape[1], towards_input=False))


def _set_mapping(source: Any, target: Any, mapping: _PadMapping) -> None:
    for dependency in source.dependencies:
        if dependency.target is target:
            dependency.index_mapping[0] = mapping
