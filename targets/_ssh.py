"""One board behind the system's ssh: commands, files and a port, over one connection that nobody else can use.

    with Ssh(Address.parse("ssh://me@orin.local")) as board:
        board.run(["uname", "-m"], limit_s=10)             # Done(rc=0, stdout="aarch64\\n", stderr="")

ssh ──ControlMaster──▶ sshd        every session goes through its private socket, and none connects on its own
 ├── jobs                          each under a dead-man switch, see `_ssh_job`
 └── sftp

What the login shell of the board sees is a constant; arguments travel inside the script of a job, quoted. The user's
~/.ssh/config, keys, agent, jump hosts and known_hosts hold; no host key is ever accepted on the user's behalf.
"""

import os
import re
import resource
import secrets
import select
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from edgeprune.canonical import file_sha256
from edgeprune.errors import DeviceLost, EdgepruneError, ProfileError, StorageFull
from edgeprune.scratch import Scratch

from ._ssh_address import Address  # noqa: TID251 private part of this adapter
from ._ssh_job import (  # noqa: TID251 private part of this adapter
    GRACE_S,
    SILENCE_S,
    Done,
    Job,
    close_quietly,
    job_script,
    last_line,
    plain,
    reap,
)

__all__ = ["FILE_OPTIONS", "Address", "Done", "Job", "Ssh", "disk_full", "plain", "remote_path"]

FILE_OPTIONS = ("identity_file", "known_hosts", "config_file")
"""Options of a profile that name a file for ssh, for tests and labs; without them the user's own hold."""

CONNECT_S, START_LIMIT_S = 10, 45.0
ALIVE_S, ALIVE_COUNT = 2, 3
"""ssh asks every so many seconds whether the board is there, and gives up after so many questions."""

OUTPUT_CAP = 8 << 20
"""Bytes of each output stream of a job that are read; a board that says more is not trusted."""

NOISE_CAP = 64 << 10
"""Bytes that a login may print before the connection is ready."""

FORWARD_TRIES = 5
FOREVER_S = 10 * 365 * 86400.0

SOCKET_PATH_CAP = 85
"""Bytes of a socket's path: 108 fit into the kernel's record, and ssh appends a temporary name of 17."""

_PATH = re.compile(r"[A-Za-z0-9._+/][A-Za-z0-9._+/~-]{0,4095}")
_READY = b"EDGEPRUNE_READY"
_JOIN_ONLY = ("-oControlMaster=no", "-oProxyCommand=false")
"""A client whose socket is gone must fail; by itself it would make a connection of its own."""

_CHANGED = re.compile(r"Host key for (\S+) has changed")


def remote_path(text: str) -> str:
    """Return `text` if it can be a path on a board: letters, digits and ``._+/~-``, nothing that anything expands.

    Raises:
        DeviceLost: otherwise; such a path is ours or comes from the board.
    """
    if not _PATH.fullmatch(text) or ".." in text.split("/"):
        raise DeviceLost(f"{plain(text)[:120]!r} is not used as a path on a board", why="it could mean something else")
    return text


def disk_full(name: str, free: int, needed: int) -> StorageFull:
    """Return the error of a board without room."""
    return StorageFull(
        f"the disk of {name} is full",
        why=f"{free >> 20} MiB are free, {-(-needed >> 20)} MiB are needed",
        next_step=f"free some, for example: ssh {name} sudo apt-get clean",
    )


