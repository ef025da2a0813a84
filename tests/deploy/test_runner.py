"""The runner in a bundle needs onnxruntime and numpy alone, says what is wrong, and runs no damaged bundle."""

import ast
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from small_bundle import (
    INPUTS,
    OUTPUTS,
    WEIGHT,
    contents,
    lay_out,
    whole_files,
    write_model,
    write_small_bundle,
    write_two_port_model,
)

from edgeprune import __version__, errors
from edgeprune.canonical import canonical_json, digest
from edgeprune.pack import shipped_runner, write_bundle

Run = Callable[..., tuple[int, str, str]]
DIAGNOSTIC = {"kind", "blame", "what", "why", "next"}
"""Keys of a diagnostic of the command line."""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return lay_out(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a bundle's runner in this process: (exit code, stdout, stderr)."""

    def call(folder: Path, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run_quietly(folder, *arguments)
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def run_quietly(folder: Path, *arguments: object) -> int:
    source = importlib.util.spec_from_file_location("runner_of_a_bundle", folder / "runner.py")
    assert source is not None
    assert source.loader is not None
    runner = importlib.util.module_from_spec(source)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a cache beside it would be an extra file
    try:
        source.loader.exec_module(runner)
        status: int = runner.main([str(each) for each in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.dont_write_bytecode = before
    return status


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


# --- the file itself


def test_it_is_python_3_8() -> None:
    ast.parse(shipped_runner(), feature_version=(3, 8))


def test_it_imports_nothing_but_the_standard_library_by_name() -> None:
    """numpy and onnxruntime are asked for when they are needed, so that their absence can be explained."""
    tree = ast.parse(shipped_runner())
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) for inner in ast.walk(node)}
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in guarded
    ]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_it_runs_from_any_folder_without_an_environment(bundle: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-B",
            bundle / "runner.py",
            "--input",
            bundle / "parity/input_0.npy",
            "--output",
            "y.npy",
        ],
        env={},
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), OUTPUTS)


def test_without_numpy_or_onnxruntime_it_says_what_to_install(bundle: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", bundle / "runner.py", "--selftest"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "pip install onnxruntime numpy" in done.stderr
    assert "Traceback" not in done.stderr


# --- answers


def test_every_row_is_answered_though_the_graph_takes_one(bundle: Path, tmp_path: Path, run: Run) -> None:
    rows = np.random.default_rng(0).standard_normal((17, 3)).astype(np.float32)
    status, out, _ = run(bundle, "--input", saved(tmp_path / "x.npy", rows), "--output", tmp_path / "y.npy")
    assert status == 0
    assert "written to" in out
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), rows @ WEIGHT, rtol=1e-5)


def test_answers_are_printed_where_no_file_takes_them(bundle: Path, run: Run) -> None:
    status, out, _ = run(bundle, "--input", bundle / "parity/input_0.npy", "--json")
    said = json.loads(out)
    assert (status, said["status"], said["command"], said["version"]) == (0, "ok", "run", __version__)
    assert said["data"]["outputs"]["y"] == {"dtype": "float32", "shape": [4, 2], "values": OUTPUTS.tolist()}
    _, out, _ = run(bundle, "--input", bundle / "parity/input_0.npy")
    assert "[9.0, 12.0]" in out


def test_an_answer_that_is_not_a_number_is_null_in_json_and_noted(bundle: Path, tmp_path: Path, run: Run) -> None:
    """The input is finite, so the request was right; the model overflows."""
    rows = saved(tmp_path / "x.npy", np.stack([np.ones(3), np.full(3, 3e38)]).astype(np.float32))
    status, out, _ = run(bundle, "--input", rows, "--json")
    said = json.loads(out)
    assert (status, said["status"]) == (0, "ok")
    assert said["data"]["outputs"]["y"]["values"] == [[9.0, 12.0], [None, None]]
    (warning,) = said["diagnostics"]
    assert warning.keys() == DIAGNOSTIC
    assert "output 'y' holds NaN or infinity, first in row 1" in warning["what"]
    status, _, err = run(bundle, "--input", rows, "--output", tmp_path / "y.npy")
    assert status == 0
    assert "first in row 1" in err


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_not_a_number_is_refused(bundle: Path, tmp_path: Path, run: Run, strange: float) -> None:
    rows = INPUTS.copy()
    rows[2, 1] = strange
    status, out, err = run(bundle, "--input", saved(tmp_path / "x.npy", rows), "--output", tmp_path / "y.npy")
    assert (status, out) == (2, "")
    assert "input 'x' holds NaN or infinity, first in row 2" in err
    assert "next: " in err
    assert not (tmp_path / "y.npy").exists()


