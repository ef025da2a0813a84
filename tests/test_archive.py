"""The archive has one spelling; whatever else is offered is refused, and nothing leaves the folder."""

import io
import os
import shutil
import stat
import subprocess
import tarfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.archive import BLOCK, TRAILER, header, read_archive, safe_name, write_archive
from edgeprune.errors import BundleError, ConfigError

FILES = {"README.txt": b"read me\n", "model.onnx": bytes(range(256)) * 5, "parity/input_0.npy": b"", "z": b"x" * 512}

contents = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}(/[A-Za-z0-9][A-Za-z0-9._-]{0,9})?", fullmatch=True),
    st.binary(max_size=1200),
    min_size=1,
    max_size=5,
).filter(
    lambda files: not any(f"{one}/" == f"{other}/"[: len(one) + 1] for one in files for other in files if one != other)
)


def written(folder: Path, files: dict[str, bytes]) -> Path:
    source = folder / "source"
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    return write_archive(folder / "top.tar", top="top", files={name: source / name for name in files})


def unpacked(archive: Path, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    assert read_archive(archive, folder) == "top"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@cache
def whole_archive() -> bytes:
    with TemporaryDirectory() as folder:
        return written(Path(folder), FILES).read_bytes()


def entry(name: str, content: bytes = b"x") -> bytes:
    return header(name, len(content)) + content + bytes(-len(content) % BLOCK)


def refused(folder: Path, archive: bytes) -> str:
    """Offer the bytes; return why they were refused, once nothing has appeared outside the folder to unpack into."""
    (folder / "hostile.tar").write_bytes(archive)
    inner = folder / "cage" / "inner"
    inner.mkdir(parents=True)
    with pytest.raises(BundleError) as caught:
        read_archive(folder / "hostile.tar", inner)
    assert [each.name for each in (folder / "cage").iterdir()] == ["inner"]
    assert not any(path.is_symlink() for path in inner.rglob("*"))
    return str(caught.value)


@given(files=contents)
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_back(files: dict[str, bytes]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        assert unpacked(written(folder, files), folder / "out") == files


def test_the_systems_tar_lists_and_unpacks_it(tmp_path: Path) -> None:
    archive = written(tmp_path, FILES)
    tar = shutil.which("tar")
    assert tar is not None
    listed = subprocess.run([tar, "tf", archive], capture_output=True, check=True)
    assert listed.stdout.decode().split() == [f"top/{name}" for name in sorted(FILES)]
    assert listed.stderr == b""
    (tmp_path / "out").mkdir()
    subprocess.run([tar, "xf", archive, "-C", tmp_path / "out"], check=True)
    for name, content in FILES.items():
        assert (tmp_path / "out/top" / name).read_bytes() == content


def test_pythons_tarfile_reads_the_same_from_a_header() -> None:
    info = tarfile.TarInfo.frombuf(header("top/model.onnx", 12345), "ascii", "strict")
    assert (info.name, info.size, info.mtime, info.mode) == ("top/model.onnx", 12345, 315532800, 0o644)
    assert (info.type, info.uid, info.gid, info.uname, info.linkname) == (tarfile.REGTYPE, 0, 0, "", "")


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_modes_of_what_is_unpacked_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    """Folders as well, however deep, so that what was unpacked is not refused as writable by anybody."""
    archive = written(tmp_path, {"a/b/c": b"", "a/d": b"", "e": b""})
    folder = tmp_path / "out"
    before = os.umask(umask)
    try:
        unpacked(archive, folder)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_dir()} == {0o755}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o644}


