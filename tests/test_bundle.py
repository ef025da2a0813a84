"""A bundle is whole or refused; writing one is all or nothing."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bundle import (
    INPUTS,
    OUTPUTS,
    PROFILE,
    contents,
    lay_out,
    measurement,
    outcome,
    whole_files,
    write_model,
    write_small_bundle,
    write_two_port_model,
)

from edgeprune.budget import Budget, Latency
from edgeprune.bundle import check_bundle, open_bundle
from edgeprune.canonical import canonical_json, digest
from edgeprune.errors import BundleError, ConfigError, StorageFull
from edgeprune.manifest import read_manifest
from edgeprune.pack import pack, write_bundle
from edgeprune.profile import Profile

EARLIER, LATER = "earlier", "later"


@contextmanager
def laid_out(**changed: bytes) -> Iterator[Path]:
    with TemporaryDirectory() as name:
        lay_out(Path(name), **changed)
        yield Path(name)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_model(tmp_path / "tuned.onnx")
    return lay_out(tmp_path)


def refused(place: Path) -> None:
    with pytest.raises(BundleError), open_bundle(place):
        pass


def resealed(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest as a forger would: with its own digest made to hold."""
    value = json.loads((bundle / "manifest.json").read_text())
    change(value)
    value["manifest_sha256"] = digest({key: each for key, each in value.items() if key != "manifest_sha256"})
    (bundle / "manifest.json").write_text(canonical_json(value) + "\n")


# --- what a bundle holds


def test_a_bundle_holds_what_it_was_made_of(bundle: Path) -> None:
    whole = check_bundle(bundle)
    claim = whole.manifest
    assert sorted(each.path for each in claim.files) == [
        "README.txt",
        "measurement.json",
        "model.onnx",
        "parity/input_0.npy",
        "parity/output_0.npy",
        "runner.py",
    ]
    assert claim.measurement.ratio.p50 == pytest.approx(0.4)
    assert claim.measurement.ratio.low < 0.4 < claim.measurement.ratio.high
    assert (claim.measurement.calls, claim.measurement.sessions) == (90, 3)
    assert (claim.baseline.accuracy, claim.result.accuracy) == (0.91, 0.9)
    assert claim.budget.met
    assert whole.measurement() == measurement()
    assert whole.model.inputs[0].shape == (1, 3)
    np.testing.assert_array_equal(np.concatenate([call["x"] for call in whole.parity_inputs()]), INPUTS)
    np.testing.assert_array_equal(np.concatenate([call["y"] for call in whole.parity_outputs()]), OUTPUTS)


def test_a_bundle_names_no_place_on_the_machine_that_made_it(bundle: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "README.txt", "measurement.json"):
        text = (bundle / name).read_text()
        for secret in ("/home", "somebody", "board-7", str(tmp_path)):
            assert secret not in text
    assert check_bundle(bundle).manifest.origin.model == "net.pt2"


def test_the_read_me_says_how_sure_the_accuracy_is_and_what_is_missed(bundle: Path, tmp_path: Path) -> None:
    """Ninety of a hundred images say little; both intervals are Wilson's."""
    text = (bundle / "README.txt").read_text()
    assert "accuracy        91.00% [83.77%, 95.19%] before, 90.00% [82.56%, 94.48%] after\n" in text
    assert "on 100 test images; 95% interval" in text
    assert "budget          0.5x: met, 80.0 % used\n" in text
    strict = Budget(latency=Latency.parse("0.5x"), max_accuracy_drop=0.001)
    (tmp_path / "strict").mkdir()
    missed = (write_small_bundle(tmp_path / "strict", budget=strict) / "README.txt").read_text()
    assert "budget          0.5x: accuracy MISSED, latency met, 80.0 % used\n" in missed


def test_a_run_in_place_of_a_bundle_names_the_bundle(bundle: Path, tmp_path: Path) -> None:
    """And any other folder says what to give."""
    for name, hint in (("small.run", f"its bundle is {bundle}"), ("other", "the .tar that deploy wrote")):
        (tmp_path / name).mkdir()
        with (
            pytest.raises(BundleError, match=re.escape("holds no manifest.json")) as caught,
            open_bundle(tmp_path / name),
        ):
            pass
        assert hint in caught.value.next_step


