"""A Jetson over ssh, driven against a real OpenSSH server and the replay of its programs."""

import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from contract import TargetContract, convnet, quick
from loopback_sshd import INSTALL, sshd_path
from replay_board import ReplayBoard

from edgeprune.artifact import Artifact
from edgeprune.errors import CompileError, DeviceBusy, DeviceLost, EdgepruneError, ProfileError, StorageFull, Unstable
from edgeprune.profile import Profile, load_profile
from edgeprune.target import Finding, examine_target, open_target
from edgeprune.targets import _jetson_options, _jetson_store
from edgeprune.targets._typed_onnx import typed

pytestmark = pytest.mark.skipif(sshd_path() is None, reason=f"no OpenSSH server here; {INSTALL}")


class TestTensorrtSshContract(TargetContract):
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Profile]:
        with ReplayBoard(tmp_path_factory.mktemp("board")) as board:
            yield board.profile()

    def test_it_can_be_opened_again_after_it_was_left(self, tmp_path: Path, small: Artifact) -> None:
        """On a board of its own: the contract's target holds the other one's lock meanwhile."""
        with ReplayBoard(tmp_path / "other") as board:
            super().test_it_can_be_opened_again_after_it_was_left(board.profile(), small)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[ReplayBoard]:
    """A board that the test may hurt."""
    with ReplayBoard(tmp_path / "board") as running:
        yield running


@pytest.fixture
def net(tmp_path: Path) -> Artifact:
    return convnet(tmp_path / "net.onnx", (16, 16))


@pytest.fixture
def sentinel(tmp_path: Path) -> Artifact:
    return convnet(tmp_path / "sentinel.onnx", (32, 32, 32))


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


def pid_in(file: Path, within_s: float = 30.0) -> int:
    end = time.monotonic() + within_s
    while not (file.exists() and file.read_text().endswith("\n")):
        assert time.monotonic() < end, f"nothing was written to {file}"
        time.sleep(0.02)
    return int(file.read_text())


def assert_deserted(board: ReplayBoard) -> None:
    """No process of ours is left on the board, and its lock is free."""
    assert all(gone(each) for each in board.processes())
    lock = board.root / "run/lock/edgeprune.lock"
    assert subprocess.run(["flock", "-n", lock, "true"], check=False).returncode == 0


# -- every version --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["8.2", "8.5", "8.6", "10.3", "10.13", "11.1"])
def test_every_version_builds_times_profiles_and_answers(tmp_path: Path, net: Artifact, version: str) -> None:
    image = np.random.default_rng(1).standard_normal(net.inputs[0].shape).astype(np.float32)
    wanted = onnxruntime.InferenceSession(str(net.path)).run(["y"], {"x": image})[0]
    with ReplayBoard(tmp_path / "board", version) as board:
        with open_target(board.profile(precision="fp16")) as target:
            engine = target.compile(net)
            seen = target.measure(engine, quick(engine, layers=True))
            answer = target.run(engine, {"x": image})["y"]
        assert_deserted(board)
    assert seen.ratio().p50 == pytest.approx(1, rel=0.05)
    assert seen.conditions["tensorrt"].startswith(version)
    assert {"conv0", "conv1", "linear"} <= set(seen.layers)
    np.testing.assert_allclose(answer, wanted, rtol=2e-2, atol=2e-2 * np.abs(wanted).max())
    told = seen.conditions["engine"]["precisions"]
    assert told.get("fp16", 0) > 0 or version == "8.2"  # which has no --exportLayerInfo to read it back


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_engine_really_has_the_precision_that_was_asked_for(
    board: ReplayBoard, net: Artifact, precision: str
) -> None:
    with open_target(board.profile(precision=precision)) as target:
        engine = target.compile(net)
        told = target.measure(engine, quick(engine)).conditions["engine"]["precisions"]
    assert told[precision] >= 2
    assert engine.sha256 != net.sha256


