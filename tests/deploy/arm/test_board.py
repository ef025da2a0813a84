"""The server of a board: one session at a time, nothing left behind, and a plain sentence for everything it refuses."""

import contextlib
import hashlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_programs import HERE, ONE, SCRIPT, engine, programs, server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

rpc = pytest.importorskip("tvm.rpc", reason="pip install -e '.[tvm]'")

INPUT = np.arange(8, dtype=np.float32).reshape(2, 4)


class Client:
    """A session, as a host would hold it."""

    def __init__(self, port: int, *, key: str = "edgeprune", holder: str = "test", limit_s: int = 60) -> None:
        self.session = rpc.connect("127.0.0.1", port, key=f"{key} -holder={holder}", session_timeout=limit_s)

    def ask(self, function: str, *arguments: Any) -> bytes:
        return bytes(self.session.get_function(f"edgeprune.{function}")(*arguments))

    def bring(self, content: bytes, name: str = "model.so") -> str:
        self.session.upload(bytearray(content), name)
        return name

    def load(self, content: bytes, name: str = "model.so") -> dict[str, Any]:
        return json.loads(self.ask("load", self.bring(content, name), hashlib.sha256(content).hexdigest()))

    def refused(self, work: Callable[[], object]) -> str:
        with pytest.raises(Exception, match="edgeprune:") as caught:
            work()
        return str(caught.value)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.session._sess["CloseRPCConnection"]()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with server(tmp_path_factory.mktemp("board") / "uploads") as (number, _):
        yield number


@pytest.fixture
def client(port: int) -> Iterator[Client]:
    made = patient(port)
    yield made
    made.close()


def patient(port: int, within_s: float = 10.0, **how: Any) -> Client:
    """Return a client that holds the board, waiting until the one before is gone."""
    end = time.monotonic() + within_s
    while True:
        made = Client(port, **how)
        try:
            made.ask("facts")
        except Exception as error:
            made.close()
            if "edgeprune:busy" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return made


def test_an_engine_is_loaded_and_run(client: Client, tmp_path: Path) -> None:
    ports = client.load(engine(tmp_path / "e.so"))
    assert ports["inputs"] == [{"name": "x", "dtype": "float32", "shape": [2, 4]}]
    assert ports["outputs"] == [{"name": "y", "dtype": "float32", "shape": [2, 4]}]
    answer = np.frombuffer(client.ask("run", "model.so", INPUT.tobytes()), np.float32).reshape(2, 4)
    np.testing.assert_array_equal(answer, 4 * INPUT + 3)


def test_facts_name_the_machine_and_its_state(client: Client) -> None:
    facts = json.loads(client.ask("facts"))
    assert facts["protocol"] == 2
    assert facts["machine"] == HERE
    assert facts["metric"] == "latency_ns"
    assert not facts["emulated"]
    assert {"governor", "khz_cur", "temperatures_c", "throttled", "free_disk_mib"} <= set(facts["conditions"])


def test_timing_gives_raw_samples_of_both_engines_in_blocks(client: Client, tmp_path: Path) -> None:
    content = engine(tmp_path / "e.so")
    client.load(content, "a.so")
    client.load(content, "b.so")
    seen = json.loads(client.ask("time", "a.so", "b.so", 20.0, 1.0, 2, "seed", -1, "normal"))
    assert seen["metric"] == "latency_ns"
    assert seen["priority"] == "normal"
    for which in ("candidate", "reference"):
        assert len({len(column) for column in seen[which].values()}) == 1
        assert len(seen[which]["wall_ns"]) >= 8
        assert min(seen[which]["wall_ns"]) > 0
    assert len(seen["warm_up"]) == 2


def test_each_step_has_a_cost(client: Client, tmp_path: Path) -> None:
    client.load(engine(tmp_path / "e.so"))
    assert len(json.loads(client.ask("steps", "model.so", -1))["costs"]) == 2


def test_a_kernel_that_fails_is_named_with_its_layer(client: Client, tmp_path: Path) -> None:
    said = client.refused(lambda: client.load(engine(tmp_path / "e.so", kernel="refuse")))
    assert "edgeprune:compile: kernel refuse of layer first failed" in said


def test_inputs_of_another_size_are_refused(client: Client, tmp_path: Path) -> None:
    client.load(engine(tmp_path / "e.so"))
    assert "edgeprune:compile: inputs of 32 bytes" in client.refused(lambda: client.ask("run", "model.so", b"123"))


