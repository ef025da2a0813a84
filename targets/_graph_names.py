"""Which node of the ONNX file a node of ONNX Runtime's optimized graph came from, as well as its name tells.

A blocked kernel is named ``<tensor>_nchwc`` after the output of the last node it swallowed: ``Conv -> Relu`` is
reported under the Relu's output. Such a tensor is followed back through activations to the layer that feeds them.
A fusion ``<node>/<Fusion>/`` is its node. What belongs to no node, like ``ReorderOutput``, keeps the name the runtime
gave it, and equal names are added up.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

_SWALLOWED = {"Relu", "Clip", "Sigmoid", "HardSigmoid", "LeakyRelu", "Tanh", "BatchNormalization", "Identity"}
_NUMBERED = re.compile(r"_token_\d+$")


def by_graph_node(graph: Path, nanoseconds: Mapping[str, float]) -> dict[str, float]:
    """Return nanoseconds by node of the ONNX file `graph`, from nanoseconds by node of the runtime.

    A node without a name is called ``<op type>_<position>``, as ONNX Runtime does.
    """
    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    for place, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type}_{place}"
    makers = {output: node for node in nodes for output in node.output}
    names = {node.name for node in nodes}
    found: dict[str, float] = {}
    for reported, spent in nanoseconds.items():
        name = _origin(reported, names, makers)
        found[name] = found.get(name, 0.0) + spent
    return found


def _origin(reported: str, names: set[str], makers: Mapping[str, Any]) -> str:
    if reported in names:
        return reported
    node = makers.get(reported.removesuffix("_nchwc"))
    while node is not None and node.op_type in _SWALLOWED and (earlier := makers.get(node.input[0])) is not None:
        node = earlier
    if node is not None:
        return str(node.name)
    fused = reported.split("/")[0]
    return fused if fused in names else _NUMBERED.sub("", reported)
