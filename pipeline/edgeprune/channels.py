"""Follows channels through the ONNX graph: which class of coupled channels each tensor's channels belong to.

torch-pruning says which channels of which *layers* fall together. A graph holds more that knows about channels:
split sizes, slice ends, pad amounts, reshape targets, per-channel constants. This walk finds all of it, turns it
into edits a plan fills in, and checks torch-pruning's answer on the way: where the two disagree the channels are
frozen, with the reason.

    Conv(layer1.0.conv1) ──owners [4 4 7 9 ...]──▶ BatchNormalization ──▶ Relu ──▶ Conv: its input side must match
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeprune.coupling import Coupling

Owners = NDArray[np.int64]
"""Class of each channel; -1: fixed; below -1: a zero-filled channel that belongs with whatever it is added to."""

FIXED = -1

UNARY = frozenset(
    "Relu LeakyRelu Clip Sigmoid HardSigmoid HardSwish Tanh Elu Selu Celu Softplus Softsign Gelu Mish Erf Sqrt "
    "Exp Log Neg Abs Identity Dropout Cast ThresholdedRelu MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool Resize "
    "Reciprocal Floor Ceil Round Sign Swish".split()
)
BINARY = frozenset("Add Sub Mul Div Max Min Pow".split())
REDUCTIONS = frozenset("ReduceMean ReduceMax ReduceMin ReduceSum ReduceL2".split())
ZERO_STAYS_ZERO = frozenset(
    "BatchNormalization Relu LeakyRelu MaxPool AveragePool GlobalAveragePool Identity Dropout Conv".split()
)
"""Through these a branch without channels stays silent (biases included: the whole branch is what is removed)."""


@dataclass(frozen=True, kw_only=True)
class Take:
    """Keep the owned slices of an initializer along one axis."""

    initializer: str
    axis: int
    owners: Owners


@dataclass(frozen=True, kw_only=True)
class Count:
    """Write how many of these channels are kept into one place of an integer initializer, plus a constant."""

    initializer: str
    place: int
    owners: Owners
    plus: int = 0


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
        shapes: tensor name → shape.
        halves: pairs of equal parts that one split makes; code that splits in equal parts needs them equal.
    """

    owners: Mapping[str, Owners]
    edits: tuple[Edit, ...]
    frozen: Mapping[int, str]
    nodes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    halves: tuple[tuple[Owners, Owners], ...]


def trace_channels(proto: onnx.ModelProto, coupling: Coupling) -> ChannelMap:
    """Return the classes of every tensor's channels, and what must change with them.

    Args:
        proto: a graph with static shapes whose parameters are named by module path, as `edgeprune.export` writes it.
        coupling: of the module it was exported from.
    """
    return _Walk(proto, coupling).run()


