"""The C++ runner of a bundle needs no Python and no TVM, answers as runner.py does, and runs no damaged bundle."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_programs import HERE, KERNELS, Spelled, kernels, programs, qemu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_bundle import INPUTS, OUTPUTS, WEIGHT, contents, write_model, write_two_port_model

from edgeprune import __version__
from edgeprune.pack import write_bundle
from edgeprune.targets._tvm.engine import write_engine

LINEAR = """
/* out[n] = sum over k of in[k] * weight[k][n] */
KERNEL(linear) {
  const float *in = given[0].tensor->data, *weight = given[1].tensor->data;
  float *out = given[2].tensor->data;
  int64_t depth = given[1].tensor->shape[0], width = given[1].tensor->shape[1];
  for (int64_t n = 0; n < width; ++n) {
    out[n] = 0;
    for (int64_t k = 0; k < depth; ++k) out[n] += in[k] * weight[k * width + n];
  }
  return 0;
}
KERNEL(mix) {
  const float *a = given[0].tensor->data, *b = given[1].tensor->data;
  float *out = given[2].tensor->data;
  for (int k = 0; k < 2; ++k) out[k] = a[k] + b[k];
  return 0;
}
KERNEL(part) {
  const float *a = given[0].tensor->data, *b = given[1].tensor->data;
  float *out = given[2].tensor->data;
  for (int k = 0; k < 2; ++k) out[k] = a[k] - b[k];
  return 0;
}
"""

SCRIPT = """edgeprune-program 1
memory 0 constants 64
memory 1 input 12
memory 2 output 8
buffer 0 1 float32 0 2 1 3
buffer 1 0 float32 0 2 3 2
buffer 2 2 float32 0 2 1 2
input 0 x
output 2 y
step linear matmul 3 0 1 2
end
"""

TWO_PORTS = """edgeprune-program 1
memory 0 constants 0
memory 1 input 8
memory 2 input 8
memory 3 output 8
memory 4 output 8
buffer 0 1 float32 0 2 1 2
buffer 1 2 float32 0 2 1 2
buffer 2 3 float32 0 2 1 2
buffer 3 4 float32 0 2 1 2
input 0 a
input 1 b
output 2 sum
output 3 difference
step mix sum 3 0 1 2
step part difference 3 0 1 3
end
"""


def write_device(folder: Path, arch: str, *, text: str = SCRIPT, constants: bytes | None = None) -> dict[str, Path]:
    """Write an engine and return what a bundle holds for its device."""
    folder.mkdir(exist_ok=True)
    weight = WEIGHT.tobytes() + bytes(64 - WEIGHT.nbytes) if constants is None else constants
    objects = {"all": kernels(arch, KERNELS + LINEAR)}
    write_engine(folder / "engine.so", script=Spelled(text), constants=weight, kernels=objects, arch=arch)
    return {"engine.so": folder / "engine.so", "bin/edgeprune-run": programs(arch) / "bin" / "edgeprune-run"}


def make_bundle(folder: Path, arch: str, **changes: Any) -> Path:
    """Write a bundle for a device and return its folder."""
    model = write_model(folder / "tuned.onnx")
    device = changes.pop("device", None) or write_device(folder / "device", arch)
    return write_bundle(folder / "small", contents=contents(model, device=device, **changes)).path


@pytest.fixture(scope="module", params=[HERE, "aarch64"])
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(arch: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"), arch)


@pytest.fixture
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle for this machine that a test may damage."""
    return make_bundle(tmp_path_factory.mktemp("bundle"), HERE)


