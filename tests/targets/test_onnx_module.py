"""A graph as a PyTorch module computes what ONNX Runtime computes: every family, and every operator in odd forms."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from families import FAMILIES, gap, plan_of, prepared, run_graph
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeprune.cut import GraphCutter
from edgeprune.targets._onnx_module import OnnxModule, UnsupportedError
from edgeprune.targets._typed_onnx import typed

TOLERANCE = 1e-5
"""Largest difference of outputs, relative to the largest output: float32 sums in another order differ by about 1e-7."""


def answers(graph: onnx.ModelProto, *given: torch.Tensor) -> list[np.ndarray]:
    with torch.inference_mode():
        return [each.numpy() for each in OnnxModule(graph)(*given)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_as_in_onnxruntime(name: str) -> None:
    """Unpruned, cut to half, and in float16."""
    family = prepared(name)
    groups = family.structure.space.groups
    widths = {group.name: [each for each in group.choices if each][len(group.choices) // 2 - 1] for group in groups}
    cut = GraphCutter(family.graph, family.structure).cut(plan_of(family.structure.space, widths))
    for graph in (family.graph, cut):
        assert gap(answers(graph, family.example)[0], run_graph(graph, family.example)) < TOLERANCE
    half = typed(cut, "fp16")
    assert gap(answers(half, family.example)[0], run_graph(cut, family.example)) < 5e-3


@pytest.mark.parametrize("name", ["resnet", "recurrent", "vit"])
def test_what_it_is_made_of_can_be_exported(name: str) -> None:
    """The straight line that AOTInductor compiles."""
    family = prepared(name)
    with torch.no_grad():
        program = torch.export.export(OnnxModule(family.graph).eval(), (family.example,))
        found = program.module()(family.example)[0].numpy()
    assert gap(found, run_graph(family.graph, family.example)) < TOLERANCE


# -- operators -------------------------------------------------------------------------------------------------------


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, np.ndarray],
    constants: Mapping[str, Any] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(each.dtype), each.shape)
            for name, each in inputs.items()
        ],
        [helper.make_value_info(name, onnx.TypeProto()) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def same(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], rtol: float = 1e-4) -> None:
    """Fail unless ONNX Runtime, which knows nothing of the module, gives the same."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = session.run(None, dict(inputs))
    found = answers(model, *(torch.from_numpy(each) for each in inputs.values()))
    for seen, right in zip(found, wanted, strict=True):
        assert (seen.shape, seen.dtype) == (right.shape, right.dtype)
        np.testing.assert_allclose(seen, right, rtol=rtol, atol=1e-5)


def check(
    op: str, x: np.ndarray, constants: Mapping[str, Any] | None = None, *, opset: int = 18, **attributes: Any
) -> None:
    """Compare one node with input x and constants in order."""
    node = helper.make_node(op, ["x", *(constants or {})], ["y"], op.lower(), **attributes)
    same(model_of([node], {"x": x}, constants, opset=opset), {"x": x})


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PADS = st.lists(st.integers(0, 2), min_size=4, max_size=4)


