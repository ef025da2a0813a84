"""What runs a bundle on a Jetson: on the replay of one, with no package at all."""

import ast
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback_sshd import INSTALL, sshd_path
from replay_board import ReplayBoard
from small_bundle import INPUTS, OUTPUTS, contents, write_model, write_small_bundle, write_two_port_model

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.errors import BundleError, DeviceLost
from edgeprune.pack import write_bundle
from edgeprune.target import Packager, open_target
from edgeprune.targets import _jetson_bundle

pytestmark = pytest.mark.skipif(sshd_path() is None, reason=f"no OpenSSH server here; {INSTALL}")

SOURCE = _jetson_bundle.shipped("edge_run.py").decode()
Run = Callable[..., tuple[int, Any, str]]


def model_in(folder: Path) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    path = write_model(folder / "small.onnx")
    return Artifact.of(path, kind="onnx", inputs=[TensorSpec(name="x", shape=(1, 3))])


def bundle_for(board: ReplayBoard, folder: Path, **changes: object) -> Path:
    """Return a bundle with what the target packs into it."""
    with open_target(board.profile()) as target:
        assert isinstance(target, Packager)
        device = target.package(target.compile(model_in(folder)))
        return write_small_bundle(folder, device=device, **changes)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplayBoard]:
    with ReplayBoard(tmp_path_factory.mktemp("board")) as running:
        yield running


@pytest.fixture(autouse=True)
def well(board: ReplayBoard) -> Iterator[None]:
    """Leave the board as it was, its engines apart."""
    yield
    board.set(version="10.3", fault=None)
    board.write("power_mode", "NV Power Mode: 15W\n0\n")


