"""A board through TVM RPC: emulated ARM, and the same server on this machine, with every fault a board can have."""

import contextlib
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from board_programs import HERE, engine, programs, server
from contract import TargetContract, convnet, quick

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.errors import (
    CompileError,
    CorruptArtifact,
    DeviceBusy,
    DeviceLost,
    LabError,
    ProfileError,
    StorageFull,
    Unstable,
)
from edgeprune.measurement import Calls, Measurement, Session
from edgeprune.profile import Profile, load_profile, profile_names
from edgeprune.target import examine_target, open_target
from edgeprune.targets.tvm_rpc import ENGINE, TvmRpc, _changes, _disagreements, cooled, throttling

pytest.importorskip("tvm", reason="pip install -e '.[tvm]'")

NATIVE = "native" if HERE == "x86_64" else "generic"


def local(address: str | None = None, **options: object) -> Profile:
    """Return the profile of a board's server that runs on this machine as it is."""
    settings = {"board": "local", "cpu": NATIVE, "slow_limit": 20.0, "pin": None} | options
    found = load_profile("arm-emulated", {"arch": HERE, "options": settings})
    return replace(
        found, address=address, options={key: each for key, each in found.options.items() if each is not None}
    )


class TestLocalBoard(TargetContract):
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> Profile:
        programs()
        return local()


class TestEmulatedBoard(TargetContract):
    """Every call takes an emulator thousands of times as long, so the images are small."""

    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> Profile:
        programs("aarch64")
        return load_profile("arm-emulated")

    @pytest.fixture
    def small(self, tmp_path: Path) -> Artifact:
        return convnet(tmp_path / "small.onnx", (16, 16), side=12)

    @pytest.fixture
    def large(self, tmp_path: Path) -> Artifact:
        return convnet(tmp_path / "large.onnx", (32, 32, 32, 32), side=12)

    def test_counts_are_the_same_every_time_and_are_called_what_they_are(
        self, target: TvmRpc, small: Artifact, large: Artifact
    ) -> None:
        candidate, reference = target.compile(small), target.compile(large)
        seen = target.measure(candidate, quick(reference, layers=True))
        assert (seen.metric, seen.emulated, seen.flags) == ("emulated_instructions", True, ())
        for which in ("candidate", "reference"):
            assert len({count for session in seen.sessions for count in getattr(session, which).elapsed}) == 1
        counts = seen.sessions[0].candidate
        assert counts.elapsed == counts.on_cpu
        assert sum(seen.layers.values()) == pytest.approx(counts.elapsed[0], rel=0.01)
        assert "conditions" not in seen.conditions["found"]
        assert seen.conditions["cpu_model"] == "emulated cortex-a72"
        assert target.measure(candidate, quick(reference)).sessions[0].candidate == counts

    def test_a_board_killed_while_counting_is_lost_and_the_next_one_counts_the_same(
        self, target: TvmRpc, small: Artifact, tmp_path: Path
    ) -> None:
        heavy = target.compile(convnet(tmp_path / "heavy.onnx", (64, 64, 64, 64), side=24))
        sentinel = target.compile(small)
        before = target.measure(sentinel, quick(sentinel)).sessions[0].candidate
        killed = target.board_pid
        assert killed is not None
        with later(0.4, lambda: os.kill(killed, signal.SIGKILL)), pytest.raises(DeviceLost):
            target.measure(heavy, quick(sentinel))
        assert target.measure(sentinel, quick(sentinel)).sessions[0].candidate == before
        assert target.board_pid != killed


@pytest.fixture
def net(tmp_path: Path) -> Artifact:
    return convnet(tmp_path / "net.onnx", (16, 16), side=16)


@pytest.fixture(scope="module")
def shared() -> Iterator[TvmRpc]:
    """Yield a board that tests may break and must leave usable."""
    programs()
    with open_target(local(time_limit_s=20)) as target:
        assert isinstance(target, TvmRpc)
        yield target


@contextlib.contextmanager
def opened(profile: Profile) -> Iterator[TvmRpc]:
    with open_target(profile) as target:
        assert isinstance(target, TvmRpc)
        yield target


