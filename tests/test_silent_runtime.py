"""Nothing that edgeprune runs reports on its use: ONNX Runtime does from 1.29 on, unless it is told not to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_bundle import write_model, write_small_bundle

USE = "import {0}\nimport onnxruntime, sys, time\nonnxruntime.InferenceSession(sys.argv[1])\ntime.sleep(0.5)\n"


def files_left_at_home(home: Path, *command: str | Path) -> list[Path]:
    """Return what a command writes into an empty home; it must succeed.

    Of our environment it sees only the path: ONNX Runtime is silent by itself where CI or the like is set.
    """
    home.mkdir()
    seen = {"HOME": str(home), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, *command], env=seen, check=True, capture_output=True)
    return [each for each in home.rglob("*") if each.is_file()]


def test_with_edgeprune_imported_onnxruntime_leaves_nothing_at_home(tmp_path: Path) -> None:
    """Without, it does: the day that it no longer does, the switch can go."""
    model = write_model(tmp_path / "model.onnx")
    assert files_left_at_home(tmp_path / "with", "-c", USE.format("edgeprune"), model) == []
    if not files_left_at_home(tmp_path / "without", "-c", USE.format("os"), model):
        pytest.fail("this ONNX Runtime reports nothing by itself; remove the switch in edgeprune/__init__.py")


def test_the_runner_of_a_bundle_leaves_nothing_at_home(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path)
    assert files_left_at_home(tmp_path / "home", bundle / "runner.py", "--selftest") == []
