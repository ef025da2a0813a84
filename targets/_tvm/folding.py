"""Work that is done once, on the host: constants are evaluated, batch norms vanish, what nobody reads is dropped."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from .graph import Graph, Node, unsupported

REFERENCE_OPSET = 21
"""Highest opset whose operators ONNX's reference implementation is asked to evaluate."""

RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


def folded(graph: Graph) -> Graph:
    """Return the graph with all of it done."""
    return without_unread(fold_batch_norms(fold_constants(graph)))


def without_unread(graph: Graph) -> Graph:
    """Return the graph without nodes that no output depends on."""
    needed, kept = set(graph.outputs), []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            kept.append(node)
    return replace(graph, nodes=tuple(reversed(kept)))


def fold_constants(graph: Graph) -> Graph:
    """Return the graph with every node evaluated that reads constants or sizes alone."""
    constants, shapes, kept = dict(graph.constants), dict(graph.shapes), []
    for node in graph.nodes:
        values = _evaluated(node, constants, shapes, graph.opset)
        if values is None:
            kept.append(node)
            continue
        constants.update(values)
        shapes.update({name: array.shape for name, array in values.items()})
    return replace(graph, nodes=tuple(kept), constants=constants, shapes=shapes)


def _evaluated(
    node: Node, constants: dict[str, NDArray[Any]], shapes: dict[str, tuple[int, ...]], opset: int
) -> dict[str, NDArray[Any]] | None:
    if node.op in ("Shape", "Size") and node.inputs[0] in shapes:
        return {node.outputs[0]: _size(node, shapes[node.inputs[0]])}
    feeds = {name: constants[name] for name in node.inputs if name in constants}
    if node.op in RANDOM or not node.inputs or any(name and name not in feeds for name in node.inputs):
        return None
    return _run(node, feeds, min(opset, REFERENCE_OPSET))


def _size(node: Node, shape: tuple[int, ...]) -> NDArray[Any]:
    if node.op == "Size":
        return np.asarray(np.prod(shape, dtype=np.int64))
    return np.asarray(shape[slice(node.attributes.get("start"), node.attributes.get("end"))], dtype=np.int64)


def _run(node: Node, feeds: dict[str, NDArray[Any]], opset: int) -> dict[str, NDArray[Any]]:
    """Return the node's outputs by ONNX's own reference implementation."""
    from onnx.reference import ReferenceEvaluator

    proto = helper.make_node(node.op, list(node.inputs), list(node.outputs), **node.attributes)
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    inputs = [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in feeds.items()]
    graph = helper.make_graph([proto], "node", inputs, [helper.make_empty_tensor_value_info(o) for o in node.outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        outputs = ReferenceEvaluator(model).run(None, feeds)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError) as error:
        raise unsupported(node, f"it reads constants alone and cannot be evaluated: {error}") from error
    return {name: np.asarray(value) for name, value in zip(node.outputs, outputs, strict=True) if name}


def fold_batch_norms(graph: Graph) -> Graph:
    """Return the graph with batch norms multiplied into the convolution before, others as a product and a sum."""
    folder = _BatchNorms(graph)
    for node in graph.nodes:
        folder.take(node)
    return folder.graph()


class _BatchNorms:
    """Walks the nodes and rewrites batch norms."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._uses = graph, graph.uses()
        self._constants, self._shapes = dict(graph.constants), dict(graph.shapes)
        self._kept: list[Node] = []
        self._maker: dict[str, int] = {}

    def graph(self) -> Graph:
        """Return what has become of the graph."""
        return replace(self._graph, nodes=tuple(self._kept), constants=self._constants, shapes=self._shapes)

    def take(self, node: Node) -> None:
        """Keep a node, or what stands for it."""
        if node.op != "BatchNormalization":
            return self._keep(node)
        if node.attributes.get("training_mode", 0) or any(each not in self._constants for each in node.inputs[1:]):
            raise unsupported(node, "its statistics are not constant")
        gain, shift, mean, variance = (self._constants[name].astype(np.float64) for name in node.inputs[1:5])
        scale = gain / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
        before = self._convolution(node.inputs[0])
        if before is None:
            return self._as_affine(node, scale, shift - mean * scale)
        return self._merge(before, node, scale, shift - mean * scale)

    def _keep(self, node: Node) -> None:
        for name in node.outputs:
            self._maker[name] = len(self._kept)
        self._kept.append(node)

    def _convolution(self, name: str) -> int | None:
        place = self._maker.get(name)
        if place is None or self._uses[name] != 1 or self._kept[place].op != "Conv":
            return None
        return place if all(each in self._constants for each in self._kept[place].inputs[1:] if each) else None

    def _merge(self, place: int, node: Node, scale: NDArray[Any], offset: NDArray[Any]) -> None:
        conv = self._kept[place]
        weight = self._constants[conv.inputs[1]]
        bias = self._constants[conv.inputs[2]] if conv.input(2) else 0.0
        names = self._named(node, "weight", "bias")
        self._add(names[0], weight * scale.reshape(-1, *[1] * (weight.ndim - 1)))
        self._add(names[1], bias * scale + offset)
        self._kept[place] = replace(conv, inputs=(conv.inputs[0], *names), outputs=node.outputs[:1])
        self._maker[node.outputs[0]] = place

    def _as_affine(self, node: Node, scale: NDArray[Any], offset: NDArray[Any]) -> None:
        shape = self._shapes[node.inputs[0]]
        tail = (-1, *[1] * (len(shape) - 2))
        gain, shift, scaled = self._named(node, "scale", "offset", "scaled")
        self._add(gain, scale.reshape(tail))
        self._add(shift, offset.reshape(tail))
        self._shapes[scaled] = shape
        first = Node(
            op="Mul", name=f"{node.name}.scale", inputs=(node.inputs[0], gain), outputs=(scaled,), attributes={}
        )
        second = replace(first, op="Add", name=f"{node.name}.offset", inputs=(scaled, shift), outputs=node.outputs[:1])
        self._keep(first)
        self._keep(second)

    def _named(self, node: Node, *parts: str) -> Sequence[str]:
        return [f"{node.outputs[0]}.{each}" for each in parts]

    def _add(self, name: str, array: NDArray[Any]) -> None:
        self._constants[name] = array.astype(np.float32)
        self._shapes[name] = array.shape