def test_a_graph_that_says_its_precision_itself_stays_as_it_is(
    board: ReplayBoard, net: Artifact, tmp_path: Path
) -> None:
    path = tmp_path / "typed.onnx"
    onnx.save(typed(onnx.load(str(net.path)), "int8"), str(path))
    given = Artifact.of(path, kind="onnx", inputs=net.inputs)
    with open_target(board.profile(precision="int8")) as target:
        assert target.compile(given) == given


def test_an_engine_that_ignores_the_types_of_its_graph_is_refused(board: ReplayBoard, net: Artifact) -> None:
    board.set(fault="lie")
    with (
        open_target(board.profile(precision="fp16")) as target,
        pytest.raises(CompileError, match="fp16 was asked"),
    ):
        target.compile(net)


def test_where_types_are_a_permission_another_precision_is_a_flag(tmp_path: Path, net: Artifact) -> None:
    with ReplayBoard(tmp_path / "board", "8.5") as board:
        board.set(fault="lie")
        with open_target(board.profile(precision="fp16")) as target:
            engine = target.compile(net)
            seen = target.measure(engine, quick(engine))
    assert any("although fp16 was permitted" in each for each in seen.flags)


def test_an_unknown_version_is_the_users_turn(board: ReplayBoard) -> None:
    board.set(version="12.0")
    with pytest.raises(ProfileError, match=r"TensorRT 12\.0\.0 .* not known"), open_target(board.profile()):
        pass
    assert_deserted(board)


# -- how it measures ------------------------------------------------------------------------------------------------


def test_both_engines_are_timed_in_fresh_processes_in_random_order(
    board: ReplayBoard, net: Artifact, sentinel: Artifact
) -> None:
    with open_target(board.profile()) as target:
        engine, reference = target.compile(net), target.compile(sentinel)
        seen = target.measure(engine, quick(reference, sessions_min=8, sessions_max=8))
    runs = ["net" if engine.sha256 in each else "sentinel" for each in board.commands(only="--exportTimes")]
    pairs = [tuple(runs[place : place + 2]) for place in range(0, 16, 2)]
    assert set(pairs) == {("net", "sentinel"), ("sentinel", "net")}
    assert seen.conditions["reference_engine"]["graph_sha256"] == reference.sha256


def test_what_was_pinned_is_pinned_in_every_timed_run(board: ReplayBoard, net: Artifact) -> None:
    with open_target(board.profile(options={"warm_up_ms": 1500, "run_s": 3})) as target:
        engine = target.compile(net)
        target.measure(engine, quick(engine))
    for each in board.commands(only="--exportTimes"):
        assert {"--warmUp=1500", "--duration=3", "--useCudaGraph", "--useSpinWait", "--noDataTransfers"} <= set(
            each.split()
        )


def test_the_builder_takes_a_level_for_the_search_and_another_for_what_ships(board: ReplayBoard, net: Artifact) -> None:
    with open_target(board.profile(options={"builder_level": 4, "builder_level_search": 1})) as target:
        engine = target.compile(net)
        target.measure(engine, quick(engine))
        assert [each for each in board.commands(only="--onnx") if "builderOptimizationLevel=4" in each] == []
        seen = target.measure(engine, quick(engine, layers=True))
    levels = [each.partition("--builderOptimizationLevel=")[2][0] for each in board.commands(only="--onnx")]
    assert levels == ["1", "4"]
    assert seen.conditions["engine"]["level"] == 4


def test_an_engine_is_built_once_and_found_again(board: ReplayBoard, net: Artifact) -> None:
    for _ in range(2):
        with open_target(board.profile()) as target:
            target.compile(net)
    assert len(board.commands(only="--onnx")) == 1


def test_a_power_mode_has_engines_and_a_timing_cache_of_its_own(board: ReplayBoard, net: Artifact) -> None:
    for mode in ("15W", "MAXN_SUPER"):
        board.write("power_mode", f"NV Power Mode: {mode}\n2\n")
        with open_target(board.profile(power_mode=mode)) as target:
            target.compile(net)
    builds = board.commands(only="--onnx")
    assert len({each.partition("--timingCacheFile=")[2].split()[0] for each in builds}) == len(builds) == 2