@settings(max_examples=25)
@given(
    pads=PADS,
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    auto=st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
)
def test_convolutions(pads, kernel, stride, dilation, groups, auto) -> None:
    assume(auto == "NOTSET" or dilation == 1)
    given_pads = {"pads": pads} if auto == "NOTSET" else {"auto_pad": auto}
    weights = {"w": normal(4, 4 // groups, *kernel, seed=1), "b": normal(4, seed=2)}
    attributes = {"strides": [stride] * 2, "dilations": [dilation] * 2, "group": groups} | given_pads
    check("Conv", normal(1, 4, 7, 6), weights, **attributes)


@settings(max_examples=15)
@given(pads=PADS, stride=st.integers(1, 3), more=st.integers(0, 1), groups=st.sampled_from([1, 2]))
def test_transposed_convolutions(pads, stride, more, groups) -> None:
    assume(more < stride)
    weights = {"w": normal(4, 3, 3, 3, seed=1), "b": normal(3 * groups, seed=2)}
    check(
        "ConvTranspose",
        normal(1, 4, 5, 6),
        weights,
        strides=[stride] * 2,
        pads=pads,
        output_padding=[more] * 2,
        group=groups,
    )


@settings(max_examples=25)
@given(
    op=st.sampled_from(["MaxPool", "AveragePool"]),
    pads=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    stride=st.integers(1, 2),
    counted=st.booleans(),
)
def test_pooling(op, pads, stride, counted) -> None:
    more = {"count_include_pad": int(counted)} if op == "AveragePool" else {}
    check(op, normal(1, 3, 7, 6), kernel_shape=[3, 2], strides=[stride] * 2, pads=pads, **more)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pooling_that_rounds_up(op: str) -> None:
    check(op, normal(1, 3, 8, 8), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)


@settings(max_examples=40)
@given(
    start=st.integers(-8, 8),
    end=st.one_of(st.integers(-8, 8), st.just(2**62), st.just(-(2**62))),
    step=st.sampled_from([-3, -1, 1, 2]),
    axis=st.sampled_from([0, 1, -1]),
)
def test_slices(start, end, step, axis) -> None:
    x = normal(5, 6)
    wanted = x[(slice(None),) * (axis % 2) + (slice(start, None if end == -(2**62) else end, step),)]
    assume(wanted.size)
    ends = {"starts": start, "ends": end, "axes": axis, "steps": step}
    check("Slice", x, {name: np.int64([value]) for name, value in ends.items()})


@pytest.mark.parametrize(
    ("op", "constants", "attributes"),
    [
        ("Reshape", {"s": np.int64([0, -1])}, {}),
        ("Flatten", {}, {"axis": 2}),
        ("Flatten", {}, {"axis": 0}),
        ("Transpose", {}, {}),
        ("Transpose", {}, {"perm": [0, 2, 1, 3]}),
        ("Unsqueeze", {"a": np.int64([0, -1])}, {}),
        ("Squeeze", {"a": np.int64([0])}, {}),
        ("Squeeze", {}, {}),
        ("Expand", {"s": np.int64([2, 1, 1, 4])}, {}),
        ("Gather", {"i": np.int64([[0, -1], [2, 1]])}, {"axis": 1}),
        ("Gather", {"i": np.int64(1)}, {"axis": -1}),
        ("Pad", {"p": np.int64([0, 1, 2, 0, 1, 0, 0, 3]), "v": np.float32(7)}, {}),
        ("Pad", {"p": np.int64([0, 0, 1, 2, 0, 0, 2, 1])}, {"mode": "reflect"}),
        ("Pad", {"p": np.int64([0, 0, 1, 2, 0, 0, 2, 1])}, {"mode": "edge"}),
        ("Shape", {}, {}),
        ("Split", {"s": np.int64([1, 2])}, {"axis": 1}),
        ("Softmax", {}, {"axis": 1}),
        ("LogSoftmax", {}, {}),
        ("ReduceMean", {"a": np.int64([1, -1])}, {"keepdims": 0}),
        ("ReduceMean", {}, {}),
        ("ReduceMax", {"a": np.int64([2])}, {}),
        ("ReduceL2", {"a": np.int64([2])}, {}),
        ("ReduceSum", {}, {"noop_with_empty_axes": 1}),
        ("Clip", {"low": np.float32(-0.5), "high": np.float32(0.5)}, {}),
        ("Clip", {"low": np.float32(0)}, {}),
        ("LeakyRelu", {}, {"alpha": 0.3}),
        ("Elu", {}, {"alpha": 0.7}),
        ("Celu", {}, {"alpha": 0.7}),
        ("PRelu", {"slope": np.float32([[[0.1]], [[0.2]], [[0.3]]])}, {}),
        ("HardSigmoid", {}, {"alpha": 0.3, "beta": 0.4}),
        ("BatchNormalization", {n: np.abs(normal(3, seed=at)) + 0.1 for at, n in enumerate("smvw")}, {"epsilon": 1e-3}),
        ("InstanceNormalization", {"s": normal(3, seed=1), "b": normal(3, seed=2)}, {}),
        ("LayerNormalization", {"s": normal(5, 4, seed=1), "b": normal(5, 4, seed=2)}, {"axis": -2}),
        ("Max", {"c": np.float32([0.1])}, {}),
        ("Min", {"c": np.float32([0.1])}, {}),
        ("Cast", {}, {"to": TensorProto.INT32}),
        ("Cast", {}, {"to": TensorProto.DOUBLE}),
        ("GlobalMaxPool", {}, {}),
        ("GlobalAveragePool", {}, {}),
        *((op, {}, {}) for op in "HardSwish Selu Softplus Softsign Mish Erf Exp Abs Neg Floor Ceil Round Tanh".split()),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_operators(op: str, constants: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    outputs = ["y", "z"] if op == "Split" else ["y"]
    node = helper.make_node(op, ["x", *constants], outputs, op.lower(), **attributes)
    x = normal(1, 3, 5, 4)
    same(model_of([node], {"x": x}, constants, outputs), {"x": x})


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu(form: str) -> None:
    check("Gelu", normal(3, 4), opset=20, approximate=form)


def test_whole_numbers_divide_towards_zero() -> None:
    check("Div", np.int64([7, -7, 6]), {"d": np.int64([2, 2, -4])})


@pytest.mark.parametrize("attributes", [{}, {"transA": 1}, {"alpha": 0.5, "beta": 2.0}, {"transB": 1}], ids=str)
def test_gemm(attributes: Mapping[str, Any]) -> None:
    x = normal(4, 4)
    check("Gemm", x, {"w": normal(4, 4, seed=1), "c": normal(4, seed=2)}, **attributes)


RESIZE = {"roi": np.float32([]), "scales": np.float32([1, 1, 2, 1.5])}


@pytest.mark.parametrize(
    "attributes",
    [
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ],
    ids=str,
)
def test_resizing_by_a_factor_and_to_a_size(attributes: Mapping[str, Any]) -> None:
    check("Resize", normal(1, 2, 4, 6), RESIZE, **attributes)
    sizes = {"roi": np.float32([]), "none": np.float32([]), "sizes": np.int64([1, 2, 7, 5])}
    check("Resize", normal(1, 2, 4, 6), sizes, **attributes)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(op: str, gates: int, direction: str) -> None:
    """Every output, with a bias, with a state to start from."""
    count, hidden = (2 if direction == "bidirectional" else 1), 3
    constants = {
        "w": normal(count, gates * hidden, 4, seed=1),
        "r": normal(count, gates * hidden, hidden, seed=2),
        "b": normal(count, 2 * gates * hidden, seed=3),
        "h": normal(count, 1, hidden, seed=4),
    }
    outputs = ["y", "last", *(["cell"] if op == "LSTM" else [])]
    more = {"linear_before_reset": 1} if op == "GRU" else {}
    inputs = ["x", "w", "r", "b", "", "h"]
    node = helper.make_node(op, inputs, outputs, "cell_of", hidden_size=hidden, direction=direction, **more)
    x = normal(5, 1, 4)
    same(model_of([node], {"x": x}, constants, outputs), {"x": x})


def test_what_depends_on_constants_alone_is_computed_once() -> None:
    """A weight that is put together in the graph is put together when the module is made."""
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["w"], "join", axis=0),
        helper.make_node("MatMul", ["x", "w"], ["y"], "product"),
    ]
    model = model_of(nodes, {"x": normal(2, 4)}, {"a": normal(1, 3), "b": normal(3, 3, seed=1)})
    assert OnnxModule(model).names == ["product"]
    same(model, {"x": normal(2, 4)})


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "attributes", "constants", "said"),
    [
        ("Einsum", {"equation": "ab->ba"}, {}, "not taught the operator Einsum"),
        ("Resize", {"mode": "cubic"}, RESIZE, "mode cubic"),
        ("Resize", {"mode": "nearest"}, RESIZE, "half_pixel"),
        ("ConvTranspose", {"auto_pad": "SAME_UPPER"}, {"w": normal(2, 2, 3, 3)}, "auto_pad"),
        ("Pad", {"mode": "wrap"}, {"p": np.int64([0] * 8)}, "mode wrap"),
        ("AveragePool", {"kernel_shape": [2, 2], "dilations": [2, 2]}, {}, "dilations"),
    ],
    ids=str,
)
def test_a_form_without_a_function_is_refused_by_name(op, attributes, constants, said: str) -> None:
    node = helper.make_node(op, ["x", *constants], ["y"], "odd", **attributes)
    with pytest.raises(UnsupportedError, match=said) as refusal:
        OnnxModule(model_of([node], {"x": normal(1, 2, 4, 6)}, constants))
    assert "odd" in str(refusal.value)


def test_a_shape_that_is_computed_is_refused_by_name() -> None:
    nodes = [
        helper.make_node("Cast", ["n"], ["shape"], "whole", to=TensorProto.INT64),
        helper.make_node("Reshape", ["x", "shape"], ["y"], "late"),
    ]
    with pytest.raises(UnsupportedError, match=r"late \(Reshape\) computes its input 1"):
        OnnxModule(model_of(nodes, {"x": normal(2, 2), "n": normal(1)}))