class _Walk:
    def __init__(self, proto: onnx.ModelProto, coupling: Coupling) -> None:
        self.graph = proto.graph
        self.classes = coupling.classes
        self.frozen = dict(coupling.frozen)
        self.constants = {each.name: each for each in proto.graph.initializer}
        self.shapes = tensor_shapes(proto)
        self.owners: dict[str, Owners] = {}
        self.edits: list[Edit] = []
        self.layer_nodes: dict[str, str] = {}
        self.halves: list[tuple[Owners, Owners]] = []
        self.joined: dict[int, int] = {}
        self.fresh = FIXED - 1

    def run(self) -> ChannelMap:
        for value in self.graph.input:
            self.owners[value.name] = self._fixed(value.name)
        for node in self.graph.node:
            self._visit(node)
        for value in self.graph.output:
            self._freeze(self.owners.get(value.name), "it is the model's output")
        self._freeze_layers_not_seen()
        return ChannelMap(
            owners={name: self._resolved(owners) for name, owners in self.owners.items()},
            edits=tuple(_with_owners(edit, self._resolved(edit.owners)) for edit in self.edits),
            frozen=self.frozen,
            nodes=self.layer_nodes,
            shapes=self.shapes,
            halves=tuple(self.halves),
        )

    # -- the walk ---------------------------------------------------------------------------------------------

    def _visit(self, node: onnx.NodeProto) -> None:
        rule = _RULES.get(node.op_type)
        if rule is None or not all(self._known(name) for name in node.input[:1]):
            self._give_up(node)
        else:
            rule(self, node)

    def _known(self, name: str) -> bool:
        return name in self.owners

    def _give_up(self, node: onnx.NodeProto, why: str = "which edgeprune cannot cut") -> None:
        for name in node.input:
            self._freeze(self.owners.get(name), f"it passes through {node.op_type} ({node.name}), {why}")
        for name in node.output:
            if len(self.shapes.get(name, ())) > 1:
                self.owners[name] = self._fixed(name)

    def _pass(self, node: onnx.NodeProto) -> None:
        owners = self.owners[node.input[0]]
        if self._channels(node.output[0]) != len(owners):
            self._give_up(node)
            return
        for name in node.output:
            if name:
                self.owners[name] = owners

    def _convolution(self, node: onnx.NodeProto) -> None:
        layer = node.input[1].removesuffix(".weight")
        if (layer, "out") not in self.classes:
            self._give_up(node, "whose weight belongs to no layer")
            return
        self.layer_nodes.setdefault(layer, node.name)
        into, out = self.classes[layer, "in"], self.classes[layer, "out"]
        group = next((each.i for each in node.attribute if each.name == "group"), 1)
        self._match(self.owners[node.input[0]], into, node)
        place_in, place_out = (1, 0) if node.op_type == "Conv" else (0, 1)
        if group == len(into) == len(out) > 1:
            self.edits.append(Groups(node=node.name, owners=out))
            self._take(node.input[1], 0, out)
        elif group > 1:
            sides = (out, into[: len(into) // group]) if node.op_type == "Conv" else (out[: len(out) // group], into)
            self._take(node.input[1], place_out, sides[0])
            self._take(node.input[1], place_in, sides[1])
        else:
            self._take(node.input[1], place_out, out)
            self._take(node.input[1], place_in, into)
        if len(node.input) > 2 and node.input[2]:
            self._take(node.input[2], 0, out)
        self.owners[node.output[0]] = out

    def _linear(self, node: onnx.NodeProto) -> None:
        layer = node.input[1].removesuffix(".weight")
        transposed = next((each.i for each in node.attribute if each.name == "transB"), 0)
        if (layer, "out") not in self.classes or not transposed:
            self._give_up(node, "whose weight belongs to no layer")
            return
        self.layer_nodes.setdefault(layer, node.name)
        into, out = self.classes[layer, "in"], self.classes[layer, "out"]
        self._match(self.owners[node.input[0]], into, node)
        self._take(node.input[1], 0, out)
        self._take(node.input[1], 1, into)
        if len(node.input) > 2:
            self._take(node.input[2], 0, out)
        self.owners[node.output[0]] = out

    def _per_channel(self, node: onnx.NodeProto) -> None:
        owners = self.owners[node.input[0]]
        for name in node.input[1:]:
            if self._constant_size(name) == len(owners):
                self._take(name, next(i for i, n in enumerate(self.shapes[name]) if n == len(owners)), owners)
            elif self._constant_size(name) != 1:
                self._give_up(node)
                return
        self._pass(node)

    def _binary(self, node: onnx.NodeProto) -> None:
        rank = len(self.shapes[node.output[0]])
        result: Owners | None = None
        for name in node.input:
            owners = self._operand(node, name, rank)
            if owners is None or len(owners) == 1 < self._channels(node.output[0]):
                continue  # broadcast over the channels
            result = owners if result is None else self._match(result, owners, node)
        self.owners[node.output[0]] = self._fixed(node.output[0]) if result is None else result
        for name in node.input:
            self._take_operand(name, rank, self.owners[node.output[0]])

    def _operand(self, node: onnx.NodeProto, name: str, rank: int) -> Owners | None:
        if name in self.constants:
            return None
        if len(self.shapes[name]) != rank:
            self._give_up(node)
            return None
        return self.owners[name]

    def _take_operand(self, name: str, rank: int, owners: Owners) -> None:
        if name not in self.constants:
            return
        axis = 1 - rank + len(self.shapes[name])
        if axis >= 0 and self.shapes[name][axis] == len(owners) > 1:
            self._take(name, axis, owners)

    def _reduce(self, node: onnx.NodeProto) -> None:
        axes = self._integers(node, 1, "axes")
        rank = len(self.shapes[node.input[0]])
        if not axes or 1 in {each % rank for each in axes} or 0 in {each % rank for each in axes}:
            self._give_up(node, "which mixes channels")
        else:
            self._pass(node)

    def _concat(self, node: onnx.NodeProto) -> None:
        rank = len(self.shapes[node.output[0]])
        axis = next(each.i for each in node.attribute if each.name == "axis") % rank
        if not all(name in self.owners for name in node.input):
            self._give_up(node)
        elif axis == 1:
            self.owners[node.output[0]] = np.concatenate([self.owners[name] for name in node.input])
        else:
            for name in node.input[1:]:
                self._match(self.owners[node.input[0]], self.owners[name], node)
            self._pass(node)

    def _split(self, node: onnx.NodeProto) -> None:
        owners = self.owners[node.input[0]]
        axis = next((each.i for each in node.attribute if each.name == "axis"), 0) % len(self.shapes[node.input[0]])
        if axis != 1:
            self._pass(node)
            return
        if len(node.input) < 2 or node.input[1] not in self.constants:
            self._give_up(node, "whose sizes are not in the graph")
            return
        sizes = [self._channels(name) for name in node.output]
        parts = np.split(owners, np.cumsum(sizes)[:-1])
        if len(set(sizes)) == 1:
            self.halves += [(parts[0], part) for part in parts[1:]]
        for place, part in enumerate(parts):
            self.edits.append(Count(initializer=node.input[1], place=place, owners=part))
            self.owners[node.output[place]] = part

    def _slice(self, node: onnx.NodeProto) -> None:
        owners = self.owners[node.input[0]]
        rank = len(self.shapes[node.input[0]])
        starts, ends = self._integers(node, 1), self._integers(node, 2)
        axes = [each % rank for each in self._integers(node, 3) or list(range(len(starts)))]
        steps = self._integers(node, 4) or [1] * len(starts)
        for place, axis in enumerate(axes):
            if axis != 1:
                continue
            first, last, _ = slice(starts[place], ends[place]).indices(len(owners))
            if steps[place] != 1:
                self._give_up(node, "which takes every so many channels")
                return
            self.edits.append(Count(initializer=node.input[1], place=place, owners=owners[:first]))
            self.edits.append(Count(initializer=node.input[2], place=place, owners=owners[:last]))
            owners = owners[first:last]
        self.owners[node.output[0]] = owners

    def _pad(self, node: onnx.NodeProto) -> None:
        rank = len(self.shapes[node.input[0]])
        pads, axes = self._integers(node, 1), self._integers(node, 3) or list(range(rank))
        mode = next((each.s for each in node.attribute if each.name == "mode"), b"constant")
        owners = self.owners[node.input[0]]
        for place, axis in enumerate(axes):
            before, after = pads[place], pads[place + len(axes)]
            if axis % rank != 1 or not (before or after):
                continue
            if mode != b"constant" or not self._pads_with_zero(node):
                self._give_up(node, "which pads channels with something else than zeros")
                return
            head, tail = self._zeros(before), self._zeros(after)
            self.edits.append(Count(initializer=node.input[1], place=place, owners=head))
            self.edits.append(Count(initializer=node.input[1], place=place + len(axes), owners=tail))
            owners = np.concatenate([head, owners, tail])
        self.owners[node.output[0]] = owners

    def _pads_with_zero(self, node: onnx.NodeProto) -> bool:
        if len(node.input) < 3 or not node.input[2]:
            return True
        return node.input[2] in self.constants and not numpy_helper.to_array(self.constants[node.input[2]]).any()

    def _reshape(self, node: onnx.NodeProto) -> None:
        owners = self.owners[node.input[0]]
        source, target = self.shapes[node.input[0]], self.shapes[node.output[0]]
        if len(target) < 2 or source[0] != target[0]:
            self._give_up(node)
        elif target[1] == source[1]:
            self._resized(node, owners)
        elif len(target) == 2 and target[1] == int(np.prod(source[1:])):
            self._resized(node, np.repeat(owners, target[1] // source[1]))
        else:
            self._give_up(node, "which regroups channels")

    def _resized(self, node: onnx.NodeProto, owners: Owners) -> None:
        if node.op_type != "Flatten":
            shape = self._integers(node, 1)
            if len(shape) > 1 and shape[1] > 0:
                self.edits.append(Count(initializer=node.input[1], place=1, owners=owners))
        self.owners[node.output[0]] = owners

    def _transpose(self, node: onnx.NodeProto) -> None:
        order = next((list(each.ints) for each in node.attribute if each.name == "perm"), [])
        if order[:2] == [0, 1]:
            self._pass(node)
        else:
            self._give_up(node, "which moves the channel axis")

    # -- owners -----------------------------------------------------------------------------------------------

    def _match(self, one: Owners, other: Owners, node: onnx.NodeProto) -> Owners:
        """Return the owners two channel axes agree on; where they differ, zero-filled channels join, others freeze."""
        if len(one) != len(other):
            for each in (one, other):
                self._freeze(each, f"it meets a different number of channels at {node.name}")
            return one
        for mine, theirs in zip(one.tolist(), other.tolist(), strict=True):
            mine, theirs = self._root(mine), self._root(theirs)
            if mine == theirs:
                continue
            if min(mine, theirs) < FIXED:
                self.joined[min(mine, theirs)] = max(mine, theirs)
                continue
            reason = f"it meets channels at {node.name} that torch-pruning does not couple with it"
            self._freeze(np.array([mine, theirs]), reason)
        return np.array([self._root(each) for each in one.tolist()], dtype=np.int64)

    def _zeros(self, count: int) -> Owners:
        owners = np.arange(self.fresh, self.fresh - count, -1, dtype=np.int64)
        self.fresh -= count
        return owners

    def _root(self, owner: int) -> int:
        while owner in self.joined:
            owner = self.joined[owner]
        return owner

    def _resolved(self, owners: Owners) -> Owners:
        return np.array([max(FIXED, self._root(each)) for each in owners.tolist()], dtype=np.int64)

    def _freeze(self, owners: Owners | None, reason: str) -> None:
        for owner in () if owners is None else owners.tolist():
            if self._root(owner) >= 0:
                self.frozen.setdefault(self._root(owner), reason)

    def _freeze_layers_not_seen(self) -> None:
        for (layer, _), classes in self.classes.items():
            weight = f"{layer}.weight" if layer else "weight"
            if weight not in self.constants:
                self._freeze(classes, f"the weight of {layer!r} is not in the ONNX graph")

    # -- the graph --------------------------------------------------------------------------------------------

    def _take(self, initializer: str, axis: int, owners: Owners) -> None:
        if initializer not in self.constants:
            self._freeze(owners, f"{initializer} is computed in the graph")
            return
        self.edits.append(Take(initializer=initializer, axis=axis, owners=owners))

    def _constant_size(self, name: str) -> int:
        return int(np.prod(self.shapes[name])) if name in self.constants else -1

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
    "Reshape": _Walk._reshape,
    "Flatten": _Walk._reshape,
    "Expand": _Walk._reshape,
    "Transpose": _Walk._transpose,
}


def _with_owners(edit: Edit, owners: Owners) -> Edit:
    if isinstance(edit, Take):
        return Take(initializer=edit.initializer, axis=edit.axis, owners=owners)
    if isinstance(edit, Count):
        return Count(initializer=edit.initializer, place=edit.place, owners=owners, plus=edit.plus)
    return Groups(node=edit.node, owners=owners)


def tensor_shapes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return tensor name → static shape, initializers included; 0 where a dimension is not static."""
    graph = proto.graph
    shapes = {each.name: tuple(each.dims) for each in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        shapes[value.name] = tuple(each.dim_value for each in value.type.tensor_type.shape.dim)
    return shapes


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What becomes of the graph when a group keeps nothing: its residual branch is silent.

    Attributes:
        aliases: output of an addition → the operand that is left of it.
        silent_layers: convolutions and batch norms whose output is gone or zero, biases included.
    """

    aliases: Mapping[str, str]
    silent_layers: tuple[str, ...]


def find_removal(proto: onnx.ModelProto, channels: ChannelMap, classes: frozenset[int]) -> Removal | None:
    """Return what is left when the channels of `classes` all go, or None if more than residual branches would die.

    A tensor is silent when it has no channels left or holds only zeros; silence must end in an addition to something
    that is not silent.
    """
    silent: set[str] = set()
    aliases: dict[str, str] = {}
    layers: list[str] = []
    for node in proto.graph.node:
        gone = _all_in(channels.owners.get(node.output[0]), classes)
        quiet = [name for name in node.input if name in silent]
        if not quiet and not gone:
            continue
        loud = [name for name in node.input if name in channels.owners and name not in silent]
        if node.op_type == "Add" and len(quiet) == 1 and len(loud) == 1 and not gone:
            if channels.shapes[loud[0]] != channels.shapes[node.output[0]]:
                return None
            aliases[node.output[0]] = loud[0]
        elif (gone and not quiet and node.op_type == "Conv") or (
            quiet and not loud and node.op_type in ZERO_STAYS_ZERO
        ):
            silent.update(node.output)
            layers += [node.input[1].removesuffix(".weight")] if node.op_type in ("Conv", "BatchNormalization") else []
        else:
            return None
    if not aliases or any(value.name in silent for value in proto.graph.output):
        return None
    return Removal(aliases=aliases, silent_layers=tuple(layers))


def _all_in(owners: Owners | None, classes: frozenset[int]) -> bool:
    return owners is not None and len(owners) > 0 and classes.issuperset(owners.tolist())
