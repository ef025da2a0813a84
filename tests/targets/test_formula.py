import math
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from contract import TargetContract, convnet, quick
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.errors import CompileError, DeviceLost, ProfileError
from edgeprune.measurement import Sampling
from edgeprune.profile import Profile, load_profile
from edgeprune.target import examine_target, open_target


class TestFormulaContract(TargetContract):
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> Profile:
        return load_profile("formula")


EXACT = {"noise": 0.0, "block": 16, "macs_per_ns": 2.0, "overhead_ns": 100.0}


def formula(**options: object) -> Profile:
    return Profile(name="formula", adapter="formula", options=EXACT | options)


def layers_of(graph: Artifact, **options: object) -> dict[str, float]:
    with open_target(formula(**options)) as target:
        return dict(target.measure(graph, Sampling(reference=graph, layers=True)).layers)


def one_node(path: Path, node: onnx.NodeProto, x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...]) -> Artifact:
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(np.zeros(w, np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(path))
    return Artifact.of(path, kind="onnx", inputs=[TensorSpec(name="x", shape=x)])


def test_a_conv_costs_its_rounded_macs_and_the_overhead(tmp_path: Path) -> None:
    """3 → 20 channels round to 16 → 32; 3x3 kernel, 5x7 outputs of stride 2."""
    conv = helper.make_node("Conv", ["x", "w"], ["y"], "conv", strides=[2, 2], pads=[1, 1, 1, 1])
    graph = one_node(tmp_path / "g.onnx", conv, (1, 3, 10, 14), (20, 3, 3, 3), (1, 20, 5, 7))
    assert layers_of(graph) == {"conv": 100 + 16 * 32 * 9 * 35 / 2}


def test_a_depthwise_conv_costs_one_input_channel_per_output(tmp_path: Path) -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], "dw", group=32, pads=[1, 1, 1, 1])
    graph = one_node(tmp_path / "g.onnx", conv, (1, 32, 8, 8), (32, 1, 3, 3), (1, 32, 8, 8))
    assert layers_of(graph) == {"dw": 100 + 32 * 9 * 64 / 2}


@pytest.mark.parametrize(("transposed", "weight"), [(1, (10, 40)), (0, (40, 10))])
def test_a_gemm_costs_the_same_whichever_way_its_weight_lies(
    tmp_path: Path, transposed: int, weight: tuple[int, int]
) -> None:
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], "fc", transB=transposed)
    graph = one_node(tmp_path / "g.onnx", gemm, (1, 40), weight, (1, 10))
    assert layers_of(graph) == {"fc": 100 + 48 * 16 / 2}


def test_a_matmul_costs_every_row(tmp_path: Path) -> None:
    matmul = helper.make_node("MatMul", ["x", "w"], ["y"], "mm")
    graph = one_node(tmp_path / "g.onnx", matmul, (1, 6, 40), (40, 10), (1, 6, 10))
    assert layers_of(graph, block=1) == {"mm": 100 + 40 * 10 * 6 / 2}


def test_a_nameless_node_is_called_by_type_and_position(tmp_path: Path) -> None:
    graph = one_node(tmp_path / "g.onnx", helper.make_node("MatMul", ["x", "w"], ["y"]), (1, 16), (16, 16), (1, 16))
    assert list(layers_of(graph)) == ["MatMul_0"]


