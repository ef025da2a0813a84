"""docs/new-target.md as a reader would follow it: its files, written as they stand, pass the contract."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from contract import TargetContract, convnet

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/new-target.md"


def files(page: str) -> dict[str, str]:
    """Return name → content of the code blocks that are files."""
    return dict(re.findall(r"^```[a-z]+ ([\w.]+)\n(.*?)^```", page, re.S | re.M))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that is a package outside of edgeprune: module, profile, test, and the entry point."""
    folder = tmp_path_factory.mktemp("package")
    told = folder / "edgeprune_reference-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: edgeprune-reference\nVersion: 1.0\n")
    for name, content in files(PAGE.read_text()).items():
        place = told if name == "entry_points.txt" else folder
        (place / name).write_text(content.replace('"', "") if place == told else content)
    return folder


def run(package: Path, *command: str) -> subprocess.CompletedProcess[str]:
    paths = [str(package), str(ROOT / "tests/targets")]
    return subprocess.run(
        [sys.executable, *command],
        cwd=package,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_the_page_holds_an_adapter_a_profile_a_test_and_an_entry_point() -> None:
    named = files(PAGE.read_text())
    assert set(named) == {"reference.py", "reference.toml", "test_reference.py", "entry_points.txt"}
    lines = [each for each in named["test_reference.py"].splitlines() if each]
    written = [each for each in lines if not each.startswith(("from", "class"))]
    assert len(written) == 1


def test_the_files_of_the_page_pass_the_contract(package: Path) -> None:
    """Found by the entry point, as any outside package is; not one test is skipped."""
    done = run(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_reference.py")
    assert done.returncode == 0, done.stdout[-5000:]
    tests = [name for name in vars(TargetContract) if name.startswith("test_")]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > len(tests)
    assert "skipped" not in done.stdout


def test_the_commands_of_the_page_run(package: Path) -> None:
    for name, widths in (("a", (8, 8)), ("b", (16, 16))):
        convnet(package / f"{name}.onnx", widths, 8)
    lines = re.findall(r"^edgeprune (.+)$", PAGE.read_text(), re.M)
    assert len(lines) == 2
    for line in lines:
        done = run(package, "-m", "edgeprune", *line.split())
        assert done.returncode == 0, done.stderr


def test_the_code_of_the_page_is_clean(package: Path) -> None:
    done = run(package, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--no-cache", "reference.py")
    assert done.returncode == 0, done.stdout + done.stderr
