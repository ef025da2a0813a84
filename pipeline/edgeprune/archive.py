"""One folder as one file, with exactly one spelling: a plain ustar archive whose every byte is fixed by rule.

    header(top/README.txt) README.txt zeros  header(top/model.onnx) model.onnx zeros  ...  1024 zero bytes

Entries are regular files under one top folder, in ascending order of name; the mode follows from the name, owner and
time are constants and there are no folder entries, links, extensions or record padding. ``tar tf`` reads it. Our
reader never parses: it writes the header that the name and size ask for and compares, so it accepts nothing that our
writer would not have written, and no byte can change unseen except inside a file (whose digest the manifest holds).
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from edgeprune.durable import FILE_MODE, FOLDER_MODE, PROGRAM_MODE, new_file, replacing, storage_errors
from edgeprune.errors import BundleError

BLOCK = 512
TRAILER = bytes(2 * BLOCK)
NAME_BYTES = 100
MTIME = 315532800
"""Modification time of every entry, seconds since 1970: 1 January 1980 UTC, the earliest that zip tools also know."""

_CHUNK = 1 << 20
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,4}}", re.ASCII)
_OCTAL = re.compile(rb"[0-7]{11}\0")


def safe_name(name: str) -> bool:
    """Return whether `name` is a relative path that stays below its folder and means the same everywhere.

    No segment starts with a dot or a dash, so there is no way up, nothing hidden and nothing that looks like a flag.
    """
    return len(name) <= NAME_BYTES and _NAME.fullmatch(name) is not None


def mode_of(name: str) -> int:
    """Return the permissions of a file of a bundle, which follow from its name: programs lie in a folder ``bin/``."""
    return PROGRAM_MODE if "bin" in PurePosixPath(name).parts[:-1] else FILE_MODE


def header(name: str, size: int) -> bytes:
    """Return the one ustar header (IEEE 1003.1, pax: "ustar Interchange Format") of a file of `size` bytes."""
    owner, device, no_link, no_names = b"0000000\0" * 2, b"0000000\0" * 2, bytes(100), bytes(64)
    mode = b"%07o\0" % mode_of(name.partition("/")[2])
    before = name.encode("ascii").ljust(NAME_BYTES, b"\0") + mode + owner + b"%011o\0%011o\0" % (size, MTIME)
    after = (b"0" + no_link + b"ustar\x0000" + no_names + device).ljust(BLOCK - len(before) - 8, b"\0")
    return before + b"%06o\0 " % (sum(before) + 8 * ord(" ") + sum(after)) + after


def write_archive(path: Path, *, top: str, files: Mapping[str, Path]) -> Path:
    """Write the files as one archive, in place of an earlier one at once or not at all; return `path`.

    Args:
        path: where the archive goes.
        top: the folder that ``tar xf`` makes.
        files: name inside the bundle → file to read.

    Raises:
        BundleError: if a name cannot stand in an archive.
        StorageFull, ConfigError: if the archive cannot be written.
    """
    if wrong := [name for name in files if not safe_name(f"{top}/{name}")]:
        raise BundleError(f"{wrong[0]!r} cannot stand in an archive", why="letters, digits and ._-/ only, 100 at most")
    with storage_errors(path), replacing(path) as stream:
        for name, source in sorted((f"{top}/{name}", source) for name, source in files.items()):
            _append(stream, name, source)
        stream.write(TRAILER)
    return path


def _append(stream: BinaryIO, name: str, source: Path) -> None:
    size = source.stat().st_size
    stream.write(header(name, size))
    with source.open("rb") as content:
        shutil.copyfileobj(content, stream, _CHUNK)
    stream.write(bytes(-size % BLOCK))


def read_archive(path: Path, folder: Path) -> str:
    """Unpack an archive that `write_archive` wrote into the empty folder `folder`; return its top folder's name.

    The top folder itself is not made: its content goes straight into `folder`.

    Raises:
        BundleError: if any byte outside the files' own content is not the one our writer would have written.
        StorageFull: if the disk is full; `folder` then holds a part.
    """
    try:
        with path.open("rb") as stream:
            return _Reader(stream, path).unpack(folder)
    except OSError as error:
        raise BundleError(f"{path.name} cannot be read", why=error.strerror or str(error)) from error


def _make_folders(folder: Path, name: str) -> None:
    """Make what is missing between `folder` and the file `name` in it, with the one mode."""
    for between in reversed(PurePosixPath(name).parents[:-1]):
        each = folder / between
        if not each.is_dir():
            each.mkdir(FOLDER_MODE)
            each.chmod(FOLDER_MODE)  # whatever the umask says


class _Reader:
    """One pass over an archive."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream = stream
        self.path = path
        self.left = path.stat().st_size
        self.top = ""
        self.names: list[str] = []

    def unpack(self, folder: Path) -> str:
        while (block := self.take(BLOCK)) != bytes(BLOCK):
            name, size = self.entry(block)
            target = folder / name
            with storage_errors(target):
                _make_folders(folder, name)
                with new_file(target, lasting=False, mode=mode_of(name)) as stream:
                    self.copy(size, stream)
            if any(self.take(-size % BLOCK)):
                raise self.refused(f"the padding after {name!r} is not zero")
        if self.left != BLOCK or any(self.take(BLOCK)) or not self.top:
            raise self.refused("it does not end in exactly two empty blocks after at least one file")
        return self.top

    def entry(self, block: bytes) -> tuple[str, int]:
        """Return name below the top folder and size, if the block is what we would have written for them."""
        name = block[:NAME_BYTES].rstrip(b"\0").decode("latin-1")
        octal = block[124:136]
        if not safe_name(name) or "/" not in name or not _OCTAL.fullmatch(octal):
            raise self.refused(f"an entry has the name {name[:40]!r} or a size that is not ours")
        size = int(octal[:11], 8)
        if block != header(name, size):
            raise self.refused(f"the header of {name!r} is not ours: only plain files with fixed fields may stand here")
        top, _, inner = name.partition("/")
        if self.names and (inner <= self.names[-1] or top != self.top):
            raise self.refused(f"{name!r} stands twice, out of order or in another folder")
        if any(inner.startswith(f"{each}/") for each in self.names):
            raise self.refused(f"{name!r} lies below another file")
        self.top = top
        self.names.append(inner)
        return inner, size

    def copy(self, size: int, stream: BinaryIO) -> None:
        while size:
            chunk = self.take(min(size, _CHUNK))
            stream.write(chunk)
            size -= len(chunk)

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise self.refused(f"it ends {count - self.left} bytes too early")
        chunk = self.stream.read(count)
        if len(chunk) != count:
            raise self.refused("it changed while it was read")
        self.left -= count
        return chunk

    def refused(self, why: str) -> BundleError:
        return BundleError(
            f"{self.path.name} is not an edgeprune archive as it was written",
            why=why,
            next_step="copy it again from where it was made; do not trust this copy",
        )