def image_bundle(folder: Path) -> Path:
    """Write a bundle whose model takes N x 3 x 4 x 4 images and answers each with its pixels doubled."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 4, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "images", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(folder / "images.onnx"))
    images = np.ones((3, 3, 4, 4), np.float32)
    made = contents(folder / "images.onnx", parity_inputs={"x": images}, parity_outputs={"y": 2 * images})
    return write_bundle(folder / "images", contents=made).path


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((4, 4, 3), "add the batch axis, channels come before rows: x[None].transpose(0, 3, 1, 2)"),
        ((1, 4, 4, 3), "channels come before rows: x.transpose(0, 3, 1, 2)"),
        ((7, 4, 4, 3), "channels come before rows: x.transpose(0, 3, 1, 2)"),
        ((3, 4, 4), "add the batch axis: x[None]"),
        ((5, 5, 3), "give it that shape"),
        ((4, 4), "give it that shape"),
    ],
)
def test_an_image_whose_channels_come_last_is_told_how_to_turn_it(
    tmp_path: Path, run: Run, shape: tuple[int, ...], hint: str
) -> None:
    folder = image_bundle(tmp_path)
    status, _, err = run(folder, "--input", saved(tmp_path / "x.npy", np.ones(shape, np.float32)))
    assert status == 2
    assert err.rstrip().endswith(f"next: {hint}")


def test_an_open_batch_and_a_batch_of_two_are_answered(tmp_path: Path, run: Run) -> None:
    rows = saved(tmp_path / "x.npy", INPUTS)
    for batch in ("n", 2):
        parity = {"parity_inputs": {"x": np.tile(INPUTS, (2, 1))}, "parity_outputs": {"y": np.tile(OUTPUTS, (2, 1))}}
        made = contents(write_model(tmp_path / "m.onnx", batch=batch), **parity)
        folder = write_bundle(tmp_path / f"batch-{batch}", contents=made).path
        assert run(folder, "--input", rows, "--output", tmp_path / "y.npy")[0] == 0
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), OUTPUTS)
        assert run(folder, "--selftest")[0] == 0
    status, _, err = run(folder, "--input", saved(tmp_path / "odd.npy", INPUTS[:3]))
    assert status == 2
    assert "a multiple of 2" in err


def test_inputs_are_named_and_several_outputs_go_into_one_npz(tmp_path: Path, run: Run) -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(3, 2), np.ones((3, 2), np.float32)
    made = contents(
        write_two_port_model(tmp_path / "ports.onnx"),
        parity_inputs={"a": a, "b": b},
        parity_outputs={"sum": a + b, "difference": a - b},
    )
    folder = write_bundle(tmp_path / "ports", contents=made).path
    given = ("--input", f"b={saved(tmp_path / 'b.npy', b)}", "--input", f"a={saved(tmp_path / 'a.npy', a)}")
    assert run(folder, *given, "--output", tmp_path / "y.npz")[0] == 0
    with np.load(tmp_path / "y.npz") as answers:
        np.testing.assert_array_equal(answers["difference"], a - b)
    assert run(folder, *given, "--output", tmp_path / "y.npy")[0] == 2
    status, _, err = run(folder, "--input", tmp_path / "a.npy")
    assert status == 2
    assert "--input a=FILE --input b=FILE" in err
    status, _, err = run(
        folder, "--input", f"a={tmp_path / 'a.npy'}", "--input", f"b={saved(tmp_path / 'c.npy', b[:2])}"
    )
    assert status == 2
    assert "different numbers of rows" in err


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (INPUTS[0], "x[None]"),
        (INPUTS[:, :2], "(N, 3)"),
        (INPUTS[:0], "(N, 3)"),
        (np.float32(1), "(N, 3)"),
        (INPUTS.astype(np.float64), "x.astype('float32')"),
        (INPUTS.astype(np.int32), "x.astype('float32')"),
    ],
)
def test_a_wrong_input_is_explained(bundle: Path, tmp_path: Path, run: Run, array: Any, hint: str) -> None:
    status, _, err = run(bundle, "--input", saved(tmp_path / "x.npy", array))
    assert status == 2
    assert hint in err


@pytest.mark.parametrize(
    "spelled",
    [INPUTS.astype(">f4"), np.asfortranarray(INPUTS), np.asfortranarray(INPUTS.astype(">f4"))],
    ids=["big-endian", "by column", "both"],
)
def test_rows_are_answered_alike_however_their_file_spells_them(
    bundle: Path, tmp_path: Path, run: Run, spelled: np.ndarray
) -> None:
    """The runtime reads bytes as this machine orders them, whatever a dtype says."""
    status, out, _ = run(bundle, "--input", saved(tmp_path / "x.npy", spelled), "--json")
    assert status == 0
    assert json.loads(out)["data"]["outputs"]["y"]["values"] == OUTPUTS.tolist()


def test_a_file_that_is_no_plain_npy_is_refused_and_never_unpickled(bundle: Path, tmp_path: Path, run: Run) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    np.save(tmp_path / "pickled.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", b"")
    (tmp_path / "text.npy").write_text("1 2 3")
    whole = io.BytesIO()
    np.save(whole, INPUTS)
    (tmp_path / "short.npy").write_bytes(whole.getvalue()[:-1])
    (tmp_path / "huge.npy").write_bytes(whole.getvalue().replace(b"(4, 3), }      ", b"(9999999999,3)}"))
    for name in ("pickled.npy", "x.npz", "text.npy", "short.npy", "huge.npy", "missing.npy"):
        status, out, err = run(bundle, "--input", tmp_path / name)
        assert (status, out) == (2, ""), name
        assert name in err
    assert not (tmp_path / "exploded").exists()


def test_nothing_is_written_into_the_bundle(bundle: Path, tmp_path: Path, run: Run) -> None:
    rows = bundle / "parity/input_0.npy"
    (tmp_path / "link").symlink_to(bundle)
    for place in (bundle / "y.npy", bundle / "parity/y.npy", tmp_path / "link/y.npy", bundle / "parity/../y.npy"):
        status, _, err = run(bundle, "--input", rows, "--output", place)
        assert status == 2
        assert "inside the bundle" in err
    assert run(bundle, "--selftest")[0] == 0


def test_an_output_that_cannot_be_written_is_explained(bundle: Path, tmp_path: Path, run: Run) -> None:
    rows = bundle / "parity/input_0.npy"
    assert run(bundle, "--input", rows, "--output", tmp_path / "missing/y.npy")[0] == 2
    assert run(bundle, "--input", rows, "--output", tmp_path / "y.txt")[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--bench", "--selftest"],
        ["--bench", "--seconds", "0"],
        ["--bench", "--seconds", "nan"],
        ["--bench", "--threads", "0"],
        ["--bench", "--threads", "two"],
        ["--selftest", "--output", "y.npy"],
    ],
)
def test_a_request_that_makes_no_sense_exits_2(bundle: Path, run: Run, arguments: list[str]) -> None:
    assert run(bundle, *arguments)[0] == 2


# --- timing


def test_a_bench_says_how_it_counted_and_that_it_is_absolute(bundle: Path, run: Run) -> None:
    status, out, _ = run(bundle, "--bench", "--seconds", "0.05", "--threads", "1", "--json")
    said = json.loads(out)
    seen = said["data"]
    assert status == 0
    assert 0 < seen["p5_ms"] <= seen["p50_ms"] <= seen["p95_ms"]
    assert 1 <= seen["clean_calls"] <= seen["calls"]
    assert seen["threads"] == 1
    (warning,) = said["diagnostics"]
    assert warning.keys() == DIAGNOSTIC
    assert "edgeprune measure" in warning["next"]
    _, out, err = run(bundle, "--bench", "--seconds", "0.05")
    assert "ms median" in out
    assert "absolute" in err


# --- the envelope


def test_it_is_of_the_version_that_ships_it(bundle: Path, run: Run) -> None:
    assert json.loads(run(bundle, "--selftest", "--json")[1])["version"] == __version__


@pytest.mark.parametrize(
    ("exit_code", "kind", "blame"),
    [(1, "ParityFailed", "result"), (2, "UserError", "user"), (4, "BundleError", "artifact")],
)
def test_a_failure_has_the_envelope_of_the_command_line(
    tmp_path: Path, run: Run, exit_code: int, kind: str, blame: str
) -> None:
    """The same keys, and words for kind and blame that are edgeprune's own."""
    folder = write_small_bundle(tmp_path, parity_outputs={"y": OUTPUTS + np.float32(exit_code == 1)})
    asked = ("--input", tmp_path / "none.npy") if exit_code == 2 else ("--selftest",)
    if exit_code == 4:
        (folder / "README.txt").unlink()
    status, out, _ = run(folder, *asked, "--json")
    said = json.loads(out)
    (diagnostic,) = said["diagnostics"]
    assert (status, said["status"], said["data"]) == (exit_code, "error", None)
    assert diagnostic.keys() == DIAGNOSTIC
    assert (diagnostic["kind"], diagnostic["blame"]) == (kind, blame)
    error = getattr(errors, kind)
    assert (error.blame, error.exit_code) == (blame, exit_code)
    assert diagnostic["what"]
    assert diagnostic["next"]


