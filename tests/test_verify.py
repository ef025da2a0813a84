"""Verify refuses what is not whole, runs nothing it does not know, and measures again before it agrees."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from small_bundle import (
    OUTPUTS,
    PROFILE,
    WEIGHT,
    contents,
    lay_out,
    measurement,
    write_model,
    write_small_bundle,
)

from edgeprune import __version__
from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.budget import Budget, Latency
from edgeprune.bundle import check_bundle
from edgeprune.canonical import canonical_json, digest, file_sha256
from edgeprune.errors import BudgetMissed, BundleError, ConfigError, DeviceLost, ParityFailed
from edgeprune.measurement import Measurement, Sampling
from edgeprune.pack import pack, shipped_runner, write_bundle
from edgeprune.profile import Profile
from edgeprune.target import Selftest, Target, open_target
from edgeprune.verify import VerifyReport, own_profile, verify


class Bench:
    """A device that really runs graphs, and whose clock says what it is told to say."""

    profile = PROFILE

    def __init__(self, **seen: Any) -> None:
        self.seen = seen
        self.asked: list[Sampling] = []
        self.compiled: list[str] = []

    def compile(self, graph: Artifact) -> Artifact:
        self.compiled.append(graph.check().sha256)
        return graph

    def run(self, engine: Artifact, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        session = onnxruntime.InferenceSession(engine.path, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
        self.asked.append(sampling)
        return measurement(**self.seen)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return lay_out(tmp_path)


def check(report: VerifyReport, name: str) -> tuple[bool, str]:
    found = next(each for each in report.checks if each.name == name)
    return found.ok, found.detail


def names(report: VerifyReport) -> list[str]:
    return [each.name for each in report.checks]


def resealed(bundle: Path, change: Callable[[dict[str, Any]], object], **files: bytes) -> None:
    """Edit files and manifest as a forger would: every digest is made to hold."""
    value = json.loads((bundle / "manifest.json").read_text())
    for name, content in files.items():
        (bundle / name).write_bytes(content)
        entry = next(each for each in value["files"] if each["path"] == name)
        entry.update(size=len(content), sha256=file_sha256(bundle / name))
    change(value)
    value["manifest_sha256"] = digest({key: each for key, each in value.items() if key != "manifest_sha256"})
    (bundle / "manifest.json").write_text(canonical_json(value) + "\n")


def nothing(value: dict[str, Any]) -> None:
    """Change nothing."""


# --- whole bundles


def test_a_bundle_passes_every_check_as_a_folder_and_as_an_archive(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path)
    archive = pack(folder, tmp_path / "small.tar")
    for place in (folder, archive):
        report = verify(place, profile=PROFILE, target=Bench(), baseline=tmp_path / "baseline.onnx")
        assert report.ok
        assert report.require() is report
        assert names(report) == [
            "bytes",
            "model",
            "samples",
            "profile",
            "runner",
            "promise",
            "parity",
            "selftest",
            "latency",
            "machine",
        ]
        assert report.skipped == ("accuracy: the bundle holds no test data",)
        assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_without_a_target_the_report_says_what_was_not_looked_at(bundle: Path) -> None:
    report = verify(bundle, profile=PROFILE)
    assert report.ok
    assert names(report) == ["bytes", "model", "samples", "profile", "runner", "promise", "selftest"]
    assert "parity on the target, latency, machine" in report.skipped[1]


def test_measuring_again_can_be_left_out_and_the_report_says_so(bundle: Path) -> None:
    device = Bench()
    report = verify(bundle, profile=PROFILE, target=device, remeasure=False)
    assert names(report)[-1] == "selftest"
    assert device.asked == []
    assert "not measured again" in report.skipped[1]


# --- refused


def test_a_changed_byte_is_refused_before_anything_runs(bundle: Path) -> None:
    device = Bench()
    with (bundle / "model.onnx").open("r+b") as stream:
        stream.write(b"\x09")
    with pytest.raises(BundleError, match="changed"):
        verify(bundle, profile=PROFILE, target=device)
    assert device.compiled == []


def test_an_unknown_runner_is_refused_unrun_unless_it_is_trusted(bundle: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    program = f"from pathlib import Path\nPath({str(touched)!r}).touch()\nprint('{{}}')\n"
    resealed(bundle, nothing, **{"runner.py": program.encode()})
    with pytest.raises(BundleError, match="was not run") as caught:
        verify(bundle, profile=PROFILE, target=Bench())
    assert not touched.exists()
    for content in (program.encode(), shipped_runner()):
        assert hashlib.sha256(content).hexdigest()[:12] in caught.value.why
    assert "run its deploy again" in caught.value.next_step
    report = verify(bundle, profile=PROFILE, trust_runner=True)
    assert touched.exists()
    assert "trusted because you said so" in check(report, "runner")[1]


def test_a_runner_of_another_version_is_left_to_that_version(bundle: Path) -> None:
    resealed(bundle, lambda value: value["versions"].update(edgeprune="0.0.1"), **{"runner.py": b"print()\n"})
    with pytest.raises(BundleError, match="was not run") as caught:
        verify(bundle, profile=PROFILE)
    assert "with edgeprune 0.0.1, or pass --trust-runner" in caught.value.next_step
    assert f"of edgeprune {__version__}" in caught.value.why


def test_the_profile_of_a_bundle_is_found_by_name_and_first_of_all_by_digest(bundle: Path) -> None:
    other, namesake = replace(PROFILE, name="other"), replace(PROFILE, channel_multiple=4)
    assert own_profile(bundle, [other, namesake, PROFILE]) == PROFILE
    assert own_profile(bundle, [other, namesake]) == namesake
    with pytest.raises(BundleError, match="profile 'bench', which is not known here") as caught:
        own_profile(bundle, [other])
    assert "known are other" in caught.value.why
    assert caught.value.next_step.endswith(f"edgeprune verify {bundle} --target bench --config edgeprune.toml")


def test_another_profile_is_refused_and_the_fields_are_named(bundle: Path) -> None:
    other = replace(PROFILE, channel_multiple=4, options={"threads": 2})
    with pytest.raises(BundleError) as caught:
        verify(bundle, profile=other)
    assert "channel_multiple was 8 and is 4" in caught.value.why
    assert "options was {'threads': 1} and is {'threads': 2}" in caught.value.why
    assert "precision" not in caught.value.why


def test_the_address_and_the_description_of_a_profile_do_not_matter(bundle: Path) -> None:
    assert verify(bundle, profile=replace(PROFILE, address="elsewhere", description="the same board")).ok


def model_bytes(tmp_path: Path, **changes: Any) -> bytes:
    return write_model(tmp_path / "forged.onnx", **changes).read_bytes()


def test_a_model_with_other_inputs_than_the_manifest_says_is_refused(bundle: Path, tmp_path: Path) -> None:
    wider = model_bytes(tmp_path, weight=np.tile(WEIGHT, 2))
    resealed(bundle, nothing, **{"model.onnx": wider})
    with pytest.raises(BundleError, match="not the one the manifest describes"):
        verify(bundle, profile=PROFILE)


def test_a_model_that_reads_other_files_is_refused(bundle: Path, tmp_path: Path) -> None:
    """Also where the reference hides in a subgraph, which the loader's own check of initialisers would not see."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(WEIGHT.tobytes())
    weight = TensorProto(name="w", dims=[3, 2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../secret.bin")
    inside = onnx.load_model_from_string(model_bytes(tmp_path))
    del inside.graph.initializer[:]
    hidden = onnx.load_model_from_string(inside.SerializeToString())
    inside.graph.initializer.append(weight)
    hidden.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    for model in (inside, hidden):
        resealed(bundle, nothing, **{"model.onnx": model.SerializeToString()})
        with pytest.raises(BundleError, match="other files"):
            verify(bundle, profile=PROFILE)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x09", b"\xff" * 100])
def test_a_model_that_is_none_is_refused(bundle: Path, content: bytes) -> None:
    resealed(bundle, nothing, **{"model.onnx": content})
    with pytest.raises(BundleError):
        verify(bundle, profile=PROFILE)


def test_a_claim_that_the_samples_do_not_bear_out_is_refused(bundle: Path) -> None:
    for change in (
        lambda value: value["measurement"]["ratio"].update(p50=0.3),
        lambda value: value["measurement"]["latency"].update(high=0.9),
        lambda value: value["measurement"].update(calls=10**6),
        lambda value: value["measurement"].update(emulated=True),
    ):
        before = (bundle / "manifest.json").read_bytes()
        resealed(bundle, change)
        with pytest.raises(BundleError, match=r"the samples give|another profile"):
            verify(bundle, profile=PROFILE)
        (bundle / "manifest.json").write_bytes(before)


def test_a_claim_by_another_edgeprune_is_only_compared_with_todays_statistics(bundle: Path) -> None:
    def older(value: dict[str, Any]) -> None:
        value["versions"]["edgeprune"] = "0.0.1"
        value["measurement"]["ratio"].update(low=0.35, high=0.45)

    resealed(bundle, older)
    ok, detail = check(verify(bundle, profile=PROFILE), "samples")
    assert ok
    assert "edgeprune 0.0.1" in detail

    def faster(value: dict[str, Any]) -> None:
        value["measurement"]["ratio"].update(p50=0.2, low=0.19, high=0.21)
        value["budget"].update(used=0.4)

    resealed(bundle, faster)
    report = verify(bundle, profile=PROFILE)
    assert not check(report, "samples")[0]
    with pytest.raises(BudgetMissed, match="samples"):
        report.require()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"sessions":[]}', canonical_json(measurement(sessions=0).to_json()).encode(), b"[" * 10**5],
)
def test_samples_that_are_none_are_refused(bundle: Path, content: bytes) -> None:
    resealed(bundle, nothing, **{"measurement.json": content})
    with pytest.raises(BundleError, match=re.escape("measurement.json")):
        verify(bundle, profile=PROFILE)


