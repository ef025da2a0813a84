"""A temporary folder for as long as somebody needs it; what a killed run left is swept by the next run.

    <temporary folder>/edgeprune-<purpose>-<random>/     locked by its owner, freed by the kernel when that dies
                                                    └── .edgeprune-scratch     marks it as one of ours

A folder whose lock can be taken belongs to nobody any more: it is locked before it is marked, and only marked ones are
swept, so nobody can take a new one for a dead one.
"""

import fcntl
import os
import shutil
import stat
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

PREFIX = "edgeprune-"

OWNED = ".edgeprune-scratch"
"""Name of the mark; a folder that is only called like ours is somebody's."""

_swept: set[Path] = set()


class Scratch:
    """A new folder that only this user may read; a context manager that yields its path.

    Args:
        purpose: part of its name, for people who look at the temporary folder.
        parent: where it is made, None: the temporary folder.
    """

    def __init__(self, purpose: str, parent: Path | None = None) -> None:
        above = parent or Path(tempfile.gettempdir())
        if above not in _swept:
            _swept.add(above)
            sweep(above)
        self._folder = tempfile.TemporaryDirectory(prefix=f"{PREFIX}{purpose}-", dir=above, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        lock = os.open(self.path, _AS_FOLDER)
        self._unlock = weakref.finalize(self, os.close, lock)
        with suppress(OSError):  # a file system without locks: it stays unmarked and is never swept
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.path / OWNED).touch(exist_ok=False)

    def close(self) -> None:
        """Remove it and all that is in it; doing so twice is harmless."""
        self._folder.cleanup()
        self._unlock()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


_AS_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def sweep(parent: Path) -> None:
    """Remove this user's marked folders in `parent` whose owner is dead; what cannot be removed stays."""
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):  # somebody else's, alive, or gone meanwhile
                    _sweep(Path(entry.path))


def _sweep(folder: Path) -> None:
    descriptor = os.open(folder, _AS_FOLDER)
    try:
        mark = os.stat(OWNED, dir_fd=descriptor, follow_symlinks=False)
        if stat.S_ISREG(mark.st_mode) and mark.st_uid == os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)  # never follows a link, nor does a link at `folder`
    finally:
        os.close(descriptor)
