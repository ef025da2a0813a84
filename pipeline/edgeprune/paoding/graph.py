"""What the exported graph says that the module does not: what follows a dense layer, and what bounds its input."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from edgeprune.channels import tensor_shapes
from edgeprune.paoding.intervals import ACTIVATIONS, Bounds

AS_IT_IS = frozenset("Identity Dropout Flatten Reshape Squeeze Unsqueeze Cast".split())
"""Operators that leave the values of a dense layer's units, and their order, as they are."""

NAMES = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh"}
"""Operator → name in `ACTIVATIONS`."""

WITHIN = {
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Softsign": (-1.0, 1.0),
}
"""Operator → what its output lies within whatever it reads."""

WITHIN_ITS_INPUT = AS_IT_IS | {"MaxPool", "GlobalMaxPool", "GlobalAveragePool", "ReduceMean", "ReduceMax"}
"""Operators whose output channels lie within the bounds of the same input channels."""

ASSUMED = "assumed"


@dataclass(frozen=True, kw_only=True)
class Follow:
    """What comes after a dense layer.

    Attributes:
        readers: the dense layers that read its units, and nobody else does; none if there is an obstacle.
        activation: between, a name in `ACTIVATIONS`.
        norm: module path of the batch norm before the activation, None without one.
        obstacle: what else follows, in words; empty if nothing does.
    """

    readers: tuple[str, ...] = ()
    activation: str = "identity"
    norm: str | None = None
    obstacle: str = ""


class Graph:
    """An exported graph, asked about its dense layers.

    Args:
        proto: as `edgeprune.export.export` writes it.
        linear: names of the linear layers.
    """

    def __init__(self, proto: onnx.ModelProto, linear: Collection[str]) -> None:
        self._linear = frozenset(linear)
        self._shapes = tensor_shapes(proto)
        self._constants = {each.name: each for each in proto.graph.initializer}
        self._input = proto.graph.input[0].name
        self._outputs = {each.name for each in proto.graph.output}
        self._maker = {name: node for node in proto.graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in proto.graph.node:
            for name in node.input:
                self._readers[name].append(node)

    def follow(self, layer: str) -> Follow:
        """Return what comes after a linear layer."""
        weight = f"{layer}.weight" if layer else "weight"
        if len(self._readers[weight]) != 1:
            return Follow(obstacle=f"{len(self._readers[weight])} operators share its weight")
        tensor, activation, norm = self._readers[weight][0].output[0], "identity", None
        while True:
            nodes = self._readers[tensor]
            names = [self._layer(node) for node in nodes]
            if nodes and None not in names and tensor not in self._outputs:
                readers = tuple(name for name in names if name is not None)
                return Follow(readers=readers, activation=activation, norm=norm)
            if len(nodes) != 1 or tensor in self._outputs:
                return Follow(obstacle=self._several(tensor))
            node = nodes[0]
            if node.op_type in NAMES and activation == "identity":
                activation = NAMES[node.op_type]
            elif node.op_type == "BatchNormalization" and activation == "identity" and norm is None:
                norm = next(each.rpartition(".")[0] for each in node.input[3:] if each in self._constants)
            elif node.op_type not in AS_IT_IS:
                return Follow(obstacle=f"{node.op_type} ({node.name}) follows it")
            tensor = node.output[0]

    def box(self, layer: str, inputs: Bounds | None, assumed: tuple[float, float]) -> tuple[Bounds, str]:
        """Return the bounds of what a linear layer reads, [in], and where they come from.

        Args:
            inputs: of the graph's input channels, [C]; None if nothing is known.
            assumed: low and high where nothing bounds it.
        """
        weight = f"{layer}.weight" if layer else "weight"
        tensor = self._readers[weight][0].input[0]
        found = self._bounds(tensor, inputs)
        if found is None:
            size = self._shapes[tensor][1]
            return Bounds(low=np.full(size, assumed[0]), high=np.full(size, assumed[1])), ASSUMED
        return found

    def _bounds(self, tensor: str, inputs: Bounds | None) -> tuple[Bounds, str] | None:
        """Return the bounds of a tensor's channels and their source, None if nothing is known of them."""
        if tensor == self._input:
            return None if inputs is None else (inputs, "the input")
        node = self._maker.get(tensor)
        if node is None or len(self._shapes.get(tensor, ())) < 2:
            return None
        channels = self._shapes[tensor][1]
        if (ends := self._ends(node)) is not None:
            return Bounds(low=np.full(channels, ends[0]), high=np.full(channels, ends[1])), node.op_type
        known = self._bounds(node.input[0], inputs) if node.input[0] in self._shapes else None
        bounds = None if known is None else _through(node, known[0])
        if known is None or bounds is None or channels % len(bounds.low):
            return None
        return bounds.at(np.repeat(np.arange(len(bounds.low)), channels // len(bounds.low))), known[1]

    def _ends(self, node: onnx.NodeProto) -> tuple[float, float] | None:
        if node.op_type != "Clip" or not all(name in self._constants for name in node.input[1:3]):
            return WITHIN.get(node.op_type)
        ends = [float(numpy_helper.to_array(self._constants[name]).ravel()[0]) for name in node.input[1:3]]
        return (ends[0], ends[1]) if len(ends) == 2 else None

    def _layer(self, node: onnx.NodeProto) -> str | None:
        """Return the linear layer that a node is, None if it is none or shares its weight."""
        layer, _, tensor = str(node.input[1] if len(node.input) > 1 else "").rpartition(".")
        known = node.op_type == "Gemm" and tensor == "weight" and layer in self._linear
        return layer if known and len(self._readers[node.input[1]]) == 1 else None

    def _several(self, tensor: str) -> str:
        if tensor in self._outputs:
            return "it is the model's output"
        nodes = self._readers[tensor]
        return f"{' and '.join(node.op_type for node in nodes)} read it" if nodes else "nothing reads it"


def _through(node: onnx.NodeProto, bounds: Bounds) -> Bounds | None:
    """Return what an operator makes of the bounds of its channels, None if that is not known."""
    if node.op_type == "Relu":
        return ACTIVATIONS["relu"].values(bounds)
    if node.op_type == "AveragePool":  # padding may count as zeros
        return Bounds(low=np.minimum(0, bounds.low), high=np.maximum(0, bounds.high))
    return bounds if node.op_type in WITHIN_ITS_INPUT else None
