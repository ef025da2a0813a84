"""Follows channels through the ONNX graph: which class of coupled channels each tensor's channels belong to.

torch-pruning says which channels of which *layers* fall together. A graph holds more that knows about channels:
split sizes, slice ends, pad amounts, reshape targets, per-channel constants. This walk finds all of it, turns it
into edits a plan fills in, and checks torch-pruning's answer on the way: channels that meet without being coupled are
reported as ties, and what the walk cannot follow is frozen, with the reason.

    Conv(layer1.0.conv1) ──owners [4 4 7 9 ...]──▶ BatchNormalization ──▶ Relu ──▶ Conv: its input side must match
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeprune.coupling import Coupling
from edgeprune.removal import Removal, Step, find_removal, steps_of

Owners = NDArray[np.int64]
"""Class of each channel; -1: fixed; below -1: a zero-filled channel that belongs with whatever it is added to."""

FIXED = -1

UNARY = frozenset(
    "Relu LeakyRelu ThresholdedRelu Clip Sigmoid HardSigmoid HardSwish Tanh Elu Selu Celu Softplus Softsign Gelu Mish "
    "Swish Erf Sqrt Exp Log Neg Abs Sign Floor Ceil Round Reciprocal Identity Dropout Cast "
    "MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool".split()
)
BINARY = frozenset("Add Sub Mul Div Max Min Pow".split())
REDUCTIONS = frozenset("ReduceMean ReduceMax ReduceMin ReduceSum ReduceL1 ReduceL2".split())


@dataclass(frozen=True, kw_only=True)
class Take:
    """Keep the owned slices of an initializer along one axis."""

    initializer: str
    axis: int
    owners: Owners


@dataclass(frozen=True, kw_only=True)
class Count:
    """Write how many of these channels are kept into one place of an integer initializer."""

    initializer: str
    place: int
    owners: Owners


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Write how many of these channels are kept into a convolution's "group" attribute."""

    node: str
    owners: Owners


Edit = Take | Count | Groups


@dataclass(frozen=True, kw_only=True)
class ChannelMap:
    """What the walk found.

    Attributes:
        owners: tensor name → class of each channel of its axis 1; absent where the tensor has no channels to speak of.
        edits: everything in the graph that a plan changes.
        frozen: class → why it must stay.
        nodes: layer name → ONNX node name, in graph order, for convolutions and linear layers.
        unseen: layer name → why the walk met no node of it that it can cut.
        strays: node name → channels, of convolutions and products whose weight belongs to no layer.
        shapes: tensor name → shape.
        ties: pairs of channel axes that meet, or that one split made equal, without being coupled.
        conflict: whether any met that are not coupled, or that are taken for no channels at all: torch-pruning erred.
        steps: the nodes, as a removal sees them.
        outputs: tensors that leave the graph.
    """

    owners: Mapping[str, Owners]
    edits: tuple[Edit, ...]
    frozen: Mapping[int, str]
    nodes: Mapping[str, str]
    unseen: Mapping[str, str]
    strays: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    ties: tuple[tuple[Owners, Owners], ...]
    conflict: bool
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]

    def removal(self, classes: frozenset[int]) -> Removal | None:
        """Return what is left when the channels of `classes` all go, None if more than residual branches would die."""
        return find_removal(self.steps, self.owners, self.shapes, classes, self.outputs)


def trace_channels(proto: onnx.ModelProto, coupling: Coupling) -> ChannelMap:
    """Return the classes of every tensor's channels, and what must change with them.

    Args:
        proto: a graph with static shapes whose parameters are named by module path, as `edgeprune.export` writes it.
        coupling: of the module it was exported from.
    """
    return _Walk(proto, coupling).run()


