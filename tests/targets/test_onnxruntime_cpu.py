import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from contract import TargetContract, convnet, quick
from onnx import TensorProto, helper, numpy_helper

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.errors import CompileError, DeviceLost, ProfileError, Unstable
from edgeprune.profile import Profile, at_address, load_profile
from edgeprune.target import examine_target, open_target
from edgeprune.targets.onnxruntime_cpu import OnnxRuntimeCpu, Yardstick

NORMAL = {"priority": "normal"}
CPUS = sorted(os.sched_getaffinity(0))


class TestOnnxRuntimeCpuContract(TargetContract):
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> Profile:
        return host()


def host(**options: object) -> Profile:
    """Return the profile of this machine, on which other tests may run: tiny nets are often a third slower there."""
    return load_profile("host", {"options": {"slow_limit": 20.0} | options})


@pytest.fixture
def net(tmp_path: Path) -> Artifact:
    return convnet(tmp_path / "net.onnx", (16, 16))


@pytest.fixture
def opened() -> Iterator[Callable[..., OnnxRuntimeCpu]]:
    """Open targets that are left when the test ends, however it ends."""
    targets = []

    def open_one(**options: object) -> OnnxRuntimeCpu:
        context = open_target(host(**options))
        targets.append(context)
        return context.__enter__()

    yield open_one
    for each in targets:
        each.__exit__(None, None, None)


def gone(pid: int, within_s: float = 20.0) -> bool:
    """Return whether the process ends in time; one that is ended but not yet reaped counts."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def after(seconds: float, pid: int, number: signal.Signals) -> None:
    timer = threading.Timer(seconds, os.kill, (pid, number))
    timer.daemon = True
    timer.start()


def test_a_worker_killed_while_timing_is_a_lost_device_and_the_next_call_works(opened, net: Artifact) -> None:
    target = opened()
    first = target.worker_pid
    after(0.4, first, signal.SIGKILL)
    with pytest.raises(DeviceLost, match=r"timing net\.onnx.*SIGKILL"):
        target.measure(net, quick(net, session_ms=20_000.0))
    assert target.measure(net, quick(net)).sessions
    assert target.worker_pid != first


def test_a_worker_that_stops_answering_is_killed_after_its_time(opened, net: Artifact) -> None:
    target = opened(time_limit_s=1)
    stopped = target.worker_pid
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(DeviceLost, match="did not answer in time"):
        target.compile(net)
    assert gone(stopped)
    assert target.compile(net)


def test_a_worker_that_stops_while_it_is_sent_a_large_input_is_killed_after_its_time(opened, net: Artifact) -> None:
    target = opened(time_limit_s=1)
    os.kill(target.worker_pid, signal.SIGSTOP)
    with pytest.raises(DeviceLost, match=r"running net\.onnx"):
        target.run(net, {"x": np.zeros((1, 3, 1000, 1000), np.float32)})


def test_a_machine_without_memory_is_a_lost_device_and_not_a_broken_candidate(opened, tmp_path: Path) -> None:
    """A loose cable must never become a reward, and neither must a neighbour that takes all the memory."""
    target = opened()
    large = convnet(tmp_path / "large.onnx", (512, 512, 512))
    used = int(Path(f"/proc/{target.worker_pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(target.worker_pid, resource.RLIMIT_AS, (used + 4 * 2**20, used + 4 * 2**20))
    with pytest.raises(DeviceLost, match=r"ran short while loading large\.onnx"):
        target.compile(large)
    assert target.compile(large)


def test_leaving_the_context_ends_the_worker(net: Artifact) -> None:
    with open_target(host()) as target:
        pid = target.worker_pid
        target.compile(net)
    assert gone(pid, 1)


def test_an_error_inside_the_context_ends_the_worker() -> None:
    seen = []

    def fail() -> None:
        with open_target(host()) as target:
            seen.append(target.worker_pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert gone(seen[0], 1)


ORPHAN = """
import sys, threading, time
from edgeprune.profile import load_profile
from edgeprune.target import open_target
def work():
    with open_target(load_profile("host")) as target:
        print(target.worker_pid, flush=True)
        time.sleep(600)
