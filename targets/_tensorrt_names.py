"""Which node of the ONNX file a layer of a TensorRT engine came from, as well as its name tells.

    conv1 + relu1                                     the first node it names: what comes after was fused into it
    Reformatting CopyNode for Input Tensor 0 to ...   none: it moves data, and keeps its own name
    {ForeignNode[a...b]}                              its first node; there may be many between a and b
    PWN(sigmoid, mul)  ·  conv1 || conv2              the same

Equal names are added up.
"""

import re
from collections.abc import Collection, Mapping

_BETWEEN = re.compile(r"\.\.\.|[\s+|()\[\]{},]+")
_COPIES = ("reformatting copynode", "reformat")


def by_graph_node(names: Collection[str], nanoseconds: Mapping[str, float]) -> dict[str, float]:
    """Return nanoseconds by node name of the graph, from nanoseconds by layer name of the engine."""
    found: dict[str, float] = {}
    for reported, spent in nanoseconds.items():
        name = _origin(reported, names)
        found[name] = found.get(name, 0.0) + spent
    return found


def _origin(reported: str, names: Collection[str]) -> str:
    if reported in names or reported.lower().startswith(_COPIES):
        return reported
    words = (each.removeprefix("node_of_") for each in _BETWEEN.split(reported))
    return next((each for each in words if each in names), reported)
