"""A temporary folder lives as long as its owner: a killed one's is swept by the next run, nobody else's ever is."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgeprune import scratch
from edgeprune.scratch import OWNED, Scratch, sweep

OWNER = """
import sys
from edgeprune.scratch import Scratch
mine = [Scratch("board"), Scratch("ssh")]
for each in mine:
    (each.path / "some").mkdir()
    (each.path / "some" / "file").write_text("left")
    print(each.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(scratch, "_swept", set())
    return tmp_path


@contextmanager
def owner() -> Iterator[tuple["subprocess.Popen[str]", list[Path]]]:
    """Run another process that owns two folders."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, [Path(process.stdout.readline().strip()) for _ in range(2)]
    finally:
        process.kill()
        process.communicate()


def test_what_a_killed_process_left_is_swept_by_the_next_one(place: Path) -> None:
    with owner() as (process, folders):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [each.is_dir() for each in folders] == [True, True]
        with Scratch("engines") as mine:
            assert list(place.iterdir()) == [mine]
    assert list(place.iterdir()) == []


def test_what_a_living_process_holds_is_left_alone(place: Path) -> None:
    with owner() as (process, folders), Scratch("engines"):
        assert [(each / "some" / "file").read_text() for each in folders] == ["left", "left"]
        process.communicate()
        assert not any(each.exists() for each in folders)


def test_what_this_process_holds_is_left_alone(place: Path) -> None:
    with Scratch("engines") as one, Scratch("board") as two:
        sweep(place)
        assert one.is_dir()
        assert two.is_dir()


def test_folders_that_are_only_called_like_ours_are_left_alone(place: Path) -> None:
    leases = place / f"edgeprune-{os.getuid()}" / "leases"
    leases.mkdir(parents=True)
    (place / "edgeprune-my-results").mkdir()
    (place / "edgeprune-notes").write_text("a file")
    ours = place / "another-name"
    ours.mkdir()
    (ours / OWNED).touch()
    before = sorted(place.iterdir())
    sweep(place)
    assert sorted(place.iterdir()) == before


def test_a_link_is_neither_followed_nor_removed(place: Path) -> None:
    precious = place / "precious"
    precious.mkdir()
    (precious / OWNED).touch()
    (place / "edgeprune-ssh-link").symlink_to(precious)
    marked_by_link = place / "edgeprune-ssh-other"
    marked_by_link.mkdir()
    (marked_by_link / OWNED).symlink_to(precious / OWNED)
    sweep(place)
    assert (precious / OWNED).exists()
    assert (place / "edgeprune-ssh-link").is_symlink()
    assert marked_by_link.is_dir()


def test_what_lies_behind_a_link_in_a_dead_folder_stays(place: Path) -> None:
    (place / "precious").write_text("mine")
    with owner() as (process, folders):
        (folders[0] / "link").symlink_to(place / "precious")
        process.kill()
        process.wait()
        sweep(place)
        assert not folders[0].exists()
    assert (place / "precious").read_text() == "mine"


@pytest.mark.skipif(os.getuid() != 0, reason="another user's folder takes root to make: sudo make test")
def test_another_users_folder_is_left_alone(place: Path) -> None:
    theirs = place / "edgeprune-ssh-theirs"
    theirs.mkdir()
    (theirs / OWNED).touch()
    os.chown(theirs, 12345, 12345)
    sweep(place)
    assert theirs.is_dir()


def test_a_folder_is_gone_once_it_is_closed_twice(place: Path) -> None:
    folder = Scratch("typed")
    assert folder.path.name.startswith("edgeprune-typed-")
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.close()
    folder.close()
    assert not folder.path.exists()


def test_a_process_that_ends_by_itself_leaves_nothing(place: Path) -> None:
    subprocess.run([sys.executable, "-c", OWNER], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert list(place.iterdir()) == []


def test_no_module_makes_temporary_folders_of_its_own() -> None:
    root = Path(__file__).parents[1]
    modules = [*(root / "pipeline").rglob("*.py"), *(root / "targets").rglob("*.py")]
    makers = {
        each.name for each in modules if any(word in each.read_text() for word in ("TemporaryDirectory", "mkdtemp"))
    }
    assert makers == {"scratch.py"}
