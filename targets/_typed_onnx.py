"""The precision of an engine, written into its ONNX graph: float16 tensors, or Q/DQ pairs around what runs in INT8.

TensorRT 11 takes precision from the graph alone, 10 does with STRONGLY_TYPED, and 8 wants a flag as permission on top;
the same typed graph serves all of them. Inputs and outputs stay float32.

    fp16    x ─Cast─▶ float16 weights and activations ─Cast─▶ y
    int8    x ─Q─DQ─▶ Conv ◀─DQ─Q─ w      around Conv, ConvTranspose, Gemm, MatMul by a constant; the rest is float32

Batch norms are folded into the convolutions before them first, because a Q/DQ pair must see the weight that is
multiplied, and a float16 weight loses less if it is rounded once. Q/DQ pairs follow what TensorRT can fuse: symmetric
INT8 with zero point 0; weights per output channel, activations per tensor; biases left in float; what comes out of a
convolution not quantised, so that addition and activation fuse behind it; the other operand of such an addition read
through its Q/DQ pair, if it has one.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from edgeprune.artifact import Artifact
from edgeprune.errors import CompileError, DeviceLost, EdgepruneError, ProfileError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRECISIONS = ("fp32", "fp16", "int8")

SAMPLES = 8
"""Seeded random inputs that ranges are taken from when nobody gives real ones."""

HALF_MAX = 65504.0
"""Largest finite float16."""

SMALLEST_RANGE = 1e-30
"""A float32 step of a smaller range would be zero."""

_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16
_STILL_FLOAT = {"Resize": (2,)}
"""Operator → places of inputs that the standard wants in float32 whatever the type of the data."""

_FLOAT_ONLY = {"Range", "CumSum", "NonMaxSuppression", "Multinomial", "Bernoulli", "STFT", "MelWeightMatrix"}
"""Operators whose float32 cannot become float16, by the standard or because sums would overflow."""

_SHORTAGES = ("failed to allocate", "bad_alloc", "out of memory", "cannot allocate memory")
"""What ONNX Runtime and the C++ library say when the machine has no memory left."""

_WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": -1}
"""Quantised operator → the axis of the output channels in its weight."""


def typed(
    graph: onnx.ModelProto, precision: str, calibration: "Iterable[Mapping[str, NDArray[Any]]] | None" = None
) -> onnx.ModelProto:
    """Return the graph in `precision`, one of `PRECISIONS`; "fp32" is the graph itself, the others are copies.

    Args:
        graph: with static shapes, weights inside, float32.
        precision: of the arithmetic.
        calibration: inputs by name that the ranges of INT8 activations are taken from. None or empty: seeded
            standard normal inputs, which give the latency of the engine but say nothing about its accuracy.

    Raises:
        ProfileError: if the precision is unknown.
        CompileError: if the graph has subgraphs, or ONNX Runtime cannot run it to see its ranges.
        DeviceLost: if this machine has no memory left for that.
    """
    if precision not in PRECISIONS:
        raise ProfileError(
            f"unknown precision {precision!r}", next_step=f"set precision to one of {', '.join(PRECISIONS)}"
        )
    if precision == "fp32":
        return graph
    model = onnx.ModelProto.FromString(graph.SerializeToString())
    _refuse_subgraphs(model.graph)
    _fold_batch_norms(model.graph)
    if precision == "fp16":
        _to_half(model)
    else:
        _quantise(model, calibration)
    del model.graph.value_info[:]  # it speaks of the types before
    return model


def _refuse_subgraphs(graph: onnx.GraphProto) -> None:
    kinds = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    for node in graph.node:
        if any(each.type in kinds for each in node.attribute):
            raise CompileError(
                f"node {node.name} ({node.op_type}) has subgraphs",
                why="their precision cannot be set",
                next_step="export the model without control flow, or use precision fp32",
            )


# -- batch norm ------------------------------------------------------------------------------------------------------


def _fold_batch_norms(graph: onnx.GraphProto) -> None:
    """Multiply every batch norm that alone reads a convolution into its weight and bias, which become copies."""
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = _readers(graph)
    gone = []
    for norm in graph.node:
        conv = makers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is None or conv.op_type not in ("Conv", "ConvTranspose") or readers[conv.output[0]] != 1:
            continue
        if not all(name in values for name in (*norm.input[1:5], *conv.input[1:])):
            continue
        weight, bias = _folded(conv, norm, values)
        names = [f"{conv.output[0]}/weight", f"{conv.output[0]}/bias"]
        graph.initializer.extend(map(numpy_helper.from_array, (weight, bias), names))
        del conv.input[1:]
        conv.input.extend(names)
        conv.output[0] = norm.output[0]
        gone.append(norm)
    for each in gone:
        graph.node.remove(each)
    _drop_unread(graph)


def _folded(
    conv: onnx.NodeProto, norm: onnx.NodeProto, values: "Mapping[str, NDArray[Any]]"
) -> "tuple[NDArray[Any], NDArray[Any]]":
    """Return the weight and the bias of ``norm(conv(x))`` as one convolution."""
    scale, shift, mean, variance = (values[each].astype(np.float64) for each in norm.input[1:5])
    weight = values[conv.input[1]].astype(np.float64)
    bias = values[conv.input[2]].astype(np.float64) if len(conv.input) > 2 and conv.input[2] else 0.0
    factor = scale / np.sqrt(variance + _attribute(norm, "epsilon", 1e-5))
    if conv.op_type == "Conv":
        weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    else:  # [inputs, outputs / groups, ...]: the rows of one group of inputs make one group of outputs
        groups = _attribute(conv, "group", 1)
        by_group = weight.reshape(groups, -1, *weight.shape[1:])
        weight = (by_group * factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)
    return weight.astype(np.float32), ((bias - mean) * factor + shift).astype(np.float32)


def _readers(graph: onnx.GraphProto) -> dict[str, int]:
    """Return tensor → how often it is read, being an output of the graph included."""
    count: dict[str, int] = {}
    for name in (*(name for node in graph.node for name in node.input), *(each.name for each in graph.output)):
        count[name] = count.get(name, 0) + 1
    return count


def _drop_unread(graph: onnx.GraphProto) -> None:
    readers = _readers(graph)
    for each in [each for each in graph.initializer if each.name not in readers]:
        graph.initializer.remove(each)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


# -- float16 ---------------------------------------------------------------------------------------------------------


def _to_half(model: onnx.ModelProto) -> None:
    """Make every float32 tensor between the inputs and the outputs float16."""
    graph, floats = model.graph, _floats(model)
    _split_kept(graph)
    kept = {name for node in graph.node for name in _kept_inputs(node)}
    for each in graph.initializer:
        if each.data_type == _FLOAT and each.name not in kept:
            each.CopyFrom(numpy_helper.from_array(_half(numpy_helper.to_array(each)), each.name))
    for node in graph.node:
        _half_attributes(node)
    _cast_around(graph, floats)
    _cast_ends(graph)


def _half(value: "NDArray[Any]") -> "NDArray[Any]":
    """Return the values in float16; finite ones stay finite."""
    clipped = np.where(np.isfinite(value), np.clip(value, -HALF_MAX, HALF_MAX), value)
    half: NDArray[Any] = clipped.astype(np.float16)
    return half


def _kept_inputs(node: onnx.NodeProto) -> list[str]:
    """Return the inputs of a node that stay float32."""
    return [node.input[place] for place in _STILL_FLOAT.get(node.op_type, ()) if place < len(node.input)]


def _split_kept(graph: onnx.GraphProto) -> None:
    """Give constants that stay float32 names of their own."""
    values = {each.name: each for each in graph.initializer}
    for node in graph.node:
        for place in _STILL_FLOAT.get(node.op_type, ()):
            name = node.input[place] if place < len(node.input) else ""
            if name in values:
                own = graph.initializer.add()
                own.CopyFrom(values[name])
                own.name = node.input[place] = f"{node.name}/{node.output[0]}/{place}"
    _drop_unread(graph)


def _half_attributes(node: onnx.NodeProto) -> None:
    """Let a constant, or a cast to float32, be one of float16."""
    for each in node.attribute:
        if each.type == onnx.AttributeProto.TENSOR and each.t.data_type == _FLOAT:
            each.t.CopyFrom(numpy_helper.from_array(_half(numpy_helper.to_array(each.t)), each.t.name))
        elif node.op_type == "Constant" and each.name in ("value_float", "value_floats"):
            value = _half(np.array(helper.get_attribute_value(each), np.float32))
            each.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(value)))
        elif node.op_type == "Cast" and each.name == "to" and each.i == _FLOAT:
            each.i = _HALF


def _floats(model: onnx.ModelProto) -> set[str]:
    """Return the float32 tensors of a graph that has an operator without float16; nobody asks for them elsewhere."""
    if not any(node.op_type in _FLOAT_ONLY for node in model.graph.node):
        return set()
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    named = {each.name for each in values if each.type.tensor_type.elem_type == _FLOAT}
    return named | {each.name for each in graph.initializer if each.data_type == _FLOAT}


def _cast_around(graph: onnx.GraphProto, floats: set[str]) -> None:
    """Let operators that have no float16 work on float32 between two casts."""
    nodes = []
    for node in graph.node:
        if node.op_type not in _FLOAT_ONLY:
            nodes.append(node)
            continue
        casts = {name: f"{node.output[0]}/{name}/float32" for name in node.input if name in floats}
        results = {name: f"{name}/float32" for name in node.output if name in floats}
        nodes += [_cast(name, own, _FLOAT) for name, own in casts.items()]
        node.input[:] = [casts.get(name, name) for name in node.input]
        node.output[:] = [results.get(name, name) for name in node.output]
        nodes += [node, *(_cast(own, name, _HALF) for name, own in results.items())]
    _replace_nodes(graph, nodes)


def _cast_ends(graph: onnx.GraphProto) -> None:
    """Keep float32 inputs and outputs, and cast behind the ones and before the others."""
    before, after = [], []
    for each in graph.input:
        if each.type.tensor_type.elem_type == _FLOAT:
            before.append(_cast(each.name, f"{each.name}/float16", _HALF))
            _rename(graph, each.name, f"{each.name}/float16")
    for each in graph.output:
        if each.type.tensor_type.elem_type == _FLOAT:
            after.append(_cast(f"{each.name}/float16", each.name, _FLOAT))
            _rename(graph, each.name, f"{each.name}/float16")
    _replace_nodes(graph, [*before, *graph.node, *after])


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new


def _cast(source: str, result: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], f"{source}/{result}/cast", to=kind)


def _replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(each.SerializeToString()) for each in nodes]
    del graph.node[:]
    graph.node.extend(copies)


# -- int8 ------------------------------------------------------------------------------------------------------------


def _quantise(model: onnx.ModelProto, calibration: "Iterable[Mapping[str, NDArray[Any]]] | None") -> None:
    """Put Q/DQ pairs before the operators that multiply by a weight."""
    graph = model.graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    weighted = [node for node in graph.node if _multiplies(node, values)]
    wanted = dict.fromkeys(node.input[0] for node in weighted)
    largest = _largest(model, list(wanted), calibration or _random_inputs(graph))
    pairs = _Pairs(graph)
    for node in weighted:
        weight = values[node.input[1]]
        axis, scales = _channel_scales(node, weight)
        node.input[0] = pairs.of(node.input[0], np.array(_scale(largest[node.input[0]]), np.float32))
        node.input[1] = pairs.of(node.input[1], scales, axis)
    _share_with_additions(graph, weighted, pairs)
    _replace_nodes(graph, _in_order(graph, pairs))


def _multiplies(node: onnx.NodeProto, values: "Mapping[str, NDArray[Any]]") -> bool:
    """Return whether a node multiplies what it is given by a constant weight, and by nothing else."""
    if node.op_type not in _WEIGHTED or node.input[1] not in values or node.input[0] in values:
        return False
    plain = node.op_type != "Gemm" or (_attribute(node, "transA", 0) == 0 and _attribute(node, "alpha", 1.0) == 1.0)
    return plain and values[node.input[1]].dtype == np.float32 and values[node.input[1]].ndim >= 2


def _channel_scales(node: onnx.NodeProto, weight: "NDArray[Any]") -> "tuple[int | None, NDArray[Any]]":
    """Return the axis of the output channels and one scale for each, or None and one scale for all of them."""
    axis = _WEIGHTED[node.op_type] % weight.ndim
    if node.op_type == "Gemm" and _attribute(node, "transB", 0):
        axis = 0
    if node.op_type == "ConvTranspose" and _attribute(node, "group", 1) > 1:
        return None, np.array(_scale(float(np.abs(weight).max())), np.float32)  # an output channel lies in many rows
    others = tuple(each for each in range(weight.ndim) if each != axis)
    return axis, np.array([_scale(float(each)) for each in np.abs(weight).max(axis=others)], np.float32)


def _scale(largest: float) -> float:
    """Return the step of INT8 that reaches from -127 to 127; what is always zero gets one that loses nothing."""
    return largest / 127 if largest > SMALLEST_RANGE else 1.0


class _Pairs:
    """The Q/DQ pairs of a graph, one a tensor, however many nodes read it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self.made: dict[str, tuple[onnx.NodeProto, onnx.NodeProto]] = {}

    def of(self, name: str, scale: "NDArray[Any]", axis: int | None = None) -> str:
        """Return the name of a tensor read through its Q/DQ pair, which is made if it is missing."""
        if name not in self.made:
            names = [name, f"{name}/scale", f"{name}/zero_point"]
            self._graph.initializer.append(numpy_helper.from_array(scale, names[1]))
            self._graph.initializer.append(numpy_helper.from_array(np.zeros(scale.shape, np.int8), names[2]))
            down = helper.make_node("QuantizeLinear", names, [f"{name}/int8"], f"{name}/q")
            up = helper.make_node("DequantizeLinear", [f"{name}/int8", *names[1:]], [f"{name}/dq"], f"{name}/dq")
            for node in (down, up) if axis is not None else ():
                node.attribute.append(helper.make_attribute("axis", axis))
            self.made[name] = (down, up)
        return f"{name}/dq"


