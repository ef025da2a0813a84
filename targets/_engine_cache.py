"""Engines that are kept in the user's cache folder, so that a graph is built once on a machine."""

import os
from contextlib import suppress
from pathlib import Path

from edgeprune.errors import ProfileError, StorageFull

KEPT = 256
"""Files of a kind in a folder; the ones not used for longest go first."""

ADVICE = "set XDG_CACHE_HOME to a folder with room that you may write"


def kept_in(*names: str) -> Path:
    """Return a folder of the user's cache, made if it is missing, that others may not read or write.

    What lies there is run as it is, so it must be nobody else's; it may be the user's own link to a larger disk.

    Raises:
        ProfileError: if it cannot be made, or is another user's, or a link of theirs.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeprune"
    folder = root.joinpath(*names)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.lstat().st_uid == folder.stat().st_uid == os.getuid():
            folder.chmod(0o700)
            return folder
    except OSError as error:
        raise ProfileError(f"{folder} cannot be made", why=str(error), next_step=ADVICE) from error
    raise ProfileError(
        f"{folder} is another user's, or a link of theirs",
        why="what others put there would be run with your rights",
        next_step="set XDG_CACHE_HOME to a folder of your own",
    )


def written(path: Path, content: bytes) -> Path:
    """Return `path`, which holds `content` whole.

    Raises:
        StorageFull: if there is no room.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageFull(f"{path} cannot be written", why=str(error), next_step=ADVICE) from error
    return path


def used(path: Path) -> None:
    """Count a file among those used last; one that is gone is missed by whoever reads it."""
    with suppress(OSError):
        os.utime(path)


def forget_old(folder: Path, pattern: str) -> None:
    """Keep the files used last; another process may be doing the same."""
    ages = []
    for each in folder.glob(pattern):
        try:
            ages.append((each.stat().st_mtime, each))
        except FileNotFoundError:
            continue
    for _, each in sorted(ages)[:-KEPT]:
        each.unlink(missing_ok=True)
        each.with_suffix(".json").unlink(missing_ok=True)  # what was written beside it
