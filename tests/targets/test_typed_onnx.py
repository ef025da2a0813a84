"""Typed graphs compute what the float32 graph computes, and are typed as TensorRT wants them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from families import FAMILIES, gap, plan_of, prepared, run_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeprune.cut import GraphCutter
from edgeprune.errors import CompileError, ProfileError
from edgeprune.targets._typed_onnx import HALF_MAX, typed

TOLERANCE = {"fp16": 5e-3, "int8": 0.1}
"""Largest difference of outputs, relative to the largest: seen were 0.0009 and 0.051."""


def narrowest(name: str) -> onnx.ModelProto:
    """Return the family's graph with every group at its fewest channels."""
    family = prepared(name)
    widths = {group.name: min(each for each in group.choices if each) for group in family.structure.space.groups}
    return GraphCutter(family.graph, family.structure).cut(plan_of(family.structure.space, widths))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_as_in_float32(name: str, precision: str) -> None:
    """Unpruned and narrowest, valid by the checker, in and out float32, the original left as it was."""
    family = prepared(name)
    for graph in (family.graph, narrowest(name)):
        before = graph.SerializeToString()
        model = typed(graph, precision)
        onnx.checker.check_model(model, full_check=True)
        assert gap(run_graph(model, family.example), run_graph(graph, family.example)) < TOLERANCE[precision]
        assert [each.type.tensor_type.elem_type for each in (*model.graph.input, *model.graph.output)] == [1, 1]
        assert graph.SerializeToString() == before


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Return tensor → element type."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.value_info, *graph.output)}
    return found | {each.name: each.data_type for each in graph.initializer}


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "unet", "groupnorm", "recurrent", "vit"])
def test_nothing_between_the_ends_of_a_float16_graph_is_float32(name: str) -> None:
    """But for the scales of a resize, which the standard wants so."""
    model = typed(prepared(name).graph, "fp16")
    ends = {each.name for each in (*model.graph.input, *model.graph.output)}
    scales = {node.input[2] for node in model.graph.node if node.op_type == "Resize" and len(node.input) > 2}
    assert {key for key, kind in types(model).items() if kind == TensorProto.FLOAT} <= ends | scales
    assert [node.op_type for node in model.graph.node].count("Cast") == 2


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "grouped_transpose", "vit"])
def test_int8_is_symmetric_and_covers_every_weight(name: str) -> None:
    """Weights per channel, activations per tensor, zero point 0, biases and outputs in float."""
    model = typed(prepared(name).graph, "int8")
    values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    weighted = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm")]
    for node in weighted:
        data, weight = (makers[each] for each in node.input[:2])
        assert data.op_type == weight.op_type == "DequantizeLinear"
        assert values[data.input[1]].shape == ()
        grouped = node.op_type == "ConvTranspose" and helper.get_node_attr_value(node, "group") > 1
        channels = values[makers[weight.input[0]].input[0]].shape[0]
        assert values[weight.input[1]].shape == (() if grouped else (channels,))
        assert all(values[each].dtype == np.float32 for each in node.input[2:])
    assert weighted
    assert not any(values[node.input[2]].any() for node in model.graph.node if node.op_type == "QuantizeLinear")


def test_a_residual_is_added_through_the_pair_it_already_has() -> None:
    """The skip is quantised for the next convolution anyway; what the branch computes is not."""
    model = typed(prepared("resnet").graph, "int8")
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    operands = [sorted(makers[each] for each in node.input) for node in model.graph.node if node.op_type == "Add"]
    assert operands.count(["Conv", "DequantizeLinear"]) == 3
    assert operands.count(["Conv", "Conv"]) == 1