def start(bundle: Path, *options: object, arch: str = HERE, count: bool = True) -> tuple[int, str, str]:
    command = [*qemu(arch, count=count), str(bundle / "device" / "bin" / "edgeprune-run"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    return done.returncode, done.stdout, done.stderr


def envelope(bundle: Path, *options: object, **how: Any) -> tuple[int, dict[str, Any]]:
    code, out, _ = start(bundle, *options, "--json", **how)
    value = json.loads(out)
    assert set(value) == {"version", "command", "status", "data", "diagnostics"}
    assert value["version"] == __version__
    return code, value


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def test_a_whole_bundle_passes_its_own_test(whole: Path, arch: str) -> None:
    code, out, _ = start(whole, "--selftest", arch=arch)
    assert code == 0
    assert "small: 9 files whole, 4 recorded samples answered within tolerance" in out
    code, value = envelope(whole, "--selftest", arch=arch)
    assert (code, value["status"]) == (0, "ok")
    assert value["data"] == {"name": "small", "files": 9, "samples": 4, "worst_of_tolerance": 0}


def test_every_row_is_answered_in_order(whole: Path, arch: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((11, 3)).astype(np.float32)
    given_, taken = saved(tmp_path / "x.npy", rows), tmp_path / "y.npy"
    code, value = envelope(whole, "--input", given_, "--output", taken, arch=arch)
    assert code == 0
    assert value["data"]["outputs"] == {"y": {"dtype": "float32", "shape": [11, 2]}}
    np.testing.assert_allclose(np.load(taken, allow_pickle=False), rows @ WEIGHT, rtol=1e-5)


def test_answers_are_shown_where_no_file_takes_them(here: Path, tmp_path: Path) -> None:
    given_ = saved(tmp_path / "x.npy", np.tile(INPUTS, (3, 1)))
    code, out, _ = start(here, "--input", f"x={given_}")
    assert code == 0
    assert out.startswith("y: float32 (12, 2)\n[1, 2]\n[3, 4]\n[5, 6]\n[9, 12]\n")
    assert out.endswith("... 4 more rows; --output FILE takes them all\n")
    _, value = envelope(here, "--input", given_)
    assert value["data"]["outputs"]["y"]["values"][:4] == OUTPUTS.tolist()


def test_timing_says_what_was_counted(here: Path) -> None:
    code, value = envelope(here, "--bench", "--seconds", 0.05)
    assert code == 0
    assert 0 < value["data"]["p5_ms"] <= value["data"]["p50_ms"] <= value["data"]["p95_ms"]
    assert value["data"]["threads"] == 1
    assert [each["kind"] for each in value["diagnostics"]] == ["Warning"]


def test_an_emulated_device_gives_instructions_and_no_time(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, "aarch64")
    code, value = envelope(bundle, "--bench", arch="aarch64")
    assert code == 0
    assert set(value["data"]) == {"metric", "emulated", "instructions"}
    assert value["data"]["metric"] == "emulated_instructions"
    assert len(set(value["data"]["instructions"])) == 1
    code, _, err = start(bundle, "--bench", arch="aarch64", count=False)
    assert code == 2
    assert "the clock of an emulator says nothing" in err


def test_it_needs_nothing_but_the_c_library(arch: str) -> None:
    program = programs(arch) / "bin" / "edgeprune-run"
    tool = "readelf" if arch == HERE else f"{arch}-linux-gnu-readelf"
    listed = subprocess.run([tool, "-d", str(program)], capture_output=True, text=True, check=True).stdout
    needed = {line.rpartition("[")[2].rstrip("]") for line in listed.splitlines() if "NEEDED" in line}
    assert {each.split(".so")[0] for each in needed if not each.startswith("ld-linux")} <= {"libc", "libm", "libdl"}


def test_the_bundle_may_lie_anywhere(here: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a place with spaces & signs"
    shutil.move(str(here), moved)
    assert start(moved, "--selftest")[0] == 0


def test_a_model_with_several_ports_wants_each_by_name(tmp_path: Path) -> None:
    model = write_two_port_model(tmp_path / "two.onnx")
    a, b = np.array([[1, 2]], np.float32), np.array([[10, 30]], np.float32)
    bundle = write_bundle(
        tmp_path / "two",
        contents=contents(
            model,
            name="two",
            device=write_device(tmp_path / "device", HERE, text=TWO_PORTS, constants=b""),
            parity_inputs={"a": [a] * 3, "b": [b] * 3},
            parity_outputs={"sum": [a + b] * 3, "difference": [a - b] * 3},
        ),
    ).path
    assert start(bundle, "--selftest")[0] == 0
    first, second = saved(tmp_path / "a.npy", a), saved(tmp_path / "b.npy", b)
    code, value = envelope(bundle, "--input", f"a={first}", "--input", f"b={second}")
    assert code == 0
    assert value["data"]["outputs"]["difference"]["values"] == (a - b).tolist()
    for wrong in ([first], [first, second], [f"a={first}", f"a={second}"], [f"a={first}"]):
        code, _, err = start(bundle, *(word for each in wrong for word in ("--input", each)))
        assert code == 2
        assert "--input a=FILE --input b=FILE" in err


BAD_INPUTS: dict[str, tuple[Callable[[], np.ndarray], str]] = {
    "a wrong shape": (lambda: np.zeros((2, 4), np.float32), "(2, 4), rows of (1, 3) are wanted"),
    "a wrong type": (lambda: np.zeros((2, 3)), "float64, float32 is wanted"),
    "too few axes": (lambda: np.zeros(3, np.float32), "(3,), rows of (1, 3) are wanted"),
    "no rows": (lambda: np.zeros((0, 3), np.float32), "(0, 3), rows of"),
    "NaN": (lambda: np.full((2, 3), np.nan, np.float32), "holds NaN or infinity, first in row 0"),
    "infinity": (lambda: np.array([[0, 0, 0], [0, np.inf, 0]], np.float32), "first in row 1"),
    "columns first": (lambda: np.asfortranarray(np.ones((2, 3), np.float32)), "column by column"),
    "another byte order": (lambda: np.ones((2, 3), ">f4"), "byte order"),
    "words": (lambda: np.array([["a", "b", "c"]]), "type or byte order"),
}


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_an_input_that_does_not_fit_is_refused(here: Path, tmp_path: Path, what: str) -> None:
    make, said = BAD_INPUTS[what]
    code, value = envelope(here, "--input", saved(tmp_path / "x.npy", make()))
    assert code == 2
    assert said in f"{value['diagnostics'][0]['what']} {value['diagnostics'][0]['why']}"
    assert value["diagnostics"][0]["blame"] == "user"


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{", b"PK\x03\x04" + bytes(100)], ids=repr
)
def test_a_file_that_is_no_array_is_refused(here: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    assert start(here, "--input", tmp_path / "x.npy")[0] == 2


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 151), value=st.integers(0, 255), cut=st.integers(0, 152))
def test_no_damage_to_an_array_crashes_it(here: Path, tmp_path: Path, place: int, value: int, cut: int) -> None:
    content = bytearray(saved(tmp_path / "x.npy", np.ones((2, 3), np.float32)).read_bytes())
    content[place] = value
    (tmp_path / "x.npy").write_bytes(content[:cut] if cut % 3 == 0 else content)
    assert start(here, "--input", tmp_path / "x.npy")[0] in (0, 2)


def test_a_missing_input_file_is_named(here: Path) -> None:
    code, _, err = start(here, "--input", "/nowhere/x.npy")
    assert code == 2
    assert "/nowhere/x.npy: No such file" in err


def test_answers_are_never_written_into_the_bundle(here: Path, tmp_path: Path) -> None:
    given_ = saved(tmp_path / "x.npy", INPUTS)
    (tmp_path / "link").symlink_to(here)
    for place in (
        here / "y.npy",
        here / "parity" / "y.npy",
        here / ".." / here.name / "y.npy",
        tmp_path / "link" / "y.npy",
    ):
        code, _, err = start(here, "--input", given_, "--output", place)
        assert code == 2
        assert "lies inside the bundle" in err
    assert start(here, "--selftest")[0] == 0


def test_an_output_that_cannot_be_written_is_the_users_turn(here: Path, tmp_path: Path) -> None:
    given_ = saved(tmp_path / "x.npy", INPUTS)
    for place in (tmp_path / "y.txt", tmp_path / "nowhere" / "y.npy", "/dev/full.npy/y.npy"):
        assert start(here, "--input", given_, "--output", place)[0] == 2


FILES = ["README.txt", "measurement.json", "model.onnx", "runner.py", "parity/input_0.npy", "parity/output_0.npy"]


@pytest.mark.parametrize("name", [*FILES, "device/engine.so", "manifest.json"])
def test_a_changed_file_is_refused_as_damage(here: Path, name: str) -> None:
    content = bytearray((here / name).read_bytes())
    content[len(content) // 2] ^= 1
    (here / name).write_bytes(content)
    code, value = envelope(here, "--selftest")
    assert code == 4
    assert name in value["diagnostics"][0]["what"]
    assert value["diagnostics"][0]["kind"] == "BundleError"


@pytest.mark.parametrize("name", [*FILES, "device/engine.so", "manifest.json"])
def test_a_missing_file_is_refused_as_damage(here: Path, name: str) -> None:
    (here / name).unlink()
    code, value = envelope(here, "--selftest")
    assert code == 4
    assert name in value["diagnostics"][0]["what"]


def test_a_file_too_many_is_refused_as_damage(here: Path) -> None:
    (here / "device" / "more").write_text("x")
    code, _, err = start(here, "--selftest")
    assert code == 4
    assert "'device/more' does not belong to the bundle" in err


def test_a_link_in_a_bundle_is_refused(here: Path) -> None:
    (here / "more").symlink_to("/etc/passwd")
    assert start(here, "--selftest")[0] == 4


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_the_manifest_passes_unseen(here: Path, data: st.DataObject) -> None:
    path = here / "manifest.json"
    whole = path.read_bytes()
    content = bytearray(whole)
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    code = start(here, "--selftest")[0]
    path.write_bytes(whole)
    assert code == (0 if bytes(content) == whole else 4)


def test_answers_off_by_more_than_is_tolerated_are_a_result(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, HERE, parity_outputs={"y": OUTPUTS + np.float32(0.01)})
    code, value = envelope(bundle, "--selftest")
    assert code == 1
    assert value["diagnostics"][0]["kind"] == "ParityFailed"
    assert "times what is tolerated" in value["diagnostics"][0]["what"]


def test_answers_that_are_no_numbers_are_shown_and_said(tmp_path: Path) -> None:
    huge = np.full((1, 3), 3e38, np.float32)
    bundle = make_bundle(tmp_path, HERE)
    code, value = envelope(bundle, "--input", saved(tmp_path / "x.npy", huge))
    assert code == 0
    assert value["data"]["outputs"]["y"]["values"] == [[None, None]]
    assert "holds NaN or infinity" in value["diagnostics"][0]["what"]


def test_an_engine_of_another_machine_says_so(tmp_path: Path) -> None:
    foreign = write_device(tmp_path / "device", "aarch64") | {"bin/edgeprune-run": programs() / "bin" / "edgeprune-run"}
    code, _, err = start(make_bundle(tmp_path, HERE, device=foreign), "--selftest")
    assert code == 2
    assert f"device/engine.so is for aarch64, this machine is {HERE}" in err


def test_an_engine_of_another_model_is_refused(tmp_path: Path) -> None:
    other = write_device(tmp_path / "device", HERE, text=TWO_PORTS, constants=b"")
    code, _, err = start(make_bundle(tmp_path, HERE, device=other), "--selftest")
    assert code == 4
    assert "another model" in err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--bench", "--selftest"],
        ["--output", "y.npy", "--bench"],
        ["--input"],
        ["--seconds", "-1", "--bench"],
        ["--seconds", "x", "--bench"],
        ["--threads", "2", "--bench"],
        ["--speed", "1"],
        ["--cpu", "9999", "--bench"],
    ],
    ids=str,
)
def test_a_senseless_command_is_the_users_turn(here: Path, words: list[str]) -> None:
    assert start(here, *words)[0] == 2


def test_it_runs_from_a_folder_without_write_permission(here: Path) -> None:
    for folder in [here, *(each for each in here.rglob("*") if each.is_dir())]:
        folder.chmod(0o555)
    try:
        assert start(here, "--selftest")[0] == 0
    finally:
        for folder in [*(each for each in here.rglob("*") if each.is_dir()), here]:
            folder.chmod(0o755)