@pytest.mark.parametrize("name", ["parity/input_0.npy", "parity/output_0.npy"])
def test_parity_files_that_do_not_fit_are_refused_and_never_unpickled(bundle: Path, tmp_path: Path, name: str) -> None:
    whole = (bundle / name).read_bytes()
    np.save(tmp_path / "objects.npy", np.array([PROFILE.name, None], dtype=object), allow_pickle=True)
    np.save(tmp_path / "columns.npy", np.asfortranarray(OUTPUTS))
    np.save(tmp_path / "many.npy", np.zeros((10, 2), np.float32))
    forged = [(tmp_path / each).read_bytes() for each in ("objects.npy", "columns.npy", "many.npy")]
    forged += [b"", whole[:-1], whole + b"\0", whole.replace(b"(4, ", b"(8, "), whole.replace(b"<f4", b">f8")]
    forged += [whole.replace(b"<f4", b">f4")]
    for content in forged:
        resealed(bundle, nothing, **{name: content})
        with pytest.raises(BundleError, match=re.escape(name)):
            verify(bundle, profile=PROFILE)


def test_a_budget_that_contradicts_itself_is_refused(bundle: Path) -> None:
    resealed(bundle, lambda value: value["budget"].update(quantile=2.0))
    with pytest.raises(BundleError, match="budget cannot be read"):
        verify(bundle, profile=PROFILE)


