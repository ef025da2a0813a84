"""The right to use one board, among the processes of this host: one has it, the others wait or go elsewhere.

    <runtime folder>/edgeprune/leases/orin.local-3f1c….lock     locked by the holder, freed by the kernel when it dies
                                                    ….json     who holds it, for messages alone

The runtime folder is $XDG_RUNTIME_DIR, else a folder of this user's under the temporary one. On a host that several
users share, $EDGEPRUNE_LEASES names a folder that all of them may write, with a umask that lets them (002).
"""

import json
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from edgeprune.errors import ConfigError, DeviceBusy
from edgeprune.run_lock import RunLock

POLL_S = 0.2
"""Seconds between two attempts."""

HOLDER_READ = 4096
"""Bytes of a holder's note that are read."""


class Lease:
    """The right to use a board, until it is released or this process ends."""

    def __init__(self, board: str, lock: RunLock, note: Path) -> None:
        self.board = board
        self._lock = lock
        self._note = note

    @classmethod
    def take(
        cls,
        board: str,
        *,
        wait_s: float = 0.0,
        folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> "Lease":
        """Return the lease on a board.

        Args:
            board: its name or address, any text.
            wait_s: seconds to wait for whoever holds it.
            folder: of the leases, None: this host's.
            clock: monotonic seconds.
            sleep: called between attempts.

        Raises:
            DeviceBusy: if somebody holds it still, saying who.
            StorageFull: if the disk is full.
            ConfigError: if the folder cannot be used.
        """
        path = (folder or lease_folder()) / f"{_file_name(board)}.lock"
        deadline = clock() + wait_s
        while True:
            try:
                lease = cls(board, RunLock.take(path, mode=0o666), path.with_suffix(".json"))
            except DeviceBusy as error:
                left = deadline - clock()
                if left <= 0:
                    raise _busy(board, path.with_suffix(".json"), wait_s) from error
                sleep(min(POLL_S, left))
            else:
                lease._sign()
                return lease

    def _sign(self) -> None:
        """Write down who holds it; a lease that cannot be signed is held all the same."""
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat("T", "seconds")}
        partial = self._note.with_name(f".{self._note.name}.{os.getpid()}")
        with suppress(OSError):
            partial.write_text(json.dumps({**facts, "board": self.board}))
            partial.replace(self._note)

    def release(self) -> None:
        """Let others have it; doing so twice is harmless."""
        self._lock.release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lease_folder() -> Path:
    """Return the folder of this host's leases.

    Raises:
        ConfigError: if it cannot be made, or is not this user's own although nobody chose it.
    """
    chosen = os.environ.get("EDGEPRUNE_LEASES")
    runtime = os.environ.get("XDG_RUNTIME_DIR") or Path(tempfile.gettempdir()) / f"edgeprune-{os.getuid()}"
    folder = Path(chosen) if chosen else Path(runtime) / "edgeprune" / "leases"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        foreign = [each for each in _own(folder, chosen, Path(runtime)) if not _is_own(each)]
    except OSError as error:
        raise _unusable(folder, str(error)) from error
    if foreign:
        raise _unusable(foreign[0], "it is a link, or another user's: others could take the leases away")
    return folder


def _own(folder: Path, chosen: str | None, runtime: Path) -> list[Path]:
    """Return the folders that must be this user's own: all that lie in a place anybody may write to."""
    return [] if chosen else [folder, folder.parent, runtime]


def _is_own(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _unusable(folder: Path, why: str) -> ConfigError:
    advice = "set EDGEPRUNE_LEASES to a folder that all who share the boards may write"
    return ConfigError(f"leases on boards cannot be kept in {folder}", why=why, next_step=advice)


def _file_name(board: str) -> str:
    """Return a file name that is readable, and another for every board."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', board)[:40]}-{sha256(board.encode()).hexdigest()[:16]}"


def _busy(board: str, note: Path, wait_s: float) -> DeviceBusy:
    waited = f", and did so for {wait_s:.0f} seconds" if wait_s else ""
    advice = "wait until it is done, or name more boards"
    return DeviceBusy(f"board {board} is in use", why=f"{_holder(note)} holds it{waited}", next_step=advice)


def _holder(note: Path) -> str:
    """Return who holds a lease, as far as the note tells; it may be missing, or of another program."""
    try:
        with note.open("rb") as file:
            facts = json.loads(file.read(HOLDER_READ))
        return "".join(filter(str.isprintable, f"process {facts['pid']} on {facts['host']} since {facts['since']}"))
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