def test_several_inputs_and_outputs_are_recorded_by_name(tmp_path: Path) -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(3, 2), np.ones((3, 2), np.float32)
    made = contents(
        write_two_port_model(tmp_path / "ports.onnx"),
        parity_inputs={"b": list(b[:, None]), "a": a},
        parity_outputs={"sum": a + b, "difference": a - b},
    )
    whole = write_bundle(tmp_path / "ports", contents=made)
    np.testing.assert_array_equal(whole.parity_inputs()[2]["a"], a[2:])
    np.testing.assert_array_equal(whole.parity_outputs()[1]["difference"], (a - b)[1:2])


def test_an_open_batch_counts_one_row_a_call(tmp_path: Path) -> None:
    whole = write_bundle(tmp_path / "open", contents=contents(write_model(tmp_path / "m.onnx", batch="n")))
    assert [call["x"].shape for call in whole.parity_inputs()] == [(1, 3)] * 4
    assert whole.model.inputs[0].shape == (1, 3)


def test_a_bundle_carries_what_runs_on_its_device(tmp_path: Path) -> None:
    """Under ``device/``, hashed like everything else; what lies in ``bin/`` may be executed, in an archive as well."""
    (tmp_path / "program").write_bytes(b"#!/bin/sh\nexit 7\n")
    given = {"bin/run": tmp_path / "program", "engine.so": tmp_path / "program"}
    folder = write_small_bundle(tmp_path, device=given)
    archive = pack(folder, tmp_path / "small.tar")
    for place in (folder, archive):
        with open_bundle(place) as bundle:
            assert subprocess.run([bundle.path / "device/bin/run"], check=False).returncode == 7
            assert not os.access(bundle.path / "device/engine.so", os.X_OK)
    assert "device/README.txt" in (folder / "README.txt").read_text()
    runner = subprocess.run([sys.executable, folder / "runner.py", "--selftest"], check=False, capture_output=True)
    assert runner.returncode == 0, runner.stderr
    (folder / "device/engine.so").write_bytes(b"#!/bin/sh\nexit 8\n")
    with pytest.raises(BundleError, match=r"engine\.so"):
        check_bundle(folder)


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../b", ".hidden", "-flag", ""])
def test_a_device_file_that_would_leave_the_bundle_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "program").write_bytes(b"x")
    with pytest.raises(BundleError):
        write_small_bundle(tmp_path, device={name: tmp_path / "program"})


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        folder = write_small_bundle(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o644}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "parity")} == {0o755}


ARCHIVE_AGAIN = """
import sys
from pathlib import Path
from small_bundle import write_small_bundle
from edgeprune.pack import pack
folder = Path(sys.argv[1])
pack(write_small_bundle(folder), folder / "again.tar")
"""


def test_the_same_contents_make_the_same_archive_anywhere(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "deep"
    folder.mkdir(parents=True)
    strange = {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1", "PATH": ""}
    subprocess.run(
        [sys.executable, "-c", ARCHIVE_AGAIN, folder],
        env=strange | {"PYTHONPATH": str(Path(__file__).parent)},
        cwd=folder,
        umask=0o027,
        check=True,
    )
    assert (folder / "again.tar").read_bytes() == whole_files()[""]


# --- tampering


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_one_flipped_bit_anywhere_is_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(whole_files())))
    content = bytearray(whole_files()[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with laid_out(**{name: bytes(content)}) as folder:
        refused(folder / ("small" if name else "small.tar"))


def test_every_byte_of_the_manifest_counts() -> None:
    content = whole_files()["manifest.json"]
    assert read_manifest(content).name == "small"
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        with pytest.raises(BundleError):
            read_manifest(bytes(flipped))


@given(name=st.sampled_from(sorted(whole_files())), share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None)
def test_a_file_cut_short_is_refused(name: str, share: float) -> None:
    content = whole_files()[name]
    with laid_out(**{name: content[: int(share * len(content))]}) as folder:
        refused(folder / ("small" if name else "small.tar"))


@pytest.mark.parametrize("name", [name for name in whole_files() if name])
def test_a_missing_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=name):
        check_bundle(bundle)


@pytest.mark.parametrize("name", ["y.npy", "parity/input_1.npy", ".hidden", "__pycache__/runner.pyc"])
def test_an_extra_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"")
    with pytest.raises(BundleError, match="does not belong"):
        check_bundle(bundle)


def test_a_link_is_refused_even_if_its_target_has_the_right_bytes(bundle: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "manifest.json", "parity"):
        (bundle / name).rename(tmp_path / "moved")
        (bundle / name).symlink_to(tmp_path / "moved")
        with pytest.raises(BundleError, match="link"):
            check_bundle(bundle)
        (bundle / name).unlink()
        (tmp_path / "moved").rename(bundle / name)
    assert check_bundle(bundle)


