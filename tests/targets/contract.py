"""What every target adapter must do. An adapter's test file subclasses `TargetContract` and gives it a profile:

class TestMyAdapter(TargetContract):
    PROFILE = load_profile("mine")
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.errors import CompileError, CorruptArtifact
from edgeprune.measurement import Measurement, Sampling
from edgeprune.profile import Profile
from edgeprune.target import Finding, Target, examine_target, open_target

SIDE = 32


def convnet(path: Path, widths: Sequence[int], side: int = SIDE) -> Artifact:
    """Write a stack of named 3x3 Conv + Relu, a global pool and a linear layer; return its artifact."""
    generator = np.random.default_rng(0)
    nodes, constants, tensor, channels = [], [], "x", 3
    for place, width in enumerate(widths):
        weight = generator.standard_normal((width, channels, 3, 3)).astype(np.float32) / math.sqrt(9 * channels)
        constants.append(numpy_helper.from_array(weight, f"w{place}"))
        nodes.append(helper.make_node("Conv", [tensor, f"w{place}"], [f"c{place}"], f"conv{place}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{place}"], [f"r{place}"], f"relu{place}"))
        tensor, channels = f"r{place}", width
    linear = generator.standard_normal((10, channels)).astype(np.float32)
    constants.append(numpy_helper.from_array(linear, "fc.weight"))
    nodes.append(helper.make_node("GlobalAveragePool", [tensor], ["pooled"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"))
    nodes.append(helper.make_node("Gemm", ["flat", "fc.weight"], ["y"], "linear", transB=1))
    shape = (1, 3, side, side)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 10))],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return Artifact.of(path, kind="onnx", inputs=[TensorSpec(name="x", shape=shape)])


def quick(reference: Artifact, **changes: object) -> Sampling:
    """Return a sampling of two short sessions."""
    settings = {"sessions_min": 2, "sessions_max": 2, "session_ms": 40.0, "block_ms": 3.0} | changes
    return Sampling(reference=reference, **settings)


class TargetContract:
    """Facts about every adapter; each test opens the target through its profile alone."""

    PROFILE: ClassVar[Profile]

    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> Profile:
        return cls.PROFILE

    @pytest.fixture(scope="class")
    @classmethod
    def target(cls, profile: Profile) -> Iterator[Target]:
        with open_target(profile) as target:
            yield target

    @pytest.fixture
    def small(self, tmp_path: Path) -> Artifact:
        return convnet(tmp_path / "small.onnx", (16, 16))

    @pytest.fixture
    def large(self, tmp_path: Path) -> Artifact:
        return convnet(tmp_path / "large.onnx", (32, 32, 32, 32))

    def test_is_a_target_with_the_profile_it_was_opened_with(self, target: Target, profile: Profile) -> None:
        assert isinstance(target, Target)
        assert target.profile == profile

    def test_examining_finds_no_problem_where_the_contract_runs(self, profile: Profile) -> None:
        findings = examine_target(profile)
        assert findings
        assert all(isinstance(each, Finding) for each in findings)
        assert {each.severity for each in findings} <= {"ok", "note"}

    def test_an_engine_takes_the_inputs_of_its_graph(self, target: Target, small: Artifact) -> None:
        engine = target.compile(small)
        assert engine.inputs == small.inputs
        assert engine.check() is engine

    def test_a_measurement_names_what_was_measured(self, target: Target, small: Artifact, large: Artifact) -> None:
        engine, reference = target.compile(small), target.compile(large)
        seen = target.measure(engine, quick(reference))
        assert seen.artifact_sha256 == engine.sha256
        assert seen.reference_sha256 == reference.sha256
        assert seen.profile_digest == target.profile.digest
        assert seen.conditions
        assert seen.seconds > 0

    def test_sessions_hold_positive_samples_of_both_engines(
        self, target: Target, small: Artifact, large: Artifact
    ) -> None:
        seen = target.measure(target.compile(small), quick(target.compile(large)))
        assert len(seen.sessions) == 2
        for calls in (calls for session in seen.sessions for calls in (session.candidate, session.reference)):
            assert len(calls.elapsed) == len(calls.on_cpu) == len(calls.preempted) >= 4
            assert min(calls.elapsed) > 0

    def test_less_work_takes_less_time(self, target: Target, small: Artifact, large: Artifact) -> None:
        assert target.measure(target.compile(large), quick(target.compile(small))).ratio().p50 > 1.5

    def test_a_model_is_about_as_fast_as_itself(self, target: Target, large: Artifact) -> None:
        engine = target.compile(large)
        assert target.measure(engine, quick(engine)).ratio().p50 == pytest.approx(1, rel=0.25)

    def test_a_clear_decision_ends_sampling_early(self, target: Target, small: Artifact, large: Artifact) -> None:
        far = quick(target.compile(large), sessions_max=6, threshold=1000.0)
        assert len(target.measure(target.compile(small), far).sessions) == 2

    def test_without_a_threshold_every_session_is_used(self, target: Target, small: Artifact) -> None:
        engine = target.compile(small)
        long = quick(engine, sessions_max=4, session_ms=120.0)  # beside which loading and warming up are short
        assert len(target.measure(engine, long).sessions) == 4

    def test_a_measurement_survives_json(self, target: Target, small: Artifact, large: Artifact) -> None:
        seen = target.measure(target.compile(small), quick(target.compile(large), layers=True))
        assert Measurement.from_json(json.loads(json.dumps(seen.to_json()))) == seen

    def test_layers_are_reported_by_graph_node(self, target: Target, small: Artifact, large: Artifact) -> None:
        layers = target.measure(target.compile(small), quick(target.compile(large), layers=True)).layers
        assert {"conv0", "conv1", "linear"} <= set(layers)
        assert min(layers.values()) > 0
        assert layers["conv1"] > layers["linear"]

    def test_layers_are_not_timed_unasked(self, target: Target, small: Artifact) -> None:
        engine = target.compile(small)
        assert not target.measure(engine, quick(engine)).layers

    def test_outputs_equal_those_of_onnxruntime(self, target: Target, large: Artifact) -> None:
        image = np.random.default_rng(1).standard_normal(large.inputs[0].shape).astype(np.float32)
        session = onnxruntime.InferenceSession(str(large.path), providers=["CPUExecutionProvider"])
        outputs = target.run(target.compile(large), {"x": image})
        assert set(outputs) == {"y"}
        np.testing.assert_allclose(outputs["y"], session.run(["y"], {"x": image})[0], rtol=1e-4, atol=1e-4)

    def test_a_wrong_input_shape_is_refused(self, target: Target, small: Artifact) -> None:
        engine = target.compile(small)
        with pytest.raises(CompileError):
            target.run(engine, {"x": np.zeros((1, 3, SIDE + 1, SIDE), np.float32)})

    @pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.999], ids=str)
    def test_a_truncated_graph_is_refused(self, target: Target, small: Artifact, tmp_path: Path, kept: float) -> None:
        content = small.path.read_bytes()
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(content[: round(kept * len(content)) if isinstance(kept, float) else kept])
        with pytest.raises(CompileError, match=r"broken\.onnx"):
            target.compile(Artifact.of(broken, kind="onnx", inputs=small.inputs))

    def test_a_file_that_is_not_a_graph_is_refused(self, target: Target, tmp_path: Path) -> None:
        noise = tmp_path / "noise.onnx"
        noise.write_bytes(np.random.default_rng(2).bytes(4096))
        with pytest.raises(CompileError):
            target.compile(Artifact.of(noise, kind="onnx", inputs=[]))

    def test_a_file_that_changed_since_it_was_hashed_is_refused(self, target: Target, tmp_path: Path) -> None:
        graph = convnet(tmp_path / "changing.onnx", (8, 24))
        convnet(tmp_path / "changing.onnx", (8, 40))
        with pytest.raises(CorruptArtifact, match="changed on disk"):
            target.compile(graph)

    def test_a_refused_graph_leaves_the_target_usable(self, target: Target, small: Artifact, tmp_path: Path) -> None:
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(b"not a graph")
        with pytest.raises(CompileError):
            target.compile(Artifact.of(broken, kind="onnx", inputs=small.inputs))
        engine = target.compile(small)
        assert target.measure(engine, quick(engine)).sessions

    def test_it_can_be_opened_again_after_it_was_left(self, profile: Profile, small: Artifact) -> None:
        for _ in range(2):
            with open_target(profile) as target:
                assert target.compile(small).sha256
