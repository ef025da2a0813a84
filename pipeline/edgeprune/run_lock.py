"""The right to write one run, given back by the kernel when the process dies."""

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import ClassVar

from edgeprune.errors import ConfigError, DeviceBusy, EdgepruneError, StorageFull


class RunLock:
    """A POSIX record lock on a small file.

    Unlike flock it does not live on in forked children that outlast a killed run, so the run can be resumed at once.
    It does not exclude the process that holds it; `_held` does.
    """

    _held: ClassVar[set[Path]] = set()
    _taking: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor

    @classmethod
    def take(cls, path: Path, *, mode: int = 0o644) -> "RunLock":
        """Return the lock on `path`, a file that is made if missing, folders included, and never removed.

        Args:
            path: of the file.
            mode: permissions of a new file, before the umask.

        Raises:
            DeviceBusy: if somebody holds it.
            StorageFull: if the disk is full.
            ConfigError: if the file cannot be written.
        """
        with cls._taking:  # the kernel would give it to every thread of this process
            return cls._take(path.absolute(), mode)

    @classmethod
    def _take(cls, path: Path, mode: int) -> "RunLock":
        if path in cls._held:
            raise _busy(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        except OSError as error:
            raise _refused(path, error) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise _refused(path, error) from error
        cls._held.add(path)
        return cls(path, descriptor)

    def release(self) -> None:
        """Let others have it; doing so twice is harmless."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._held.discard(self._path)


def _refused(path: Path, error: OSError) -> EdgepruneError:
    if error.errno in (errno.EACCES, errno.EAGAIN) and path.is_file() and os.access(path, os.W_OK):
        return _busy(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space and run the same command again: it continues"
        return StorageFull(f"no room to write {path}", why=str(error), next_step=advice)
    return ConfigError(f"{path} cannot be written", why=str(error), next_step="choose a folder you may write")


def _busy(path: Path) -> DeviceBusy:
    advice = "wait until it is done, or write to another --out"
    return DeviceBusy(f"another edgeprune run holds {path.parent}", next_step=advice)
