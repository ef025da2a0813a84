"""A real OpenSSH server on 127.0.0.1 that plays the board: its own port, host key, user key and files.

    with LoopbackSshd(tmp_path, environment={"PATH": "..."}) as board:
        with Ssh(Address.parse(board.address), board.files) as ssh: ...

It runs as whoever runs the tests and lets nobody else in. It can be frozen, cut off and given another host key.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from getpass import getuser
from pathlib import Path
from typing import Self

START_LIMIT_S = 20.0
INSTALL = "sh tests/install-openssh"


def sshd_path() -> str | None:
    """Return where the server program is; it must be called by its full path."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class LoopbackSshd:
    """One server; a context manager.

    Args:
        folder: for everything it needs.
        environment: variables of every session, over those that sshd sets.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = dict(environment or {})
        self._server: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        for key in ("host_key", "user_key"):
            self._new_key(key)
        (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
        (folder / "ssh_config").write_text("# nothing of the user's own\n")
        self.port = _free_port()
        self.trust()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"ssh://{getuser()}@127.0.0.1:{self.port}"

    @property
    def files(self) -> dict[str, str]:
        """Return the options of a profile that make ssh trust this server and no other."""
        names = {"identity_file": "user_key", "known_hosts": "known_hosts", "config_file": "ssh_config"}
        return {option: str(self.folder / name) for option, name in names.items()}

    def trust(self) -> None:
        """Write the host key into known_hosts."""
        key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}")

    def forget(self) -> None:
        """Empty known_hosts."""
        (self.folder / "known_hosts").write_text("")

    def start(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # without it a server run by root refuses to start
        (self.folder / "sshd_config").write_text(self._config())
        program = sshd_path()
        assert program, INSTALL
        log = self.folder / "sshd.log"
        self._server = subprocess.Popen(
            [program, "-D", "-f", str(self.folder / "sshd_config"), "-E", str(log)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + START_LIMIT_S
        while not _listens(self.port):
            assert self._server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        if self._server is not None:
            self.cut()
            self._server.kill()
            self._server.wait()
            self._server = None

    def new_host_key(self) -> None:
        """Be another machine under the same address, as after an installation."""
        self.stop()
        self._new_key("host_key")
        self.start()

    def connections(self) -> list[int]:
        """Return the processes that serve connections, those of other users' rights included."""
        assert self._server is not None
        return [each for child in _children(self._server.pid) for each in (child, *_named(_children(child), "sshd"))]

    def cut(self) -> None:
        """Break every connection, as a pulled plug does once it is noticed."""
        for each in self.connections():
            _signal(each, signal.SIGKILL)

    def freeze(self) -> None:
        """Stop answering, as a board does that hangs or whose cable is pulled; what runs on it runs on."""
        for each in self.connections():
            _signal(each, signal.SIGSTOP)

    def thaw(self) -> None:
        for each in self.connections():
            _signal(each, signal.SIGCONT)

    def _new_key(self, name: str) -> None:
        for each in (self.folder / name, self.folder / f"{name}.pub"):
            each.unlink(missing_ok=True)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(self.folder / name)]
        subprocess.run(command, check=True)

    def _config(self) -> str:
        variables = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        lines = {
            "ListenAddress": f"127.0.0.1:{self.port}",
            "HostKey": self.folder / "host_key",
            "PidFile": "none",
            "AuthorizedKeysFile": self.folder / "authorized_keys",
            "StrictModes": "no",  # temporary folders may be anybody's
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "AllowUsers": getuser(),
            "PrintMotd": "no",
            "MaxStartups": "100",
            "Subsystem": "sftp internal-sftp",
            **({"SetEnv": variables} if variables else {}),
        }
        return "".join(f"{name} {value}\n" for name, value in lines.items())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _named(pids: list[int], name: str) -> list[int]:
    return [each for each in pids if Path(f"/proc/{each}/comm").read_text().strip() == name]


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
