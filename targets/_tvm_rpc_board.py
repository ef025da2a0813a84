"""Where a board's server is reached: one that runs here as our child, or a port of this machine that leads to one.

    emulated   qemu-aarch64 -plugin count.so edgeprune-board     counts instructions
    local      edgeprune-board, built for this machine           a real clock
    remote     tcp://127.0.0.1:PORT, or ssh://[user@]host[:port] with the server at its usual port

`deploy/emulated/setup` builds the programs of the first two. A child ends when its standard input does, so it cannot
outlive this process.
"""

import json
import os
import re
import secrets
import select
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import IO, Protocol

from edgeprune.errors import DeviceLost, ProfileError
from edgeprune.scratch import Scratch
from edgeprune.target import Selftest

from ._ssh import Ssh, remote_path  # noqa: TID251 private parts of this adapter

START_LIMIT_S = 20.0
BOARD_PORT = 9190
"""Where the server listens on a board of its own, see deploy/arm/edgeprune-board.service."""

RUNNER = "device/bin/edgeprune-run"
BUNDLE_FOLDER = "edgeprune-bundle-"
SELFTEST_LIMIT_S = 300.0
ANSWER_CAP = 1 << 20
DETAIL_CAP = 400

SHARED_KEY = "edgeprune"
"""The word that servers on boards of their own ask for; it keeps strangers' tools apart and protects nothing."""

_TCP = re.compile(r"tcp://127\.0\.0\.1:([0-9]{1,5})")
_LISTENS = re.compile(rb"edgeprune-board [0-9.]+ listens on 127\.0\.0\.1:([0-9]{1,5})\n")


@dataclass(frozen=True, kw_only=True)
class Door:
    """A port of this machine's loopback that leads to a board's server, and the word it asks for."""

    port: int
    key: str


