"""Files that are kept for the next run: private, whole, and not for ever."""

import os
from pathlib import Path

import pytest

from edgeprune.errors import ProfileError, StorageFull
from edgeprune.targets import _engine_cache as cache


def test_a_folder_of_the_cache_is_the_users_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache.kept_in("kind", "engines")
    assert folder == tmp_path / "edgeprune/kind/engines"
    assert folder.stat().st_mode & 0o077 == 0
    assert cache.kept_in("kind", "engines") == folder


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ProfileError) as error:
        cache.kept_in("kind")
    assert "XDG_CACHE_HOME" in error.value.next_step


def test_an_older_folder_that_others_may_write_is_closed(tmp_path: Path, monkeypatch) -> None:
    """What lies there is run as it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "edgeprune/kind").mkdir(parents=True)
    (tmp_path / "edgeprune/kind").chmod(0o777)
    assert cache.kept_in("kind").stat().st_mode & 0o077 == 0


def test_a_link_of_the_users_to_a_larger_disk_is_followed_and_closed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "edgeprune").mkdir()
    (tmp_path / "disk").mkdir(mode=0o777)
    (tmp_path / "edgeprune/kind").symlink_to(tmp_path / "disk")
    cache.kept_in("kind")
    assert (tmp_path / "disk").stat().st_mode & 0o077 == 0


AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder another user's: sudo make test")


@AS_ROOT
@pytest.mark.parametrize("others", ["link", "folder"])
def test_a_link_that_is_another_users_or_leads_to_what_is_theirs_is_refused(
    tmp_path: Path, monkeypatch, others
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "edgeprune").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "edgeprune/kind").symlink_to(tmp_path / "folder")
    theirs = {"link": tmp_path / "edgeprune/kind", "folder": tmp_path / "folder"}[others]
    os.chown(theirs, 12345, 12345, follow_symlinks=False)
    with pytest.raises(ProfileError, match="another user's, or a link of theirs"):
        cache.kept_in("kind")


@AS_ROOT
def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "edgeprune/kind").mkdir(parents=True)
    os.chown(tmp_path / "edgeprune/kind", 12345, 12345)
    with pytest.raises(ProfileError, match="another user's"):
        cache.kept_in("kind")


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    assert cache.written(tmp_path / "a", b"one").read_bytes() == b"one"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/inside").write_text("")
    with pytest.raises(StorageFull, match="folder cannot be written"):
        cache.written(tmp_path / "folder", b"two")
    assert {each.name for each in tmp_path.iterdir()} == {"a", "folder"}


def test_the_files_used_last_are_kept(tmp_path: Path, monkeypatch) -> None:
    """What is written beside one goes with it; files of another kind stay."""
    monkeypatch.setattr(cache, "KEPT", 2)
    for age, name in enumerate(("old", "middle", "new")):
        for suffix in (".pt2", ".json", ".onnx"):
            (tmp_path / f"{name}{suffix}").write_text("")
            os.utime(tmp_path / f"{name}{suffix}", (age, age))
    cache.used(tmp_path / "old.pt2")
    cache.used(tmp_path / "gone.pt2")
    cache.forget_old(tmp_path, "*.pt2")
    assert {each.name for each in tmp_path.glob("*.pt2")} == {"old.pt2", "new.pt2"}
    assert {each.name for each in tmp_path.glob("*.json")} == {"old.json", "new.json"}
    assert len(list(tmp_path.glob("*.onnx"))) == 3