threading.Thread(target=work).start() if sys.argv[1] == "thread" else work()
"""


@pytest.mark.parametrize("where", ["main", "thread"])
def test_killing_the_parent_ends_the_worker(where: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, where], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(worker)


def test_ctrl_c_in_the_terminal_does_not_reach_the_worker(opened, net: Artifact) -> None:
    target = opened()
    worker = target.worker_pid
    assert os.getpgid(worker) != os.getpgid(0)
    os.kill(worker, signal.SIGINT)
    assert target.measure(net, quick(net)).sessions
    assert target.worker_pid == worker


def test_an_interrupted_exchange_leaves_no_half_frame_behind(opened, net: Artifact) -> None:
    target = opened()
    worker = target.worker_pid
    after(0.4, os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        target.measure(net, quick(net, session_ms=20_000.0))
    assert gone(worker, 1)
    assert target.measure(net, quick(net)).artifact_sha256 == net.sha256


def test_the_worker_is_pinned_and_the_caller_is_not(opened, net: Artifact) -> None:
    target = opened()
    assert os.sched_getaffinity(target.worker_pid) == {CPUS[-1]}
    assert sorted(os.sched_getaffinity(0)) == CPUS
    assert target.measure(net, quick(net)).conditions["cpus"] == [CPUS[-1]]


def test_the_cpu_can_be_chosen(opened) -> None:
    assert os.sched_getaffinity(opened(cpu=CPUS[0]).worker_pid) == {CPUS[0]}


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_two_threads_take_two_cpus_and_never_the_clock_of_one(opened, net: Artifact) -> None:
    target = opened(threads=2)
    assert os.sched_getaffinity(target.worker_pid) == set(CPUS[-2:])
    seen = target.measure(net, quick(net))
    assert seen.conditions["threads"] == 2
    assert not any(each.single_threaded or each.clock == "cpu" for each in seen.sessions)


def test_normal_priority_is_kept_if_asked_for(opened, net: Artifact) -> None:
    assert opened(**NORMAL).measure(net, quick(net)).conditions["priority"] == "normal"


def test_a_raised_priority_is_recorded_and_given_back(opened, net: Artifact) -> None:
    target = opened()
    priority = target.measure(net, quick(net)).conditions["priority"]
    assert priority in {"fifo", "nice -20", "normal"}
    assert os.sched_getscheduler(target.worker_pid) == os.SCHED_OTHER
    assert os.getpriority(os.PRIO_PROCESS, target.worker_pid) >= 0


def test_conditions_say_how_it_was_measured(opened, net: Artifact) -> None:
    seen = opened().measure(net, quick(net)).conditions
    assert {"before", "after", "onnxruntime", "cpu_model", "cpus", "threads", "priority", "warm_up", "notes"} == set(
        seen
    )
    assert {"governor", "mhz", "temperatures_c", "load_1m", "steal_ticks", "free_memory_mib"} <= set(seen["before"])
    assert all(each["calls"] >= 3 for session in seen["warm_up"] for each in session)


def test_sessions_of_many_measurements_are_released(opened, net: Artifact) -> None:
    target = opened()

    def resident_kib() -> int:
        status = Path(f"/proc/{target.worker_pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    sizes = []
    for number in range(60):
        target.measure(net, quick(net, session_ms=1.0, sessions_min=1, sessions_max=1, block_ms=0.1))
        if number in (19, 59):
            sizes.append(resident_kib())
    assert sizes[1] - sizes[0] < 4096


def test_other_inputs_than_the_graph_has_are_refused(opened, net: Artifact) -> None:
    target = opened()
    for wrong in (
        TensorSpec(name="z", shape=(1, 3, 32, 32)),
        TensorSpec(name="x", shape=(1, 3, 32)),
        TensorSpec(name="x", shape=(1, 3, 32, 31)),
        TensorSpec(name="x", shape=(1, 3, 32, 32), dtype="float64"),
    ):
        with pytest.raises(CompileError, match="input"):
            target.compile(Artifact.of(net.path, kind="onnx", inputs=[wrong]))


def test_an_engine_that_fails_only_when_it_runs_is_refused(opened, tmp_path: Path) -> None:
    """Gather with an index that is out of range loads, and fails in the first call."""
    graph = helper.make_graph(
        [helper.make_node("Gather", ["x", "far"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (4,))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1,))],
        [numpy_helper.from_array(np.array([99]), "far")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(tmp_path / "g.onnx")
    )
    artifact = Artifact.of(tmp_path / "g.onnx", kind="onnx", inputs=[TensorSpec(name="x", shape=(4,))])
    with pytest.raises(CompileError, match="out of"):
        opened().compile(artifact)


def test_whole_number_inputs_are_timed_with_zeros(opened, tmp_path: Path) -> None:
    """An embedding of two rows: any random index would be out of range."""
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, (8,))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (8, 3))],
        [numpy_helper.from_array(np.ones((2, 3), np.float32), "table")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(tmp_path / "g.onnx")
    )
    artifact = Artifact.of(tmp_path / "g.onnx", kind="onnx", inputs=[TensorSpec(name="i", shape=(8,), dtype="int64")])
    target = opened()
    assert target.measure(target.compile(artifact), quick(artifact)).sessions


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0},
        {"threads": 4096},
        {"threads": True},
        {"cpu": -1},
        {"cpu": 100_000},
        {"priority": "high"},
        {"time_limit_s": 0},
        {"slow_limit": 1},
        {"speed": "fast"},
    ],
    ids=str,
)
def test_a_senseless_option_is_a_profile_error(options: dict[str, object]) -> None:
    with pytest.raises(ProfileError), open_target(host(**options)):
        pass
    problems = [each for each in examine_target(host(**options)) if each.severity == "problem"]
    assert [each.subject for each in problems] == ["options"]
    assert problems[0].mend


def test_an_address_is_refused_because_this_machine_would_be_timed_in_its_place() -> None:
    elsewhere = at_address(host(), "ssh://me@pi.local")
    with pytest.raises(ProfileError, match=r"ssh://me@pi\.local"), open_target(elsewhere):
        pass
    assert [each.subject for each in examine_target(elsewhere) if each.severity == "problem"] == ["options"]


def test_examining_names_what_decides_a_measurement() -> None:
    subjects = {each.subject for each in examine_target(host())}
    assert {"onnxruntime", "cpu", "governor", "priority", "timer", "load", "memory", "sensors"} <= subjects


def test_examining_leaves_the_scheduling_of_this_process_alone() -> None:
    examine_target(host())
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_sentinel_as_fast_as_before_says_nothing() -> None:
    yardstick = Yardstick(1.3)
    assert [yardstick.compare("a", took) for took in (10.0, 10.5, 9.0, 10.9)] == [[]] * 4


def test_a_sentinel_a_tenth_slower_is_flagged_and_a_third_slower_is_refused() -> None:
    yardstick = Yardstick(1.3)
    for _ in range(5):
        yardstick.compare("a", 10.0)
    assert "1.20 times" in yardstick.compare("a", 12.0)[0]
    with pytest.raises(Unstable, match=r"1\.40 times"):
        yardstick.compare("a", 14.0)
    assert yardstick.compare("a", 10.0) == []


def test_a_creeping_slow_down_does_not_move_the_yardstick() -> None:
    yardstick = Yardstick(1.3)
    for step in range(28):
        yardstick.compare("a", 10.0 * 1.01**step)
    with pytest.raises(Unstable):
        yardstick.compare("a", 10.0 * 1.01**30)


def test_each_sentinel_has_its_own_yardstick() -> None:
    yardstick = Yardstick(1.3)
    yardstick.compare("a", 1.0)
    assert yardstick.compare("b", 100.0) == []