def test_conditions_say_on_what_and_in_which_state(board: ReplayBoard, net: Artifact) -> None:
    with open_target(board.profile(options={"energy_s": 1, "idle_s": 1})) as target:
        engine = target.compile(net)
        board.set(realtime=True)
        seen = target.measure(engine, quick(engine, layers=True, sessions_min=1, sessions_max=1)).conditions
    assert seen["cpu_model"] == "NVIDIA Jetson Orin Nano Developer Kit, 15W"
    assert (seen["l4t"], seen["power_mode"], seen["clocks"]) == ("36.4.0", "15W", "free")
    assert seen["before"]["temperatures_c"] == {"cpu": 46.531, "gpu": 48.218}
    assert seen["before"]["throttled"] == {"oc1": 0, "oc2": 0, "oc3": 37}
    assert seen["tegrastats"]["rails"] == "VDD_IN"
    assert any("clocks were not pinned" in each for each in seen["notes"])
    energy = seen["energy"]
    assert energy["idle_mw"] == pytest.approx(4000, rel=0.2)
    assert energy["busy_mw"] == pytest.approx(9000, rel=0.2)
    assert 0 < energy["net_mj"] < energy["gross_mj"]


def test_a_board_that_throttles_for_lack_of_power_is_unstable(board: ReplayBoard, net: Artifact) -> None:
    with open_target(board.profile()) as target:
        engine = target.compile(net)
        board.set(rewrite={str(board.root / "sys/class/hwmon/hwmon3/oc1_event_cnt"): "3\n"})
        with pytest.raises(Unstable, match="3 events of low voltage"):
            target.measure(engine, quick(engine))


def test_short_current_peaks_and_another_power_mode_are_flags(board: ReplayBoard, net: Artifact) -> None:
    with open_target(board.profile()) as target:
        engine = target.compile(net)
        peaks, mode = board.root / "sys/class/hwmon/hwmon3/oc3_event_cnt", board.root / "power_mode"
        board.set(rewrite={str(peaks): "40\n", str(mode): "NV Power Mode: 7W\n1\n"})
        flags = target.measure(engine, quick(engine)).flags
    assert any("3 times" in each for each in flags)
    assert any("from 15W to 7W" in each for each in flags)


def test_a_sentinel_that_slows_down_is_unstable(board: ReplayBoard, net: Artifact) -> None:
    with open_target(board.profile(options={"slow_limit": 1.3})) as target:
        engine = target.compile(net)
        target.measure(engine, quick(engine))
        board.set(slow=1.5)
        with pytest.raises(Unstable, match=r"1\.[45]\d times as long"):
            target.measure(engine, quick(engine))


def test_a_hot_board_is_waited_for_and_not_for_ever(board: ReplayBoard, net: Artifact) -> None:
    with open_target(board.profile(cooldown_c=40.0, options={"cooldown_limit_s": 0})) as target:
        engine = target.compile(net)
        with pytest.raises(Unstable, match=r"does not cool down to 40 °C.*48\.218"):
            target.measure(engine, quick(engine))
        board.write("sys/class/thermal/thermal_zone0/temp", "30000\n")
        board.write("sys/class/thermal/thermal_zone1/temp", "31000\n")
        assert target.measure(engine, quick(engine)).sessions


def test_the_wrong_power_mode_is_the_users_turn_and_never_changed_from_here(board: ReplayBoard) -> None:
    with (
        pytest.raises(ProfileError, match="is in power mode 15W, the target wants MAXN"),
        open_target(board.profile(power_mode="MAXN")),
    ):
        pass
    assert (board.root / "power_mode").read_text().startswith("NV Power Mode: 15W")


