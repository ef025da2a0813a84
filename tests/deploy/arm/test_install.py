"""The installer of a board's server, against a real OpenSSH server whose systemctl writes down what is asked."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from board_programs import ROOT, programs
from loopback_sshd import INSTALL, LoopbackSshd, sshd_path

pytestmark = pytest.mark.skipif(sshd_path() is None, reason=f"no OpenSSH server here; {INSTALL}")

STUBS = {
    "sudo": '#!/bin/sh\nexec "$@"\n',
    "uname": "#!/bin/sh\necho ${BOARD_MACHINE:-aarch64}\n",
    "systemctl": '#!/bin/sh\necho "$*" >>"$BOARD_LOG"\n[ "$1 ${BOARD_FAILS:-}" != "is-active yes" ]\n',
}


class Board:
    def __init__(self, folder: Path, **environment: str) -> None:
        self.log, self.root, stubs = folder / "systemctl.log", folder / "root", folder / "stubs"
        stubs.mkdir(parents=True)
        for name, text in STUBS.items():
            (stubs / name).write_text(text)
            (stubs / name).chmod(0o755)
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        own = {"PATH": f"{stubs}:/usr/bin:/bin", "BOARD_LOG": str(self.log), "TMPDIR": str(self.temporary)}
        self.sshd = LoopbackSshd(folder / "sshd", environment=own | environment)
        (folder / "config").write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {self.sshd.port}\n  BatchMode yes\n"
            f"  IdentityFile {self.sshd.files['identity_file']}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.sshd.files['known_hosts']}\n  StrictHostKeyChecking yes\n"
        )
        self.config = folder / "config"

    def install(self, *words: str, host: str = "board") -> "subprocess.CompletedProcess[str]":
        command = ["sh", str(ROOT / "deploy" / "arm" / "install"), host, "--ssh-config", str(self.config)]
        options = ["--python", sys.executable, "--root", str(self.root), *words]
        return subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
        )


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    programs("aarch64")
    made = Board(tmp_path)
    with made.sshd:
        yield made


def test_the_server_is_put_in_its_place_and_started(board: Board) -> None:
    for _ in range(2):  # a second time over a running server
        done = board.install()
        assert done.returncode == 0, done.stderr
        assert "edgeprune-board runs" in done.stdout
    placed = {str(each.relative_to(board.root)) for each in board.root.rglob("*") if each.is_file()}
    assert placed == {
        "opt/edgeprune/bin/edgeprune-board",
        "opt/edgeprune/lib/libtvm_runtime.so",
        "opt/edgeprune/lib/libtvm_ffi.so",
        "opt/edgeprune/lib/libonnxruntime.so.1.31.1",
        "etc/systemd/system/edgeprune-board.service",
    }
    server = programs("aarch64") / "bin" / "edgeprune-board"
    assert (board.root / "opt/edgeprune/bin/edgeprune-board").read_bytes() == server.read_bytes()
    assert "restart edgeprune-board.service" in board.log.read_text()
    assert not list(board.temporary.iterdir())


def test_a_server_that_does_not_start_is_said(tmp_path: Path) -> None:
    made = Board(tmp_path, BOARD_FAILS="yes")
    with made.sshd:
        done = made.install()
    assert done.returncode == 1
    assert "the server does not run" in done.stderr
    assert not list(made.temporary.iterdir())


def test_a_board_of_another_architecture_is_left_as_it_was(tmp_path: Path) -> None:
    made = Board(tmp_path, BOARD_MACHINE="armv7l")
    with made.sshd:
        done = made.install()
    assert done.returncode == 1
    assert "this board is armv7l; a 64-bit system" in done.stderr
    assert not made.root.exists()


@pytest.mark.parametrize("host", ["-oProxyCommand=touch evil", "a;touch evil", "$(touch evil)", "a b", "me@host/x", ""])
def test_a_host_that_could_mean_something_else_is_refused(tmp_path: Path, host: str) -> None:
    command = ["sh", str(ROOT / "deploy" / "arm" / "install"), host]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert "user@host is wanted" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_root_that_could_mean_something_else_is_refused(tmp_path: Path) -> None:
    command = ["sh", str(ROOT / "deploy" / "arm" / "install"), "me@board", "--root", "/x; touch evil"]
    assert subprocess.run(command, capture_output=True, timeout=60, cwd=tmp_path).returncode == 2
    assert not list(tmp_path.iterdir())


def test_the_unit_lets_the_server_listen_on_loopback_alone_and_restarts_it_always() -> None:
    text = (ROOT / "deploy" / "arm" / "edgeprune-board.service").read_text()
    lines = {line for line in text.splitlines() if line and not line.startswith(("#", "["))}
    wanted = "Restart=always StartLimitIntervalSec=0 IPAddressDeny=any IPAddressAllow=localhost PrivateTmp=yes"
    assert set(f"{wanted} NoNewPrivileges=yes MemoryMax=80%".split()) <= lines