def test_the_bytes_do_not_depend_on_the_order_or_the_times_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = written(tmp_path / "a", FILES)
    other = written(tmp_path / "b", dict(reversed(FILES.items())))
    (tmp_path / "b/source/z").chmod(0o600)
    assert one.read_bytes() == other.read_bytes()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_is_refused_or_shows_in_a_file(data: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        archive, whole = folder / "flipped.tar", bytearray(whole_archive())
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
        archive.write_bytes(whole)
        with suppress(BundleError):
            assert unpacked(archive, folder / "out") != FILES


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = whole_archive()
    for number, length in enumerate([*range(0, len(whole), 128), len(whole) - 1]):
        (tmp_path / str(number)).mkdir()
        refused(tmp_path / str(number), whole[:length])


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "top/../../evil",
        "/etc/evil",
        "top/",
        "top",
        "top//a",
        "top/./a",
        "top/.hidden",
        "-rf/a",
        "top/-rf",
        "top/a\nb",
        "top/a b",
        "top/a\\b",
        "C:/a",
        "top/a/b/c/d/e",
    ],
)
def test_a_name_that_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    assert not (safe_name(name) and "/" in name)
    forged = bytearray(header("top/a", 1))
    forged[:100] = name.encode()[:100].ljust(100, b"\0")
    forged[148:156] = b" " * 8
    forged[148:156] = b"%06o\0 " % sum(forged)
    assert "name" in refused(tmp_path, bytes(forged) + b"x".ljust(BLOCK, b"\0") + TRAILER)


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        tarfile.CONTTYPE,
    ],
)
def test_an_entry_that_is_not_a_plain_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("top/a")
    info.type, info.linkname, info.mtime = kind, "/etc/passwd", 315532800
    refused(tmp_path, info.tobuf(tarfile.USTAR_FORMAT) + TRAILER)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_in_another_dialect_is_refused(tmp_path: Path, form: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, pax_headers={"comment": "hello"}) as archive:
        info = tarfile.TarInfo("top/a")
        info.mtime = 315532800
        archive.addfile(info)
    refused(tmp_path, stream.getvalue())


@pytest.mark.parametrize(
    ("archive", "why"),
    [
        (b"", "too early"),
        (TRAILER, "at least one file"),
        (entry("top/a"), "too early"),
        (entry("top/a") + TRAILER + bytes(BLOCK), "exactly two"),
        (entry("top/a") + TRAILER + b"x", "exactly two"),
        (entry("top/a") + bytes(BLOCK) + b"y" * BLOCK, "exactly two"),
        (entry("top/a") + entry("top/a") + TRAILER, "twice"),
        (entry("top/b") + entry("top/a") + TRAILER, "out of order"),
        (entry("top/a") + entry("tup/b") + TRAILER, "another folder"),
        (entry("top/a") + entry("top/a-b") + entry("top/a/b") + TRAILER, "below another file"),
        (header("top/a", 2) + b"x" + bytes(BLOCK - 1) + TRAILER, None),
        (header("top/a", 0o77777777777) + b"x" + bytes(BLOCK - 1) + TRAILER, "too early"),
        (header("top/a", 5000) + b"x" + bytes(BLOCK - 1) + TRAILER, "too early"),
        (header("top/a", 1) + b"xy" + bytes(BLOCK - 2) + TRAILER, "padding"),
    ],
)
def test_a_false_structure_is_refused(tmp_path: Path, archive: bytes, why: str | None) -> None:
    if why is None:  # a size one too large is still a well-formed archive; only the manifest can tell
        (tmp_path / "a.tar").write_bytes(archive)
        assert unpacked(tmp_path / "a.tar", tmp_path / "out") == {"a": b"x\0"}
    else:
        assert why in refused(tmp_path, archive)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    import gzip

    refused(tmp_path, gzip.compress(written(tmp_path, FILES).read_bytes()))


def test_a_name_that_cannot_stand_in_an_archive_is_refused_when_writing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    for name in ("../a", "a" * 97):
        with pytest.raises(BundleError, match="cannot stand"):
            write_archive(tmp_path / "t.tar", top="top", files={name: tmp_path / "a"})
    assert not (tmp_path / "t.tar").exists()


def test_a_failed_write_leaves_the_earlier_archive_and_nothing_else(tmp_path: Path) -> None:
    archive = written(tmp_path, FILES)
    before = archive.read_bytes()
    with pytest.raises(ConfigError):
        write_archive(archive, top="top", files={"a": tmp_path / "source/z", "b": tmp_path / "missing"})
    assert archive.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["source", "top.tar"]


def test_a_missing_archive_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        read_archive(tmp_path / "missing.tar", tmp_path)


def test_only_what_lies_in_a_folder_bin_is_a_program(tmp_path: Path) -> None:
    files = dict.fromkeys(("bin", "device/bin/run", "device/run", "device/robin/run"), tmp_path / "content")
    (tmp_path / "content").write_bytes(b"#!/bin/true\n")
    archive = write_archive(tmp_path / "a.tar", top="bin", files=files)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    read_archive(archive, unpacked)
    programs = {name for name in files if (unpacked / name).stat().st_mode & 0o111}
    assert programs == {"device/bin/run"}
    with tarfile.open(archive) as read:
        assert {each.name for each in read if each.mode == 0o755} == {"bin/device/bin/run"}