def test_a_pipe_is_refused_and_not_read(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    os.mkfifo(bundle / "model.onnx")
    with pytest.raises(BundleError, match="link or a device"):
        check_bundle(bundle)


@pytest.mark.parametrize("mode", [0o666, 0o4755, 0o2644])
def test_a_file_that_anybody_may_write_or_with_a_special_bit_is_refused(bundle: Path, mode: int) -> None:
    (bundle / "runner.py").chmod(mode)
    with pytest.raises(BundleError, match="may not stand"):
        check_bundle(bundle)


def test_a_private_copy_is_accepted(bundle: Path) -> None:
    for path in bundle.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    assert check_bundle(bundle)


@pytest.mark.parametrize(
    "path", ["../tuned.onnx", "/etc/passwd", "parity/../../tuned.onnx", ".hidden", "a\nb", "-x", ""]
)
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, path: str) -> None:
    def change(value: dict[str, Any]) -> None:
        value["files"][2]["path"] = path

    resealed(bundle, change)
    with pytest.raises(BundleError, match="may leave"):
        check_bundle(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(hello=1),
        lambda value: value["measurement"].update(hello=1),
        lambda value: value.pop("plan"),
        lambda value: value.update(schema_version=3),
        lambda value: value.update(name="../up"),
        lambda value: value.update(name="a\n"),
        lambda value: value["budget"].update(met="yes"),
        lambda value: value["budget"].update(met=1),
        lambda value: value["result"].update(accuracy="0.9"),
        lambda value: value["result"].update(accuracy=1),
        lambda value: value["result"].update(accuracy=1.5),
        lambda value: value["budget"]["latency"].update(value=0.0),
        lambda value: value["budget"]["latency"].update(value=-0.5),
        lambda value: value["parity"].update(samples=4.0),
        lambda value: value["parity"].update(samples=10**6),
        lambda value: value["plan"].update(conv=[1]),
        lambda value: value["profile"].update(channel_multiple=1),
        lambda value: value["profile"].update(unknown=1),
        lambda value: value.update(profile={}),
        lambda value: value["files"].append(value["files"][0]),
        lambda value: value["files"].reverse(),
        lambda value: value["files"].pop(),
        lambda value: value["files"][0].update(size=10**12),
        lambda value: value["signature"]["inputs"].append(value["signature"]["inputs"][0]),
    ],
)
def test_a_forged_manifest_is_refused_though_its_digest_holds(
    bundle: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    resealed(bundle, lambda value: None)
    assert check_bundle(bundle)
    resealed(bundle, change)
    with pytest.raises(BundleError):
        check_bundle(bundle)


@pytest.mark.parametrize(
    "spell",
    [
        lambda text: text.rstrip("\n"),
        lambda text: text + "\n",
        lambda text: json.dumps(json.loads(text), indent=1, sort_keys=True),
        lambda text: text.replace('"name":"small"', '"name":"small","name":"small"'),
        lambda text: text.replace("0.91", "0.910"),
        lambda text: text.replace("0.91", "NaN"),
        lambda text: "[" * 100_000,
        lambda text: "[]\n",
        lambda text: "",
        lambda text: "\ufeff" + text,
    ],
)
def test_a_manifest_spelled_otherwise_is_refused(bundle: Path, spell: Callable[[str], str]) -> None:
    manifest = bundle / "manifest.json"
    manifest.write_text(spell(manifest.read_text()))
    with pytest.raises(BundleError):
        check_bundle(bundle)


def test_an_archive_of_a_bundle_under_another_name_is_refused(tmp_path: Path) -> None:
    with laid_out() as folder:
        renamed = whole_files()[""]
        from edgeprune.archive import write_archive

        names = [name for name in whole_files() if name]
        write_archive(folder / "big.tar", top="big", files={name: folder / "small" / name for name in names})
        assert len((folder / "big.tar").read_bytes()) == len(renamed)
        with pytest.raises(BundleError, match="'big'"), open_bundle(folder / "big.tar"):
            pass


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_an_archive_opens_under_any_umask(umask: int) -> None:
    with laid_out() as folder:
        before = os.umask(umask)
        try:
            with open_bundle(folder / "small.tar") as opened:
                assert opened.manifest.name == "small"
        finally:
            os.umask(before)


def test_an_archive_is_unpacked_only_while_it_is_open(tmp_path: Path) -> None:
    with laid_out() as folder, open_bundle(folder / "small.tar") as opened:
        place = opened.path
        assert check_bundle(place).manifest == check_bundle(folder / "small").manifest
    assert not place.exists()


def test_nothing_at_a_path_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no bundle"), open_bundle(tmp_path / "nowhere"):
        pass
    with pytest.raises(BundleError, match=r"no manifest\.json"), open_bundle(tmp_path):
        pass


# --- contents that do not make a bundle


def broken(tmp_path: Path, message: str, **changes: Any) -> None:
    model = changes.pop("model", None) or write_model(tmp_path / "m.onnx")
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "broken", contents=contents(model, **changes))
    assert not [each for each in tmp_path.iterdir() if "broken" in each.name]