def test_a_bug_is_called_that_with_its_traceback(bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: 1 / 0)
    status, out, _ = run(bundle, "--selftest", "--json")
    monkeypatch.undo()
    (diagnostic,) = json.loads(out)["diagnostics"]
    assert status == 70
    assert (diagnostic["kind"], diagnostic["blame"]) == ("EdgepruneError", "bug")
    assert "ZeroDivisionError" in diagnostic["why"]


# --- the self-test


def test_a_whole_bundle_passes_its_self_test(bundle: Path, run: Run) -> None:
    status, out, _ = run(bundle, "--selftest", "--json")
    assert status == 0
    assert json.loads(out)["data"] == {"name": "small", "files": 7, "samples": 4, "worst_of_tolerance": 0.0}
    assert run(bundle, "--selftest")[1] == "small: 7 files whole, 4 recorded samples answered within tolerance\n"


def test_a_model_that_answers_otherwise_fails_with_exit_1(tmp_path: Path, run: Run) -> None:
    folder = write_small_bundle(tmp_path, parity_outputs={"y": OUTPUTS + np.float32(1e-3)})
    status, _, err = run(folder, "--selftest")
    assert status == 1
    assert "off by" in err
    status, out, _ = run(folder, "--selftest", "--json")
    assert (status, json.loads(out)["status"]) == (1, "error")


