"""What a graph costs on paper; never a substitute for measuring it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

import onnx
import onnx.shape_inference
from onnx import TensorProto

from edgeprune.channels import tensor_shapes

Shape = tuple[int, ...]

UNREAD = frozenset(
    "Einsum If Loop Scan Attention ConvInteger MatMulInteger QLinearConv QLinearMatMul DeformConv".split()
)
"""Operations that multiply and accumulate, or hold others that do, in a way that is not read here."""

CONVERSIONS = frozenset(("QuantizeLinear", "DequantizeLinear"))
"""Operations that runtimes also keep under domains of their own and that multiply once an element."""


def parameters(graph: onnx.ModelProto) -> int:
    """Return the number of trained values in a graph that `edgeprune.export` wrote, running statistics left out."""
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    seen = {name for node in graph.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}
    trained = (each for each in graph.graph.initializer if each.name not in seen and "/" not in each.name)
    return sum(prod(each.dims) for each in trained if each.data_type in kinds)


def macs(graph: onnx.ModelProto) -> int:
    """Return the multiply-accumulates of convolutions, matrix products and recurrent layers in one call.

    They are a lower bound if there are `uncounted` nodes.
    """
    return sum(count or 0 for _, count in _counts(graph))


def uncounted(graph: onnx.ModelProto) -> tuple[str, ...]:
    """Return the nodes that `macs` leaves out although they multiply and accumulate, e.g. "Einsum (node_einsum)"."""
    return tuple(f"{node.op_type} ({node.name})" for node, count in _counts(graph) if count is None)


def _counts(graph: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, int | None]]:
    """Yield each node that multiplies and accumulates with how often it does, None if that is not known."""
    shapes = tensor_shapes(onnx.shape_inference.infer_shapes(graph, data_prop=True))
    for node in graph.graph.node:
        rule = _RULES.get(node.op_type)
        if rule is not None:
            yield node, _counted(rule, node, shapes)
        elif node.op_type in UNREAD or (node.domain not in ("", "ai.onnx") and node.op_type not in CONVERSIONS):
            yield node, None


def _counted(rule: "_Rule", node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    known = [shapes.get(name, (0,)) if name else () for name in (*node.input, node.output[0] or node.input[0])]
    return None if any(0 in each for each in known) else rule(known)


# -- one rule an operation: the shapes of its inputs and, last, of its first output -----------------------------------

_Rule = Callable[[Sequence[Shape]], int]


def _convolution(shapes: Sequence[Shape]) -> int:
    return prod(shapes[-1]) * prod(shapes[1][1:])


def _transposed(shapes: Sequence[Shape]) -> int:
    return prod(shapes[0]) * prod(shapes[1][1:])


def _product(shapes: Sequence[Shape]) -> int:
    return prod(shapes[-1]) * shapes[0][-1]


def _recurrent(shapes: Sequence[Shape]) -> int:
    """Every step of every sequence multiplies all gates' weights, in every direction, with input and state."""
    (steps, batch, _), inputs, states = shapes[0], shapes[1], shapes[2]
    return steps * batch * (prod(inputs) + prod(states))


_RULES: dict[str, _Rule] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Gemm": _product,
    "MatMul": _product,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
}
