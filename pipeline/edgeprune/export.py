"""A trained module, written as ONNX once; every candidate is cut from this graph, none is exported again.

Batch norms are left standing and parameters keep their module paths as names, so that a plan can slice them and
fine-tuned weights can be put back. Everything else the graph holds has a name with a slash in it. The runtime folds the
batch norms when it loads the graph.
"""

import inspect
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.shape_inference
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from edgeprune.errors import CorruptArtifact, ModelError
from edgeprune.held import held

OPSET = 18


def export(module: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    """Return the ONNX graph of a module in eval mode, one input "input", one output "output".

    Args:
        module: left as it was.
        example: an input, [1, ...]; its shape is the graph's, fixed. Its strides are not: an axis of one element may
            have any, and the exporter would write them into the graph.

    Raises:
        ModelError: if the module does not run, PyTorch cannot trace or translate it, or it does not map one tensor to
            one tensor.
    """
    try:
        with held(module), _quiet():
            proto = _exported(module, torch.empty(example.shape, dtype=example.dtype).copy_(example))
    except Exception as error:  # the exporter raises whatever the user's forward raises
        raise _refusal(module, example, error) from error
    _check_ends(proto.graph)
    return _cuttable(proto, frozenset(module.state_dict()))


def load_graph(path: Path) -> onnx.ModelProto:
    """Return the ONNX graph of a file.

    Raises:
        CorruptArtifact: if the file is missing, cut short, or holds something else.
    """
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
        onnx.checker.check_model(proto)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CorruptArtifact(
            f"{path.name} is not a whole ONNX graph", why=first, next_step="copy or export the file again"
        ) from error
    return proto


def _exported(module: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    """Return what PyTorch's exporter writes, constants folded but for what is computed from parameters."""
    from onnxscript import optimizer

    parameters = frozenset(module.state_dict())
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

    def fold(model: Any) -> None:
        # Folding alone: the full optimiser would fold batch norms too. A folded parameter could not be put back.
        optimizer.fold_constants(
            model,
            should_fold=lambda node: (
                False if any(i is not None and i.name in parameters for i in node.inputs) else None
            ),
        )
        optimizer.remove_unused_nodes(model)

    fold(program.model)
    return _with_constant_shapes(program.model_proto, fold)


def _with_constant_shapes(proto: onnx.ModelProto, fold: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    """Return the graph with sizes that are computed from static shapes folded too.

    What comes out of a recurrent layer is reshaped to a size read off it, and the exporter does not know its shape;
    ONNX does. Of stacked layers, each fold makes the next one's shape known.
    """
    left, before = _shape_nodes(proto), -1
    while left and left != before:
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        fold(proto)
        left, before = _shape_nodes(proto), left
    return proto


def _shape_nodes(proto: onnx.ModelProto) -> int:
    return sum(node.op_type == "Shape" for node in proto.graph.node)


# -- refusals --------------------------------------------------------------------------------------------------------


def _refusal(module: nn.Module, example: torch.Tensor, error: Exception) -> ModelError:
    """Return what is wrong with the model, given what the exporter raised: it wraps the user's own error in its advice.

    The module must still be in eval mode.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    line = _own_line(error)
    if isinstance(error, GuardOnDataDependentSymNode):
        return ModelError(
            "the model cannot be exported to ONNX",
            why=f"what its forward method does depends on the values it is given, and a graph does not branch{line}",
            next_step="compute both sides and choose with torch.where; no if, .item() or .tolist() on values",
        )
    if _inputs(module) > 1:
        return _one_only(_inputs(module), "input")
    if not _runs(module, example):
        shape = " x ".join(map(str, example.shape))
        return ModelError(
            f"the model does not run on an input of {shape}", why=_first_line(error) + line, next_step=_advice(example)
        )
    return ModelError(
        "the model cannot be exported to ONNX",
        why=_first_line(error) + line,
        next_step="make torch.onnx.export(model, (example,), dynamo=True) work first",
    )


def _own_line(error: BaseException) -> str:
    """Return the innermost line of the user's code that an error came through, in brackets, or nothing."""
    libraries = tuple(sysconfig.get_paths()[each] for each in ("stdlib", "purelib", "platlib"))
    foreign = (*libraries, str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    own = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith(foreign)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else ""


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _inputs(module: nn.Module) -> int:
    """Return how many tensors forward must be given."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    asked = inspect.signature(module.forward).parameters.values()
    return sum(each.kind in positional and each.default is inspect.Parameter.empty for each in asked)


def _runs(module: nn.Module, example: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            module(example)
    except Exception:  # noqa: BLE001 - whatever the user's forward raises
        return False
    return True


def _advice(example: torch.Tensor) -> str:
    if example.dim() == 4 and example.shape[-1] in _COLOURS and example.shape[1] not in _COLOURS:
        return "float arrays are taken as N x C x H x W: transpose(0, 3, 1, 2)"
    return "the model is called in eval mode, with nothing but this tensor: see that it runs"


_COLOURS = (1, 3, 4)


def _one_only(count: int, what: str) -> ModelError:
    return ModelError(
        f"the model has {count} {what}s",
        why="edgeprune cuts models that map one tensor to one tensor",
        next_step=f"wrap the model in a module with one {what}",
    )


def _check_ends(graph: onnx.GraphProto) -> None:
    for ends, what in ((graph.input, "input"), (graph.output, "output")):
        names = [each.name for each in ends]
        if names != [what]:
            raise _one_only(len(names), what)


# -- the form that cutting relies on ---------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks about libraries nobody asked for, and its dumps of graphs; errors still raise.

    Some dumps are logged, some are printed.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # half a dozen of PyTorch's loggers have something to say
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _cuttable(proto: onnx.ModelProto, parameters: Collection[str]) -> onnx.ModelProto:
    """Return the graph in the form that cutting relies on."""
    _drop_notes(proto)
    _name_nodes(proto.graph)
    _constants_to_initializers(proto.graph)
    _fold_views(proto.graph, parameters)
    _drop_zero_biases(proto.graph, parameters)
    _write_split_sizes(proto)
    _give_own_constants(proto.graph, parameters)
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def _drop_notes(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes: they carry stack traces with paths of this machine."""
    graph = proto.graph
    for each in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        each.ClearField("metadata_props")
        each.ClearField("doc_string")
    graph.ClearField("value_info")


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name; profiles and layer tables speak of nodes by name."""
    seen: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{number}"
        seen.add(node.name)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        value = _constant(node.attribute[0]) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
        else:
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    _replace_nodes(graph, kept)


def _constant(attribute: onnx.AttributeProto) -> NDArray[np.generic] | None:
    """Return the value of a Constant node, None if it is text or sparse."""
    if attribute.name == "value":
        return np.asarray(numpy_helper.to_array(attribute.t))
    if attribute.name in ("value_int", "value_ints"):
        return np.array(onnx.helper.get_attribute_value(attribute), dtype=np.int64)
    if attribute.name in ("value_float", "value_floats"):
        return np.array(onnx.helper.get_attribute_value(attribute), dtype=np.float32)
    return None


def _replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(each.SerializeToString()) for each in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _fold_views(graph: onnx.GraphProto, parameters: Collection[str]) -> None:
    """Let parameters that only gain axes of length one (the slopes of a PReLU) have those axes themselves."""
    values = {each.name: each for each in graph.initializer}
    readers = _readers(graph)
    kept = []
    for node in graph.node:
        name = node.input[0] if node.input else ""
        shape = _view(node, values) if name in parameters and len(readers.get(name, ())) == 1 else None
        if shape is None:
            kept.append(node)
            continue
        values[name].dims[:] = shape
        for reader, place in readers[node.output[0]]:
            reader.input[place] = name
    _replace_nodes(graph, kept)


def _view(node: onnx.NodeProto, values: dict[str, onnx.TensorProto]) -> list[int] | None:
    if node.op_type != "Reshape" or node.input[1] not in values:
        return None
    array = numpy_helper.to_array(values[node.input[0]])
    shape = array.reshape(numpy_helper.to_array(values[node.input[1]])).shape
    return list(shape) if [each for each in shape if each > 1] == [each for each in array.shape if each > 1] else None


def _readers(graph: onnx.GraphProto) -> dict[str, list[tuple[onnx.NodeProto, int]]]:
    """Return tensor → the nodes that read it, and the place of their inputs where they do."""
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, place))
    return readers


def _drop_zero_biases(graph: onnx.GraphProto, parameters: Collection[str]) -> None:
    """Drop the zeros that the exporter invents as biases of convolutions that have none."""
    invented = {each.name for each in graph.initializer if each.name not in parameters}
    zero = {each.name for each in graph.initializer if each.name in invented and not numpy_helper.to_array(each).any()}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and len(node.input) == 3 and node.input[2] in zero:
            del node.input[2]


def _write_split_sizes(proto: onnx.ModelProto) -> None:
    """Let every split hold its sizes: without them the runtime would split what is left in equal parts."""
    shapes = _shapes(proto)
    for node in proto.graph.node:
        if node.op_type != "Split" or len(node.input) > 1:
            continue
        axis = next((each.i for each in node.attribute if each.name == "axis"), 0)
        sizes = np.array([shapes[name][axis] for name in node.output], dtype=np.int64)
        proto.graph.initializer.append(numpy_helper.from_array(sizes, f"{node.name}/1"))
        node.input.append(f"{node.name}/1")
        kept = [each for each in node.attribute if each.name != "num_outputs"]
        del node.attribute[:]
        node.attribute.extend(kept)


def _shapes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    values = (*graph.value_info, *graph.output)
    return {each.name: tuple(d.dim_value for d in each.type.tensor_type.shape.dim) for each in values}


def _give_own_constants(graph: onnx.GraphProto, parameters: Collection[str]) -> None:
    """Give every node its own copy of each constant that is no parameter: one can change without the others."""
    values = {each.name: each for each in graph.initializer}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in values and name not in parameters:
                own = onnx.TensorProto()
                own.CopyFrom(values[name])
                own.name = f"{node.name}/{place}"
                values[own.name] = own
                node.input[place] = own.name
    used = {name for node in graph.node for name in node.input} | {each.name for each in graph.output}
    kept = [each for name, each in values.items() if name in used]
    copies = [onnx.TensorProto.FromString(each.SerializeToString()) for each in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies)
