"""Write files and folders so that a crash leaves the old or the new, never half of either."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edgeprune.errors import ConfigError, StorageFull

FILE_MODE = 0o644
PROGRAM_MODE = 0o755
FOLDER_MODE = 0o755

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Translate what the file system says while `place` is written.

    Raises:
        StorageFull: for a full disk, a spent quota or a file-size limit.
        ConfigError: for everything else, because the user named the place.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(
                f"cannot write {place}",
                why=str(error.strerror),
                next_step="free some space and run the same command again",
            ) from error
        raise ConfigError(
            f"cannot write {place}", why=error.strerror or str(error), next_step="choose a folder you may write"
        ) from error


@contextmanager
def new_file(path: Path, *, lasting: bool = True, mode: int = FILE_MODE) -> Iterator[BinaryIO]:
    """Yield a stream to a file that must not exist yet.

    Args:
        path: where it goes.
        mode: its permissions, whatever the umask says.
        lasting: put its bytes on the disk before the block is left, so that a power cut cannot take them.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, mode), "wb") as stream:
        yield stream
        stream.flush()
        if lasting:
            os.fsync(stream.fileno())
    path.chmod(mode)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream to a sibling of `path` that takes its place when the block is left without an error."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with new_file(part) as stream:
            yield stream
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk."""
    handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
