"""An ONNX model as plain records: nodes in order, constants by name, and the static shape of every value."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, shape_inference

from edgeprune.errors import CompileError

DOMAINS = ("", "ai.onnx")

SAME_SHAPE = ("GroupNormalization",)
"""Operators whose result has their input's shape, which ONNX 1.21 cannot infer."""

SMALL = 1024
"""Constants of up to so many elements may be sizes, which shapes depend on."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator.

    Attributes:
        inputs, outputs: names of values; an empty name stands for an optional one that is not given.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.op} {self.name or self.outputs[0]!r}"

    def input(self, place: int) -> str:
        """Return the name of an optional input, empty if it is not given."""
        return self.inputs[place] if place < len(self.inputs) else ""

    def text(self, key: str, default: str = "") -> str:
        """Return an attribute that is a string."""
        value = self.attributes.get(key, default)
        return value.decode() if isinstance(value, bytes) else str(value)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes in an order in which they can run.

    Attributes:
        constants: arrays by name.
        shapes: of every value and constant.
        inputs, outputs: names, in the model's order.
        opset: of the default domain.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, NDArray[Any]]
    shapes: Mapping[str, tuple[int, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int

    def array(self, node: Node, place: int) -> NDArray[Any]:
        """Return an input that must be constant.

        Raises:
            CompileError: if it is not.
        """
        if node.input(place) not in self.constants:
            raise unsupported(node, f"its input {place} is computed while the network runs")
        return self.constants[node.inputs[place]]

    def integers(self, node: Node, place: int) -> list[int] | None:
        """Return an input that must be constant as integers, None if it is not given."""
        return [int(each) for each in self.array(node, place).reshape(-1)] if node.input(place) else None

    def uses(self) -> dict[str, int]:
        """Return how often each value is read; being an output of the model counts as one."""
        counts = dict.fromkeys(self.outputs, 1)
        for node in self.nodes:
            for name in node.inputs:
                counts[name] = counts.get(name, 0) + 1
        return counts


def unsupported(node: Node, why: str) -> CompileError:
    """Return the error of a node that has no kernel."""
    return CompileError(
        f"TVM has no kernel for {node}", why=why, next_step="replace the layer in the model, or choose another runtime"
    )


def read_graph(model: onnx.ModelProto) -> Graph:
    """Return the model's graph.

    Raises:
        CompileError: if shapes are not static, an input is no float32 tensor, or an operator is not ONNX's own.
    """
    inferred = _inferred(model)
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    infos = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    shapes = {each.name: _shape(each) for each in infos}
    nodes = []
    for proto in model.graph.node:
        node = _node(proto)
        if node.op == "Constant":
            constants[node.outputs[0]] = _constant(node)
        else:
            nodes.append(node)
    graph = Graph(
        nodes=tuple(nodes),
        constants=constants,
        shapes={name: shape for name, shape in shapes.items() if shape is not None}
        | {name: array.shape for name, array in constants.items()},
        inputs=tuple(each.name for each in model.graph.input if each.name not in constants),
        outputs=tuple(each.name for each in model.graph.output),
        opset=max((each.version for each in model.opset_import if each.domain in DOMAINS), default=1),
    )
    _check_ports(model, graph)
    return graph


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return shape_inference.infer_shapes(_without_weights(model), strict_mode=True, data_prop=True)
    except (shape_inference.InferenceError, ValueError) as error:
        raise CompileError("the shapes of the graph cannot be inferred", why=str(error).strip()) from error


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its large constants as inputs: inference looks at none, and copies the model twice."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(_inferable(each) for each in model.graph.node)
    for field in ("input", "output", "value_info"):
        getattr(light.graph, field).extend(getattr(model.graph, field))
    known = {each.name for each in model.graph.input}
    for each in model.graph.initializer:
        if math.prod(each.dims) <= SMALL:
            light.graph.initializer.append(each)
        elif each.name not in known:
            light.graph.input.append(onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims))
    return light


def _inferable(node: onnx.NodeProto) -> onnx.NodeProto:
    """Return the node, or one with a result of the same shape if ONNX cannot infer its own."""
    if node.op_type not in SAME_SHAPE:
        return node
    return onnx.helper.make_node("Identity", node.input[:1], node.output[:1])


def _shape(info: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    sizes = tuple(each.dim_value if each.HasField("dim_value") else -1 for each in tensor.shape.dim)
    return None if -1 in sizes else sizes


def _node(proto: onnx.NodeProto) -> Node:
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in proto.attribute}
    node = Node(
        op=proto.op_type,
        name=proto.name,
        inputs=tuple(proto.input),
        outputs=tuple(proto.output),
        attributes=attributes,
    )
    if proto.domain not in DOMAINS:
        raise unsupported(node, f"it belongs to the domain {proto.domain!r}")
    return node


def _constant(node: Node) -> NDArray[Any]:
    kind, value = next(iter(node.attributes.items()))
    if kind == "value":
        return np.asarray(numpy_helper.to_array(value))
    if kind in ("value_float", "value_floats"):
        return np.asarray(value, dtype=np.float32)
    if kind in ("value_int", "value_ints"):
        return np.asarray(value, dtype=np.int64)
    raise unsupported(node, f"a constant given as {kind}")


def _check_ports(model: onnx.ModelProto, graph: Graph) -> None:
    kinds = {each.name: each.type.tensor_type.elem_type for each in [*model.graph.input, *model.graph.output]}
    for name in (*graph.inputs, *graph.outputs):
        if kinds[name] != onnx.TensorProto.FLOAT:
            raise CompileError(
                f"TVM takes and gives float32 tensors, {name!r} is none", next_step="convert inside the model"
            )
        if name not in graph.shapes or 0 in graph.shapes[name]:
            raise CompileError(
                f"the shape of {name!r} is not static", next_step="export the model with a fixed, non-empty shape"
            )