def test_a_graph_without_static_shapes_is_refused(tmp_path: Path) -> None:
    matmul = helper.make_node("MatMul", ["x", "w"], ["y"], "mm")
    graph = helper.make_graph(
        [matmul],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("rows", 16))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("rows", 16))],
        [numpy_helper.from_array(np.zeros((16, 16), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph), str(tmp_path / "g.onnx"))
    artifact = Artifact.of(tmp_path / "g.onnx", kind="onnx", inputs=[])
    with open_target(formula()) as target, pytest.raises(CompileError, match="mm: it has no static shape") as refusal:
        target.compile(artifact)
    assert "choose a target that measures" in refusal.value.next_step


def test_what_is_no_graph_is_refused_with_a_next_step(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"no graph")
    artifact = Artifact.of(tmp_path / "g.onnx", kind="onnx", inputs=[])
    with open_target(formula()) as target, pytest.raises(CompileError, match=r"cannot read g\.onnx") as refusal:
        target.compile(artifact)
    assert refusal.value.next_step


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("outputs", [["y"], ["", "y"]], ids=["every state", "the last state"])
def test_a_recurrent_node_costs_every_gate_at_every_step(
    tmp_path: Path, kind: str, gates: int, outputs: list[str]
) -> None:
    """Seven steps, 12 + 4 inputs and states, both directions; whichever output is read."""
    node = helper.make_node(kind, ["x", "w", "r"], outputs, "cell", hidden_size=4, direction="bidirectional")
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (7, 1, 12))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (7, 2, 1, 4) if len(outputs) == 1 else (2, 1, 4))],
        [
            numpy_helper.from_array(np.zeros((2, gates * 4, 12), np.float32), "w"),
            numpy_helper.from_array(np.zeros((2, gates * 4, 4), np.float32), "r"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(tmp_path / "g.onnx"))
    artifact = Artifact.of(tmp_path / "g.onnx", kind="onnx", inputs=[TensorSpec(name="x", shape=(7, 1, 12))])
    assert layers_of(artifact, block=1) == {"cell": 100 + 2 * gates * 4 * (12 + 4) * 7 / 2}


def test_a_size_computed_from_a_shape_is_followed(tmp_path: Path) -> None:
    """An exporter that reshapes to what it reads off a tensor gives no shapes itself."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["rows"]),
        helper.make_node("Concat", ["rows", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"], "mm"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 4, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 10))],
        [
            numpy_helper.from_array(np.array([0]), "first"),
            numpy_helper.from_array(np.array([16]), "rest"),
            numpy_helper.from_array(np.zeros((16, 10), np.float32), "w"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(tmp_path / "g.onnx"))
    artifact = Artifact.of(tmp_path / "g.onnx", kind="onnx", inputs=[TensorSpec(name="x", shape=(2, 4, 4))])
    assert layers_of(artifact, block=1) == {"mm": 100 + 16 * 10 * 2 / 2}


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 64))
def test_widths_of_one_block_cost_the_same_and_the_next_block_costs_more(
    tmp_path_factory: pytest.TempPathFactory, width: int
) -> None:
    folder = tmp_path_factory.mktemp("widths")
    full = math.ceil(width / 16) * 16
    here, end, after = (
        sum(layers_of(convnet(folder / f"{each}.onnx", (each, 16), 8)).values()) for each in (width, full, full + 1)
    )
    assert here == end < after


def test_without_noise_the_ratio_is_the_quotient_of_the_sums(tmp_path: Path) -> None:
    small, large = convnet(tmp_path / "s.onnx", (16, 16)), convnet(tmp_path / "l.onnx", (48, 64))
    with open_target(formula()) as target:
        ratio = target.measure(small, Sampling(reference=large)).ratio().p50
    assert ratio == pytest.approx(sum(layers_of(small).values()) / sum(layers_of(large).values()), rel=1e-4)


def test_the_same_question_has_the_same_answer_whatever_came_before(tmp_path: Path) -> None:
    nets = [convnet(tmp_path / f"{width}.onnx", (width, 16), 8) for width in (8, 32, 64)]
    sampling = Sampling(reference=nets[2], seed=5)
    with open_target(formula(noise=0.05)) as target:
        forward = [target.measure(each, sampling).sessions for each in nets]
    with open_target(formula(noise=0.05)) as target:
        backward = [target.measure(each, sampling).sessions for each in reversed(nets)]
    assert forward == backward[::-1]


def test_another_seed_gives_other_samples(tmp_path: Path) -> None:
    net = convnet(tmp_path / "n.onnx", (16, 16), 8)
    seen = set()
    for seed, sampling_seed in ((0, 0), (1, 0), (0, 1)):
        with open_target(formula(noise=0.05, seed=seed)) as target:
            seen.add(target.measure(net, Sampling(reference=net, seed=sampling_seed)).sessions)
    assert len(seen) == 3


def test_an_honest_a_a_interval_contains_one(tmp_path: Path) -> None:
    net = convnet(tmp_path / "n.onnx", (16, 16), 8)
    with open_target(formula(noise=0.002)) as target:
        ratios = [target.measure(net, Sampling(reference=net, seed=seed)).ratio() for seed in range(100)]
    assert sum(each.low <= 1 <= each.high for each in ratios) >= 95


def test_numbers_of_a_formula_say_so(tmp_path: Path) -> None:
    net = convnet(tmp_path / "n.onnx", (16, 16), 8)
    with open_target(formula()) as target:
        seen = target.measure(net, quick(net))
    assert seen.emulated
    assert seen.metric == "formula_ns"


def test_the_device_is_lost_at_the_measurements_asked_for_and_then_goes_on(tmp_path: Path) -> None:
    net = convnet(tmp_path / "n.onnx", (16, 16), 8)
    survived, lost = [], []
    with open_target(formula(lose_at=[1, 2])) as target:
        for number in range(5):
            try:
                target.measure(net, quick(net))
                survived.append(number)
            except DeviceLost as error:
                lost.append(error.what)
    assert survived == [0, 3, 4]
    assert [each.split()[-1] for each in lost] == ["1", "2"]


def test_dropping_out_is_as_frequent_as_asked_and_the_same_every_time(tmp_path: Path) -> None:
    net = convnet(tmp_path / "n.onnx", (16, 16), 8)
    runs = []
    for _ in range(2):
        lost = []
        with open_target(formula(drop_out=0.3)) as target:
            for number in range(200):
                try:
                    target.measure(net, quick(net))
                except DeviceLost:
                    lost.append(number)
        runs.append(lost)
    assert runs[0] == runs[1]
    assert 35 <= len(runs[0]) <= 85


@pytest.mark.parametrize(
    "options",
    [{"block": 0}, {"noise": -1.0}, {"drop_out": 2.0}, {"lose_at": ["now"]}, {"speed": 1}, {"seed": 1.5}],
    ids=str,
)
def test_a_senseless_option_is_a_profile_error(options: dict[str, object]) -> None:
    with pytest.raises(ProfileError, match=next(iter(options))), open_target(formula(**options)):
        pass
    assert examine_target(formula(**options))[0].severity == "problem"


def test_measuring_sixty_layers_again_reads_no_file(tmp_path: Path) -> None:
    net = convnet(tmp_path / "n.onnx", (16,) * 60, 8)
    with open_target(formula()) as target:
        first = target.measure(net, quick(net))
        net.path.unlink()
        assert target.measure(net, quick(net)).sessions == first.sessions


def test_seconds_are_those_of_computing_not_of_the_formula(tmp_path: Path) -> None:
    net = convnet(tmp_path / "n.onnx", (16, 16), 8)
    started = time.monotonic()
    with open_target(formula(overhead_ns=1e12)) as target:
        seen = target.measure(net, quick(net))
    assert seen.latency().p50 > 1e6
    assert seen.seconds <= time.monotonic() - started