def tensor_shapes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return tensor name → static shape, initializers included; 0 where a dimension is not static."""
    graph = proto.graph
    shapes = {each.name: tuple(each.dims) for each in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        shapes[value.name] = tuple(each.dim_value for each in value.type.tensor_type.shape.dim)
    return shapes


class _Walk:
    def __init__(self, proto: onnx.ModelProto, coupling: Coupling) -> None:
        self.graph = proto.graph
        self.classes = coupling.classes
        self.frozen = dict(coupling.frozen)
        self.constants = {each.name: each for each in proto.graph.initializer}
        self.shapes = tensor_shapes(proto)
        self.owners: dict[str, Owners] = {}
        self.takes: dict[tuple[str, int], Take] = {}
        self.edits: list[Count | Groups] = []
        self.layer_nodes: dict[str, str] = {}
        self.per_channel: set[str] = set()
        self.strays: dict[str, int] = {}
        self.parts: dict[str, list[Owners]] = {}
        self.ties: list[tuple[Owners, Owners]] = []
        self.conflict = False
        self.joined: dict[int, int] = {}
        self.fresh = FIXED - 1

    def run(self) -> ChannelMap:
        for value in self.graph.input:
            self.owners[value.name] = self._fixed(value.name)
        for node in self.graph.node:
            rule = _RULES.get(node.op_type)
            if rule is None or not self._readable(node):
                self._give_up(node)
            else:
                rule(self, node)
        for value in self.graph.output:
            self._freeze(self.owners.get(value.name), "it is the model's output")
        self._tie_parts()
        unseen = self._unseen_layers()
        return self._resolved_map(unseen)

    def _resolved_map(self, unseen: Mapping[str, str]) -> ChannelMap:
        interned: dict[bytes, Owners] = {}

        def resolved(owners: Owners) -> Owners:
            found = np.array([max(FIXED, self._root(each)) for each in owners.tolist()], dtype=np.int64)
            return interned.setdefault(found.tobytes(), found)  # a cut looks each distinct axis up once

        return ChannelMap(
            owners={name: resolved(owners) for name, owners in self.owners.items()},
            edits=tuple(replace(edit, owners=resolved(edit.owners)) for edit in (*self.takes.values(), *self.edits)),
            frozen=self.frozen,
            nodes=self.layer_nodes,
            unseen=unseen,
            strays=self.strays,
            shapes=self.shapes,
            ties=tuple(self.ties),
            conflict=self.conflict,
            steps=steps_of(self.graph),
            outputs=tuple(value.name for value in self.graph.output),
        )

    # -- one rule an operation --------------------------------------------------------------------------------

    def _readable(self, node: onnx.NodeProto) -> bool:
        """Return whether the walk knows the channels of every tensor the node reads, and there is one."""
        known = [name in self.owners for name in node.input if name and name not in self.constants]
        return all(known) and bool(known) and (node.op_type in BINARY or node.input[0] not in self.constants)

    def _give_up(self, node: onnx.NodeProto, why: str = "which edgeprune cannot cut") -> None:
        for name in node.input:
            self._freeze(self.owners.get(name), f"it passes through {node.op_type} ({node.name}), {why}")
        for name in node.output:
            if len(self.shapes.get(name, ())) > 1:
                self.owners[name] = self._fixed(name)

    def _pass(self, node: onnx.NodeProto) -> None:
        owners = self.owners.get(node.input[0])
        if owners is None or self._channels(node.output[0]) != len(owners):
            self._give_up(node)
            return
        self.owners |= {name: owners for name in node.output if name}

    def _convolution(self, node: onnx.NodeProto) -> None:
        layer = self._layer(node)
        if layer is None:
            return
        into, out = self.classes[layer, "in"], self.classes[layer, "out"]
        groups = _attribute(node, "group", 1)
        per_in, per_out = into[: len(into) // groups], out[: len(out) // groups]
        if groups == len(into) == len(out) > 1:
            self.edits.append(Groups(node=node.name, owners=out))
            self._take(node.input[1], 0, out)
        else:
            sides = (out, per_in) if node.op_type == "Conv" else (into, per_out)
            for axis, owners in enumerate(sides):
                self._take(node.input[1], axis, owners)
        self._finish_layer(node, into, out)

    def _linear(self, node: onnx.NodeProto) -> None:
        if not _attribute(node, "transB", 0):
            self._stray(node)
            return
        layer = self._layer(node)
        if layer is None:
            return
        into, out = self.classes[layer, "in"], self.classes[layer, "out"]
        self._take(node.input[1], 0, out)
        self._take(node.input[1], 1, into)
        self._finish_layer(node, into, out)

    def _layer(self, node: onnx.NodeProto) -> str | None:
        """Return the layer whose weight a node holds; if there is none, freeze what the node reads."""
        layer, _, tensor = str(node.input[1]).rpartition(".")
        if tensor != "weight" or (layer, "in") not in self.classes or node.input[1] not in self.constants:
            self._stray(node)
            return None
        self.layer_nodes.setdefault(layer, node.name)
        return layer

    def _stray(self, node: onnx.NodeProto) -> None:
        self._give_up(node, "whose weight belongs to no layer")
        self.strays[node.name] = self._channels(node.output[0])

    def _finish_layer(self, node: onnx.NodeProto, into: Owners, out: Owners) -> None:
        read = self.owners[node.input[0]]
        self.conflict |= len(read) == len(into) and bool(((into == FIXED) & (read > FIXED)).any())
        self._match(read, into, node.name)
        if len(node.input) > 2 and node.input[2]:
            self._take(node.input[2], 0, out)
        self.owners[node.output[0]] = out

    def _per_channel(self, node: onnx.NodeProto) -> None:
        owners = self.owners[node.input[0]]
        for name in node.input[1:]:
            size = int(np.prod(self.shapes[name])) if name in self.constants else -1
            if size not in (1, len(owners)):
                self._give_up(node, "whose slopes or statistics are computed in the graph")
                return
            layer = name.rpartition(".")[0]
            self.per_channel.add(layer)
            if size == len(owners):
                owners = self._match(owners, self.classes.get((layer, "out"), owners), node.name)
                self._take(name, self.shapes[name].index(size), owners)
        self._pass(node)

    def _binary(self, node: onnx.NodeProto) -> None:
        rank, channels = len(self.shapes[node.output[0]]), self._channels(node.output[0])
        tensors = [name for name in node.input if name not in self.constants]
        if any(len(self.shapes[name]) != rank for name in tensors):
            self._give_up(node)
            return
        spread = [self.owners[name] for name in tensors if len(self.owners[name]) == channels]
        result = spread[0] if spread else self._fixed(node.output[0])
        for owners in spread[1:]:
            result = self._match(result, owners, node.name)
        for name in node.input:
            axis = 1 - rank + len(self.shapes[name])  # the channel axis, counted from the front of this operand
            if name in self.constants and axis >= 0 and self.shapes[name][axis] == channels > 1:
                self._take(name, axis, result)
        self.owners[node.output[0]] = result

    def _reduce(self, node: onnx.NodeProto) -> None:
        rank = len(self.shapes[node.input[0]])
        axes = {each % rank for each in self._integers(node, 1, "axes") or range(rank)}
        if axes & {0, 1}:
            self._give_up(node, "which mixes channels")
        else:
            self._pass(node)

    def _concat(self, node: onnx.NodeProto) -> None:
        axis = _attribute(node, "axis", 0) % len(self.shapes[node.output[0]])
        if not all(name in self.owners for name in node.input):
            self._give_up(node)
        elif axis == 1:
            self.owners[node.output[0]] = np.concatenate([self.owners[name] for name in node.input])
        else:
            for name in node.input[1:]:
                self._match(self.owners[node.input[0]], self.owners[name], node.name)
            self._pass(node)

    def _split(self, node: onnx.NodeProto) -> None:
        owners = self.owners[node.input[0]]
        if _attribute(node, "axis", 0) % len(self.shapes[node.input[0]]) != 1:
            self._pass(node)
        elif len(node.input) < 2 or node.input[1] not in self.constants:
            self._give_up(node, "whose sizes are not in the graph")
        else:
            ends = np.cumsum([self._channels(name) for name in node.output])
            for place, part in enumerate(np.split(owners, ends[:-1])):
                self.edits.append(Count(initializer=node.input[1], place=place, owners=part))
                self._part(node.input[0], node.output[place], part)

    def _slice(self, node: onnx.NodeProto) -> None:
        if not self._fixed_sizes(node):
            return
        owners = self.owners[node.input[0]]
        for place, first, last, step in self._channel_ranges(node):
            if step != 1:
                self._give_up(node, "which takes every so many channels")
                return
            self.edits.append(Count(initializer=node.input[1], place=place, owners=owners[:first]))
            self.edits.append(Count(initializer=node.input[2], place=place, owners=owners[:last]))
            owners = owners[first:last]
        self._part(node.input[0], node.output[0], owners)

    def _channel_ranges(self, node: onnx.NodeProto) -> list[tuple[int, int, int, int]]:
        """Return (place among the axes, first, last, step) of every slice of the channel axis."""
        shape = self.shapes[node.input[0]]
        starts, ends = self._integers(node, 1), self._integers(node, 2)
        axes = self._integers(node, 3) or list(range(len(starts)))
        steps = self._integers(node, 4) or [1] * len(starts)
        ranges = zip(starts, ends, axes, steps, strict=True)
        return [
            (place, *slice(start, end, step).indices(shape[1]))
            for place, (start, end, axis, step) in enumerate(ranges)
            if axis % len(shape) == 1
        ]

    def _pad(self, node: onnx.NodeProto) -> None:
        if not self._fixed_sizes(node):
            return
        owners = self.owners[node.input[0]]
        rank = len(self.shapes[node.input[0]])
        pads, axes = self._integers(node, 1), self._integers(node, 3) or list(range(rank))
        for place, axis in enumerate(axes):
            before, after = pads[place], pads[place + len(axes)]
            if axis % rank != 1 or not (before or after):
                continue
            if min(before, after) < 0 or not self._pads_with_zero(node):
                self._give_up(node, "which pads channels with something else than zeros")
                return
            head, tail = self._zeros(before), self._zeros(after)
            self.edits.append(Count(initializer=node.input[1], place=place, owners=head))
            self.edits.append(Count(initializer=node.input[1], place=place + len(axes), owners=tail))
            owners = np.concatenate([head, owners, tail])
        self.owners[node.output[0]] = owners

    def _pads_with_zero(self, node: onnx.NodeProto) -> bool:
        if next((each.s for each in node.attribute if each.name == "mode"), b"constant") != b"constant":
            return False
        value = node.input[2] if len(node.input) > 2 else ""
        return not value or (value in self.constants and not numpy_helper.to_array(self.constants[value]).any())

    def _reshape(self, node: onnx.NodeProto) -> None:
        owners = self.owners[node.input[0]]
        source, target = self.shapes[node.input[0]], self.shapes[node.output[0]]
        if not self._fixed_sizes(node):
            return
        if len(target) < 2 or source[0] != target[0]:
            self._give_up(node)
        elif target[1] == source[1]:
            self._resized(node, owners, 1)
        elif len(target) == 2 and target[1] == int(np.prod(source[1:])):
            self._resized(node, np.repeat(owners, target[1] // source[1]), 1)
        else:
            self._give_up(node, "which regroups channels")

    def _expand(self, node: onnx.NodeProto) -> None:
        source, target = self.shapes[node.input[0]], self.shapes[node.output[0]]
        if not self._fixed_sizes(node):
            return
        if len(source) == len(target) and source[:2] == target[:2]:
            self._resized(node, self.owners[node.input[0]], 1)
        else:
            self._give_up(node, "which makes channels")

    def _resize(self, node: onnx.NodeProto) -> None:
        owners = self.owners[node.input[0]]
        if not self._fixed_sizes(node):
            return
        if self._channels(node.output[0]) != len(owners):
            self._give_up(node, "which resizes channels")
        else:
            self._resized(node, owners, 3)

    def _resized(self, node: onnx.NodeProto, owners: Owners, place: int) -> None:
        """Let the node's shape input, if it has one, follow the channels that come out."""
        shape = self._integers(node, place)
        if len(shape) > 1 and shape[1] > 0:
            self.edits.append(Count(initializer=node.input[place], place=1, owners=owners))
        self.owners[node.output[0]] = owners

    def _squeeze(self, node: onnx.NodeProto) -> None:
        source, target = self.shapes[node.input[0]], self.shapes[node.output[0]]
        if source[:2] == target[:2]:
            self._pass(node)
        else:
            self._give_up(node, "which moves the channel axis")

    def _transpose(self, node: onnx.NodeProto) -> None:
        order = next((list(each.ints) for each in node.attribute if each.name == "perm"), [])
        if order[:2] == [0, 1]:
            self._pass(node)
        else:
            self._give_up(node, "which moves the channel axis")

    # -- owners -----------------------------------------------------------------------------------------------

    def _match(self, one: Owners, other: Owners, where: str) -> Owners:
        """Return the owners that two axes agree on; zero-filled channels join the other side, fixed ones freeze it."""
        if len(one) != len(other):
            for each in (one, other):
                self._freeze(each, f"it meets a different number of channels at {where}")
            return one
        for mine, theirs in zip(one.tolist(), other.tolist(), strict=True):
            self._meet(self._root(mine), self._root(theirs), where)
        return np.array([self._root(each) for each in one.tolist()], dtype=np.int64)

    def _meet(self, one: int, other: int, where: str) -> None:
        low, high = min(one, other), max(one, other)
        if low == high:
            return
        if low < FIXED:
            self.joined[low] = high
        elif low == FIXED:
            self._freeze(np.array([high]), f"it meets channels at {where} that must stay")
        else:
            self.conflict = True
            self.ties.append((np.array([low]), np.array([high])))

    def _part(self, whole: str, name: str, owners: Owners) -> None:
        self.owners[name] = owners
        if len(owners) < len(self.owners[whole]):
            self.parts.setdefault(whole, []).append(owners)

    def _tie_parts(self) -> None:
        """Tie parts of one tensor that are equally long: code that splits in equal parts needs them equal."""
        for parts in self.parts.values():
            for one, other in pairwise(parts):
                if len(one) == len(other):
                    apart = (one != other) & (one >= 0) & (other >= 0)
                    self.ties += [(one[apart], other[apart])] if apart.any() else []

    def _zeros(self, count: int) -> Owners:
        owners = np.arange(self.fresh, self.fresh - count, -1, dtype=np.int64)
        self.fresh -= count
        return owners

    def _root(self, owner: int) -> int:
        while owner in self.joined:
            owner = self.joined[owner]
        return owner

    def _freeze(self, owners: Owners | None, reason: str) -> None:
        for owner in () if owners is None else owners.tolist():
            if self._root(owner) >= 0:
                self.frozen.setdefault(self._root(owner), reason)

    def _unseen_layers(self) -> dict[str, str]:
        """Return layer → why no node of it can be cut, and freeze the channels of those layers."""
        readers = {name: node for node in self.graph.node for name in node.input}
        seen = self.per_channel.union(self.layer_nodes)
        unseen: dict[str, str] = {}
        for layer, side in self.classes:
            if layer not in seen:
                unseen[layer] = self._why_unseen(readers, f"{layer}.weight" if layer else "weight")
                self._freeze(self.classes[layer, side], f"{layer!r} needs it, but {unseen[layer]}")
        return unseen

    def _why_unseen(self, readers: Mapping[str, onnx.NodeProto], weight: str) -> str:
        node = readers.get(weight)
        if node is None:
            return "the exported graph does not hold its weight: forward never uses it, or another layer shares it"
        product = readers.get(node.output[0]) if node.op_type == "Transpose" else None
        if product is None or product.op_type != "MatMul":
            return f"its weight goes into {node.op_type} ({node.name}), which edgeprune cannot cut"
        axes = _AXES.get(len(self.shapes.get(product.input[0], ())), "more than two axes")
        return f"it is a Linear applied to {axes}, which edgeprune does not cut yet ({product.name})"

    # -- the graph --------------------------------------------------------------------------------------------

    def _take(self, initializer: str, axis: int, owners: Owners) -> None:
        known = self.takes.get((initializer, axis))
        if known is None:
            self.takes[initializer, axis] = Take(initializer=initializer, axis=axis, owners=owners)
        elif known.owners is not owners:  # a layer that runs twice, or two that share a weight
            self._match(known.owners, owners, initializer)

    def _fixed_sizes(self, node: onnx.NodeProto) -> bool:
        """Return whether the node's sizes are constants; if one is computed, freeze what the node reads."""
        computed = [name for name in node.input[1:] if name and name not in self.constants]
        if computed:
            self._give_up(node, "whose sizes are computed in the graph")
        return not computed

    def _channels(self, name: str) -> int:
        shape = self.shapes.get(name, ())
        return shape[1] if len(shape) > 1 else -1

    def _fixed(self, name: str) -> Owners:
        return np.full(max(0, self._channels(name)), FIXED, dtype=np.int64)

    def _integers(self, node: onnx.NodeProto, place: int, attribute: str = "") -> list[int]:
        if place < len(node.input) and node.input[place] in self.constants:
            return [int(each) for each in numpy_helper.to_array(self.constants[node.input[place]]).ravel()]
        return next((list(each.ints) for each in node.attribute if each.name == attribute), [])


_RULES: dict[str, Callable[[_Walk, onnx.NodeProto], None]] = {
    **dict.fromkeys(UNARY, _Walk._pass),
    **dict.fromkeys(BINARY, _Walk._binary),
    **dict.fromkeys(REDUCTIONS, _Walk._reduce),
    "Conv": _Walk._convolution,
    "ConvTranspose": _Walk._convolution,
    "Gemm": _Walk._linear,
    "BatchNormalization": _Walk._per_channel,
    "PRelu": _Walk._per_channel,
    "Concat": _Walk._concat,
    "Split": _Walk._split,
    "Slice": _Walk._slice,
    "Pad": _Walk._pad,
    "Resize": _Walk._resize,
    "Reshape": _Walk._reshape,
    "Flatten": _Walk._reshape,
    "Expand": _Walk._expand,
    "Squeeze": _Walk._squeeze,
    "Unsqueeze": _Walk._squeeze,
    "Transpose": _Walk._transpose,
}


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(each.i) for each in node.attribute if each.name == name), default)


_AXES = {3: "tokens (N x L x C)", 4: "the last axis of a map (N x H x W x C)"}
"""Rank of what a linear layer reads → what its user calls it."""