def _share_with_additions(graph: onnx.GraphProto, weighted: Sequence[onnx.NodeProto], pairs: _Pairs) -> None:
    """Let additions to a convolution read their other operand through the pair it has: TensorRT fuses both then."""
    sums = {node.output[0] for node in weighted}
    for node in graph.node:
        if node.op_type == "Add" and any(name in sums for name in node.input):
            for place, name in enumerate(node.input):
                if name in pairs.made and name not in sums:
                    node.input[place] = f"{name}/dq"


def _in_order(graph: onnx.GraphProto, pairs: _Pairs) -> list[onnx.NodeProto]:
    """Return all nodes, each pair as soon as what it reads is there."""
    ready = [each.name for each in (*graph.initializer, *graph.input)]
    nodes = [node for name in ready for node in pairs.made.get(name, ())]
    for node in graph.node:
        nodes += [node, *(each for name in node.output for each in pairs.made.get(name, ()))]
    return nodes


def _random_inputs(graph: onnx.GraphProto) -> "Iterable[Mapping[str, NDArray[Any]]]":
    """Yield seeded standard normal inputs; zeros for whole numbers, because an index must stay in range."""
    generator = np.random.default_rng(0)
    constants = {each.name for each in graph.initializer}
    specs = [each for each in graph.input if each.name not in constants]
    for _ in range(SAMPLES):
        given = {}
        for each in specs:
            shape = [size.dim_value for size in each.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(each.type.tensor_type.elem_type)
            noise = generator.standard_normal(shape) if dtype.kind == "f" else np.zeros(shape)
            given[each.name] = noise.astype(dtype)
        yield given


def _largest(
    model: onnx.ModelProto, names: Sequence[str], samples: "Iterable[Mapping[str, NDArray[Any]]]"
) -> dict[str, float]:
    """Return tensor → largest magnitude seen over the samples, computed by ONNX Runtime on one thread."""
    seen = dict.fromkeys(names, 0.0)
    try:
        session = _watching(model, names)
        inputs = {each.name for each in session.get_inputs()}
        others = [name for name in names if name not in inputs]
        for sample in samples:
            found = {name: np.asarray(sample[name]) for name in names if name in inputs}
            found |= zip(others, session.run(others, dict(sample)) if others else [], strict=True)
            for name, value in found.items():
                seen[name] = max(seen[name], float(np.abs(value).max(initial=0.0)))
    except Exception as error:  # its exceptions share no base class
        raise _refusal(error) from error
    return seen


def _watching(model: onnx.ModelProto, names: Sequence[str]) -> Any:
    """Return a session that also gives out the named tensors."""
    import onnxruntime  # only INT8 needs to run anything

    opened = onnx.ModelProto.FromString(model.SerializeToString())
    already = {each.name for each in (*opened.graph.output, *opened.graph.input)}
    opened.graph.output.extend(
        helper.make_tensor_value_info(each, _FLOAT, None) for each in names if each not in already
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(opened.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _refusal(error: Exception) -> EdgepruneError:
    """Return what it means that ONNX Runtime did not run the graph: a host without memory is no broken candidate."""
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError) or any(each in why.lower() for each in _SHORTAGES):
        advice = "end what else uses the memory, then run the command again"
        return DeviceLost("this machine ran short of memory while taking INT8 ranges", why=why, next_step=advice)
    return CompileError("the ranges of the activations cannot be taken", why=f"ONNX Runtime refused: {why}")


# -- files -----------------------------------------------------------------------------------------------------------


def read_graph(graph: Artifact) -> onnx.ModelProto:
    """Return the graph of a file.

    Raises:
        CorruptArtifact: if the file is missing or changed since it was hashed.
        CompileError: if it holds no whole graph.
    """
    graph.check()
    try:
        model = onnx.load_model_from_string(graph.path.read_bytes())
    except (DecodeError, OSError) as error:
        raise CompileError(
            f"{graph.path.name} is not a whole ONNX graph",
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            next_step="export the graph again, all of it in one file",
        ) from error
    if not model.graph.output:
        raise CompileError(f"{graph.path.name} is not a whole ONNX graph", why="it has no output")
    return model