def promised(**claims: Any) -> Callable[[dict[str, Any]], object]:
    """Return a change of what the manifest says of its budget."""
    return lambda value: value["budget"].update(claims)


def at_another_limit(value: dict[str, Any]) -> None:
    """Promise a tenth of the latency, nothing lost, all of it kept; the measured ratio is 0.4."""
    value["budget"].update(latency={"value": 0.1, "unit": "x"}, requested="0.1x", limit_ratio=0.1, used=4.0)
    value["budget"].update(max_accuracy_drop=0.0)
    value["result"].update(accuracy=0.2)


def less_accurate(value: dict[str, Any]) -> None:
    value["budget"].update(max_accuracy_drop=0.05)
    value["result"].update(accuracy=0.2)


@pytest.mark.parametrize(
    "change",
    [
        at_another_limit,
        less_accurate,
        promised(requested="0.1x"),
        promised(limit_ratio=0.45),
        promised(used=0.1),
        promised(latency={"value": 0.3, "unit": "x"}, requested="0.3x", limit_ratio=0.3, used=0.4 / 0.3),
        promised(size_mib=1e-5),
        promised(met=False),
        promised(met=False, missed=["latency"]),
        promised(missed=["latency"]),
        lambda value: value["result"].update(size_bytes=1),
    ],
)
@pytest.mark.parametrize("author", ["ours", "0.0.1"])
def test_a_promise_that_its_own_numbers_do_not_bear_out_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], object], author: str
) -> None:
    """Every digest holds and nothing is measured again: samples, accuracies and the model's size still tell."""

    def forge(value: dict[str, Any]) -> None:
        change(value)
        value["versions"].update({} if author == "ours" else {"edgeprune": author})

    resealed(bundle, forge)
    with pytest.raises(BundleError, match=re.escape("manifest.json says")):
        verify(bundle, profile=PROFILE)