def test_clocks_are_pinned_on_request_and_put_back(board: ReplayBoard, net: Artifact) -> None:
    clock = board.root / "sys/class/devfreq/17000000.gpu/min_freq"
    with open_target(board.profile(options={"pin_clocks": True})) as target:
        assert clock.read_text() == "624750000\n"
        engine = target.compile(net)
        assert target.measure(engine, quick(engine)).conditions["clocks"] == "pinned for this measurement"
    end = time.monotonic() + 20
    while clock.read_text() != "306000000\n":
        assert time.monotonic() < end
        time.sleep(0.05)


# -- what the store survives ----------------------------------------------------------------------------------------


def test_a_timing_cache_that_cannot_be_read_is_dropped(board: ReplayBoard, net: Artifact, sentinel: Artifact) -> None:
    with open_target(board.profile()) as target:
        target.compile(net)
        (cache,) = board.cache.glob("timing/*.cache")
        cache.write_bytes(b"half of a cach")
        target.compile(sentinel)
        assert cache.read_text().startswith("replay timing cache")


@pytest.mark.parametrize("harm", ["gone", "torn", "rotten"])
def test_an_engine_that_cannot_be_loaded_is_built_again(board: ReplayBoard, net: Artifact, harm: str) -> None:
    with open_target(board.profile()) as target:
        engine = target.compile(net)
        (file,) = board.cache.glob("engines/*/*.engine")
        if harm == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:20] if harm == "torn" else b"x" * 4000)
        assert target.measure(engine, quick(engine)).sessions
    assert len(board.commands(only="--onnx")) == 2


def test_an_engine_that_rotted_between_two_connections_is_not_used(board: ReplayBoard, net: Artifact) -> None:
    with open_target(board.profile()) as target:
        target.compile(net)
    (file,) = board.cache.glob("engines/*/*.engine")
    file.write_bytes(file.read_bytes() + b"x")
    with open_target(board.profile()) as target:
        target.compile(net)
    assert len(board.commands(only="--onnx")) == 2


def test_what_was_not_used_for_longest_goes_first(board: ReplayBoard, tmp_path: Path) -> None:
    with open_target(board.profile()) as target:
        for place in range(3):
            target.compile(convnet(tmp_path / f"{place}.onnx", (16, 16 + 8 * place)))
        oldest, middle, newest = sorted(board.cache.glob("engines/*/*.engine"), key=lambda each: each.stat().st_mtime)
        for age, each in ((3, oldest), (1, middle), (2, newest)):
            for file in (each, each.with_suffix(".json")):
                os.utime(file, (time.time() - 3600 * age, time.time()))
        for file in board.cache.glob("graphs/*"):
            os.utime(file, (time.time() - 36000, time.time()))
        held = target._open
        room = sum(each.stat().st_size for each in (middle, middle.with_suffix(".json"))) // 1024 + 4
        held.ssh.run(["bash", "-c", _jetson_store._TRIM, "trim", str(board.cache), str(room)], limit_s=20)
    assert list(board.cache.glob("engines/*/*.engine")) == [middle]
    assert list(board.cache.glob("graphs/*")) == []


def test_a_job_leaves_no_folder_on_the_board(board: ReplayBoard, net: Artifact) -> None:
    with open_target(board.profile()) as target:
        engine = target.compile(net)
        target.measure(engine, quick(engine))
        target.run(engine, {"x": np.zeros(net.inputs[0].shape, np.float32)})
    assert list((board.cache / "jobs").iterdir()) == []


# -- faults ---------------------------------------------------------------------------------------------------------


def lose_while_timing(board: ReplayBoard, net: Artifact, tmp_path: Path, act: Callable[[], None]) -> None:
    """Time an engine that hangs on the board, and act once it does; then see that all is well again."""
    file = tmp_path / "pid"
    with open_target(board.profile()) as target:
        engine = target.compile(net)
        board.set(fault="hang", fault_at="time", pid_file=str(file))
        thread = threading.Thread(target=lambda: (pid_in(file), act()))
        thread.start()
        with pytest.raises(DeviceLost):
            target.measure(engine, quick(engine))
        thread.join()
        board.set(fault=None)
        assert gone(pid_in(file))
        board.sshd.thaw()
        assert target.measure(engine, quick(engine)).sessions
    assert_deserted(board)