def test_float32_is_the_graph_itself() -> None:
    graph = prepared("vgg").graph
    assert typed(graph, "fp32") is graph


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_same_graph_gives_the_same_bytes(precision: str) -> None:
    """An engine is known by the hash of its graph."""
    graph = prepared("resnet").graph
    first, second = (typed(graph, precision).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


# -- small graphs with known answers ---------------------------------------------------------------------------------


def model_of(
    nodes: list[onnx.NodeProto], x: tuple[int, ...], constants: Mapping[str, Any], kind: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    """Return a graph from "x" to "y"."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", kind, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(x))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def answer(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


NORM = ["scale", "shift", "mean", "variance"]


@settings(max_examples=20)
@given(
    groups=st.sampled_from([1, 2, 4]),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    transposed=st.booleans(),
    biased=st.booleans(),
)
def test_a_folded_batch_norm_computes_the_same(
    groups: int, inputs: int, outputs: int, transposed: bool, biased: bool
) -> None:
    """Any number of groups, forward and transposed, with and without a bias of the convolution."""
    rows, columns = (groups * inputs, outputs) if transposed else (groups * outputs, inputs)
    constants = {"w": normal(rows, columns, 3, 3)} | ({"b": normal(groups * outputs, seed=6)} if biased else {})
    constants |= {name: np.abs(normal(groups * outputs, seed=place)) + 0.1 for place, name in enumerate(NORM)}
    conv = helper.make_node(
        "ConvTranspose" if transposed else "Conv", ["x", "w", *(["b"] if biased else [])], ["c"], "conv", group=groups
    )
    norm = helper.make_node("BatchNormalization", ["c", *NORM], ["y"], "norm", epsilon=1e-3)
    model = model_of([conv, norm], (1, groups * inputs, 5, 5), constants)
    half = typed(model, "fp16")
    assert [node.op_type for node in half.graph.node].count("BatchNormalization") == 0
    x = normal(1, groups * inputs, 5, 5, seed=9)
    np.testing.assert_allclose(answer(half, x), answer(model, x), rtol=0.02, atol=0.02)


def test_a_batch_norm_whose_input_is_read_elsewhere_stays() -> None:
    constants = {"w": normal(4, 4, 1, 1)} | {name: np.abs(normal(4)) + 0.1 for name in NORM}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("BatchNormalization", ["c", *NORM], ["n"], "norm"),
        helper.make_node("Add", ["c", "n"], ["y"], "add"),
    ]
    model = model_of(nodes, (1, 4, 3, 3), constants)
    assert "BatchNormalization" in {node.op_type for node in typed(model, "fp16").graph.node}
    x = normal(1, 4, 3, 3, seed=3)
    np.testing.assert_allclose(answer(typed(model, "fp16"), x), answer(model, x), rtol=0.02, atol=0.02)


def test_values_beyond_float16_become_the_largest_and_infinity_stays() -> None:
    model = model_of([helper.make_node("Add", ["x", "c"], ["y"])], (3,), {"c": np.float32([1e9, -1e9, np.inf])})
    half = typed(model, "fp16")
    (constant,) = (numpy_helper.to_array(each) for each in half.graph.initializer)
    assert constant.tolist() == [HALF_MAX, -HALF_MAX, np.inf]


def test_operators_without_float16_work_on_float32() -> None:
    """A cumulative sum in the middle, one that makes the output, and a range."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["d"]),
        helper.make_node("CumSum", ["d", "axis"], ["s"]),
        helper.make_node("Range", ["zero", "four", "one"], ["r"]),
        helper.make_node("Add", ["s", "r"], ["t"]),
        helper.make_node("CumSum", ["t", "axis"], ["y"]),
    ]
    constants = {"two": np.float32([2]), "axis": np.int64(0)}
    constants |= {"zero": np.float32(0), "four": np.float32(4), "one": np.float32(1)}
    model = model_of(nodes, (4,), constants)
    half = typed(model, "fp16")
    onnx.checker.check_model(half, full_check=True)
    x = np.float32([1, 2, 3, 4])
    assert answer(half, x).tolist() == answer(model, x).tolist()


def test_a_constant_that_is_data_and_scales_at_once_is_both() -> None:
    """The scales of a resize stay float32 though the same constant is multiplied with float16 data."""
    nodes = [
        helper.make_node("Mul", ["x", "c"], ["m"]),
        helper.make_node("Resize", ["m", "", "c"], ["y"], "resize", mode="nearest"),
    ]
    model = model_of(nodes, (1, 1, 2, 4), {"c": np.float32([1, 1, 2, 2])})
    half = typed(model, "fp16")
    onnx.checker.check_model(half, full_check=True)
    x = normal(1, 1, 2, 4)
    np.testing.assert_allclose(answer(half, x), answer(model, x), rtol=2e-3)


def test_whole_number_inputs_and_casts_keep_their_meaning() -> None:
    """An index stays whole; a cast to float32 becomes one to float16."""
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["g"]),
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["g", "f"], ["y"]),
    ]
    model = model_of(nodes, (3,), {"table": np.float32([1, 2, 4])}, TensorProto.INT64)
    for precision in ("fp16", "int8"):
        found = typed(model, precision)
        onnx.checker.check_model(found, full_check=True)
        assert answer(found, np.int64([0, 1, 2])).tolist() == [0, 2, 8]