def gone(pid: int, within_s: float = 10.0) -> bool:
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


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def later(seconds: float, act: Callable[[], object]) -> Iterator[None]:
    timer = threading.Timer(seconds, act)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def test_a_board_killed_while_measuring_is_a_lost_device_and_the_next_call_works(shared: TvmRpc, net: Artifact) -> None:
    model = shared.compile(net)
    before = shared.board_pid
    assert before is not None
    with later(0.5, lambda: os.kill(before, signal.SIGKILL)), pytest.raises(DeviceLost, match=r"timing net"):
        shared.measure(model, quick(model, session_ms=8000.0))
    assert shared.measure(model, quick(model)).sessions
    assert shared.board_pid != before


def test_a_session_killed_while_measuring_says_how_it_ended(shared: TvmRpc, net: Artifact) -> None:
    model = shared.compile(net)
    assert shared.board_pid is not None
    (session,) = children(shared.board_pid)
    with (
        later(0.5, lambda: os.kill(session, signal.SIGKILL)),
        pytest.raises(DeviceLost, match="ended by signal Killed"),
    ):
        shared.measure(model, quick(model, session_ms=8000.0))
    assert shared.measure(model, quick(model)).sessions


def test_a_board_killed_between_two_calls_is_not_even_noticed(shared: TvmRpc, net: Artifact) -> None:
    model = shared.compile(net)
    assert shared.measure(model, quick(model)).sessions
    assert shared.board_pid is not None
    os.kill(shared.board_pid, signal.SIGKILL)
    assert gone(shared.board_pid)
    assert shared.measure(model, quick(model)).sessions


def test_a_worker_killed_while_measuring_is_a_lost_device_and_the_next_call_works(
    shared: TvmRpc, net: Artifact
) -> None:
    model = shared.compile(net)
    assert shared.measure(model, quick(model)).sessions
    worker = shared.worker_pid
    assert worker is not None
    with later(0.5, lambda: os.kill(worker, signal.SIGKILL)), pytest.raises(DeviceLost, match="SIGKILL"):
        shared.measure(model, quick(model, session_ms=8000.0))
    assert shared.measure(model, quick(model)).sessions


