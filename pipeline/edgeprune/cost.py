"""What a graph costs on paper; never a substitute for measuring it."""

import onnx
import onnx.shape_inference
from onnx import TensorProto

from edgeprune.channels import tensor_shapes


def parameters(graph: onnx.ModelProto) -> int:
    """Return the number of trained values in a graph that `edgeprune.export` wrote, running statistics left out."""
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    seen = {name for node in graph.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}
    trained = (each for each in graph.graph.initializer if each.name not in seen and "/" not in each.name)
    return sum(_size(each.dims) for each in trained if each.data_type in kinds)


def macs(graph: onnx.ModelProto) -> int:
    """Return the multiply-accumulates of convolutions and matrix products in one call."""
    shapes = tensor_shapes(onnx.shape_inference.infer_shapes(graph, data_prop=True))
    total = 0
    for node in graph.graph.node:
        if node.op_type == "Conv":
            total += _size(shapes[node.output[0]]) * _size(shapes[node.input[1]][1:])
        elif node.op_type == "ConvTranspose":
            total += _size(shapes[node.input[0]]) * _size(shapes[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):
            total += _size(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    return total


def _size(shape: object) -> int:
    product = 1
    for side in shape:  # type: ignore[attr-defined]
        product *= int(side)
    return product