def test_a_link_cut_in_the_middle_is_a_lost_device_and_nothing_runs_on(
    board: ReplayBoard, net: Artifact, tmp_path: Path
) -> None:
    lose_while_timing(board, net, tmp_path, board.sshd.cut)
    assert list((board.cache / "jobs").iterdir()) == []


def test_a_running_job_holds_its_folder_until_it_is_dead(board: ReplayBoard, net: Artifact, tmp_path: Path) -> None:
    held = []

    def look_then_cut() -> None:
        (folder,) = (board.cache / "jobs").iterdir()
        held.append(subprocess.run(["flock", "-n", folder, "true"], check=False).returncode)
        board.sshd.cut()

    lose_while_timing(board, net, tmp_path, look_then_cut)
    assert held == [1]


def test_a_board_that_freezes_in_the_middle_is_a_lost_device(board: ReplayBoard, net: Artifact, tmp_path: Path) -> None:
    lose_while_timing(board, net, tmp_path, board.sshd.freeze)


def test_a_process_killed_in_the_middle_is_a_lost_device(board: ReplayBoard, net: Artifact, tmp_path: Path) -> None:
    lose_while_timing(board, net, tmp_path, lambda: os.kill(pid_in(tmp_path / "pid"), 9))


@pytest.mark.parametrize("part", ["build", "time"])
def test_a_board_that_restarts_in_the_middle_is_a_lost_device(board: ReplayBoard, net: Artifact, part: str) -> None:
    with open_target(board.profile()) as target:
        engine = target.compile(net) if part == "time" else net
        board.set(fault="reboot", fault_at=part)
        with pytest.raises(DeviceLost, match="was started anew in the middle"):
            target.measure(engine, quick(engine)) if part == "time" else target.compile(net)
        board.set(fault=None)
        assert target.compile(net)


def test_a_builder_that_hangs_is_ended_after_its_time(board: ReplayBoard, net: Artifact, tmp_path: Path) -> None:
    board.set(fault="hang", pid_file=str(tmp_path / "pid"))
    with open_target(board.profile(options={"build_limit_s": 2})) as target:
        with pytest.raises(DeviceLost, match="did not end within 2 s"):
            target.compile(net)
        assert gone(pid_in(tmp_path / "pid"))


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("crash", CompileError, "crashed"),
        ("killed", DeviceLost, "without free memory"),
        ("memory", DeviceLost, "out of memory"),
        ("device", DeviceLost, "no CUDA-capable device"),
        ("full", StorageFull, "disk of 127.0.0.1 is full"),
        ("shout", DeviceLost, "said more than is read"),
    ],
)
def test_a_build_that_fails_is_blamed_on_whose_fault_it_is(
    board: ReplayBoard, net: Artifact, fault: str, error: type[EdgepruneError], words: str
) -> None:
    board.set(fault=fault)
    with open_target(board.profile()) as target:
        with pytest.raises(error, match=words):
            target.compile(net)
        board.set(fault=None)
        assert target.compile(net)
    assert_deserted(board)


def test_escape_codes_in_a_log_never_reach_a_message(board: ReplayBoard, net: Artifact) -> None:
    board.set(fault="escape")
    with open_target(board.profile()) as target, pytest.raises(CompileError) as caught:
        target.compile(net)
    assert "node  failed" in str(caught.value)
    assert all(each.isprintable() or each == "\n" for each in str(caught.value))


def test_times_that_are_no_numbers_are_a_lost_device(board: ReplayBoard, net: Artifact) -> None:
    with open_target(board.profile()) as target:
        engine = target.compile(net)
        board.set(fault="garbage", fault_at="time")
        with pytest.raises(DeviceLost, match="wrote what cannot be read"):
            target.measure(engine, quick(engine))


