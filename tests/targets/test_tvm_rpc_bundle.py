"""What a bundle holds for a board runs there without edgeprune, and nothing unknown is run of it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from board_programs import programs, qemu, server
from contract import convnet
from small_bundle import contents
from test_tvm_rpc import address, local

from edgeprune import __version__
from edgeprune.artifact import Artifact
from edgeprune.bundle import check_bundle
from edgeprune.errors import BundleError
from edgeprune.pack import write_bundle
from edgeprune.profile import Profile, load_profile
from edgeprune.target import Packager, open_target
from edgeprune.targets._tvm_rpc_bundle import answered, compiler_of
from edgeprune.targets.tvm_rpc import TvmRpc

pytest.importorskip("tvm", reason="pip install -e '.[tvm]'")

ROWS = np.random.default_rng(3).standard_normal((4, 3, 12, 12)).astype(np.float32)


def emulated() -> Profile:
    return load_profile("arm-emulated")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return convnet(tmp_path_factory.mktemp("graph") / "net.onnx", (16, 24), side=12)


@pytest.fixture(scope="module")
def wanted(graph: Artifact) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": row[None]})[0] for row in ROWS])


def bundle_of(folder: Path, target: TvmRpc, graph: Artifact, wanted: np.ndarray, **changes: Any) -> Path:
    device = target.package(target.compile(graph))
    settings = {
        "device": device,
        "parity_inputs": {"x": ROWS},
        "parity_outputs": {"y": wanted},
        "tolerances": (1e-4, 1e-4),
    }
    return write_bundle(folder / "small", contents=contents(graph.path, **(settings | changes))).path


@pytest.fixture(scope="module", params=["local", "emulated"])
def target(request: pytest.FixtureRequest) -> Iterator[TvmRpc]:
    profile = local() if request.param == "local" else emulated()
    programs(profile.arch)
    with open_target(profile) as opened:
        assert isinstance(opened, TvmRpc)
        yield opened


@pytest.fixture(scope="module")
def bundle(target: TvmRpc, graph: Artifact, wanted: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(tmp_path_factory.mktemp("bundle"), target, graph, wanted)


def test_it_packages_and_tests_itself(target: TvmRpc) -> None:
    assert isinstance(target, Packager)


def test_a_bundle_is_what_its_manifest_says_and_its_programs_can_be_started(bundle: Path) -> None:
    check_bundle(bundle)
    held = {str(each.relative_to(bundle / "device")) for each in (bundle / "device").rglob("*") if each.is_file()}
    assert held == {"engine.so", "bin/edgeprune-run", "board_run.py", "README.txt"}
    assert os.access(bundle / "device" / "bin" / "edgeprune-run", os.X_OK)


def test_the_runner_answers_the_recorded_samples_on_the_device(target: TvmRpc, bundle: Path, graph: Artifact) -> None:
    said = target.selftest(bundle, graph, trusted=False)
    assert said.ok
    assert said.detail == "4 recorded samples answered within tolerance, 11 files whole"


def test_the_runner_answers_new_inputs_as_onnxruntime_does(
    target: TvmRpc, bundle: Path, wanted: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", ROWS[::-1])
    command = [*qemu(target.profile.arch), str(bundle / "device" / "bin" / "edgeprune-run")]
    places = ["--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy")]
    done = subprocess.run([*command, *places], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted[::-1], rtol=1e-4, atol=1e-4)


def test_an_answer_that_is_not_the_recorded_one_fails_the_test(
    target: TvmRpc, graph: Artifact, wanted: np.ndarray, tmp_path: Path
) -> None:
    wrong = bundle_of(tmp_path, target, graph, wanted, parity_outputs={"y": wanted + np.float32(0.1)})
    said = target.selftest(wrong, graph, trusted=False)
    assert not said.ok
    assert "times what is tolerated" in said.detail


@pytest.mark.parametrize("name", ["engine.so", "bin/edgeprune-run", "board_run.py"])
def test_code_that_is_not_ours_is_run_only_if_it_is_trusted(
    target: TvmRpc, graph: Artifact, wanted: np.ndarray, tmp_path: Path, name: str
) -> None:
    strange = tmp_path / "strange"
    device = dict(target.package(target.compile(graph)))
    strange.write_bytes(device[name].read_bytes() + (b"\n" if name.endswith(".py") else b"\0"))
    foreign = bundle_of(tmp_path, target, graph, wanted, device=device | {name: strange})
    with pytest.raises(BundleError, match=f"device/{name} of the bundle is not what"):
        target.selftest(foreign, graph, trusted=False)
    assert target.selftest(foreign, graph, trusted=True).ok


def another_compiler(program: Path, place: Path) -> Path:
    """Write a program as another release of the same compiler would leave its name in it."""
    content = program.read_bytes()
    ours = compiler_of(program).encode()
    assert content.count(ours) == 1
    place.write_bytes(content.replace(ours, ours[:-1] + b"9" if ours[-1:] != b"9" else ours[:-1] + b"8"))
    return place


def test_a_runner_of_another_compiler_is_refused_in_words_that_say_so(
    graph: Artifact, wanted: np.ndarray, tmp_path: Path
) -> None:
    programs()
    with open_target(local()) as opened:
        assert isinstance(opened, TvmRpc)
        device = dict(opened.package(opened.compile(graph)))
        runner = "bin/edgeprune-run"
        theirs = another_compiler(device[runner], tmp_path / "theirs")
        foreign = bundle_of(tmp_path, opened, graph, wanted, device=device | {runner: theirs})
        with pytest.raises(BundleError) as caught:
            opened.selftest(foreign, graph, trusted=False)
    maker, ours = compiler_of(theirs), compiler_of(device[runner])
    assert maker != ours
    assert maker.startswith("GCC: (")
    assert f"it was built by {maker}, ours by {ours}, and another compiler gives other bytes" in caught.value.why
    assert f"the bundle is by edgeprune {__version__}" in caught.value.why
    assert "--trust-runner" in caught.value.next_step
    assert "run its deploy again here" in caught.value.next_step
    assert caught.value.exit_code == 4


def test_every_file_that_differs_is_named_with_what_differs(
    graph: Artifact, wanted: np.ndarray, tmp_path: Path
) -> None:
    programs()
    with open_target(local()) as opened:
        assert isinstance(opened, TvmRpc)
        device = dict(opened.package(opened.compile(graph)))
        (tmp_path / "more").write_bytes(b"more")
        (tmp_path / "run").write_bytes(device["bin/edgeprune-run"].read_bytes() + b"\0")
        del device["board_run.py"]
        strange = {"bin/edgeprune-run": tmp_path / "run", "bin/more": tmp_path / "more"}
        foreign = bundle_of(tmp_path, opened, graph, wanted, device=device | strange)
        with pytest.raises(BundleError) as caught:
            opened.selftest(foreign, graph, trusted=False)
    names = "device/bin/edgeprune-run, device/bin/more, device/board_run.py"
    assert caught.value.what.startswith(f"{names} of the bundle are not what this edgeprune would have put there")
    assert "so from other sources" in caught.value.why
    assert "this edgeprune puts no device/bin/more there" in caught.value.why
    assert "device/board_run.py is missing" in caught.value.why


def test_a_program_that_names_no_compiler_is_said_to_name_none(tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(b"\x7fELF" + b"GCC: (\x1b[2J) 1.2")
    assert compiler_of(tmp_path / "program") == "a compiler it does not name"


def test_the_same_model_gives_the_same_engine_every_time(target: TvmRpc, graph: Artifact, tmp_path: Path) -> None:
    first = target.compile(graph)
    copy = tmp_path / "another name.onnx"
    shutil.copy(graph.path, copy)
    assert target.compile(replace(graph, path=copy)).sha256 == first.sha256


@pytest.fixture(scope="module")
def here(graph: Artifact, wanted: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    programs()
    with open_target(local()) as opened:
        assert isinstance(opened, TvmRpc)
        return bundle_of(tmp_path_factory.mktemp("bundle"), opened, graph, wanted)


def from_python(bundle: Path, *options: object) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(bundle / "device" / "board_run.py"), *map(str, options), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    )
    return done.returncode, json.loads(done.stdout)


def test_the_engine_runs_from_python_with_numpy_and_tvm_ffi_alone(
    here: Path, wanted: np.ndarray, tmp_path: Path
) -> None:
    code, value = from_python(here, "--selftest")
    assert (code, value["data"]["samples"]) == (0, 4)
    np.save(tmp_path / "x.npy", ROWS)
    code, _ = from_python(here, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    assert code == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted, rtol=1e-4, atol=1e-4)


def test_timing_from_python_names_what_ran(here: Path) -> None:
    code, value = from_python(here, "--bench", "--seconds", 0.05)
    assert code == 0
    assert "tvm_ffi" in value["data"]
    assert "onnxruntime" not in value["data"]
    code, value = from_python(here, "--bench", "--threads", 2)
    assert code == 2
    assert "one thread" in value["diagnostics"][0]["what"]


def test_a_damaged_engine_is_not_loaded_from_python(here: Path, tmp_path: Path) -> None:
    shutil.copytree(here, tmp_path / "copy")
    path = tmp_path / "copy" / "device" / "engine.so"
    path.write_bytes(path.read_bytes()[:-1])
    assert from_python(tmp_path / "copy", "--selftest")[0] == 4


def test_through_a_port_the_engine_answers_by_itself(here: Path, graph: Artifact, tmp_path: Path) -> None:
    with server(tmp_path / "uploads") as (port, _), open_target(local(address(port))) as opened:
        assert isinstance(opened, TvmRpc)
        said = opened.selftest(here, graph, trusted=False)
        assert said.ok
        assert "its runner was not started" in said.detail


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e3])
def test_an_engine_that_answers_nothing_does_not_pass(
    here: Path, graph: Artifact, wanted: np.ndarray, wrong: float
) -> None:
    assert answered(here, graph, lambda *_: {"y": np.full_like(wanted[:1], wrong)}).ok is False
