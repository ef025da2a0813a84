"""The wheel: what is in it, and that it works where nothing else is installed."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from contract import convnet

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Return a finished process that saw nothing of this test's Python path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environment
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=clean, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "build", "--wheel", "--outdir", out, ROOT, cwd=out)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the executables of an environment that holds the wheel and what it asks for."""
    place = tmp_path_factory.mktemp("empty")
    venv.create(place, with_pip=True)
    pip = (place / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    done = run(*pip, "-c", ROOT / "constraints.txt", wheel, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "bin"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Modules, the report's template, the profiles, the typing marker, the licence; no tests, no data."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"edgeprune/py.typed", "edgeprune/report.html.j2", "edgeprune/device/runner.py"} <= set(names)
    assert {"edgeprune/profiles/host.toml", "edgeprune/targets/onnxruntime_cpu.py"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"edgeprune"}
    assert wheel.stat().st_size < 2**20
    checked = run(Path(sys.executable).with_name("check-wheel-contents"), wheel, cwd=ROOT)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.timeout(1200)
def test_the_wheel_works_in_an_empty_environment(installed: Path, tmp_path: Path) -> None:
    """Help, profiles and a real measurement, from a folder that is not the repository."""
    shown = run(installed / "edgeprune", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert all(command in shown.stdout for command in ("deploy", "measure", "verify", "report", "doctor", "targets"))
    listed = run(installed / "edgeprune", "targets", "--json", cwd=tmp_path)
    assert {"host", "formula"} <= {each["name"] for each in json.loads(listed.stdout)["data"]["targets"]}
    for name, widths in (("wide", (16, 16)), ("thin", (8, 8))):
        convnet(tmp_path / f"{name}.onnx", widths)
    timed = run(installed / "edgeprune", "measure", "wide.onnx", "thin.onnx", "--json", cwd=tmp_path)
    assert timed.returncode == 0, timed.stderr
    assert json.loads(timed.stdout)["status"] == "ok"
