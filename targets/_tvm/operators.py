"""Every ONNX operator that has a kernel, and the function that writes its result."""

from collections.abc import Callable, Mapping

import numpy as np
from onnx import TensorProto

from . import convolution, movement, pooling, products, reductions
from .elementwise import ELEMENTWISE
from .graph import Graph, Node, unsupported
from .grouping import VIEWS
from .site import Site
from .values import Reader

Operator = Callable[[Site, Node], Reader]

OPERATORS: Mapping[str, Operator] = {
    "Conv": convolution.conv,
    "ConvTranspose": convolution.conv_transpose,
    "MaxPool": pooling.max_pool,
    "AveragePool": pooling.average_pool,
    "Gemm": products.gemm,
    "MatMul": products.matmul,
    **dict.fromkeys(reductions.REDUCED, reductions.reduce),
    "Softmax": reductions.softmax,
    "LogSoftmax": reductions.softmax,
    "LayerNormalization": reductions.layer_normalization,
    "RMSNormalization": reductions.layer_normalization,
    "InstanceNormalization": reductions.instance_normalization,
    "GroupNormalization": reductions.group_normalization,
    "LRN": reductions.lrn,
    "Concat": movement.concat,
    "Transpose": movement.transpose,
    "Split": movement.split,
    "Slice": movement.slice_,
    "Gather": movement.gather,
    "Expand": movement.expand,
    "Tile": movement.tile,
    "DepthToSpace": movement.depth_to_space,
    "SpaceToDepth": movement.space_to_depth,
    "Pad": movement.pad,
    "Resize": movement.resize,
    **dict.fromkeys(VIEWS, movement.view),
}

BLOCKED = frozenset(ELEMENTWISE) | {
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean",
    "InstanceNormalization", "Concat", "Slice", "Split", "Pad", "Resize", "DepthToSpace",
}  # fmt: skip
"""Operators that can write blocks of channels."""


FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


def check(graph: Graph, node: Node) -> None:
    """Refuse a node that looks like one that only passes elements on, and is none.

    Raises:
        CompileError: if it makes integers of what is computed, or drops elements at random.
    """
    if node.op == "Cast" and node.attributes["to"] not in FLOATS:
        raise unsupported(node, "it makes integers or truth values of what is computed")
    if node.op == "CastLike" and graph.constants.get(node.inputs[1], np.zeros(1)).dtype.kind != "f":
        raise unsupported(node, "it makes integers or truth values of what is computed")
    if node.op == "Dropout" and np.any(graph.constants.get(node.input(2), False)):
        raise unsupported(node, "it is in training mode")
    if node.op == "Dropout" and any(name in graph.uses() for name in node.outputs[1:]):
        raise unsupported(node, "its mask is read")


def write(site: Site, node: Node) -> Reader:
    """Return a reader of a node's result, at the indices of the kernel's output.

    Raises:
        CompileError: if there is no kernel for it.
    """
    if node.op in ELEMENTWISE:
        return site.element(node)
    if node.op not in OPERATORS:
        raise unsupported(node, "the operator is not known")
    return OPERATORS[node.op](site, node)
