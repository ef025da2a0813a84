"""One board, one holder: among threads, among processes, through deaths."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edgeprune.errors import ConfigError, DeviceBusy
from edgeprune.lease import Lease, lease_folder

HOLD = """
import sys, time
from pathlib import Path
from edgeprune.lease import Lease
lease = Lease.take(sys.argv[1], folder=Path(sys.argv[2]))
print("held", flush=True)
time.sleep(600)
"""


def holder(board: str, folder: Path) -> subprocess.Popen[str]:
    """Return a process that holds the lease."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, board, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_second_process_is_told_who_holds_the_board(tmp_path: Path) -> None:
    process = holder("ssh://me@orin.local", tmp_path)
    try:
        with pytest.raises(DeviceBusy, match=r"ssh://me@orin\.local is in use") as busy:
            Lease.take("ssh://me@orin.local", folder=tmp_path)
        assert f"process {process.pid} on " in busy.value.why
        assert " since 20" in busy.value.why
        Lease.take("ssh://me@other.local", folder=tmp_path).release()
    finally:
        end(process)


def test_the_lease_of_a_killed_holder_expires_at_once(tmp_path: Path) -> None:
    process = holder("orin", tmp_path)
    end(process)
    with Lease.take("orin", folder=tmp_path) as lease:
        assert lease.board == "orin"


def test_a_stopped_holder_keeps_it_and_the_wait_for_it_ends(tmp_path: Path) -> None:
    process = holder("orin", tmp_path)
    try:
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(DeviceBusy, match="did so for 1 seconds"):
            Lease.take("orin", folder=tmp_path, wait_s=1)
    finally:
        end(process)


def test_a_waiting_process_gets_it_as_soon_as_it_is_free(tmp_path: Path) -> None:
    process = holder("orin", tmp_path)
    threading.Timer(0.5, process.kill).start()
    Lease.take("orin", folder=tmp_path, wait_s=60).release()
    end(process)


def test_the_wait_is_as_long_as_it_says(tmp_path: Path) -> None:
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with Lease.take("orin", folder=tmp_path), pytest.raises(DeviceBusy):
        Lease.take("orin", folder=tmp_path, wait_s=7.1, clock=lambda: now[0], sleep=sleep)
    assert now[0] == pytest.approx(107.1)


def test_a_forked_child_does_not_keep_the_board_of_its_dead_parent(tmp_path: Path) -> None:
    """A worker may outlive a killed run for a moment; the board must not stay held for it."""
    code = HOLD.replace('print("held", flush=True)', "import os\nchild = os.fork()\nif child: print(child, flush=True)")
    process = subprocess.Popen([sys.executable, "-c", code, "orin", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    end(process)
    assert Path(f"/proc/{child}").exists()
    Lease.take("orin", folder=tmp_path).release()
    os.kill(child, signal.SIGKILL)


COUNT = """
import sys
from pathlib import Path
from edgeprune.lease import Lease
folder, counter = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(50):
    with Lease.take("orin", folder=folder, wait_s=60, sleep=lambda s: None):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_of_racing_processes_one_at_a_time_wins(tmp_path: Path) -> None:
    """Three processes add fifty times each to a file, reading and writing it; not one addition is lost."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path / "leases"), str(counter)]
    racers = [subprocess.Popen(command) for _ in range(3)]
    assert [each.wait(120) for each in racers] == [0, 0, 0]
    assert counter.read_text() == "150"


def test_of_racing_threads_one_wins(tmp_path: Path) -> None:
    """The kernel would give a process its own lock as often as it asks."""
    for number in range(30):
        won: list[Lease] = []
        start = threading.Barrier(4)

        def race(board: str = f"board{number}", won: list[Lease] = won, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                won.append(Lease.take(board, folder=tmp_path))
            except DeviceBusy:
                return

        threads = [threading.Thread(target=race) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(won) == 1
        won[0].release()


BOARDS = ["orin", "ORIN", "ssh://a@b:22", "ssh://a@b:2", "../orin", "orin/..", "x" * 300, "a" * 40, "a" * 41, "é", ""]


class Leases(RuleBasedStateMachine):
    """Take and release in any order: what is held is exactly what was taken and not released."""

    def __init__(self) -> None:
        super().__init__()
        from tempfile import TemporaryDirectory

        self.place = TemporaryDirectory()
        self.folder = Path(self.place.name) / "leases"
        self.held: dict[str, Lease] = {}

    @rule(board=st.sampled_from(BOARDS))
    def take(self, board: str) -> None:
        if board in self.held:
            with pytest.raises(DeviceBusy):
                Lease.take(board, folder=self.folder)
        else:
            self.held[board] = Lease.take(board, folder=self.folder)

    @rule(board=st.sampled_from(BOARDS))
    def release(self, board: str) -> None:
        if board in self.held:
            lease = self.held.pop(board)
            lease.release()
            lease.release()

    @invariant()
    def no_name_leaves_the_folder(self) -> None:
        outside = [each for each in Path(self.place.name).rglob("*") if each.is_file() and each.parent != self.folder]
        assert not outside

    def teardown(self) -> None:
        for each in self.held.values():
            each.release()
        self.place.cleanup()


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_a_note_that_is_not_ours_is_never_shown_as_it_is(tmp_path: Path) -> None:
    """Escape codes, a gigabyte, no JSON: the board is in use by another process, and that is all."""
    with Lease.take("orin", folder=tmp_path):
        (note,) = tmp_path.glob("*.json")
        for content in (b"\xff" * 100, b"[]", b'{"pid": 1}', b" " * 10_000_000):
            note.write_bytes(content)
            with pytest.raises(DeviceBusy, match="another process holds it"):
                Lease.take("orin", folder=tmp_path)
        note.write_text(json.dumps({"pid": "\x1b[2J7", "host": "h", "since": "s"}))
        with pytest.raises(DeviceBusy) as busy:
            Lease.take("orin", folder=tmp_path)
        assert "\x1b" not in str(busy.value)


def test_the_folder_is_the_one_that_was_chosen_else_the_users_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("EDGEPRUNE_LEASES", str(tmp_path / "shared"))
    assert lease_folder() == tmp_path / "shared"
    monkeypatch.delenv("EDGEPRUNE_LEASES")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    assert lease_folder() == tmp_path / "run/edgeprune/leases"
    assert lease_folder().stat().st_mode & 0o077 == 0


def test_a_folder_that_another_put_there_is_refused(tmp_path: Path, monkeypatch) -> None:
    """A link under the temporary folder would let its owner take every lease away."""
    monkeypatch.delenv("EDGEPRUNE_LEASES", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"edgeprune-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="a link, or another user's"):
        lease_folder()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEPRUNE_LEASES", str(tmp_path / "file/leases"))
    with pytest.raises(ConfigError) as error:
        lease_folder()
    assert "EDGEPRUNE_LEASES" in error.value.next_step