def test_an_output_that_is_cut_short_is_a_lost_device(board: ReplayBoard, net: Artifact) -> None:
    with open_target(board.profile()) as target:
        engine = target.compile(net)
        board.set(fault="torn", fault_at="none")
        with pytest.raises(DeviceLost, match="were announced"):
            target.run(engine, {each.name: np.zeros(each.shape, each.dtype) for each in engine.inputs})


def test_an_operator_that_tensorrt_lacks_is_the_candidates_fault(board: ReplayBoard, tmp_path: Path) -> None:
    net = convnet(tmp_path / "odd.onnx", (16,))
    model = onnx.load(str(net.path))
    model.graph.node[1].op_type = "Mish"
    onnx.save(model, str(net.path))
    with open_target(board.profile()) as target, pytest.raises(CompileError, match=r"odd\.onnx.*Mish"):
        target.compile(Artifact.of(net.path, kind="onnx", inputs=net.inputs))


def test_a_board_without_room_takes_no_graph(board: ReplayBoard, net: Artifact) -> None:
    with (
        open_target(board.profile(options={"free_mib": 1 << 20})) as target,
        pytest.raises(StorageFull, match="MiB are needed"),
    ):
        target.compile(net)
    assert list((board.cache / "graphs").iterdir()) == []


def test_a_board_without_memory_builds_nothing(board: ReplayBoard, net: Artifact) -> None:
    board.write("proc/meminfo", "MemAvailable: 204800 kB\n")
    with open_target(board.profile()) as target, pytest.raises(DeviceLost, match="has 200 MiB of memory left"):
        target.compile(net)


def test_a_busy_board_is_said_to_be_busy_and_by_whom(board: ReplayBoard) -> None:
    with open_target(board.profile()):
        with pytest.raises(DeviceBusy, match=rf"in use.*process {os.getpid()}"), open_target(board.profile()):
            pass
        (finding,) = [each for each in examine_target(board.profile()) if each.subject == "lock"]
        assert finding.severity == "note"
        assert f"process {os.getpid()}" in finding.found
    with open_target(board.profile()):
        pass


@pytest.mark.parametrize("kind", ["link", "link to nothing", "second name", "pipe", "folder"])
def test_a_lock_that_is_no_plain_file_of_its_own_is_refused_and_nothing_is_written_through_it(
    board: ReplayBoard, tmp_path: Path, kind: str
) -> None:
    lock, precious = board.root / "run/lock/edgeprune.lock", tmp_path / "precious"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.unlink(missing_ok=True)
    if kind != "link to nothing":
        precious.write_text("mine")
    make = {
        "link": lambda: lock.symlink_to(precious),
        "link to nothing": lambda: lock.symlink_to(precious),
        "second name": lambda: lock.hardlink_to(precious),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }
    make[kind]()
    with pytest.raises(DeviceLost, match="cannot be locked") as caught, open_target(board.profile()):
        pass
    assert "is no plain file of its own" in caught.value.why
    assert str(lock) in caught.value.next_step
    (finding,) = [each for each in examine_target(board.profile()) if each.subject == "lock"]
    assert (finding.severity, str(lock) in finding.mend) == ("problem", True)
    assert precious.exists() == (kind != "link to nothing")
    assert kind == "link to nothing" or precious.read_text() == "mine"


@pytest.mark.skipif(os.getuid() != 0, reason="another user's file takes root to make: sudo make test")
def test_a_lock_that_another_user_made_is_shared_with_them(board: ReplayBoard) -> None:
    lock = board.root / "run/lock/edgeprune.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    os.chown(lock, 12345, 12345)
    lock.chmod(0o666)
    with open_target(board.profile()):
        assert f"process {os.getpid()}" in lock.read_text()
        assert subprocess.run(["flock", "-n", lock, "true"], check=False).returncode == 1
    assert lock.stat().st_uid == 12345


def test_a_new_lock_may_be_taken_by_every_user_of_the_board(board: ReplayBoard) -> None:
    lock = board.root / "run/lock/edgeprune.lock"
    lock.unlink(missing_ok=True)
    with open_target(board.profile()):
        assert lock.stat().st_mode & 0o777 == 0o666


