"""The TensorRT adapter on a replayed GPU: every version's names, every fault; no number of it is a GPU's."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_replay_setup as replay
import numpy as np
import pytest
import tiny_project
from contract import TargetContract, convnet, quick

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.deploy import deploy
from edgeprune.errors import CompileError, DeviceLost, ProfileError, Unstable
from edgeprune.intake.config import load_config
from edgeprune.measurement import Measurement
from edgeprune.profile import Profile, load_profile
from edgeprune.stages.prepare import Request
from edgeprune.target import examine_target, open_target
from edgeprune.targets.tensorrt_local import TensorRtLocal, calibration

pytestmark = replay.built

PATIENT = {"slow_limit": 20.0, "warm_up_s": 0.01}
EXACT = {"precision": "fp32", "options": PATIENT}
"""Float32, because the contract compares to 1e-4; and patience, because the replayed GPU is a busy CPU."""


@pytest.fixture(scope="class")
def replayed(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        version = getattr(request.cls, "VERSION", "10.3.0")
        replay.install(patch, tmp_path_factory.mktemp("home"), REPLAY_TENSORRT=version)
        yield


@pytest.mark.usefixtures("replayed")
class TestTensorRt11Contract(TargetContract):
    VERSION = "11.1.0"

    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls, replayed: None) -> Profile:
        return load_profile("nvidia-gpu", EXACT)


class TestTensorRt8Contract(TestTensorRt11Contract):
    VERSION = "8.6.1"


# -- one test a fact -------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, home: Path) -> Callable[..., None]:
    """Give this machine a replayed GPU, with settings."""
    return lambda **settings: replay.install(monkeypatch, home, **settings)


@pytest.fixture
def opened(machine: Callable[..., None]) -> Iterator[Callable[..., TensorRtLocal]]:
    """Open targets that are left when the test ends, however it ends."""
    contexts = []

    def open_one(precision: str = "fp16", facts: dict[str, object] | None = None, **options: object) -> TensorRtLocal:
        context = open_target(profile(precision, facts, **options))
        contexts.append(context)
        return context.__enter__()

    machine()
    yield open_one
    for each in contexts:
        each.__exit__(None, None, None)


def profile(precision: str = "fp16", facts: dict[str, object] | None = None, **options: object) -> Profile:
    given = {"options": PATIENT | options, "precision": precision}
    return load_profile("nvidia-gpu", given | (facts or {}))


@pytest.fixture
def net(tmp_path: Path) -> Artifact:
    return convnet(tmp_path / "net.onnx", (16, 16))


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "11.1.0"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_each_version_is_asked_for_the_precision_in_its_own_way(
    opened, machine, net: Artifact, version: str, precision: str
) -> None:
    """The replay refuses a missing flag of version 8, and a flag too many of the later ones."""
    machine(REPLAY_TENSORRT=version)
    target = opened(precision)
    engine = target.compile(net)
    image = np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype(np.float32)
    assert target.run(engine, {"x": image})["y"].dtype == np.float32
    assert target.measure(engine, quick(engine)).conditions["version"] == f"tensorrt {version}"


def test_a_missing_driver_is_a_lost_device_with_the_command_that_mends_it(machine, monkeypatch) -> None:
    """TensorRT is never used before the driver is open: the real one would crash."""
    machine()
    monkeypatch.delenv("LD_LIBRARY_PATH")
    with pytest.raises(DeviceLost, match="no NVIDIA driver") as lost, open_target(profile()):
        pass
    assert "nvidia-smi" in lost.value.next_step
    (finding,) = examine_target(profile())
    assert (finding.severity, finding.subject) == ("problem", "tensorrt")
    assert "nvidia-smi" in finding.mend


def test_a_missing_tensorrt_is_told_with_its_package(monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="needs tensorrt") as error, open_target(profile()):
        pass
    assert error.value.next_step == "pip install tensorrt"
    (finding,) = examine_target(profile())
    assert finding.mend == "pip install tensorrt"


def test_a_gpu_that_is_not_there_is_told_from_those_that_are(machine) -> None:
    machine(REPLAY_GPU_COUNT="2")
    with pytest.raises(DeviceLost, match="GPU 5 is wanted, the driver has 2"), open_target(profile(gpu=5)):
        pass
    machine(REPLAY_GPU_COUNT="0")
    with pytest.raises(DeviceLost, match="no CUDA-capable device"), open_target(profile()):
        pass


def test_a_tensorrt_that_crashes_when_it_is_imported_is_reported_and_crashes_nothing_else(machine) -> None:
    machine(REPLAY_TENSORRT_CRASH="import")
    with pytest.raises(DeviceLost, match="SIGSEGV"), open_target(profile()):
        pass
    (finding,) = examine_target(profile())
    assert finding.severity == "problem"
    assert "SIGSEGV" in finding.found


def test_a_builder_that_crashes_is_a_lost_device_and_the_next_build_works(opened, machine, monkeypatch, net) -> None:
    machine(REPLAY_TENSORRT_CRASH="build")
    target = opened()
    with pytest.raises(DeviceLost, match=r"building net\.onnx.*SIGSEGV"):
        target.compile(net)
    monkeypatch.delenv("REPLAY_TENSORRT_CRASH")
    assert target.compile(net).kind == "tensorrt"


def test_a_worker_killed_while_timing_is_a_lost_device_and_the_next_call_works(opened, net: Artifact) -> None:
    target = opened()
    engine = target.compile(net)
    timer = threading.Timer(0.5, os.kill, (target.worker_pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(DeviceLost, match="SIGKILL"):
        target.measure(engine, quick(engine, session_ms=20_000.0))
    assert target.measure(engine, quick(engine)).sessions


def test_a_builder_without_memory_is_no_broken_candidate(opened, machine, net: Artifact) -> None:
    machine(REPLAY_TENSORRT_BUILD_ERROR="Requested amount of GPU memory could not be allocated: out of memory")
    with pytest.raises(DeviceLost, match="ran short while building"):
        opened().compile(net)


def test_a_builder_that_finds_no_kernel_is_a_broken_candidate(opened, machine, net: Artifact) -> None:
    machine(REPLAY_TENSORRT_BUILD_ERROR="Could not find any implementation for node conv0")
    with pytest.raises(CompileError, match="any implementation for node conv0"):
        opened().compile(net)


def test_a_gpu_without_memory_for_the_tensors_is_no_broken_candidate(opened, machine, net: Artifact) -> None:
    machine(REPLAY_GPU_MEMORY="8000")
    with pytest.raises(DeviceLost, match="the GPU has no memory left"):
        opened().compile(net)


def test_a_fault_on_the_gpu_ends_the_worker_whose_context_it_spoiled(opened, machine, monkeypatch, net) -> None:
    machine(REPLAY_GPU_FAULT="1")
    target = opened()
    with pytest.raises(DeviceLost, match="illegal memory access"):
        target.compile(net)
    monkeypatch.delenv("REPLAY_GPU_FAULT")
    assert target.compile(net)


def test_the_same_graph_is_built_once_even_by_another_process(opened, net: Artifact, home: Path) -> None:
    first = opened().compile(net)
    written = first.path.stat().st_ino
    again = opened().compile(net)
    assert (again.sha256, again.path.stat().st_ino) == (first.sha256, written)
    assert first.path.is_relative_to(home)
    assert first.path.parent.stat().st_mode & 0o077 == 0


def test_another_precision_version_or_level_is_another_engine(opened, machine, net: Artifact) -> None:
    paths = {opened("fp32").compile(net).path, opened("fp16").compile(net).path}
    paths.add(opened("fp16", builder_level=5).compile(net).path)
    machine(REPLAY_TENSORRT="11.1.0")
    paths.add(opened("fp16").compile(net).path)
    assert len(paths) == 4


def test_an_engine_that_cannot_be_loaded_is_built_again(opened, net: Artifact) -> None:
    target = opened()
    engine = target.compile(net)
    engine.path.write_bytes(b"half an engine")
    assert target.compile(net).path.read_bytes().startswith(b"replayed engine")


def test_builds_share_one_timing_cache_and_a_spoiled_one_is_dropped(
    opened, net: Artifact, home: Path, tmp_path
) -> None:
    target = opened()
    target.compile(net)
    target.compile(convnet(tmp_path / "other.onnx", (8, 24)))
    (cache,) = (home / "edgeprune/tensorrt/timings").glob("*.cache")
    assert cache.read_bytes().count(b"one more tactic") == 2
    cache.write_bytes(b"spoiled")
    target.compile(convnet(tmp_path / "third.onnx", (8, 8)))
    assert cache.read_bytes().count(b"one more tactic") == 1


def test_nothing_but_engines_and_timings_is_left_in_the_cache(opened, net: Artifact, home: Path) -> None:
    opened().compile(net)
    assert {each.suffix for each in (home / "edgeprune").rglob("*") if each.is_file()} == {".engine", ".cache"}


def measured(opened, net: Artifact, **options: object) -> Measurement:
    target = opened("fp32", **options)
    engine = target.compile(net)
    return target.measure(engine, quick(engine))


def test_conditions_name_the_gpu_and_what_it_said_before_and_after(opened, net: Artifact) -> None:
    seen = measured(opened, net).conditions
    assert seen["gpu"] == "Replayed GPU 0"
    assert (seen["compute_capability"], seen["multiprocessors"], seen["cuda_of_driver"]) == ("8.6", 4, "13.0")
    assert seen["after"]["power_w"] == 60.5
    assert seen["after"]["state"] is None  # this GPU does not tell
    assert seen["notes"] == []


def test_a_throttled_gpu_is_flagged_with_its_reasons(opened, machine, net: Artifact) -> None:
    machine(REPLAY_NVML_REASONS=str(0x4 | 0x40 | 0x1))
    flags = measured(opened, net).flags
    assert "the GPU was throttled while measuring: hardware thermal slowdown, software power cap" in flags


def test_a_clock_that_moves_between_sessions_is_flagged(opened, machine, net: Artifact) -> None:
    machine(REPLAY_NVML_CLOCK_STEP="50")
    assert any("the GPU's clock moved between" in each for each in measured(opened, net).flags)


def test_company_on_the_gpu_is_noted(opened, machine, net: Artifact) -> None:
    machine(REPLAY_NVML_PROCESSES="3")
    assert "2 other processes had the GPU open while measuring" in measured(opened, net).notes


def test_without_nvml_it_measures_and_says_what_is_not_recorded(opened, machine, net: Artifact) -> None:
    machine(REPLAY_NVML="0")
    seen = measured(opened, net)
    assert seen.sessions
    assert "throttling are not recorded" in seen.notes[0]
    assert [each.severity for each in examine_target(profile()) if each.subject == "sensors"] == ["note"]


def test_it_waits_for_the_temperature_that_the_profile_asks_for(opened, machine, net: Artifact, monkeypatch) -> None:
    machine(REPLAY_NVML_TEMPERATURE="80")
    monkeypatch.setattr("edgeprune.targets._gpu.COOLING_LIMIT_S", 0.1)
    monkeypatch.setattr("edgeprune.targets._gpu.COOLING_STEP_S", 0.05)
    target = opened("fp32", {"cooldown_c": 60})
    engine = target.compile(net)
    with pytest.raises(Unstable, match="still at 80 degrees"):
        target.measure(engine, quick(engine))
    cool = opened("fp32", {"cooldown_c": 90})
    assert cool.measure(engine, quick(engine)).sessions


def test_without_a_cuda_graph_the_engine_is_launched_itself(opened, net: Artifact) -> None:
    assert measured(opened, net, cuda_graph=False).sessions


def test_device_memory_is_given_back_after_every_request(opened, machine, net: Artifact) -> None:
    """Room for two engines of this net, not for three: each session loads two."""
    machine(REPLAY_GPU_MEMORY="60000")
    target = opened("fp32")
    engine = target.compile(net)
    for _ in range(4):
        assert target.measure(engine, quick(engine)).sessions


def test_int8_of_random_ranges_says_so_and_of_given_ones_does_not(opened, net: Artifact, tmp_path: Path) -> None:
    target = opened("int8")
    engine = target.compile(net)
    assert "no accuracy" in target.measure(engine, quick(engine)).notes[0]
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).random((4, 3, 32, 32), np.float32))
    given = opened("int8", calibration=str(tmp_path / "images.npz"))
    other = given.compile(net)
    assert other.sha256 != engine.sha256
    assert given.measure(other, quick(other)).notes == ()


def test_calibration_is_one_sample_at_a_time(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", x=np.arange(6).reshape(3, 2))
    assert [each["x"].tolist() for each in calibration(tmp_path / "images.npz")] == [[[0, 1]], [[2, 3]], [[4, 5]]]


@pytest.mark.parametrize("content", ["nothing", "text", "pickle", "lengths"])
def test_calibration_that_cannot_be_used_is_a_profile_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "images.npz"
    if content == "text":
        path.write_text("images")
    elif content == "pickle":
        np.savez(path, x=np.array([{}], dtype=object))
    elif content == "lengths":
        np.savez(path, x=np.zeros((2, 1)), y=np.zeros((3, 1)))
    with pytest.raises(ProfileError, match=r"images\.npz"):
        calibration(path)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"options": {"gpu": -1}}, "gpu"),
        ({"options": {"gpu": True}}, "gpu"),
        ({"options": {"runtime": "os; rm"}}, "runtime"),
        ({"options": {"cuda_graph": 1}}, "cuda_graph"),
        ({"options": {"builder_level": 6}}, "builder_level"),
        ({"options": {"calibration": 3}}, "calibration"),
        ({"options": {"warm_up_s": -1}}, "warm_up_s"),
        ({"options": {"time_limit_s": 0}}, "time_limit_s"),
        ({"options": {"slow_limit": 1}}, "slow_limit"),
        ({"options": {"speed": "fast"}}, "speed"),
        ({"precision": "int4"}, "int4"),
        ({"address": "ssh://board"}, "address"),
    ],
    ids=str,
)
def test_a_senseless_profile_is_refused_before_anything_is_touched(facts: dict[str, object], said: str) -> None:
    with pytest.raises(ProfileError, match=said), open_target(load_profile("nvidia-gpu", facts)):
        pass
    (finding,) = examine_target(load_profile("nvidia-gpu", facts))
    assert finding.severity == "problem"
    assert said in finding.found


def test_a_gpu_of_another_architecture_than_the_profile_names_is_refused(machine) -> None:
    machine()
    with open_target(profile("fp32", {"arch": "sm_86"})) as target:
        assert target.profile.arch == "sm_86"
    with pytest.raises(ProfileError, match="sm_87"), open_target(profile("fp32", {"arch": "sm_87"})):
        pass


def test_other_inputs_than_the_graph_has_are_refused(opened, net: Artifact) -> None:
    target = opened("fp32")
    for wrong in (
        TensorSpec(name="z", shape=(1, 3, 32, 32)),
        TensorSpec(name="x", shape=(1, 3, 32)),
        TensorSpec(name="x", shape=(1, 3, 32, 32), dtype="float64"),
    ):
        with pytest.raises(CompileError, match="input"):
            target.compile(Artifact.of(net.path, kind="onnx", inputs=[wrong]))


def test_leaving_the_context_ends_the_worker(machine) -> None:
    machine()
    with open_target(profile("fp32")) as target:
        pid = target.worker_pid
    assert not Path(f"/proc/{pid}").exists()


# -- the whole line --------------------------------------------------------------------------------------------------


def test_a_deploy_ends_with_a_bundle_whose_engine_answers_as_pytorch_does(machine, tmp_path: Path) -> None:
    """Baseline, candidates and winner are built, timed and run by the adapter; the replay times the host's CPU."""
    machine()
    whole = "\n".join(f"{name} = {value}" for name, value in PATIENT.items())
    config = tiny_project.write_project(
        tmp_path,
        ('profile = "formula"', 'profile = "nvidia-gpu"\nprecision = "fp16"'),
        ("block = 8\n", f"{whole}\n"),
        ('latency = "0.5x"', 'latency = "0.9x"'),
        ("trials = 6", "trials = 3"),
    )
    done = deploy(Request(config=load_config(config), target="toy", out=tmp_path / "dist", sleep=lambda _: None))
    assert done.conditions["gpu"] == "Replayed GPU 0"
    assert (done.emulated, done.metric) == (False, "latency_ns")
    assert set(done.layer_shares) == {
        *("stem.0", "head"),
        *(f"block{block}.{layer}" for block in (1, 2) for layer in ("conv1", "conv2", "shortcut")),
    }
    assert Path(done.bundle).exists()
