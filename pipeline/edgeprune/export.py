"""A trained module, written as ONNX once; every candidate is cut from this graph, none is exported again.

Batch norms are left standing and parameters keep their module paths as names, so that a plan can slice them and
fine-tuned weights can be put back. The runtime folds the batch norms when it loads the graph.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx.shape_inference
import torch
from onnx import numpy_helper
from torch import nn

from edgeprune.errors import ExportError

OPSET = 18


def export(module: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    """Return the ONNX graph of a module in eval mode, one input "input", one output "output".

    Args:
        module: left as it was.
        example: an input, [1, ...]; its shape is the graph's, fixed.

    Raises:
        ExportError: if PyTorch cannot trace or translate the module.
    """
    from onnxscript import optimizer

    training = module.training
    module.eval()
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
            )
            assert program is not None
            optimizer.fold_constants(program.model)  # alone: the full optimiser would fold batch norms as well
            optimizer.remove_unused_nodes(program.model)
            proto: onnx.ModelProto = program.model_proto
    except Exception as error:  # the exporter raises whatever the user's forward raises
        raise ExportError(
            "the model cannot be exported to ONNX",
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            next_step="make torch.onnx.export(model, (example,), dynamo=True) work first",
        ) from error
    finally:
        module.train(training)
    return _with_own_constants(_named(_stripped(_without_zero_biases(proto))))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks about libraries nobody asked for; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _without_zero_biases(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the zeros the exporter invents as biases of convolutions that have none."""
    zero = {each.name for each in proto.graph.initializer if each.name.startswith("val_") and not _any(each)}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and len(node.input) == 3 and node.input[2] in zero:
            del node.input[2]
    return proto


def _any(tensor: onnx.TensorProto) -> bool:
    return bool(numpy_helper.to_array(tensor).any())


def _stripped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the exporter's notes: they carry stack traces with paths of this machine."""
    graph = proto.graph
    for each in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        each.ClearField("metadata_props")
        each.ClearField("doc_string")
    graph.ClearField("value_info")
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def _named(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Give every node a name; profiles and layer tables speak of nodes by name."""
    seen: set[str] = set()
    for number, node in enumerate(proto.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{number}"
        seen.add(node.name)
    return proto


_SHAPE_INPUTS = {
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "Split": (1,),
    "Expand": (1,),
    "Resize": (1, 2, 3),
}


def _with_own_constants(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Give every node its own copy of the constants that hold sizes, so that one can change without the others."""
    _constants_to_initializers(proto.graph)
    values = {each.name: each for each in proto.graph.initializer}
    for node in proto.graph.node:
        for place in _SHAPE_INPUTS.get(node.op_type, ()):
            if place < len(node.input) and node.input[place] in values:
                own = proto.graph.initializer.add()
                own.CopyFrom(values[node.input[place]])
                own.name = f"{node.name}/{place}"
                node.input[place] = own.name
    used = {name for node in proto.graph.node for name in node.input} | {each.name for each in proto.graph.output}
    kept = [each for each in proto.graph.initializer if each.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    nodes = []
    for node in graph.node:
        tensors = [each.t for each in node.attribute if each.name == "value"] if node.op_type == "Constant" else []
        if not tensors:
            nodes.append(node)
            continue
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensors[0]), node.output[0]))
    if len(nodes) != len(graph.node):
        kept = [onnx.NodeProto.FromString(each.SerializeToString()) for each in nodes]
        del graph.node[:]
        graph.node.extend(kept)