def test_engines_unused_for_longest_make_room_and_the_sentinel_stays(
    shared: TvmRpc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentinel = shared.compile(convnet(tmp_path / "sentinel.onnx", (16, 16), side=8))
    monkeypatch.setattr("edgeprune.targets.tvm_rpc.ENGINES_KEPT", 120_000)
    made = []
    for width in (17, 18, 19, 20, 21):
        made.append(shared.compile(convnet(tmp_path / f"net{width}.onnx", (width, 16), side=8)))
        assert shared.measure(made[-1], quick(sentinel, sessions_max=2)).sessions
    assert sentinel.path.exists()
    assert made[-1].path.exists()
    assert not made[0].path.exists()


def test_a_frozen_board_is_lost_after_its_time_and_no_process_stays(net: Artifact) -> None:
    programs()
    with opened(local(time_limit_s=3, busy_wait_s=0)) as target:
        with contextlib.suppress(DeviceLost):  # a first compilation may take longer than that on a busy machine
            target.compile(net)
        model = target.compile(net)
        assert target.measure(model, quick(model)).sessions
        assert target.board_pid is not None
        frozen = [target.board_pid, *children(target.board_pid)]
        assert len(frozen) == 2
        for each in frozen:
            os.kill(each, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(DeviceLost, match="did not answer in time"):
            target.measure(model, quick(model))
        assert time.monotonic() - started < 10
        assert all(gone(each) for each in frozen)
        assert target.measure(model, quick(model)).sessions
        worker, board = target.worker_pid, target.board_pid
    assert worker is not None
    assert board is not None
    assert gone(worker, 1)
    assert gone(board, 1)


ORPHAN = """
import json, sys, time
from edgeprune.profile import Profile
from edgeprune.target import open_target
with open_target(Profile.from_json(json.loads(sys.argv[1]))) as target:
    print(target.worker_pid, target.board_pid, flush=True)
    time.sleep(600)
"""


def test_killing_the_parent_ends_worker_board_and_session() -> None:
    programs()
    facts = json.dumps(local().to_json())
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, facts], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker, board = (int(each) for each in parent.stdout.readline().split())
    everyone = [worker, board, *children(board)]
    assert len(everyone) == 3
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all(gone(each) for each in everyone)


def address(port: int) -> str:
    return f"tcp://127.0.0.1:{port}"


def test_a_board_that_restarts_in_the_middle_is_lost_once_and_then_used_again(tmp_path: Path, net: Artifact) -> None:
    with contextlib.ExitStack() as stack:
        port, process = stack.enter_context(server(tmp_path / "uploads"))
        with opened(local(address(port))) as target:
            model = target.compile(net)
            with later(0.5, process.kill), pytest.raises(DeviceLost):
                target.measure(model, quick(model, session_ms=8000.0))
            with pytest.raises(DeviceLost, match="no session"):
                target.measure(model, quick(model))
            stack.enter_context(server(tmp_path / "uploads", "--port", str(port)))
            assert target.measure(model, quick(model)).sessions


def test_a_busy_board_names_its_holder_and_is_not_waited_for_without_end(tmp_path: Path, net: Artifact) -> None:
    with server(tmp_path / "uploads") as (port, _), opened(local(address(port))) as first:
        started = time.monotonic()
        with (
            pytest.raises(DeviceBusy, match=r"held by .*@.* for \d+ s"),
            open_target(local(address(port), busy_wait_s=0.5)),
        ):
            pass
        assert time.monotonic() - started < 30
        problems = [each for each in examine_target(local(address(port), busy_wait_s=0)) if each.severity == "problem"]
        assert "held by" in problems[0].found
        model = first.compile(net)
        assert first.measure(model, quick(model)).sessions


def test_a_board_whose_server_is_down_is_a_lost_device() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(DeviceLost, match="no session"), open_target(local(address(port))):
        pass


def test_a_server_without_room_is_storage_that_is_full(tmp_path: Path) -> None:
    with server(tmp_path / "uploads", "--upload-mib", "1") as (port, _), opened(local(address(port))) as target:
        large = target.compile(convnet(tmp_path / "large.onnx", (16, 512), side=8))
        image = np.zeros((1, 3, 8, 8), np.float32)
        target.run(large, {"x": image})
        huge = target.compile(convnet(tmp_path / "huge.onnx", (256, 256), side=8))
        with pytest.raises(StorageFull, match="more than 1 MiB"):
            target.run(huge, {"x": image})
        assert issubclass(StorageFull, LabError)
        target.run(large, {"x": image})


def test_a_board_of_another_architecture_is_the_profiles_fault(tmp_path: Path) -> None:
    with server(tmp_path / "uploads") as (port, _):
        wrong = load_profile(
            "raspberry-pi-4", {"address": address(port), "arch": "aarch64" if HERE == "x86_64" else "x86_64"}
        )
        with pytest.raises(ProfileError, match=f"the board is '{HERE}'"), open_target(wrong):
            pass
        assert any(HERE in each.found for each in examine_target(wrong) if each.severity == "problem")


def test_a_board_with_a_clock_is_not_taken_for_an_emulated_one(tmp_path: Path) -> None:
    with server(tmp_path / "uploads") as (port, _):
        wrong = local(address(port), board="emulated", cpu="cortex-a72")
        with pytest.raises(ProfileError, match="wants emulated_instructions"), open_target(wrong):
            pass


def test_an_emulated_board_is_not_taken_for_a_real_one(tmp_path: Path) -> None:
    for count in (True, False):
        with server(tmp_path / f"uploads-{count}", arch="aarch64", count=count) as (port, _):
            pi = load_profile("raspberry-pi-4", {"address": address(port)})
            with pytest.raises(ProfileError, match="it is emulated"), open_target(pi):
                pass


def made(path: Path, **how: str) -> Artifact:
    engine(path, **how)
    return Artifact.of(path, kind=ENGINE, inputs=[TensorSpec(name="x", shape=(2, 4))])


def test_an_instruction_that_the_board_lacks_is_the_profiles_fault(shared: TvmRpc, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="does not know the engine's instructions"):
        shared.run(made(tmp_path / "e.so", kernel="illegal"), {"x": np.zeros((2, 4), np.float32)})


def test_a_kernel_that_crashes_is_a_lost_device_that_says_so(shared: TvmRpc, tmp_path: Path) -> None:
    with pytest.raises(DeviceLost, match="Segmentation fault"):
        shared.run(made(tmp_path / "e.so", kernel="crash"), {"x": np.zeros((2, 4), np.float32)})


def test_a_kernel_that_refuses_is_the_candidates_fault(shared: TvmRpc, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="kernel refuse of layer first failed"):
        shared.run(made(tmp_path / "e.so", kernel="refuse"), {"x": np.zeros((2, 4), np.float32)})


def test_an_engine_that_changed_or_is_none_is_refused_before_it_goes_anywhere(shared: TvmRpc, tmp_path: Path) -> None:
    good = made(tmp_path / "e.so")
    image = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(shared.run(good, {"x": image})["y"], 4 * image + 3)
    made(tmp_path / "e.so", constants=bytes(64))
    with pytest.raises(CorruptArtifact, match="changed on disk"):
        shared.run(good, {"x": image})
    with pytest.raises(CorruptArtifact, match="no engine of this target"):
        shared.run(replace(good, kind="onnx"), {"x": image})


FACTS = {"protocol": 2, "machine": HERE, "metric": "latency_ns", "emulated": False, "version": "9"}
ROWS = {"wall_ns": [5, 5, 5, 5], "cpu_ns": [5, 5, 5, 5], "preempted": [0, 0, 0, 0]}
SAMPLES = {"metric": "latency_ns", "candidate": ROWS, "reference": ROWS}


@contextlib.contextmanager
def lying(**answers: object) -> Iterator[int]:
    texts = {name: each if isinstance(each, str) else json.dumps(each) for name, each in answers.items()}
    script = Path(__file__).with_name("lying_board.py")
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(texts)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("facts", "kind", "said"),
    [
        ("no JSON", DeviceLost, "no JSON object"),
        ([1], DeviceLost, "no JSON object"),
        ("[" * 100_000, DeviceLost, "no JSON object"),
        (FACTS | {"conditions": {"temperatures_c": {"cpu": math.nan}}}, DeviceLost, "no JSON object of plain values"),
        (json.dumps(FACTS).replace('"9"', "1e999"), DeviceLost, "no JSON object of plain values"),
        (FACTS | {"memory_mib": 10**400}, DeviceLost, "no JSON object of plain values"),
        (FACTS | {"protocol": 99}, ProfileError, "speaks protocol 99"),
        (FACTS | {"machine": "\x1b]0;evil\x07"}, ProfileError, "the board is ']0;evil'"),
        ("raise edgeprune:lost: \x1b[2J\x1b[31mgone\x07", DeviceLost, r"\[2J\[31mgone"),
        ("raise \x1b[2Jwhatever", DeviceLost, "the session broke"),
        ("long", DeviceLost, "an answer of 34603008 bytes"),
    ],
    ids=[
        "no JSON",
        "a list",
        "nested",
        "NaN",
        "infinity",
        "400 digits",
        "another protocol",
        "escape codes",
        "escape codes in a refusal",
        "any error",
        "33 MiB",
    ],
)
def test_a_board_that_lies_of_itself_is_refused_in_plain_words(facts: object, kind: type[Exception], said: str) -> None:
    with lying(facts=facts) as port:
        with pytest.raises(kind, match=said) as caught, open_target(local(address(port))):
            pass
        assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "samples",
    [
        {},
        SAMPLES | {"metric": "emulated_instructions"},
        SAMPLES | {"candidate": ROWS | {"wall_ns": [5, 5, -5, 5]}},
        SAMPLES | {"candidate": ROWS | {"wall_ns": [5, 0, 5, 5]}},
        SAMPLES | {"candidate": ROWS | {"cpu_ns": [5, 5, -5, 5]}},
        SAMPLES | {"candidate": ROWS | {"cpu_ns": [0, 0, 5, 5]}},
        SAMPLES | {"candidate": ROWS | {"wall_ns": [5, 5, 5]}},
        SAMPLES | {"candidate": ROWS | {"wall_ns": [5, 5, 5, "5"]}},
        SAMPLES | {"candidate": {}},
        SAMPLES | {"reference": {"wall_ns": [], "cpu_ns": [], "preempted": []}},
    ],
    ids=str,
)
def test_samples_that_are_none_are_never_a_measurement(samples: dict[str, object]) -> None:
    """Straight from the reply to the refusal: what was garbled never reaches the searcher."""
    target = TvmRpc(local())
    try:
        with pytest.raises(DeviceLost, match="answers what was not asked"):
            target._calls_of(json.loads(json.dumps(samples)))
    finally:
        target.close()