def test_milliseconds_claimed_by_another_edgeprune_are_compared_with_the_samples_too(tmp_path: Path) -> None:
    """Naming another version is no way around: where the limit is in milliseconds, they decide."""
    folder = write_small_bundle(tmp_path, budget=Budget(latency=Latency.parse("0.5ms")))

    def faster(value: dict[str, Any]) -> None:
        value["versions"]["edgeprune"] = "0.0.1"
        value["measurement"]["latency"].update(p50=0.4, low=0.39, high=0.41)
        value["budget"].update(met=True, missed=[], used=0.8)

    resealed(folder, faster)
    report = verify(folder, profile=PROFILE)
    assert check(report, "promise")[0]
    assert not check(report, "samples")[0]


# --- answers


def test_other_answers_fail_on_the_target_and_in_the_runner(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path, parity_outputs={"y": OUTPUTS + np.float32(1e-3)})
    report = verify(folder, profile=PROFILE, target=Bench())
    assert not check(report, "parity")[0]
    assert not check(report, "selftest")[0]
    assert "off by" in check(report, "selftest")[1]
    with pytest.raises(ParityFailed, match="parity"):
        report.require()


class Broken(Bench):
    """A device that answers with something else than it was asked for."""

    def __init__(self, answer: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        self.answer = answer

    def run(self, engine: Artifact, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return self.answer


class Board(Bench):
    """A device that runs what a bundle holds for it, if that is what it would have put there itself."""

    PROGRAM = b"#!/bin/sh\nexit 0\n"

    def __init__(self, *, answers: bool = True) -> None:
        super().__init__()
        self.answers = answers

    def package(self, engine: Artifact) -> Mapping[str, Path]:
        raise NotImplementedError

    def selftest(self, bundle: Path, model: Artifact, *, trusted: bool) -> Selftest:
        assert model.check().kind == "onnx"
        if (bundle / "device/bin/run").read_bytes() != self.PROGRAM and not trusted:
            raise BundleError("device/bin/run is not ours")
        return Selftest(ok=self.answers, detail="4 samples")


@pytest.fixture
def packaged(tmp_path: Path) -> Path:
    program = tmp_path / "program"
    program.write_bytes(Board.PROGRAM)
    return write_small_bundle(tmp_path, device={"bin/run": program, "README.txt": program})


@pytest.mark.parametrize("answers", [True, False])
def test_the_runner_for_the_device_is_run_on_the_device(packaged: Path, answers: bool) -> None:
    report = verify(packaged, profile=PROFILE, target=Board(answers=answers))
    assert check(report, "device") == (answers, "4 samples")
    assert report.ok is answers
    if not answers:
        with pytest.raises(ParityFailed):
            report.require()


def test_a_device_is_given_the_whole_path_of_a_bundle_named_from_here(
    packaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter may start the runner in another folder than this one."""

    class Elsewhere(Board):
        def selftest(self, bundle: Path, model: Artifact, *, trusted: bool) -> Selftest:
            return Selftest(ok=bundle.is_absolute(), detail=str(bundle))

    monkeypatch.chdir(packaged.parent)
    assert verify(Path(packaged.name), profile=PROFILE, target=Elsewhere()).ok


def test_a_bundle_without_anything_for_the_device_runs_nothing_there(bundle: Path) -> None:
    assert "device" not in names(verify(bundle, profile=PROFILE, target=Board()))


def test_a_program_for_the_device_that_is_not_ours_is_refused_unless_it_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(b"#!/bin/sh\nrm -r /\n")
    folder = write_small_bundle(tmp_path, device={"bin/run": tmp_path / "program"})
    with pytest.raises(BundleError):
        verify(folder, profile=PROFILE, target=Board())
    assert verify(folder, profile=PROFILE, target=Board(), trust_runner=True).ok


@pytest.mark.parametrize(
    "answer",
    [{}, {"y": np.full((1, 2), np.nan)}, {"y": np.zeros(2)}, {"y": np.zeros((1, 2))}, {"y": OUTPUTS[:1], "z": OUTPUTS}],
)
def test_a_target_that_answers_otherwise_fails_while_the_runner_passes(bundle: Path, answer: Any) -> None:
    report = verify(bundle, profile=PROFILE, target=Broken(answer))
    assert not check(report, "parity")[0]
    assert check(report, "selftest")[0]


def test_a_lost_device_is_the_labs_fault_not_the_bundles(bundle: Path) -> None:
    class Lost(Bench):
        def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
            raise DeviceLost("gone")

    with pytest.raises(DeviceLost):
        verify(bundle, profile=PROFILE, target=Lost())


# --- latency


def test_the_ratio_decides_when_the_baseline_is_given(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path)
    baseline = tmp_path / "baseline.onnx"
    device = Bench(ratio=0.45)
    assert verify(folder, profile=PROFILE, target=device, baseline=baseline).ok
    assert device.asked[0].threshold == 0.5
    assert device.asked[0].reference.sha256 == file_sha256(baseline)
    report = verify(folder, profile=PROFILE, target=Bench(ratio=0.6), baseline=baseline)
    ok, detail = check(report, "latency")
    assert not ok
    assert "ratio 0.6 [" in detail
    assert "0.4 [" in detail
    with pytest.raises(BudgetMissed, match="latency"):
        report.require()


def test_an_interval_that_straddles_the_limit_does_not_disprove_the_promise(tmp_path: Path) -> None:
    report = verify(
        write_small_bundle(tmp_path),
        profile=PROFILE,
        target=Bench(ratio=0.501),
        baseline=tmp_path / "baseline.onnx",
    )
    assert check(report, "latency")[0]


def test_without_the_baseline_milliseconds_are_compared_and_called_weak(bundle: Path) -> None:
    device = Bench(reference_ns=2_300_000)
    ok, detail = check(verify(bundle, profile=PROFILE, target=device), "latency")
    assert ok
    assert "weak" in detail
    assert device.asked[0].threshold is None
    assert device.asked[0].reference.sha256 == file_sha256(bundle / "model.onnx")
    assert not check(verify(bundle, profile=PROFILE, target=Bench(reference_ns=4_000_000)), "latency")[0]


def test_a_budget_in_milliseconds_is_decided_by_milliseconds(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path, budget=Budget(latency=Latency.parse("0.85ms")))
    for baseline in (None, tmp_path / "baseline.onnx"):
        inside = Bench(reference_ns=2_100_000, ratio=0.4)
        assert check(verify(folder, profile=PROFILE, target=inside, baseline=baseline), "latency")[0]
        outside = Bench(reference_ns=2_000_000, ratio=0.6)
        ok, detail = check(verify(folder, profile=PROFILE, target=outside, baseline=baseline), "latency")
        assert not ok
        assert "would have to lie above 0.85ms" in detail


def test_a_bundle_that_says_itself_that_it_misses_the_budget_fails(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path, budget=Budget(latency=Latency.parse("0.3x")))
    report = verify(folder, profile=PROFILE, target=Bench())
    assert [each.name for each in report.checks if not each.ok] == ["promise"]
    said = r"0\.3x: latency MISSED, 133\.3 % used; latency: the interval ends at 0\.4\d+x, .*"
    assert re.fullmatch(said, check(report, "promise")[1])
    with pytest.raises(BudgetMissed, match="MISSED"):
        report.require()


@pytest.mark.parametrize("limit", ["0.5x", "0.85ms", "0.5ms"])
def test_an_emulated_latency_is_never_milliseconds(tmp_path: Path, limit: str) -> None:
    """Claimed, measured again, met or missed: no clock gave it."""
    seen = measurement(emulated=True, metric="formula_ns")
    folder = write_small_bundle(tmp_path, budget=Budget(latency=Latency.parse(limit)), measurement=seen)
    for baseline in (None, tmp_path / "baseline.onnx"):
        report = verify(folder, profile=PROFILE, target=Bench(emulated=True, metric="formula_ns"), baseline=baseline)
        text = json.dumps(report.to_json())
        assert report.emulated
        assert "formula units" in check(report, "samples")[1]
        assert "formula units" in check(report, "latency")[1]
        assert not re.search(r"\d ?ms\b", text), text


def test_a_baseline_that_is_not_the_parent_is_the_users_mistake(bundle: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other.onnx")
    with pytest.raises(ConfigError, match="not the model"):
        verify(bundle, profile=PROFILE, target=Bench(), baseline=tmp_path / "other.onnx")
    with pytest.raises(ConfigError, match="no baseline"):
        verify(bundle, profile=PROFILE, target=Bench(), baseline=tmp_path / "missing.onnx")


# --- machine


def test_a_latency_proven_on_another_machine_fails_but_is_not_corrupt(bundle: Path) -> None:
    report = verify(bundle, profile=PROFILE, target=Bench(conditions={"cpu_model": "Imaginary 1"}))
    ok, detail = check(report, "machine")
    assert not ok
    assert "another machine: Imaginary 9000; this is Imaginary 1" in detail
    with pytest.raises(BudgetMissed, match="another machine"):
        report.require()


def test_another_runtime_is_told_and_a_device_without_a_name_is_not_judged(bundle: Path) -> None:
    newer = Bench(conditions={"cpu_model": "Imaginary 9000", "onnxruntime": "2.0"})
    ok, detail = check(verify(bundle, profile=PROFILE, target=newer), "machine")
    assert ok
    assert "was 1.31.1 and is 2.0" in detail
    assert "machine" not in names(verify(bundle, profile=PROFILE, target=Bench(conditions={})))


def test_flags_of_the_new_measurement_are_told(bundle: Path) -> None:
    report = verify(bundle, profile=PROFILE, target=Bench(flags=("the CPU was throttled",)))
    assert "the CPU was throttled" in check(report, "latency")[1]


# --- the targets that ship


WIDE, NARROW = 2048, 256


def write_two_layers(path: Path, hidden: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    draw = np.random.default_rng(0)
    into, out = (draw.standard_normal(shape).astype(np.float32) for shape in ((256, hidden), (hidden, 256)))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "into"], ["h"]), helper.make_node("MatMul", ["h", "out"], ["y"])],
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 256])],
        [numpy_helper.from_array(into, "into"), numpy_helper.from_array(out, "out")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return into, out


@pytest.fixture(params=["onnxruntime_cpu", "formula"])
def adapter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def host(adapter: str) -> Iterator[Target]:
    with open_target(Profile(name="here", adapter=adapter)) as target:
        yield target


def test_a_bundle_of_a_shipped_target_is_verified_there(tmp_path: Path, adapter: str, host: Target) -> None:
    write_two_layers(tmp_path / "baseline.onnx", WIDE)
    into, out = write_two_layers(tmp_path / "tuned.onnx", NARROW)
    specs = (TensorSpec(name="x", shape=(1, 256)),)
    whole, cut = (
        host.compile(Artifact.of(tmp_path / name, kind="onnx", inputs=specs))
        for name in ("baseline.onnx", "tuned.onnx")
    )
    seen = host.measure(cut, Sampling(reference=whole, threshold=0.5))
    samples = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)
    made = contents(
        tmp_path / "tuned.onnx",
        profile=host.profile,
        measurement=seen,
        parity_inputs={"x": samples},
        parity_outputs={"y": samples @ into @ out},
        tolerances=(1e-2, 1e-4),
        parent_sha256=file_sha256(tmp_path / "baseline.onnx"),
    )
    folder = write_bundle(tmp_path / "made", contents=made).path
    report = verify(folder, profile=host.profile, target=host, baseline=tmp_path / "baseline.onnx")
    assert report.ok, report.to_json()
    claim = check_bundle(folder).manifest.measurement
    assert claim.emulated == (adapter == "formula")
    if adapter == "onnxruntime_cpu":
        assert claim.conditions["cpu_model"] in check(report, "machine")[1]
    else:
        assert "emulated" in check(report, "samples")[1]
    assert not re.search(r'"/|/tmp|/root|/home', (folder / "manifest.json").read_text())