def test_an_int8_range_reaches_to_the_largest_value_of_the_calibration() -> None:
    model = model_of([helper.make_node("Gemm", ["x", "w"], ["y"], "fc")], (1, 2), {"w": np.float32([[1, -4], [2, 1]])})
    samples = [{"x": np.float32([[1, -2]])}, {"x": np.float32([[0.5, 12.7]])}]
    found = typed(model, "int8", samples)
    values = {each.name: numpy_helper.to_array(each) for each in found.graph.initializer}
    assert values["x/scale"] == pytest.approx(0.1)
    assert values["w/scale"].tolist() == pytest.approx([2 / 127, 4 / 127])


def test_a_dead_activation_is_quantised_without_a_division_by_zero() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "nothing"], ["z"]),
        helper.make_node("MatMul", ["z", "w"], ["y"], "fc"),
    ]
    model = model_of(nodes, (1, 2), {"nothing": np.float32(0), "w": np.float32([[0, 1], [0, 2]])})
    found = typed(model, "int8")
    onnx.checker.check_model(found, full_check=True)
    assert answer(found, np.float32([[1, 2]])).tolist() == [[0, 0]]


def test_a_product_of_two_activations_is_left_in_float() -> None:
    model = model_of([helper.make_node("MatMul", ["x", "x"], ["y"], "self")], (2, 2), {})
    assert [node.op_type for node in typed(model, "int8").graph.node] == ["MatMul"]


def test_an_unknown_precision_is_the_fault_of_the_profile() -> None:
    with pytest.raises(ProfileError, match="int4") as refusal:
        typed(prepared("vgg").graph, "int4")
    assert "fp32, fp16, int8" in refusal.value.next_step


def test_a_graph_with_control_flow_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["i"])], "b", [], [helper.make_tensor_value_info("i", 1, None)]
    )
    node = helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch, else_branch=branch)
    model = model_of([node], (2,), {"c": np.array(True)})
    with pytest.raises(CompileError, match=r"choice \(If\) has subgraphs"):
        typed(model, "fp16")


@pytest.mark.parametrize(
    "sample",
    [lambda: {"z": np.zeros((1, 2), np.float32)}, lambda: {"x": np.zeros((1, 3), np.float32)}],
    ids=["another name", "another shape"],
)
def test_calibration_that_does_not_fit_is_refused(sample: Callable[[], Mapping[str, np.ndarray]]) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"], "fc")]
    model = model_of(nodes, (1, 2), {"w": np.ones((2, 2), np.float32)})
    with pytest.raises(CompileError, match="ranges of the activations"):
        typed(model, "int8", [sample()])


def test_random_ranges_do_not_touch_the_generators_of_the_caller() -> None:
    """A search that compiles INT8 engines draws the same plans as one that does not."""
    torch.manual_seed(1)
    np.random.seed(1)
    before = (torch.random.get_rng_state(), np.random.get_state()[1].tolist())
    typed(prepared("vgg").graph, "int8")
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