def test_an_answer_that_is_not_a_number_fails(tmp_path: Path, run: Run) -> None:
    wanted = OUTPUTS.copy()
    wanted[2, 1] = np.nan
    assert run(write_small_bundle(tmp_path, parity_outputs={"y": wanted}), "--selftest")[0] == 1


def test_answers_within_the_tolerance_pass(tmp_path: Path, run: Run) -> None:
    folder = write_small_bundle(tmp_path, parity_outputs={"y": OUTPUTS * np.float32(1.0009)}, tolerances=(0.0, 1e-3))
    status, out, _ = run(folder, "--selftest", "--json")
    assert status == 0
    assert json.loads(out)["data"]["worst_of_tolerance"] == pytest.approx(0.9, abs=0.02)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_anywhere_else_fails_with_exit_4(
    data: st.DataObject, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of any file but the runner itself: a runner that was changed cannot be asked."""
    name = data.draw(st.sampled_from(sorted(set(whole_files()) - {"runner.py", ""})))
    content = bytearray(whole_files()[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with TemporaryDirectory() as place:
        folder = lay_out(Path(place), **{name: bytes(content)})
        assert run_quietly(folder, "--selftest") == 4
        if name in ("model.onnx", "manifest.json"):
            assert run_quietly(folder, "--input", folder / "parity/input_0.npy") == 4
            assert run_quietly(folder, "--bench") == 4


def test_a_runner_that_was_changed_says_so_itself(bundle: Path, run: Run) -> None:
    with (bundle / "runner.py").open("a") as stream:
        stream.write("# harmless\n")
    status, _, err = run(bundle, "--selftest")
    assert status == 4
    assert "runner.py was changed" in err


def test_an_extra_file_a_missing_file_and_a_link_fail_with_exit_4(bundle: Path, tmp_path: Path, run: Run) -> None:
    (bundle / "y.npy").write_bytes(b"")
    assert "does not belong" in run(bundle, "--selftest")[2]
    (bundle / "y.npy").unlink()
    shutil.move(bundle / "README.txt", tmp_path / "README.txt")
    assert "is missing" in run(bundle, "--selftest")[2]
    (bundle / "README.txt").symlink_to(tmp_path / "README.txt")
    status, _, err = run(bundle, "--selftest")
    assert status == 4
    assert "a link" in err


def test_a_path_that_leaves_the_bundle_is_not_followed(bundle: Path, run: Run) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    for entry in manifest["files"]:
        if entry["path"] == "model.onnx":
            entry["path"] = "../tuned.onnx"
    sealed = {**manifest, "manifest_sha256": digest(manifest)}
    (bundle / "manifest.json").write_text(canonical_json(sealed) + "\n")
    assert run(bundle, "--selftest")[0] == 4
    assert run(bundle, "--bench")[0] == 4