class Ssh:
    """A connection to one board; a context manager. Nothing of it is left on either side when it is closed.

    Args:
        address: of the board.
        files: option of `FILE_OPTIONS` → path of a file on this machine.

    Raises:
        ProfileError: if such a file does not exist.
    """

    def __init__(self, address: Address, files: Mapping[str, str] | None = None) -> None:
        self.address = address
        self._files = {name: _existing(name, path) for name, path in (files or {}).items()}
        self._scratch: Scratch | None = None
        self._master: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._jobs: list[Job] = []

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """Return what messages call the board."""
        return self.address.host

    @property
    def alive(self) -> bool:
        """Return whether the connection stands, as far as is known here."""
        return self._master is not None and self._master.poll() is None

    def open(self) -> None:
        """Connect.

        Raises:
            ProfileError: if ssh is missing, the board's key is unknown or changed, or nobody is let in.
            DeviceLost: if the board cannot be reached.
        """
        if shutil.which("ssh") is None or shutil.which("sftp") is None:
            raise ProfileError("ssh is not installed", next_step="sudo apt-get install openssh-client")
        self._scratch = _short_folder()
        self._errors = (self._scratch.path / "errors").open("w+b")
        try:
            own = ["ssh", "-oControlMaster=yes", "-oControlPersist=no", "-oClearAllForwardings=yes", *self._options()]
            ready = "echo EDGEPRUNE_READY; exec cat > /dev/null"  # ends with its input, which ends with this process
            self._master = _spawn([*own, "--", self.address.host, ready], stderr=self._errors)
            resource.prlimit(self._master.pid, resource.RLIMIT_FSIZE, (NOISE_CAP, NOISE_CAP))
            self._await_ready(self._master)
        except BaseException:
            self.close()
            raise

    def _await_ready(self, master: "subprocess.Popen[bytes]") -> None:
        assert master.stdout is not None
        end, seen = time.monotonic() + START_LIMIT_S, b""
        while _READY not in seen.splitlines():
            part = b""
            if select.select([master.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                part = os.read(master.stdout.fileno(), 4096)
            seen += part
            if not part or len(seen) > NOISE_CAP:
                raise self._not_connected(timed_out=time.monotonic() >= end)

    def _not_connected(self, *, timed_out: bool) -> EdgepruneError:
        if timed_out:
            return self._unreachable(f"there was no answer within {START_LIMIT_S:g} s")
        assert self._master is not None
        with suppress(subprocess.TimeoutExpired):
            self._master.wait(2)
        return self._why_refused(self._master_words())

    def _master_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return plain(self._errors.read(NOISE_CAP).decode("utf-8", "replace"))

    def _why_refused(self, words: str) -> EdgepruneError:
        """Return the error that the words of a connection that did not come about mean."""
        if found := _CHANGED.search(words):
            return self._key_changed(found[1])
        if "Host key verification failed" in words:
            return ProfileError(
                f"the host key of {self.name} is not known here",
                why="nothing vouches that this is the board and not something in between",
                next_step=f"{self._by_hand()} and compare the fingerprint it shows with the one on the board: "
                "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub",
            )
        if "Permission denied" in words or "Too many authentication failures" in words:
            return ProfileError(
                f"{self.name} does not let {self.address.user or 'this user'} in",
                why=last_line(words),
                next_step=f"ssh-copy-id {self.address.login}",
            )
        if "configuration option" in words or "Bad configuration" in words or "no argument after keyword" in words:
            return ProfileError("ssh cannot read its configuration", why=words.splitlines()[0][:300])
        return self._unreachable(last_line(words) or "ssh ended without a word")

    def _key_changed(self, known_as: str) -> ProfileError:
        file = f"-f {shlex.quote(self._files['known_hosts'])} " if "known_hosts" in self._files else ""
        return ProfileError(
            f"the host key of {self.name} has changed",
            why="the board was installed anew, or something answers in its place",
            next_step=f"if it was installed anew: ssh-keygen {file}-R {shlex.quote(known_as)}, then {self._by_hand()}",
        )

    def _by_hand(self) -> str:
        file = self._files.get("known_hosts")
        return f"ssh {f'-o UserKnownHostsFile={shlex.quote(file)} ' if file else ''}{self.address.login}"

    def _unreachable(self, why: str) -> DeviceLost:
        next_step = f"see whether the board is on and on the network: ssh {self.address.login} true"
        return DeviceLost(f"{self.name} cannot be reached", why=why, next_step=next_step)

    def close(self) -> None:
        """End every job and the connection."""
        for job in list(self._jobs):
            job.close()
        master, self._master = self._master, None
        if master is not None:
            if master.poll() is None:
                with suppress(OSError, subprocess.TimeoutExpired):
                    self._control("exit")
            close_quietly(master.stdin)
            reap(master)
            close_quietly(master.stdout)
        close_quietly(self._errors)
        self._errors = None
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    # -- commands -------------------------------------------------------------------------------------------------

    def run(self, argv: Sequence[str], *, limit_s: float, stdin: bytes = b"", cap: int = OUTPUT_CAP) -> Done:
        """Return how `argv` ended on the board and what it said.

        Args:
            argv: the command and its arguments, which arrive as they are.
            limit_s: seconds it may take, held on both sides.
            stdin: its input.
            cap: bytes of each output stream that are accepted.

        Raises:
            DeviceLost: if the connection breaks, the job takes or says too much, or ends without its exit status.
        """
        job = self._job(argv, limit_s=limit_s, silence_s=SILENCE_S, stdin=stdin, cap=cap)
        try:
            if not job.pump(time.monotonic() + limit_s):
                raise DeviceLost(
                    f"{self.name}: {_short(argv)} did not end within {limit_s:g} s and was stopped",
                    next_step="see whether the board is overloaded, then run the command again",
                )
            return self._done(job, argv)
        finally:
            job.close()

    def start(self, argv: Sequence[str], *, silence_s: float = SILENCE_S, cap: int = 64 << 10) -> Job:
        """Return `argv` running on the board until it ends, it is closed or this process dies.

        A thread of ours feeds its dead-man switch. Only the last of its output is kept.

        Args:
            silence_s: seconds without a word from us after which the board ends it.
            cap: bytes of each output stream that are kept.
        """
        job = self._job(argv, limit_s=FOREVER_S, silence_s=silence_s, cap=cap, tail=True)
        job.feed()
        return job

    def _job(
        self,
        argv: Sequence[str],
        *,
        limit_s: float,
        silence_s: float,
        cap: int,
        stdin: bytes = b"",
        tail: bool = False,
    ) -> Job:
        self._insist(f"starting {_short(argv)}")
        nonce = secrets.token_hex(16)
        script = job_script(argv, nonce=nonce, limit_s=limit_s + GRACE_S, silence_s=silence_s, stdin=stdin)
        words = ["ssh", *_JOIN_ONLY, *self._options(), "--", self.address.host, "exec bash --noprofile --norc -s"]
        client = _spawn(words, stderr=subprocess.PIPE)
        job = Job(client, nonce=nonce, script=script, cap=cap, tail=tail, on_close=self._jobs.remove)
        self._jobs.append(job)
        return job

    def _done(self, job: Job, argv: Sequence[str]) -> Done:
        if job.flooded:
            raise DeviceLost(
                f"{self.name}: {_short(argv)} said more than {job.cap >> 10} KiB and was stopped",
                why="no answer that long is read",
                next_step="see what that command prints on the board",
            )
        rc = job.rc
        if rc is None:
            raise self._lost(f"running {_short(argv)}", job.client_words)
        return Done(rc=rc, stdout=job.stdout, stderr=job.stderr)

    def _insist(self, doing: str, words: str = "") -> None:
        """Raise DeviceLost unless the connection stands."""
        if not self.alive:
            raise self._lost(doing, words)

    def _lost(self, doing: str, words: str = "") -> DeviceLost:
        if self._master is not None:
            with suppress(subprocess.TimeoutExpired):  # the words of the connection come a moment after its clients'
                self._master.wait(1)
        why = last_line(self._master_words()) or words or "the connection is gone"
        next_step = f"see whether the board is on and on the network: ssh {self.address.login} true"
        return DeviceLost(f"{self.name} was lost while {doing}", why=why, next_step=next_step)

    @property
    def _folder(self) -> Path:
        """Return our folder here; there is one for as long as there is a connection."""
        assert self._scratch is not None
        return self._scratch.path

    # -- files ----------------------------------------------------------------------------------------------------

    def put(self, local: Path, remote: str, *, limit_s: float) -> None:
        """Copy a file to the board: whole under its name, or not at all.

        Raises:
            StorageFull: if the board's disk is full.
            DeviceLost: if the connection breaks, the copy is damaged or the board refuses it.
        """
        part = remote_path(f"{remote}.part")
        self._insist(f"copying {local.name}")
        link = self._folder / f"out-{secrets.token_hex(4)}"  # a name that sftp does not expand
        link.symlink_to(local.resolve())
        try:
            status, words = self._sftp(f"put {link.name} {part}", limit_s, file_cap=NOISE_CAP)
        finally:
            link.unlink()
        if status != 0:
            raise self._not_written(local, part, words)
        self._accept(local, part, remote)

    def _accept(self, local: Path, part: str, remote: str) -> None:
        script = 'sha256sum < "$1" && sync "$1" && mv -f -- "$1" "$2"'
        done = self.run(["bash", "-c", script, "accept", part, remote], limit_s=120)
        if done.rc != 0:
            raise DeviceLost(f"{self.name}: {local.name} was not kept", why=done.said)
        if done.stdout.split()[:1] != [file_sha256(local)]:
            self.run(["rm", "-f", "--", remote], limit_s=20)
            raise DeviceLost(
                f"{self.name}: {local.name} arrived damaged",
                why="its SHA-256 is not the one it had here",
                next_step="check the board's disk and cable, then run the command again",
            )

    def _not_written(self, local: Path, part: str, words: str) -> EdgepruneError:
        self._insist(f"copying {local.name}", words)
        needed = local.stat().st_size
        try:
            self.run(["rm", "-f", "--", part], limit_s=20)
            free = self.free_bytes(str(Path(part).parent))
        except DeviceLost as error:
            raise DeviceLost(f"{self.name}: {local.name} could not be written", why=words) from error
        if free < needed:
            return disk_full(self.name, free, needed)
        return DeviceLost(f"{self.name}: {local.name} could not be written", why=words)

    def get(self, remote: str, local: Path, *, cap: int, limit_s: float) -> None:
        """Copy a file of at most `cap` bytes from the board: whole under its name, or not at all.

        Raises:
            DeviceLost: if it is missing or larger, or the connection breaks.
        """
        source = remote_path(remote)
        done = self.run(["stat", "-L", "-c", "%s", "--", source], limit_s=20)
        if done.rc != 0 or (size := _count(done.stdout.strip())) is None:
            raise DeviceLost(f"{self.name}: {source} cannot be read", why=done.said)
        if size > cap:
            raise DeviceLost(f"{self.name}: {source} has {size} bytes", why=f"at most {cap} are taken")
        part = self._folder / f"in-{secrets.token_hex(4)}"
        try:
            status, words = self._sftp(f"get {source} {part.name}", limit_s, file_cap=size)
            if status != 0 or not part.is_file() or part.stat().st_size != size:
                self._insist(f"fetching {source}", words)
                why = words or f"{size} bytes were announced, and others came"
                raise DeviceLost(f"{self.name}: {source} did not arrive whole", why=why)
            shutil.copyfile(part, local.with_name(f"{local.name}.part"))
            local.with_name(f"{local.name}.part").replace(local)
        finally:
            part.unlink(missing_ok=True)

    def _sftp(self, line: str, limit_s: float, *, file_cap: int) -> tuple[int, str]:
        """Return exit status and last words of sftp after one line; it cannot write a file longer than `file_cap`."""
        self._insist(line.split()[0])
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        words = ["sftp", "-q", "-b", "-", *_JOIN_ONLY, *self._options(), "--", host]
        with tempfile.TemporaryFile() as said:
            process = _spawn(words, stderr=said, stdout=subprocess.DEVNULL, cwd=self._folder)
            limit = max(file_cap, NOISE_CAP)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
            try:
                process.communicate(f"{line}\n".encode(), timeout=limit_s)
            except subprocess.TimeoutExpired as error:
                doing = f"{self.name}: {line.split()[0]} of a file took more than {limit_s:g} s"
                raise DeviceLost(doing, next_step="check the network, then run the command again") from error
            finally:
                reap(process, patience_s=0.0)
            said.seek(0)
            return process.returncode, last_line(plain(said.read(NOISE_CAP).decode("utf-8", "replace")))

    def free_bytes(self, folder: str) -> int:
        """Return the bytes that this user may still write under a folder of the board."""
        done = self.run(["df", "-P", "-k", "--", remote_path(folder)], limit_s=20)
        lines = done.stdout.splitlines()
        columns = lines[-1].split() if done.rc == 0 and len(lines) > 1 else []
        kib = _count(columns[3]) if len(columns) >= 4 else None
        if kib is None:
            raise DeviceLost(f"{self.name}: the free space of {folder} cannot be read", why=done.said)
        return kib * 1024

    # -- ports ----------------------------------------------------------------------------------------------------

    def forward(self, remote_port: int) -> int:
        """Return a port of this machine's loopback that leads to a loopback port of the board, until we close.

        Raises:
            DeviceLost: if there is none to be had, or the connection is gone.
        """
        words = ""
        for _ in range(FORWARD_TRIES):
            self._insist("forwarding a port", words)
            port = _free_port()
            done = self._control("forward", "-L", f"127.0.0.1:{port}:127.0.0.1:{int(remote_port)}")
            if done.returncode == 0:
                return port
            words = last_line(plain(done.stderr.decode("utf-8", "replace")))
        raise DeviceLost(f"{self.name}: port {remote_port} cannot be forwarded", why=words)

    def stop_forwarding(self, local_port: int, remote_port: int) -> None:
        """Take back what `forward` gave."""
        self._control("cancel", "-L", f"127.0.0.1:{local_port}:127.0.0.1:{int(remote_port)}")

    # -- the client programs --------------------------------------------------------------------------------------

    def _control(self, what: str, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
        """Return what the holder of the connection answers to a request of ``ssh -O``."""
        words = ["ssh", "-O", what, *arguments, *_JOIN_ONLY, *self._options(), "--", self.address.host]
        environment = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(
            words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=CONNECT_S, check=False
        )

    def _options(self) -> list[str]:
        """Return the options of every client. Of two settings ssh takes the first, so these go before the user's."""
        files, address = self._files, self.address
        config = ["-F", files["config_file"]] if "config_file" in files else []
        key = ["-i", files["identity_file"], "-oIdentitiesOnly=yes"] if "identity_file" in files else []
        known = [f'-oUserKnownHostsFile="{files["known_hosts"]}"'] if "known_hosts" in files else []
        settings = {
            "ControlPath": '"{}"'.format(str(self._folder / "m").replace("%", "%%")),
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UpdateHostKeys": "no",
            "ConnectTimeout": CONNECT_S,
            "ServerAliveInterval": ALIVE_S,
            "ServerAliveCountMax": ALIVE_COUNT,
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "PermitLocalCommand": "no",
            "RemoteCommand": "none",
            "RequestTTY": "no",
            "EscapeChar": "none",
            "LogLevel": "ERROR",
            **({"User": address.user} if address.user else {}),
            **({"Port": address.port} if address.port else {}),
        }
        return [*config, *key, *known, *(f"-o{name}={value}" for name, value in settings.items())]


def _spawn(
    words: Sequence[str],
    *,
    stderr: "IO[bytes] | int",
    stdout: int = subprocess.PIPE,
    cwd: Path | None = None,
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        bufsize=0,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,  # an interrupt at the keyboard is ours to pass on
    )


def _existing(option: str, path: str) -> str:
    """Return the absolute path of a file for ssh, spelled so that ssh reads it as one."""
    file = Path(path).expanduser().absolute()
    if option not in FILE_OPTIONS or not file.is_file() or re.search(r'["%\x00-\x1f]', str(file)):
        raise ProfileError(
            f"option {option} is {path!r}", why="a file on this machine is wanted, without quotes or % in its path"
        )
    return str(file)


def _short_folder() -> Scratch:
    """Return a new private folder whose path leaves room for a socket in it."""
    for parent in (tempfile.gettempdir(), "/var/tmp"):  # noqa: S108 a private folder is made in it
        scratch = Scratch("ssh", Path(parent))
        if len(os.fsencode(scratch.path)) < SOCKET_PATH_CAP:
            return scratch
        scratch.close()
    raise ProfileError("no folder for a socket", why="the paths of temporary folders are too long")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _count(text: str) -> int | None:
    """Return a number that a board wrote, None if it is none of a sensible length; digits are those of ASCII."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _short(argv: Sequence[str]) -> str:
    """Return what messages call a command: its first word, which is ours."""
    return Path(argv[0]).name