def test_contents_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    broken(tmp_path, "another profile", profile=Profile(name="other", adapter="onnxruntime_cpu"))
    broken(tmp_path, "claims a ratio", outcome=outcome(measurement(ratio=0.3)))
    broken(tmp_path, "says", outcome=outcome(measurement(), size_bytes=1))
    broken(tmp_path, "says", budget=Budget(latency=Latency.parse("0.3x")), outcome=outcome(measurement()))
    broken(tmp_path, "name", name="up/../and/away")
    broken(tmp_path, "parent_sha256", parent_sha256="unknown")
    broken(tmp_path, "not JSON", measurement=measurement(conditions={"load": float("nan")}))


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ({"x": INPUTS[:2]}, {"y": OUTPUTS[:2]}),
        ({"x": np.tile(INPUTS, (3, 1))}, {"y": np.tile(OUTPUTS, (3, 1))}),
        ({"x": INPUTS}, {"y": OUTPUTS[:3]}),
        ({"x": INPUTS.astype(np.float64)}, {"y": OUTPUTS}),
        ({"x": INPUTS}, {"y": OUTPUTS.astype(np.int64)}),
        ({"x": INPUTS[:, :2]}, {"y": OUTPUTS}),
        ({"x": INPUTS[0]}, {"y": OUTPUTS}),
        ({"z": INPUTS}, {"y": OUTPUTS}),
        ({"x": INPUTS, "z": INPUTS}, {"y": OUTPUTS}),
        ({"x": INPUTS}, {}),
        ({"x": np.array([object()] * 4)}, {"y": OUTPUTS}),
    ],
)
def test_parity_samples_that_do_not_fit_the_model_are_refused(tmp_path: Path, inputs: Any, outputs: Any) -> None:
    broken(tmp_path, "parity samples", parity_inputs=inputs, parity_outputs=outputs)