@pytest.fixture(scope="module")
def bundle(board: ReplayBoard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_for(board, tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def run(board: ReplayBoard, tmp_path: Path) -> Run:
    """Return what runs a bundle on the board itself: (exit code, its report, its errors)."""

    def call(folder: Path, *arguments: object) -> tuple[int, Any, str]:
        words = [sys.executable, "-I", "-S", "-B", str(folder / "device/edge_run.py"), "--json"]
        words += [f"--sysroot={board.root}", f"--cache={tmp_path}/cache", *map(str, arguments)]
        done = subprocess.run(words, env=board._environment(), capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr

    return call


# -- through ssh ----------------------------------------------------------------------------------------------------


def test_a_bundle_checks_itself_on_the_board(board: ReplayBoard, bundle: Path, tmp_path: Path) -> None:
    with open_target(board.profile()) as target:
        said = target.selftest(bundle, model_in(tmp_path), trusted=True)
    assert said.ok
    assert "4 samples" in said.detail
    assert "engine of the bundle for trt10.3.0_sm87_l4t36.4.0" in said.detail


def test_an_engine_that_came_with_a_bundle_is_loaded_only_if_it_is_trusted(
    board: ReplayBoard, bundle: Path, tmp_path: Path
) -> None:
    with open_target(board.profile()) as target:
        assert "engine built now" in target.selftest(bundle, model_in(tmp_path), trusted=False).detail


def test_a_runner_that_is_not_ours_runs_only_if_it_is_trusted(board: ReplayBoard, tmp_path: Path) -> None:
    strange = tmp_path / "edge_run.py"
    strange.write_text('print(\'{"status": "ok", "data": {}}\')')
    with open_target(board.profile()) as target:
        device = {**target.package(target.compile(model_in(tmp_path))), "edge_run.py": strange}
        folder = write_small_bundle(tmp_path, device=device)
        with pytest.raises(BundleError, match="not the one that this edgeprune") as caught:
            target.selftest(folder, model_in(tmp_path), trusted=False)
        assert "--trust-runner" in caught.value.next_step
        with pytest.raises(DeviceLost, match="gave no report"):
            target.selftest(folder, model_in(tmp_path), trusted=True)


def test_wrong_answers_on_the_board_are_no_ok(board: ReplayBoard, tmp_path: Path) -> None:
    folder = bundle_for(board, tmp_path, parity_outputs={"y": OUTPUTS + np.float32(0.5)})
    with open_target(board.profile()) as target:
        said = target.selftest(folder, model_in(tmp_path / "m"), trusted=True)
    assert not said.ok
    assert "times what is tolerated" in said.detail


# -- on the board ---------------------------------------------------------------------------------------------------


def test_the_bundles_own_engine_serves_the_board_it_was_made_on(run: Run, bundle: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    status, report, _ = run(bundle, "--selftest")
    assert status == 0
    assert report["data"]["made"] == "of the bundle"
    assert report["data"]["samples"] == 4
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("change", ["mode", "version"])
def test_another_state_of_the_board_takes_another_engine_which_is_kept(
    board: ReplayBoard, run: Run, bundle: Path, change: str
) -> None:
    if change == "mode":
        board.write("power_mode", "NV Power Mode: MAXN_SUPER\n2\n")
    else:
        board.set(version="11.1")
    made = [run(bundle, "--selftest")[1]["data"]["made"] for _ in range(2)]
    assert made == ["built now", "kept from before"]
    assert run(bundle, "--selftest", "--rebuild")[1]["data"]["made"] == "built now"


@pytest.mark.parametrize("version", ["8.2", "8.6", "10.13"])
def test_every_version_builds_and_answers(board: ReplayBoard, run: Run, bundle: Path, version: str) -> None:
    board.set(version=version)
    status, report, errors = run(bundle, "--selftest")
    assert (status, errors) == (0, "")
    assert report["data"]["worst_of_tolerance"] <= 1


def test_an_engine_that_answers_wrong_is_not_kept(board: ReplayBoard, run: Run, tmp_path: Path) -> None:
    folder = bundle_for(board, tmp_path / "b", parity_outputs={"y": OUTPUTS + np.float32(0.5)})
    status, report, _ = run(folder, "--engine", "--rebuild")
    assert status == 1
    assert report["diagnostics"][0]["blame"] == "result"
    assert not list((tmp_path / "cache").rglob("*"))


def test_a_kept_engine_that_rotted_is_built_again(board: ReplayBoard, run: Run, bundle: Path, tmp_path: Path) -> None:
    board.write("power_mode", "NV Power Mode: 7W\n1\n")
    run(bundle, "--engine")
    (engine,) = tmp_path.glob("cache/**/model.engine")
    engine.write_bytes(engine.read_bytes() + b"x")
    assert run(bundle, "--engine")[1]["data"]["made"] == "built now"


def test_rows_are_answered_one_call_a_row(run: Run, bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", INPUTS)
    status, report, _ = run(bundle, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    assert status == 0
    assert report["data"]["outputs"] == {"y": ["float32", [4, 2]]}
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), OUTPUTS)


def test_several_inputs_and_outputs_go_by_their_names(board: ReplayBoard, run: Run, tmp_path: Path) -> None:
    path = write_two_port_model(tmp_path / "ports.onnx")
    shapes = [TensorSpec(name=name, shape=(1, 2)) for name in ("a", "b")]
    a, b = np.array([[1, 2], [3, 4]], np.float32), np.array([[5, 7], [9, 11]], np.float32)
    with open_target(board.profile()) as target:
        device = target.package(target.compile(Artifact.of(path, kind="onnx", inputs=shapes)))
        made = contents(
            path,
            device=device,
            parity_inputs={"a": np.tile(a, (2, 1)), "b": np.tile(b, (2, 1))},
            parity_outputs={"sum": np.tile(a + b, (2, 1)), "difference": np.tile(a - b, (2, 1))},
        )
        folder = write_bundle(tmp_path / "bundle", contents=made).path
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    given = [f"--input=a={tmp_path}/a.npy", f"--input=b={tmp_path}/b.npy", f"--output={tmp_path}/y.npy"]
    assert run(folder, *given)[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.sum.npy"), a + b)
    np.testing.assert_allclose(np.load(tmp_path / "y.difference.npy"), a - b)
    status, report, _ = run(folder, given[0])
    assert status == 2
    assert "each input once" in report["diagnostics"][0]["what"]


def test_a_bench_says_milliseconds_and_that_they_are_absolute(board: ReplayBoard, bundle: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(bundle / "device/edge_run.py"), "--bench", "--seconds=1", f"--sysroot={board.root}"]
    done = subprocess.run(words, env=board._environment(), capture_output=True, text=True, check=True)
    assert "ms median" in done.stdout
    assert "absolute milliseconds" in done.stdout


@pytest.mark.parametrize("name", ["device/model.engine", "device/model.typed.onnx", "model.onnx", "manifest.json"])
def test_a_damaged_bundle_is_refused(run: Run, board: ReplayBoard, bundle: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(bundle), str(copy)], check=True)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    status, report, _ = run(copy, "--selftest")
    assert status == 4
    assert report["diagnostics"][0]["kind"] == "BundleError"


@pytest.mark.parametrize("fault", ["crash", "memory", "device"])
def test_a_board_that_fails_is_the_labs_turn(board: ReplayBoard, run: Run, bundle: Path, fault: str) -> None:
    board.set(fault=fault)
    status, report, _ = run(bundle, "--selftest", "--rebuild")
    assert status == 3
    assert report["diagnostics"][0]["blame"] == "lab"


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((1, 4), np.float32), "float32 [1, 4]"),
        (np.zeros((1, 3), np.float64), "not a plain .npy file"),
        (np.zeros((0, 3), np.float32), "[0, 3]"),
        (np.array([object()]), "not a plain .npy file"),
        (np.asfortranarray(np.zeros((2, 3), np.float32)), "column by column"),
    ],
)
def test_an_input_that_does_not_fit_is_the_users_turn(
    run: Run, bundle: Path, tmp_path: Path, array: np.ndarray, words: str
) -> None:
    np.save(tmp_path / "x.npy", array)
    status, report, _ = run(bundle, "--input", tmp_path / "x.npy")
    assert status == 2
    assert words in report["diagnostics"][0]["what"]


def test_nothing_is_written_into_the_bundle_on_request_either(run: Run, bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", INPUTS)
    assert run(bundle, "--input", tmp_path / "x.npy", "--output", bundle / "y.npy")[0] == 2


# -- alone ----------------------------------------------------------------------------------------------------------


def test_it_is_python_3_8_and_imports_the_standard_library_alone() -> None:
    tree = ast.parse(SOURCE, feature_version=(3, 8))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [each.name for each in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
        )
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported <= set(sys.stdlib_module_names)


def loaded() -> Any:
    spec = importlib.util.spec_from_loader("edge_run", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    exec(compile(SOURCE, "edge_run.py", "exec"), module.__dict__)
    return module


EDGE_RUN = loaded()


@given(st.binary(max_size=300) | st.binary(max_size=200).map(lambda tail: b"\x93NUMPY\x01\x00\x40\x00" + tail))
def test_any_bytes_are_numbers_or_refused(content: bytes) -> None:
    try:
        values = EDGE_RUN.values_from_npy(content, "x", EDGE_RUN.DAMAGED)
    except EDGE_RUN.RunnerError:
        return
    assert len(values.numbers) == math.prod(values.shape)


@given(st.lists(st.integers(1, 4), max_size=4), st.sampled_from(["<f4", "<i4", "<i8", "|u1", "|i1"]))
def test_numbers_survive_a_file_and_numpy_reads_it(shape: list[int], kind: str) -> None:
    wanted = np.arange(np.prod(shape, dtype=int)).astype(kind).reshape(shape)
    stream = io.BytesIO()
    np.save(stream, wanted)
    values = EDGE_RUN.values_from_npy(stream.getvalue(), "x", EDGE_RUN.DAMAGED)
    np.testing.assert_array_equal(np.load(io.BytesIO(values.npy())), wanted)


def test_the_runner_and_the_target_agree_on_the_key(board: ReplayBoard, run: Run, bundle: Path) -> None:
    with open_target(board.profile()) as target:
        mine = target._open.board.engine_key("10.3.0")
    assert (
        run(bundle, "--engine")[1]["data"]["key"]
        == mine
        == json.loads((bundle / "device/engine.json").read_text())["key"]
    )


@pytest.mark.parametrize("version", ["3.8", "3.10"])
def test_older_pythons_run_it(board: ReplayBoard, bundle: Path, tmp_path: Path, version: str) -> None:
    """Where there is one; the syntax is checked above in any case."""
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
    found = next(installed, None)
    words = [str(found or sys.executable), "-I", "-S", str(bundle / "device/edge_run.py"), "--selftest"]
    words += [f"--sysroot={board.root}", f"--cache={tmp_path}"]
    done = subprocess.run(words, env=board._environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