def test_a_gpu_that_somebody_uses_without_the_lock_is_busy(board: ReplayBoard) -> None:
    board.write("sys/class/devfreq/17000000.gpu/device/load", "613\n")
    with pytest.raises(DeviceBusy, match=r"61\.3 % busy"), open_target(board.profile()):
        pass
    assert_deserted(board)


_HOLDER = """
import json, sys, time
from edgeprune.profile import Profile
from edgeprune.target import open_target
with open_target(Profile.from_json(json.loads(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(3600)
"""


def test_a_killed_host_frees_the_board_and_puts_its_clocks_back(board: ReplayBoard) -> None:
    profile = board.profile(options={"pin_clocks": True})
    words = [sys.executable, "-c", _HOLDER, json.dumps(profile.to_json())]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"held\n"
        host.kill()
    assert_deserted(board)
    assert (board.root / "sys/class/devfreq/17000000.gpu/min_freq").read_text() == "306000000\n"


def test_the_folders_of_dead_jobs_are_swept_once_the_board_is_ours(board: ReplayBoard) -> None:
    jobs, precious = board.cache / "jobs", board.root / "precious"
    for name in ("dead", "alive"):
        (jobs / name).mkdir(parents=True)
        (jobs / name / "engine.part").write_text("part of one")
    precious.mkdir(parents=True)
    (jobs / "link").symlink_to(precious)
    job = os.open(jobs / "alive", os.O_RDONLY)
    fcntl.flock(job, fcntl.LOCK_EX)
    with open_target(board.profile()):
        assert {each.name for each in jobs.iterdir()} == {"alive", "link"}
    os.close(job)
    with open_target(board.profile()):
        assert {each.name for each in jobs.iterdir()} == {"link"}
    assert precious.is_dir()


def test_nothing_is_swept_while_somebody_else_has_the_board(board: ReplayBoard) -> None:
    with open_target(board.profile()):
        (board.cache / "jobs" / "theirs").mkdir()
        with pytest.raises(DeviceBusy), open_target(board.profile()):
            pass
        assert (board.cache / "jobs" / "theirs").is_dir()


def test_a_changed_host_key_is_the_users_turn(board: ReplayBoard) -> None:
    board.sshd.new_host_key()
    with pytest.raises(ProfileError, match="has changed"), open_target(board.profile()):
        pass


# -- what a profile says --------------------------------------------------------------------------------------------


def test_without_an_address_it_is_said_what_to_put_where() -> None:
    with (
        pytest.raises(ProfileError, match="'jetson-orin-nano' has no address") as caught,
        open_target(load_profile("jetson-orin-nano")),
    ):
        pass
    assert 'edgeprune.toml, below [targets.jetson-orin-nano]: address = "ssh://me@orin.local"' in caught.value.next_step


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("address", "ssh://-oProxyCommand=touch pwned"),
        ("address", "ssh://me@host; touch pwned"),
        ("trtexec", "/usr/bin/trtexec; touch pwned"),
        ("trtexec", "$(touch pwned)"),
        ("trtexec", "-oProxyCommand=x"),
        ("lock", "/run/a b"),
        ("lock", "/run/../etc/passwd"),
        ("sysroot", "/`touch pwned`"),
        ("sysroot", "relative"),
        ("identity_file", "-oProxyCommand=touch pwned"),
        ("known_hosts", "/dev/null\n"),
        ("run_s", "1; touch pwned"),
        ("run_s", True),
        ("builder_level", 6),
        ("nothing", 1),
        ("precision", "fp8"),
    ],
)
def test_a_field_that_could_be_a_command_is_refused(
    field: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = load_profile("jetson-orin-nano", {"address": "ssh://me@127.0.0.1:1"})
    changed = {field: value} if field in ("address", "precision") else {"options": {field: value}}
    with pytest.raises(ProfileError), open_target(replace_in(profile, changed)):
        pass
    assert [each.severity for each in examine_target(replace_in(profile, changed))] == ["problem"]
    assert not list(tmp_path.rglob("pwned"))


def replace_in(profile: Profile, changes: dict[str, object]) -> Profile:
    options = {**profile.options, **changes.get("options", {})}
    return replace(profile, **{**changes, "options": options})


def test_a_power_mode_is_compared_and_never_said_to_the_board(board: ReplayBoard, tmp_path: Path) -> None:
    mode = f"MAXN; touch {tmp_path}/pwned"
    with pytest.raises(ProfileError, match="is in power mode 15W"), open_target(board.profile(power_mode=mode)):
        pass
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "name", ["jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-xavier-nx", "jetson-agx-thor"]
)
def test_the_shipped_profiles_lack_nothing_but_an_address(name: str) -> None:
    profile = load_profile(name, {"address": "ssh://me@127.0.0.1:1"})
    assert (profile.adapter, profile.precision, profile.arch) == ("tensorrt_ssh", "fp16", "aarch64")
    with pytest.raises(DeviceLost, match=r"127\.0\.0\.1 cannot be reached"), open_target(profile):
        pass