class Board(Protocol):
    """A way to a board's server."""

    def door(self) -> Door:
        """Return where it is reached now; a server of ours that is gone is started again.

        Raises:
            DeviceLost: if it cannot be reached.
            ProfileError: if what it needs is not installed.
        """
        ...

    def lost(self) -> None:
        """Take note that the board did not behave; the next door is a fresh one where that is possible."""
        ...

    def selftest(self, bundle: Path) -> Selftest:
        """Return what the runner in the folder `bundle` says when it checks itself on the board.

        Raises:
            DeviceLost: if it could not be asked.
        """
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def cache_folder() -> Path:
    """Return where edgeprune keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeprune"


def programs(arch: str) -> Path:
    """Return the folder of what `deploy/emulated/setup` built for `arch`.

    Raises:
        ProfileError: if it was not.
    """
    folder = cache_folder() / "emulated" / arch
    if not (folder / "bin" / "edgeprune-board").is_file():
        raise ProfileError(
            f"the programs of a board for {arch} are not built",
            why=f"{folder} lacks them",
            next_step=setup_command(arch),
        )
    return folder


def setup_command(arch: str) -> str:
    """Return the command that builds the programs of a board."""
    return f"sh {files('edgeprune.device') / 'emulated' / 'setup'} --arch {arch}"


class ChildBoard:
    """A server that runs on this machine as our child.

    Args:
        arch: what it is built for.
        cpu: the CPU that qemu imitates; None: it runs here as it is.
    """

    def __init__(self, arch: str, cpu: str | None) -> None:
        self._arch, self._cpu = arch, cpu
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._folder: Scratch | None = None
        self._door: Door | None = None

    @property
    def pid(self) -> int | None:
        """Return the process id of the server, None while there is none."""
        return self._process.pid if self._process else None

    def door(self) -> Door:
        """Return where the server is reached; one that has ended is started again."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None or self._door is None:
            self._start()
        assert self._door is not None
        return self._door

    def lost(self) -> None:
        """End the server, which may be frozen; the next call of `door` starts another."""
        self.close()

    def selftest(self, bundle: Path) -> Selftest:
        """Run the runner here, under the emulator if the board is emulated."""
        runner = str(bundle / RUNNER)
        around = [] if self._cpu is None else emulator(self._arch, self._cpu, count=False)
        try:
            done = subprocess.run(
                [*around, runner, "--selftest", "--json"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SELFTEST_LIMIT_S,
                check=False,
                cwd="/",
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeviceLost("the bundle's runner could not be asked", why=str(error)) from error
        return said_by(done.returncode, done.stdout[:ANSWER_CAP].decode(errors="replace"))

    def close(self) -> None:
        """End the server and its sessions, and remove what was brought to it."""
        if self._process is not None:
            self._process.kill()  # its sessions end with it, see die_with in board.cc
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
        if self._errors is not None:
            self._errors.close()
        if self._folder is not None:
            self._folder.close()
        self._process, self._folder, self._door, self._errors = None, None, None, None

    def _start(self) -> None:
        self._folder = Scratch("board")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed with the server
        key = secrets.token_hex(16)
        command = [*self._command(programs(self._arch)), "--port", "0", "--until-stdin-closes"]
        try:
            self._process = subprocess.Popen(
                [*command, "--folder", f"{self._folder.path}/uploads"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                cwd="/",
                env={**os.environ, "EDGEPRUNE_BOARD_KEY": key, "TVM_NUM_THREADS": "1"},
                start_new_session=True,
            )
            self._door = Door(port=self._port(), key=key)
        except OSError as error:
            self.close()
            raise DeviceLost("the server of a board did not start", why=str(error)) from error
        except BaseException:
            self.close()
            raise

    def _command(self, folder: Path) -> Sequence[str]:
        server = str(folder / "bin" / "edgeprune-board")
        return [server] if self._cpu is None else [*emulator(self._arch, self._cpu, count=True), server]

    def _port(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        said, deadline = b"", time.monotonic() + START_LIMIT_S
        while not said.endswith(b"\n") and len(said) < 200:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise DeviceLost("the server of a board did not start", why="it did not say its port in time")
            part = os.read(self._process.stdout.fileno(), 200)
            if not part:
                raise DeviceLost("the server of a board did not start", why=self._said(), next_step=self._again())
            said += part
        found = _LISTENS.fullmatch(said)
        if found is None:
            raise DeviceLost("the server of a board did not start", why="it said something else than its port")
        return int(found[1])

    def _said(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        lines = self._errors.read(DETAIL_CAP).decode(errors="replace").splitlines()
        return "it ended at once" + (f"; it said: {''.join(filter(str.isprintable, lines[0]))}" if lines else "")

    def _again(self) -> str:
        return f"build it again: {setup_command(self._arch)}"


def emulator(arch: str, cpu: str, *, count: bool) -> list[str]:
    """Return the command that runs a program of `arch` here, with the counter of instructions if that is wanted.

    Raises:
        ProfileError: if the emulator is not installed, or the programs were built without what it needs.
    """
    root = programs(arch) / "root"
    if not root.is_dir():
        raise ProfileError(f"the programs of a board for {arch} are old", next_step=setup_command(arch))
    found = shutil.which(f"qemu-{arch}")
    if found is None:
        raise ProfileError(f"qemu-{arch} is not installed", next_step=setup_command(arch))
    plugin = ["-plugin", str(programs(arch) / "count.so")] if count else []
    return [found, "-cpu", cpu, *plugin, "-L", str(root)]


class TcpBoard:
    """A server that somebody else runs, or that is tunnelled to, on this machine's loopback."""

    def __init__(self, port: int) -> None:
        self._door = Door(port=port, key=SHARED_KEY)

    def door(self) -> Door:
        """Return where it is said to be."""
        return self._door

    def lost(self) -> None:
        """Do nothing: it is not ours to restart."""

    def selftest(self, bundle: Path) -> Selftest:
        """Refuse: a port leads to the server alone."""
        raise DeviceLost(
            f"the runner of {bundle.name} cannot be started through tcp://", next_step="give an ssh address"
        )

    def close(self) -> None:
        """Do nothing."""


class SshBoard:
    """A server on a board of its own, reached through an ssh tunnel that is opened when it is needed.

    Args:
        ssh: not yet open.
        port: of the board's loopback, where the server listens.
    """

    def __init__(self, ssh: Ssh, port: int) -> None:
        self._ssh, self._port = ssh, port
        self._door: Door | None = None

    def door(self) -> Door:
        """Return the near end of the tunnel."""
        if self._door is None or not self._ssh.alive:
            self.close()
            self._ssh.open()
            self._door = Door(port=self._ssh.forward(self._port), key=SHARED_KEY)
        return self._door

    def lost(self) -> None:
        """Close the connection; the next call of `door` opens another."""
        self.close()

    def selftest(self, bundle: Path) -> Selftest:
        """Copy the bundle to the board, run its runner there and remove it again."""
        self.door()
        made = self._ssh.run(["mktemp", "-d", "-t", f"{BUNDLE_FOLDER}XXXXXXXXXX"], limit_s=20)
        place = remote_path(made.stdout.strip())
        if made.rc != 0 or not Path(place).name.startswith(BUNDLE_FOLDER):
            raise DeviceLost("the board made no folder for the bundle", why=made.said)
        try:
            return self._selftest_in(place, bundle)
        finally:
            with suppress(DeviceLost):
                self._ssh.run(["rm", "-rf", "--", place], limit_s=60)

    def _selftest_in(self, place: str, bundle: Path) -> Selftest:
        with Scratch("bundle") as folder:
            whole = folder / "bundle.tar"
            with tarfile.open(whole, "w") as archive:
                archive.add(bundle, "bundle")
            self._ssh.put(whole, f"{place}/bundle.tar", limit_s=SELFTEST_LIMIT_S)
        unpacked = self._ssh.run(["tar", "-x", "-f", f"{place}/bundle.tar", "-C", place], limit_s=SELFTEST_LIMIT_S)
        if unpacked.rc != 0:
            raise DeviceLost("the board could not unpack the bundle", why=unpacked.said)
        runner = [f"{place}/bundle/{RUNNER}", "--selftest", "--json"]
        done = self._ssh.run(runner, limit_s=SELFTEST_LIMIT_S, cap=ANSWER_CAP)
        return said_by(done.rc, done.stdout)

    def close(self) -> None:
        """Close the connection, and the tunnel with it."""
        self._ssh.close()
        self._door = None


def said_by(code: int, text: str) -> Selftest:
    """Return what a runner with this exit code and this answer says."""
    try:
        value = json.loads(text)
        facts, told = value["data"] or {}, value["diagnostics"]
        words = f"{told[0]['what']} {told[0]['why']}".strip() if told else ""
        detail = words or f"{facts['samples']} recorded samples answered within tolerance, {facts['files']} files whole"
    except (ValueError, LookupError, TypeError):
        detail = f"it ended with exit code {code} and no answer"
    return Selftest(ok=code == 0, detail="".join(filter(str.isprintable, str(detail)))[:DETAIL_CAP])


def tcp_port(address: str) -> int:
    """Return the port of ``tcp://127.0.0.1:PORT``.

    Raises:
        ProfileError: for anything else.
    """
    found = _TCP.fullmatch(address)
    if found is not None and 0 < int(found[1]) < 65536:
        return int(found[1])
    if address.startswith("tcp://"):
        raise ProfileError(
            f"address {address!r} is not tcp://127.0.0.1:PORT",
            why="TVM RPC knows neither passwords nor encryption: whoever reaches the port runs code on the board",
            next_step='address = "ssh://user@board" goes through a tunnel',
        )
    raise ProfileError(
        f"address {address!r} is no way to a board",
        next_step='address = "ssh://user@board", or "tcp://127.0.0.1:PORT" for a tunnel that you keep open',
    )
