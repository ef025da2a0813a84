"""NVIDIA's compiler takes every family that edgeprune cuts, in float16 and in INT8, and still refuses what is wrong."""

import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from contract import convnet
from families import FAMILIES, plan_of, prepared
from onnx import TensorProto, helper, numpy_helper
from trt_gate import Gate, installed, opened

from edgeprune.cut import GraphCutter
from edgeprune.errors import CompileError, DeviceLost
from edgeprune.targets._typed_onnx import typed

pytestmark = installed


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with opened(tmp_path_factory.mktemp("gate")) as one:
        yield one


def cut(name: str) -> onnx.ModelProto:
    """Return the family's graph cut by a plan that leaves every group about half of its channels."""
    family = prepared(name)
    groups = family.structure.space.groups
    widths = {group.name: [each for each in group.choices if each][len(group.choices) // 2 - 1] for group in groups}
    return GraphCutter(family.graph, family.structure).cut(plan_of(family.structure.space, widths))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_cut_family_is_built_in_float16(gate: Gate, name: str) -> None:
    """Nothing is left in float32 but the cast behind the output."""
    seen = gate.build(cut(name), "fp16")
    assert seen["ends"] == ["DataType.FLOAT"] * 2
    assert seen["types"]["FLOAT"] == 1
    assert seen["types"]["HALF"] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_cut_family_is_built_in_int8(gate: Gate, name: str) -> None:
    """Every Q/DQ pair of the graph is one of the network's, and gives INT8."""
    graph = cut(name)
    pairs = [node.op_type for node in typed(graph, "int8").graph.node].count("QuantizeLinear")
    seen = gate.build(graph, "int8")
    assert seen["ends"] == ["DataType.FLOAT"] * 2
    assert seen["operations"]["QUANTIZE"] == seen["types"]["INT8"] == pairs > 0


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2"])
def test_the_uncut_graph_is_built_as_it_is(gate: Gate, name: str) -> None:
    graph = prepared(name).graph
    assert gate.build(graph, "fp32")["types"] == {"FLOAT": gate.build(graph, "fp32")["layers"]}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_odd_channel_counts_are_built(gate: Gate, precision: str) -> None:
    """37 and 5 are no multiple of anything a kernel is blocked by; TensorRT pads them."""
    graph = onnx.load(str(convnet(gate.folder / "odd.onnx", (37, 5)).path))
    assert gate.build(graph, precision)["layers"] > 0


# -- the gate can close ----------------------------------------------------------------------------------------------


def one(node: onnx.NodeProto, **constants: np.ndarray) -> bytes:
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def test_an_unknown_operator_is_refused_by_name(gate: Gate) -> None:
    with pytest.raises(CompileError, match=r"building graph\.onnx.*strange"):
        gate.build_bytes(one(helper.make_node("NoSuchOperator", ["x"], ["y"], "strange")))


def test_mixed_types_are_refused(gate: Gate) -> None:
    """What `typed` must never write: float32 data times a float16 weight."""
    with pytest.raises(CompileError, match=r"refuses the graph|cannot be built"):
        gate.build_bytes(one(helper.make_node("MatMul", ["x", "w"], ["y"], "mixed"), w=np.ones((4, 4), np.float16)))


def test_an_asymmetric_int8_range_is_refused(gate: Gate) -> None:
    """TensorRT knows symmetric INT8 alone; a zero point beside 0 must not slip through."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantise"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], "dequantise"),
    ]
    model = onnx.ModelProto.FromString(one(nodes[0], scale=np.float32(0.1), zero=np.int8(3)))
    model.graph.node.append(nodes[1])
    with pytest.raises(CompileError, match="quantise"):
        gate.build_bytes(model.SerializeToString())


def test_what_is_no_graph_is_refused(gate: Gate) -> None:
    with pytest.raises(CompileError, match="refuses the graph"):
        gate.build_bytes(b"not a graph")


def test_a_compiler_that_crashes_takes_nothing_with_it(gate: Gate) -> None:
    """A segmentation fault in its process is a lost device; the next graph is built by a new process."""
    gate.worker.start()
    os.kill(gate.worker.pid, signal.SIGSTOP)
    timer = threading.Timer(0.3, os.kill, (gate.worker.pid, signal.SIGSEGV))
    timer.start()
    threading.Timer(0.4, os.kill, (gate.worker.pid, signal.SIGCONT)).start()
    with pytest.raises(DeviceLost, match="SIGSEGV"):
        gate.build(cut("vgg"), "fp16")
    assert gate.build(cut("vgg"), "fp16")["layers"] > 0


def test_a_timing_cache_is_given_back_and_a_spoiled_one_is_dropped(gate: Gate) -> None:
    """The names that TensorRT 11 and the replayed versions share, asked of NVIDIA's own module."""
    cache = gate.folder / "timing.cache"
    content = typed(cut("vgg"), "fp16").SerializeToString()
    gate.build_bytes(content, timing_cache=cache)
    whole = cache.read_bytes()
    assert whole
    cache.write_bytes(b"spoiled")
    gate.build_bytes(content, timing_cache=cache)
    assert cache.read_bytes() == whole
