"""The PyTorch adapter: everything but the GPU, on this machine's CPU by its own clock; no profile can ask for that."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from contract import TargetContract, convnet, quick
from onnx import TensorProto, helper

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.errors import CompileError, DeviceLost, ProfileError
from edgeprune.profile import Profile, load_profile
from edgeprune.target import Finding, Target, examine_target, open_target
from edgeprune.targets.torch_cuda import TorchCuda, _options, _worker, held

EASY = {"slow_limit": 20.0, "warm_up_s": 0.01}

without_cuda = pytest.mark.skipif(
    torch.version.cuda is not None,
    reason="this PyTorch has CUDA; how it is refused without: pip install torch from the CPU index",
)


def on_cpu(**facts: object) -> Profile:
    given = {"precision": "fp32", "options": EASY | dict(facts.pop("options", {}))}
    return load_profile("nvidia-gpu-torch", given | facts)


class OnCpu(ModuleType):
    """An adapter that only this test can open: the same target, on the CPU."""

    @staticmethod
    def connect(profile: Profile) -> AbstractContextManager[Target]:
        return held(TorchCuda(profile, on_gpu=False))

    @staticmethod
    def examine(profile: Profile) -> list[Finding]:
        return [Finding(subject="torch", severity="note", found="the CPU stands in for a GPU")]


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep engines away from the user's, and let profiles name the adapter of this test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setitem(sys.modules, "edgeprune.targets.torch_on_cpu", OnCpu("torch_on_cpu"))
        yield


class TestTorchOnCpuContract(TargetContract):
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> Profile:
        return on_cpu(adapter="torch_on_cpu")


@pytest.fixture
def net(tmp_path: Path) -> Artifact:
    return convnet(tmp_path / "net.onnx", (16, 16))


@pytest.fixture
def opened() -> Iterator[Callable[..., TorchCuda]]:
    """Open targets that are left when the test ends, however it ends."""
    contexts = []

    def open_one(**facts: object) -> TorchCuda:
        context = held(TorchCuda(on_cpu(**facts), on_gpu=False))
        contexts.append(context)
        return context.__enter__()

    yield open_one
    for each in contexts:
        each.__exit__(None, None, None)


@without_cuda
def test_a_worker_whose_pytorch_has_no_cuda_refuses_to_start() -> None:
    """A build of one's own may have any version."""
    worker = _worker(_options(load_profile("nvidia-gpu-torch")), on_gpu=True)
    with pytest.raises(ProfileError, match="built without CUDA"):
        worker.start()
    assert worker.pid is None


@without_cuda
def test_a_pytorch_without_cuda_is_told_with_the_command_that_mends_it() -> None:
    with (
        pytest.raises(ProfileError, match="built without CUDA") as error,
        open_target(load_profile("nvidia-gpu-torch")),
    ):
        pass
    assert "pip install" in error.value.next_step
    (finding,) = examine_target(load_profile("nvidia-gpu-torch"))
    assert finding.severity == "problem"
    assert "without CUDA" in finding.found
    assert "pip install" in finding.mend


def test_a_machine_without_a_driver_is_a_lost_device() -> None:
    """The adapter and the TensorRT one ask the same driver in the same way, in a child."""
    from edgeprune.targets._cuda_driver import LIBRARY, Driver
    from edgeprune.targets._serve import RefusedError

    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has an NVIDIA driver: run tests/hardware with --target instead")
    with pytest.raises(RefusedError, match="no NVIDIA driver") as refusal:
        Driver(0)
    assert refusal.value.kind == "lost"
    assert LIBRARY in str(refusal.value)


def test_float16_runs_and_answers_as_float32(opened, net: Artifact) -> None:
    target = opened(precision="fp16")
    engine = target.compile(net)
    image = np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(net.path), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": image})
    seen = target.run(engine, {"x": image})["y"]
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen, wanted, atol=0.01 * np.abs(wanted).max())
    assert target.measure(engine, quick(engine)).sessions


@pytest.mark.skipif(shutil.which("c++") is None, reason="a C++ compiler is missing: sudo apt-get install g++")
def test_a_compiled_package_is_built_once_timed_and_answers_the_same(opened, net: Artifact) -> None:
    """AOTInductor, through export and package; the second target finds the first one's."""
    target = opened(options={"compiler": "aot_inductor"})
    engine = target.compile(net)
    assert engine.path.suffix == ".pt2"
    image = np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(net.path), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(
        target.run(engine, {"x": image})["y"], session.run(None, {"x": image})[0], rtol=1e-4, atol=1e-4
    )
    seen = target.measure(engine, quick(engine, layers=True))
    assert {"conv0", "conv1", "linear"} <= set(seen.layers)
    assert "one by one" in seen.notes[0]
    written = engine.path.stat().st_ino
    again = opened(options={"compiler": "aot_inductor"}).compile(net)
    assert (again.sha256, again.path.stat().st_ino) == (engine.sha256, written)
    engine.path.write_bytes(b"half a package")
    with pytest.raises(CompileError):
        target.run(Artifact.of(engine.path, kind="pt2", inputs=net.inputs), {"x": image})


def test_a_worker_killed_while_timing_is_a_lost_device_and_the_next_call_works(opened, net: Artifact) -> None:
    target = opened()
    engine = target.compile(net)
    timer = threading.Timer(0.5, os.kill, (target.worker_pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(DeviceLost, match="SIGKILL"):
        target.measure(engine, quick(engine, session_ms=20_000.0))
    assert target.measure(engine, quick(engine)).sessions


def test_an_operator_that_pytorch_is_not_taught_is_a_broken_candidate_that_names_it(opened, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("DepthToSpace", ["x"], ["y"], "deal", blocksize=2)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4, 2, 2))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 1, 4, 4))],
    )
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    artifact = Artifact.of(path, kind="onnx", inputs=[TensorSpec(name="x", shape=(1, 4, 2, 2))])
    with pytest.raises(CompileError, match=r"deal.*DepthToSpace"):
        opened().compile(artifact)


def test_other_inputs_than_the_graph_has_are_refused(opened, net: Artifact) -> None:
    """PyTorch would run on another shape; an engine has one."""
    target = opened()
    for wrong in (
        TensorSpec(name="z", shape=(1, 3, 32, 32)),
        TensorSpec(name="x", shape=(1, 3, 32)),
        TensorSpec(name="x", shape=(1, 3, 32, 31)),
    ):
        with pytest.raises(CompileError, match="input"):
            target.compile(Artifact.of(net.path, kind="onnx", inputs=[wrong]))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"options": {"gpu": "first"}}, "gpu"),
        ({"options": {"compiler": "dynamo"}}, "compiler"),
        ({"options": {"channels_last": "yes"}}, "channels_last"),
        ({"options": {"tf32": 1}}, "tf32"),
        ({"options": {"slow_limit": 0.5}}, "slow_limit"),
        ({"precision": "int8"}, "int8"),
        ({"address": "ssh://board"}, "address"),
    ],
    ids=str,
)
def test_a_senseless_profile_is_refused_before_anything_is_touched(facts: dict[str, object], said: str) -> None:
    with pytest.raises(ProfileError, match=said), open_target(load_profile("nvidia-gpu-torch", facts)):
        pass
    (finding,) = examine_target(load_profile("nvidia-gpu-torch", facts))
    assert finding.severity == "problem"
    assert said in finding.found