def test_every_option_stands_on_the_page_of_the_jetson() -> None:
    page = (Path(__file__).parents[2] / "docs/devices-jetson.md").read_text()
    rows = {name for line in page.splitlines() if line.startswith("|") for name in re.findall(r"`(\w+)`", line)}
    assert set(_jetson_options.OPTIONS) <= rows


# -- doctor ---------------------------------------------------------------------------------------------------------


def findings(board: ReplayBoard, **overrides: object) -> dict[str, Finding]:
    return {each.subject: each for each in examine_target(board.profile(**overrides))}


def test_a_board_in_order_has_a_line_for_everything(board: ReplayBoard) -> None:
    found = findings(board)
    assert list(found) == [
        "ssh", "board", "trtexec", "lock", "power mode", "clocks", "disk", "memory", "throttling", "temperature",
        "tegrastats",
    ]  # fmt: skip
    assert "TensorRT 10.3.0" in found["trtexec"].found
    assert "L4T 36.4.0, GPU of SM 87" in found["board"].found
    assert found["clocks"].severity == "note"
    assert "jetson_clocks" in found["clocks"].mend
    assert_deserted(board)


def test_what_is_wrong_comes_with_what_mends_it(board: ReplayBoard) -> None:
    board.set(version="12.0")
    board.write("proc/meminfo", "MemAvailable: 204800 kB\n")
    board.write("sys/class/hwmon/hwmon3/oc2_event_cnt", "5\n")
    found = findings(board, power_mode="MAXN", options={"free_mib": 1 << 20})
    problems = {name for name, each in found.items() if each.severity == "problem"}
    assert problems == {"trtexec", "power mode", "disk", "memory"}
    assert all(found[name].mend for name in problems)
    assert "oc2 5" in found["throttling"].found


@pytest.mark.parametrize(
    ("act", "words"), [("stop", "refused"), ("new_host_key", "has changed"), ("forget", "not known")]
)
def test_a_board_that_cannot_be_reached_is_one_problem(board: ReplayBoard, act: str, words: str) -> None:
    getattr(board.sshd, act)()
    (finding,) = examine_target(board.profile())
    assert (finding.subject, finding.severity) == ("ssh", "problem")
    assert words in finding.found
    assert finding.mend


def test_a_machine_that_is_no_jetson_is_told_so(board: ReplayBoard, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    (empty / "proc/sys/kernel/random").mkdir(parents=True)
    (empty / "proc/sys/kernel/random/boot_id").write_text("0" * 36)
    found = findings(board, options={"sysroot": str(empty), "trtexec": "/usr/bin/nothing"})
    assert "no Jetson that is known" in found["board"].found
    assert found["trtexec"].severity == "problem"
    assert "libnvinfer-bin" in found["trtexec"].mend
