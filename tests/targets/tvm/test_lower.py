"""Whole networks: right answers, the same program every time, kernels shared, errors that name the node."""

import dataclasses
import random

import numpy as np
import onnx
import pytest
from families import FAMILIES, plan_of, prepared
from onnx import helper

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edgeprune[tvm]'")

from tvm_on_host import expected, feeds_of, gap, host_cpu, model_of, normal, on_host

from edgeprune.cut import GraphCutter
from edgeprune.errors import CompileError
from edgeprune.targets._tvm.cpus import cpu_of
from edgeprune.targets._tvm.lower import lower
from edgeprune.targets._tvm.program import Program

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_answers_as_in_onnx_runtime(name: str) -> None:
    assert gap(prepared(name).graph, effort=3) < TOLERANCE


@pytest.mark.parametrize(("name", "cpu"), [("resnet", "avx2"), ("mobilenetv2", "generic")])
def test_other_registers_give_the_same_answer(name: str, cpu: str) -> None:
    assert gap(prepared(name).graph, cpu_of("x86_64", cpu)) < TOLERANCE


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "inception", "shufflenet", "prelu"])
def test_a_cut_network_answers_as_in_onnx_runtime(name: str) -> None:
    """Widths that fill no register, and groups that are gone."""
    family, chooser = prepared(name), random.Random(name)
    widths = {group.name: chooser.choice(group.choices) for group in family.structure.space.groups}
    cut = GraphCutter(family.graph, family.structure).cut(plan_of(family.structure.space, widths))
    assert gap(cut) < TOLERANCE


def test_a_batch_of_three_is_three_answers() -> None:
    weights = {"w": normal(20, 3, 3, 3), "v": normal(7, 20, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["y"]),
    ]
    assert gap(model_of(nodes, {"x": (3, 3, 9, 9)}, ["y"], weights)) < TOLERANCE


def _same(a: Program, b: Program) -> bool:
    facts = [dataclasses.replace(each, kernels=dict.fromkeys(each.kernels), constants=()) for each in (a, b)]
    return facts[0] == facts[1] and a.blob() == b.blob()


def test_the_same_model_always_gives_the_same_program() -> None:
    graph = prepared("inception").graph
    again = onnx.ModelProto.FromString(graph.SerializeToString())
    assert _same(lower(graph, host_cpu()), lower(again, host_cpu()))


def _stack(widths: list[int]) -> onnx.ModelProto:
    nodes, constants, tensor, channels = [], {}, "x", 3
    for place, width in enumerate(widths):
        constants[f"w{place}"] = normal(width, channels, 3, 3, seed=place)
        nodes.append(helper.make_node("Conv", [tensor, f"w{place}"], [f"c{place}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{place}"], [f"r{place}"]))
        tensor, channels = f"r{place}", width
    return model_of(nodes, {"x": (1, 3, 8, 8)}, [tensor], constants)


def test_equal_layers_share_a_kernel_and_weights_are_no_part_of_it() -> None:
    program = lower(_stack([32, 32, 32, 32, 32]), host_cpu())
    assert len(program.steps) == 5
    assert len(program.kernels) == 3  # the first one reads three channels, the last one writes ONNX's layout


def test_a_candidate_with_one_width_changed_needs_two_more_kernels() -> None:
    before = lower(_stack([32, 64, 96, 128, 32]), host_cpu())
    after = lower(_stack([32, 64, 80, 128, 32]), host_cpu())
    assert len(set(after.kernels) - set(before.kernels)) == 2


def test_the_arena_is_smaller_than_what_lies_in_it() -> None:
    program = lower(_stack([32] * 8), host_cpu())
    maps = {each.buffers[-1] for each in program.steps}
    assert program.arena_bytes == 2 * 32 * 8 * 8 * 4
    assert len(program.steps) == 8 > len(maps)


def test_every_buffer_lies_in_its_memory_and_is_aligned() -> None:
    program = lower(prepared("densenet").graph, host_cpu())
    limits = {"arena": program.arena_bytes, "constant": program.constant_bytes}
    for each in program.buffers:
        size = int(np.prod(each.shape)) * np.dtype(each.dtype).itemsize
        assert each.offset % 64 == 0
        assert each.offset + size <= limits.get(each.space, size)


def test_an_output_that_another_layer_reads_is_written_once_and_right() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
        helper.make_node("Conv", ["y", "v"], ["z"]),
    ]
    model = model_of(nodes, {"x": (1, 4, 6, 6)}, ["y", "z"], {"w": normal(24, 4, 3, 3), "v": normal(8, 24, 1, 1)})
    assert gap(model) < TOLERANCE


def test_a_view_that_is_an_output_is_copied() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Flatten", ["a"], ["y"])]
    assert gap(model_of([*nodes, helper.make_node("Neg", ["a"], ["z"])], {"x": (1, 3, 4, 5)}, ["y", "z"])) < TOLERANCE


def test_an_input_passed_through_is_copied() -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Relu", ["x"], ["z"])]
    assert gap(model_of(nodes, {"x": (1, 3, 4, 5)}, ["y", "z"])) < TOLERANCE


def test_running_twice_gives_the_same_answer() -> None:
    graph = prepared("unet").graph
    feeds, cpu = feeds_of(graph), host_cpu()
    run = on_host(graph, cpu)
    first, second = run.outputs(feeds), run.outputs(feeds)
    assert all(np.array_equal(first[name], second[name]) for name in expected(graph, feeds))


def test_an_operator_without_a_kernel_is_named_with_its_node() -> None:
    node = helper.make_node("Det", ["x"], ["y"], name="the_determinant")
    with pytest.raises(CompileError, match="Det 'the_determinant'"):
        lower(model_of([node], {"x": (1, 3, 3)}, ["y"]), host_cpu())


def test_an_operator_of_another_domain_is_refused() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"], name="mine")], {"x": (1, 3)}, ["y"])
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(CompileError, match="mine"):
        lower(model, host_cpu())


def test_a_shape_that_is_not_static_is_refused() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 3)}, ["y"])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(CompileError, match="'x' is not static"):
        lower(model, host_cpu())


def test_integer_inputs_are_refused() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 3)}, ["y"])
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT32
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT32
    with pytest.raises(CompileError, match="float32"):
        lower(model, host_cpu())


def test_weights_that_are_computed_are_refused_by_name() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="dynamic")
    with pytest.raises(CompileError, match="Conv 'dynamic'"):
        lower(model_of([node], {"x": (1, 3, 5, 5), "w": (4, 3, 3, 3)}, ["y"]), host_cpu())