def test_a_model_that_does_not_stand_alone_is_refused(tmp_path: Path) -> None:
    model = onnx.load(write_model(tmp_path / "m.onnx"))
    onnx.save_model(model, tmp_path / "outside.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    broken(tmp_path, "other files", model=tmp_path / "outside.onnx")
    whole = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "short.onnx").write_bytes(whole[: len(whole) // 2])
    broken(tmp_path, "not a", model=tmp_path / "short.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    broken(tmp_path, "not a valid", model=tmp_path / "empty.onnx")
    broken(tmp_path, "cannot be read", model=tmp_path / "missing.onnx")


# --- all or nothing


def test_a_later_bundle_takes_the_place_of_an_earlier_one(bundle: Path, tmp_path: Path) -> None:
    write_bundle(bundle, contents=contents(tmp_path / "tuned.onnx", versions={"release": LATER}))
    assert check_bundle(bundle).manifest.versions["release"] == LATER
    assert sorted(each.name for each in tmp_path.iterdir()) == ["small", "small.tar", "tuned.onnx"]


def test_a_folder_that_holds_something_else_is_never_replaced(bundle: Path, tmp_path: Path) -> None:
    made = contents(tmp_path / "tuned.onnx")
    (bundle / "thesis.tex").write_text("ten years")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        write_bundle(bundle, contents=made)
    assert (bundle / "thesis.tex").read_text() == "ten years"
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(bundle)
    for place in ("file", "link"):
        with pytest.raises(ConfigError, match="not a folder"):
            write_bundle(tmp_path / place, contents=made)


WRITE_LATER = """
import os, resource, signal, sys
from pathlib import Path
from small_bundle import contents
from edgeprune.errors import EdgepruneError
from edgeprune.pack import pack, write_bundle

folder, manner, numbers = Path(sys.argv[1]), sys.argv[2], [int(each) for each in sys.argv[3:]]
made = contents(folder / "tuned.onnx", versions={"release": "later"})


def kill_at(number):
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod"):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(number):
    if manner == "kill":
        kill_at(number)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
    try:
        write_bundle(folder / str(number) / "small", contents=made)
        pack(folder / str(number) / "small", folder / str(number) / "small.tar")
    except EdgepruneError as error:
        return error.exit_code
    return 0


for number in numbers:
    if not (pid := os.fork()):
        try:
            os._exit(child(number))
        finally:
            os._exit(70)
    _, status = os.waitpid(pid, 0)
    print(number, os.waitstatus_to_exitcode(status))
"""


def written_later(folder: Path, manner: str, numbers: list[int]) -> dict[int, int]:
    """Lay out an earlier bundle for each number, have children write a later one over it; return their exit codes."""
    write_small_bundle(folder, versions={"release": EARLIER})
    pack(folder / "small", folder / "small.tar")
    for number in numbers:
        (folder / str(number)).mkdir()
        shutil.copytree(folder / "small", folder / str(number) / "small")
        shutil.copy(folder / "small.tar", folder / str(number) / "small.tar")
    done = subprocess.run(
        [sys.executable, "-c", WRITE_LATER, folder, manner, *map(str, numbers)],
        env={"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        check=True,
        text=True,
    )
    return {int(number): int(code) for number, code in map(str.split, done.stdout.splitlines())}


def release_in(place: Path) -> str:
    with open_bundle(place) as opened:
        return opened.manifest.versions["release"]


def test_a_full_disk_is_typed_and_leaves_the_earlier_bundle_whole(tmp_path: Path) -> None:
    sizes = [0, 1, 130, 1000, 2500, 4000, 20_000]
    assert written_later(tmp_path, "limit", sizes) == dict.fromkeys(sizes, StorageFull.exit_code)
    for size in sizes:
        folder = tmp_path / str(size)
        assert release_in(folder / "small") == EARLIER
        assert release_in(folder / "small.tar") == EARLIER
        assert sorted(each.name for each in folder.iterdir()) == ["small", "small.tar"]


def test_a_full_disk_while_archiving_keeps_the_earlier_archive(tmp_path: Path) -> None:
    largest = max(len(content) for name, content in whole_files().items() if name)
    size = (largest + len(whole_files()[""])) // 2
    assert written_later(tmp_path, "limit", [size]) == {size: StorageFull.exit_code}
    folder = tmp_path / str(size)
    assert release_in(folder / "small") == LATER
    assert release_in(folder / "small.tar") == EARLIER
    assert sorted(each.name for each in folder.iterdir()) == ["small", "small.tar"]


def test_a_writer_killed_at_any_step_leaves_a_whole_bundle(tmp_path: Path) -> None:
    """At most file operations: afterwards the folder holds the earlier or the later, or its next writer mends it."""
    numbers = [*range(1, 30, 4), *range(30, 58)]  # the renames come late
    codes = written_later(tmp_path, "kill", numbers)
    killed = [number for number, code in codes.items() if code == -signal.SIGKILL]
    assert killed == numbers[: len(killed)]
    assert 0 < len(killed) < len(numbers), "the kills do not reach from the first to the last step"
    mended = 0
    for number in killed:
        folder = tmp_path / str(number)
        if not (folder / "small").exists():
            assert release_in(folder / ".small.earlier") == EARLIER
            mended += 1
        else:
            assert release_in(folder / "small") in (EARLIER, LATER)
        assert release_in(folder / "small.tar") in (EARLIER, LATER)
    assert mended >= 1, "no kill fell between the two renames"
    for number in (killed[0], *killed[-3:], *(n for n in killed if not (tmp_path / str(n) / "small").exists())):
        folder = tmp_path / str(number)
        write_bundle(folder / "small", contents=contents(tmp_path / "tuned.onnx", versions={"release": LATER}))
        pack(folder / "small", folder / "small.tar")
        assert release_in(folder / "small") == release_in(folder / "small.tar") == LATER
        assert sorted(each.name for each in folder.iterdir()) == ["small", "small.tar"]


def test_a_place_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_bundle(tmp_path / "file" / "small", contents=contents(model))


def test_the_profile_in_a_bundle_is_the_one_it_was_measured_with(bundle: Path) -> None:
    assert check_bundle(bundle).manifest.profile_digest == PROFILE.digest