def test_an_engine_damaged_on_its_way_is_told_from_one_of_another_machine(client: Client, tmp_path: Path) -> None:
    content = bytearray(engine(tmp_path / "e.so"))
    digest = hashlib.sha256(content).hexdigest()
    content[len(content) // 2] ^= 1
    client.bring(bytes(content), "damaged.so")
    assert "edgeprune:corrupt: damaged.so was damaged" in client.refused(
        lambda: client.ask("load", "damaged.so", digest)
    )
    content[len(content) // 2] ^= 1
    struct.pack_into("<H", content, 18, 243)
    said = client.refused(lambda: client.load(bytes(content), "foreign.so"))
    assert f"edgeprune:architecture: foreign.so is for riscv, this machine is {HERE}" in said


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_engine_is_refused_and_the_session_lives(client: Client, tmp_path: Path, share: float) -> None:
    content = engine(tmp_path / "e.so")
    part = content[: int(share * len(content))]
    assert "edgeprune:corrupt" in client.refused(lambda: client.load(part))
    assert client.load(content, "whole.so")


def test_a_library_that_is_no_engine_is_refused(client: Client) -> None:
    plain = (programs() / "lib" / "libtvm_ffi.so").read_bytes()
    assert "edgeprune:corrupt: model.so is no engine" in client.refused(lambda: client.load(plain))


WRONG = {
    "another version": ("program 1", "program 2"),
    "a buffer outside its memory": ("buffer 0 2 float32 0 2 2 4", "buffer 0 2 float32 0 2 2 5"),
    "an offset outside its memory": ("buffer 2 1 float32 0", "buffer 2 1 float32 64"),
    "an offset that is not aligned": ("buffer 3 3 float32 0 2 2 4", "buffer 3 3 float32 4 1 1"),
    "a size that overflows": ("2 2 4\nbuffer 1", "3 4294967296 4294967296 4\nbuffer 1"),
    "a negative size": ("2 2 4\nbuffer 1", "2 -2 4\nbuffer 1"),
    "too many axes": ("2 2 4\nbuffer 1", "9 1 1 1 1 1 1 1 1 1\nbuffer 1"),
    "more constants than there are": ("constants 64", "constants 128"),
    "too much memory": ("arena 64", "arena 99999999999"),
    "an unknown memory": ("buffer 0 2", "buffer 0 9"),
    "an unknown type": ("float32 0 1 1", "float33 0 1 1"),
    "a step that writes constants": ("3 2 1 3", "3 2 3 1"),
    "a step that writes its input": ("3 2 1 3", "3 2 1 0"),
    "a step without arguments": ("second 3 2 1 3", "second 0"),
    "an unknown kernel": ("step twice second", "step thrice second"),
    "an unknown buffer": ("3 2 1 3", "3 2 1 4"),
    "an input that is an output": ("input 0 x", "input 3 x"),
    "no end": ("end\n", ""),
    "a longer line": ("input 0 x", "input 0 x y"),
    "an unknown line": ("input 0 x", "inputs 0 x"),
    "nothing to compute": (SCRIPT[SCRIPT.index("step") : SCRIPT.index("end")], ""),
    "an empty text": (SCRIPT, ""),
    "a number that is none": ("buffer 0 2", "buffer 0x 2"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_program_that_could_leave_its_memory_is_refused(client: Client, tmp_path: Path, what: str) -> None:
    before, after = WRONG[what]
    assert before in SCRIPT
    content = engine(tmp_path / "e.so", text=SCRIPT.replace(before, after, 1))
    assert "edgeprune:corrupt: the engine's program" in client.refused(lambda: client.load(content))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_program_ends_the_session(client: Client, tmp_path: Path, data: st.DataObject) -> None:
    words = SCRIPT.replace("{kernel}", "twice").split(" ")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(words) - 1))
        words[place] = data.draw(
            st.sampled_from([*words, "", "0", "1", "9", "-1", "18446744073709551615", "4294967296"])
        )
    name = f"e{time.monotonic_ns()}.so"
    with contextlib.suppress(Exception):
        client.load(engine(tmp_path / "e.so", text=" ".join(words)), name)
    assert json.loads(client.ask("facts"))["last_end"] == ""


@pytest.mark.parametrize("name", ["..", "../x", "a/b", ".hidden", "x" * 101, "a b", "a\nb"])
def test_a_name_that_could_leave_the_session_is_refused(client: Client, name: str) -> None:
    assert "edgeprune:request" in client.refused(lambda: client.bring(b"1", name))


def test_a_file_is_never_overwritten(client: Client) -> None:
    client.bring(b"1", "once")
    assert "edgeprune:request: once: File exists" in client.refused(lambda: client.bring(b"2", "once"))
    assert bytes(client.session.download("once")) == b"1"


def test_a_removed_file_makes_room(tmp_path: Path) -> None:
    with server(tmp_path / "uploads", "--upload-mib", "1") as (port, _):
        client = Client(port)
        client.bring(bytes(700_000), "first")
        assert "edgeprune:full: more than 1 MiB" in client.refused(lambda: client.bring(bytes(700_000), "second"))
        client.session.remove("first")
        client.bring(bytes(700_000), "second")
        client.close()


def test_a_full_disk_is_said_and_leaves_no_part(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a small disk: both fail the same write."""
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))}
    with server(tmp_path / "uploads", **limited) as (port, _):
        client = Client(port)
        assert "edgeprune:full: big: File too large" in client.refused(lambda: client.bring(bytes(200_000), "big"))
        assert not any(each.name == "big" for each in tmp_path.rglob("*"))
        client.close()


def test_a_second_client_is_told_who_holds_the_board(port: int, client: Client) -> None:
    second = Client(port, holder="somebody")
    said = second.refused(lambda: second.ask("facts"))
    assert "edgeprune:busy: held by test for" in said
    assert "edgeprune:busy" in second.refused(lambda: second.bring(b"1"))
    second.close()
    assert json.loads(client.ask("facts"))["protocol"] == 2


def test_a_holder_cannot_send_escape_codes_to_others(tmp_path: Path) -> None:
    with server(tmp_path / "uploads") as (port, _):
        first = Client(port, holder="\x1b[31mevil\x07")
        first.ask("facts")
        second = Client(port)
        said = second.refused(lambda: second.ask("facts"))
        assert "\x1b" not in said
        assert "evil" in said
        first.close()
        second.close()


def test_a_session_that_ends_leaves_nothing_and_frees_the_board(tmp_path: Path) -> None:
    with server(tmp_path / "uploads") as (port, _):
        first = Client(port)
        first.bring(bytes(1000), "left")
        assert list(tmp_path.glob("uploads/session-*/left"))
        first.close()
        second = patient(port)
        assert not list(tmp_path.glob("uploads/session-*/left"))
        second.close()


def test_a_client_that_dies_frees_the_board_even_while_a_kernel_hangs(tmp_path: Path) -> None:
    content = engine(tmp_path / "e.so", kernel="hang")
    (tmp_path / "engine").write_bytes(content)
    with server(tmp_path / "uploads") as (port, _):
        hanging = _hanging_client(port, tmp_path / "engine")
        _until(lambda: bool(list(tmp_path.glob("uploads/session-*/model.so"))))
        time.sleep(0.2)
        hanging.kill()
        hanging.wait()
        second = patient(port)
        assert json.loads(second.ask("facts"))["protocol"] == 2
        second.close()


HANGING = """
import hashlib, sys
from tvm import rpc
content = open(sys.argv[2], "rb").read()
session = rpc.connect("127.0.0.1", int(sys.argv[1]), key="edgeprune -holder=hanging", session_timeout=60)
session.upload(bytearray(content), "model.so")
session.get_function("edgeprune.load")("model.so", hashlib.sha256(content).hexdigest())
"""


def _hanging_client(port: int, path: Path) -> "subprocess.Popen[bytes]":
    import sys

    return subprocess.Popen([sys.executable, "-c", HANGING, str(port), str(path)], stderr=subprocess.DEVNULL)


def _until(fact: Callable[[], bool], within_s: float = 30.0) -> None:
    end = time.monotonic() + within_s
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_kernel_that_hangs_is_ended_after_the_time_its_client_allows(tmp_path: Path) -> None:
    with server(tmp_path / "uploads") as (port, _):
        client = Client(port, limit_s=1)
        content = engine(tmp_path / "e.so", kernel="hang")
        with pytest.raises(Exception, match=r"shutdown|Shutdown|closed|reset"):
            client.load(content)
        after = patient(port)
        assert json.loads(after.ask("facts"))["last_end"] == "it overran its time and was ended"
        after.close()


@pytest.mark.parametrize(
    ("kernel", "signal_name"), [("crash", "Segmentation fault"), ("illegal", "Illegal instruction")]
)
def test_a_kernel_that_crashes_takes_its_session_and_no_more(tmp_path: Path, kernel: str, signal_name: str) -> None:
    with server(tmp_path / "uploads") as (port, process):
        client = Client(port)
        with pytest.raises(Exception, match=r"shutdown|Shutdown|closed|reset"):
            client.load(engine(tmp_path / "e.so", kernel=kernel))
        after = patient(port)
        assert json.loads(after.ask("facts"))["last_end"] == f"it was ended by signal {signal_name}"
        assert process.poll() is None
        after.close()


def test_a_client_without_the_key_is_turned_away(tmp_path: Path) -> None:
    with server(tmp_path / "uploads", key="secret") as (port, _):
        with pytest.raises(Exception, match="key"):
            Client(port)
        patient(port, key="secret").close()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\x71\xf2\x0f\x00\xff\xff\xff\x7f", b""], ids=repr)
def test_a_stranger_is_turned_away_and_the_board_stays_free(tmp_path: Path, said: bytes) -> None:
    with server(tmp_path / "uploads") as (port, _):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as stranger:
            stranger.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                assert not said or stranger.recv(64) == b""
        patient(port).close()


def test_it_listens_on_loopback_alone(port: int) -> None:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    assert listening == {f"0100007F:{port:04X}"}


def test_a_server_that_is_killed_takes_its_session_along_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    with server(tmp_path / "uploads") as (port, process):
        client = Client(port)
        client.bring(bytes(1000), "left")
        session = _children(process.pid)
        assert len(session) == 1
        process.kill()
        process.wait()
        _until(lambda: not Path(f"/proc/{session[0]}").exists() or _zombie(session[0]))
    assert list(tmp_path.glob("uploads/session-*/left"))
    with server(tmp_path / "uploads") as (port, _):
        assert not list(tmp_path.glob("uploads/session-*"))


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def test_a_server_ends_with_its_standard_input(tmp_path: Path) -> None:
    with server(tmp_path / "uploads") as (port, process):
        Client(port).ask("facts")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
        assert not list(tmp_path.glob("uploads/session-*"))


def test_two_servers_cannot_share_a_folder(tmp_path: Path) -> None:
    with server(tmp_path / "uploads"):
        command = [str(programs() / "bin" / "edgeprune-board"), "--port", "0", "--folder", str(tmp_path / "uploads")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert "is used by another server" in done.stderr


def test_a_folder_of_somebody_else_or_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    command = [str(programs() / "bin" / "edgeprune-board"), "--port", "0", "--folder", str(tmp_path / "link")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert "is not a folder of this user" in done.stderr


@pytest.mark.parametrize(
    "options", [["--port", "70000"], ["--port", "x"], ["--speed", "1"], ["--upload-mib", "0"], ["--port"]]
)
def test_a_senseless_option_is_refused(options: list[str]) -> None:
    done = subprocess.run([str(programs() / "bin" / "edgeprune-board"), *options], capture_output=True, timeout=20)
    assert done.returncode == 2


def test_tools_of_tvm_itself_work_with_it(client: Client, tmp_path: Path) -> None:
    """MetaSchedule's runner uploads a library, loads it and calls `time_evaluator`."""
    import tvm
    from tvm import te

    a = te.placeholder((16,), "float32", "a")
    func = te.create_prim_func([a, te.compute((16,), lambda i: a[i] * 2, "b")]).with_attr("global_symbol", "main")
    library = tvm.compile(tvm.IRModule({"main": func}), tvm.target.Target({"kind": "llvm"}))
    library.export_library(str(tmp_path / "lib.so"))
    client.session.upload(str(tmp_path / "lib.so"))
    remote = client.session.load_module("lib.so")
    device = client.session.cpu(0)
    given, taken = (tvm.runtime.tensor(np.full(16, each, np.float32), device) for each in (1, 0))
    assert remote.time_evaluator("main", device, number=3)(given, taken).mean > 0
    np.testing.assert_array_equal(taken.numpy(), 2)


def test_an_emulated_board_counts_the_same_instructions_every_time(tmp_path: Path) -> None:
    content = engine(tmp_path / "e.so", arch="aarch64")
    with server(tmp_path / "uploads", arch="aarch64") as (port, _):
        client = Client(port)
        counts = []
        for name in ("a.so", "b.so"):
            client.load(content, name)
            seen = json.loads(client.ask("count", name))
            assert set(seen) == {"metric", "counts"}
            assert seen["metric"] == "emulated_instructions"
            counts += seen["counts"]
        assert len(counts) == 8
        assert len(set(counts)) == 1
        assert 50 < counts[0] < 2000
        client.close()


@pytest.mark.parametrize("count", [True, False])
def test_the_clock_of_an_emulator_is_never_read(tmp_path: Path, count: bool) -> None:
    content = engine(tmp_path / "e.so", arch="aarch64")
    with server(tmp_path / "uploads", arch="aarch64", count=count) as (port, _):
        client = Client(port)
        client.load(content)
        asked = [lambda: client.ask("time", "model.so", "model.so", 20.0, 1.0, 2, "seed", -1, "normal")]
        if not count:
            asked.append(lambda: client.ask("steps", "model.so", -1))
        for ask in asked:
            assert "edgeprune:lost: this board is emulated" in client.refused(ask)
        client.close()


def test_a_board_with_a_clock_counts_nothing(client: Client, tmp_path: Path) -> None:
    client.load(engine(tmp_path / "e.so"))
    assert "edgeprune:lost: this board counts no instructions" in client.refused(
        lambda: client.ask("count", "model.so")
    )


def test_a_frozen_server_answers_again_when_it_is_let_go(tmp_path: Path) -> None:
    with server(tmp_path / "uploads") as (port, process):
        client = Client(port)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.3)
        assert json.loads(client.ask("facts"))["protocol"] == 2  # its session runs on
        os.kill(process.pid, signal.SIGCONT)
        client.close()
        patient(port).close()


assert len(ONE) == 64