def test_a_cpu_clock_that_stood_still_for_one_call_is_no_lie() -> None:
    """Seen on a virtual machine, once in some ten thousand calls."""
    target = TvmRpc(local())
    try:
        session = target._calls_of(SAMPLES | {"candidate": ROWS | {"cpu_ns": [5, 0, 5, 5]}})
        assert session.candidate.on_cpu == (5, 0, 5, 5)
    finally:
        target.close()


def test_a_board_that_sends_a_gigabyte_does_not_fill_this_machine(net: Artifact) -> None:
    """It announces one packet of that size and begins to send it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_flood, args=(listener,), daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        with pytest.raises(DeviceLost), open_target(local(address(port), time_limit_s=20)):
            pass


def _flood(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                client.recv(512)
                client.sendall(struct.pack("<iiQ", 0xFF271, 0, 1 << 30))
                for _ in range(1 << 10):
                    client.sendall(bytes(1 << 20))


def test_a_board_that_says_nothing_is_given_up_after_its_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        patient = local(address(port), time_limit_s=2, busy_wait_s=0)
        with pytest.raises(DeviceLost, match="did not answer in time"), open_target(patient):
            pass


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("tcp://192.168.1.5:9190", "neither passwords nor encryption"),
        ("tcp://0.0.0.0:9190", "neither passwords nor encryption"),
        ("tcp://localhost:9190", "neither passwords nor encryption"),
        ("tcp://127.0.0.1:0", "neither passwords"),
        ("tcp://127.0.0.1:99999", "neither passwords"),
        ("tcp://127.0.0.1:9190; reboot", "neither passwords"),
        ("tcp://127.0.0.1:9190\n", "neither passwords"),
        ("http://127.0.0.1:9190", "no way to a board"),
        ("127.0.0.1:9190", "no way to a board"),
        ("", "no way to a board"),
    ],
)
def test_an_address_beyond_loopback_is_refused_and_says_why(place: str, said: str) -> None:
    with pytest.raises(ProfileError, match=said) as caught, open_target(local(place)):
        pass
    assert "ssh://" in caught.value.next_step


def test_a_board_of_its_own_without_an_address_says_what_to_write() -> None:
    for name in ("raspberry-pi-4", "raspberry-pi-5", "rock-5b"):
        with pytest.raises(ProfileError, match="has no address") as caught, open_target(load_profile(name)):
            pass
        assert 'address = "ssh://me@pi.local"' in caught.value.next_step
        assert any("has no address" in each.found for each in examine_target(load_profile(name)))


@pytest.mark.parametrize(
    "options",
    [
        {"board": "cloud"},
        {"cpu": "cortex a72"},
        {"cpu": "-plugin"},
        {"cpu": "x,plugin=/tmp/evil"},
        {"cpu": ""},
        {"threads": 2},
        {"pin": -1},
        {"pin": True},
        {"priority": "high"},
        {"time_limit_s": 0},
        {"busy_wait_s": -1},
        {"slow_limit": 1},
        {"speed": "fast"},
    ],
    ids=str,
)
def test_a_senseless_option_is_a_profile_error(options: dict[str, object]) -> None:
    with pytest.raises(ProfileError), open_target(local(**options)):
        pass
    problems = [each for each in examine_target(local(**options)) if each.severity == "problem"]
    assert len(problems) == 1
    assert problems[0].mend


def test_a_cpu_that_kernels_are_not_made_for_is_a_profile_error(net: Artifact) -> None:
    programs()
    with opened(local(cpu="quantum-1")) as target, pytest.raises(ProfileError, match="quantum-1"):
        target.compile(net)


def test_programs_that_are_not_built_are_named_with_the_command_that_builds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ProfileError, match="are not built") as caught, open_target(load_profile("arm-emulated")):
        pass
    assert "emulated/setup --arch aarch64" in caught.value.next_step
    assert any("are not built" in each.found for each in examine_target(load_profile("arm-emulated")))


def test_examining_an_emulated_board_says_that_it_knows_no_time() -> None:
    programs("aarch64")
    found = {each.subject: each for each in examine_target(load_profile("arm-emulated"))}
    assert {"tvm", "linker", "programs", "emulator", "metric", "board"} <= set(found)
    assert "nothing about milliseconds" in found["metric"].found


def test_a_chosen_cpu_is_pinned_and_a_missing_one_is_said(net: Artifact, tmp_path: Path) -> None:
    first = sorted(os.sched_getaffinity(0))[0]
    with server(tmp_path / "uploads") as (port, process):
        with opened(local(address(port), pin=first)) as target:
            model = target.compile(net)
            target.measure(model, quick(model))
            (session,) = children(process.pid)
            assert os.sched_getaffinity(session) == {first}
        with opened(local(address(port), pin=1000)) as target:
            model = target.compile(net)
            with pytest.raises(DeviceLost, match="CPU 1000 cannot be used"):
                target.measure(model, quick(model))


def hot(*temperatures: float | None) -> Callable[[], dict[str, object]]:
    """Return what reads these temperatures one after another, the last one for ever."""
    left = list(temperatures)

    def read() -> dict[str, object]:
        now = left.pop(0) if len(left) > 1 else left[0]
        return {"conditions": {"temperatures_c": {} if now is None else {"thermal_zone0 cpu": now, "other": 20.0}}}

    return read


def test_a_hot_board_is_waited_for() -> None:
    naps: list[float] = []
    facts = cooled(hot(80.0, 70.0, 65.0, 60.0), 65.0, 600, sleep=naps.append)
    assert facts["conditions"] == {"temperatures_c": {"thermal_zone0 cpu": 65.0, "other": 20.0}}
    assert len(naps) == 2


def test_a_board_that_stays_hot_is_unstable_and_never_a_reward() -> None:
    naps: list[float] = []
    with pytest.raises(Unstable, match="at 80 C and does not cool down to 65 C"):
        cooled(hot(80.0), 65.0, 60, sleep=naps.append)
    assert sum(naps) == pytest.approx(65, abs=5)


def test_without_a_sensor_or_a_wish_nothing_is_waited_for() -> None:
    for temperature, wanted in ((None, 65.0), (90.0, None), (65.0, 65.0)):
        cooled(hot(temperature), wanted, 600, sleep=lambda _: pytest.fail("it waited"))


def counted(*counts: int) -> Calls:
    return Calls(elapsed=counts, on_cpu=counts, preempted=(0,) * len(counts))


def test_counts_that_disagree_are_flagged() -> None:
    def seen(*counts: int) -> Measurement:
        sessions = (Session(candidate=counted(*counts), reference=counted(1_000_000, 1_000_000)),)
        facts = {"profile_digest": "p", "artifact_sha256": "a", "reference_sha256": "r", "conditions": {}}
        return Measurement(**facts, sessions=sessions, taken_at="", seconds=1.0)

    assert _disagreements(seen(1_000_000, 1_000_050)) == []
    assert _disagreements(seen(1_000_000, 1_001_000)) == ["the counts of the candidate differ by 0.100%"]


def test_a_board_that_changed_while_it_was_timed_is_flagged() -> None:
    calm = {"governor": "performance", "khz_max": 2400000, "throttled": "0x0"}
    assert _changes(calm, calm) == []
    assert _changes(calm, calm | {"governor": "powersave"}) == [
        "the CPU governor changed from performance to powersave while measuring"
    ]
    assert "the board is throttled: it is throttled" in _changes(calm, calm | {"throttled": "0x50004"})


@pytest.mark.parametrize(
    ("bits", "count"),
    [("0x0", 0), ("0x50000", 0), ("0x1", 1), ("0x50005", 2), ("0xf", 4), (None, 0), ("nonsense", 0), (7, 0)],
)
def test_the_throttle_bits_of_a_raspberry_pi_are_read(bits: object, count: int) -> None:
    """0x50000 says that it was under-voltage and throttled since it started, and is fine now."""
    assert len(throttling(bits)) == count


def test_the_shipped_boards_are_profiles() -> None:
    boards = {"arm-emulated", "raspberry-pi-4", "raspberry-pi-5", "rock-5b"}
    assert boards <= set(profile_names())
    assert all(load_profile(each).adapter == "tvm_rpc" for each in boards)
