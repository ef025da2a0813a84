"""Operators that have no kernel of ours: TVM's own importer lowers them, one node at a time."""

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from tvm import relax, tirx

from .values import Value

if TYPE_CHECKING:
    from .lower import Lowering, Node


def lower_with_relax(lowering: "Lowering", node: "Node") -> None:
    """Append the steps that TVM makes of one node."""
    raise NotImplementedError(node.op)
