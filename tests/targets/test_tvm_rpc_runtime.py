"""Two runtimes on one board: ONNX Runtime as TVM, both against each other, and the faster one in the bundle."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from board_programs import HERE, programs, qemu
from contract import TargetContract, convnet, quick
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from small_bundle import contents
from test_tvm_rpc import NATIVE, local

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.bundle import check_bundle
from edgeprune.errors import BundleError, CompileError, ProfileError
from edgeprune.measurement import Calls, Measurement, Session
from edgeprune.pack import write_bundle
from edgeprune.profile import Profile, load_profile
from edgeprune.statistics import Interval
from edgeprune.target import examine_target, open_target
from edgeprune.targets._tvm_rpc_runtime import Choice, Choices, choice_from, note_of
from edgeprune.targets.tvm_rpc import TvmRpc

pytest.importorskip("tvm", reason="pip install -e '.[tvm]'")

ROWS = np.random.default_rng(3).standard_normal((4, 3, 12, 12)).astype(np.float32)


def emulated(**options: object) -> Profile:
    return load_profile("arm-emulated", {"options": options})


class TestOnnxRuntimeOnALocalBoard(TargetContract):
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> Profile:
        programs()
        return local(runtime="onnxruntime")


class TestOnnxRuntimeOnAnEmulatedBoard(TargetContract):
    """Every call takes an emulator thousands of times as long, so the images are small."""

    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> Profile:
        programs("aarch64")
        return emulated(runtime="onnxruntime")

    @pytest.fixture
    def small(self, tmp_path: Path) -> Artifact:
        return convnet(tmp_path / "small.onnx", (16, 16), side=12)

    @pytest.fixture
    def large(self, tmp_path: Path) -> Artifact:
        return convnet(tmp_path / "large.onnx", (32, 32, 32, 32), side=12)

    def test_counts_are_the_same_every_time_and_are_called_what_they_are(
        self, target: TvmRpc, small: Artifact, large: Artifact
    ) -> None:
        candidate, reference = target.compile(small), target.compile(large)
        seen = target.measure(candidate, quick(reference))
        assert (seen.metric, seen.emulated, seen.flags) == ("emulated_instructions", True, ())
        assert (seen.conditions["runtime"], seen.conditions["onnxruntime"]) == ("onnxruntime", "1.31.1")
        counts = seen.sessions[0].candidate.elapsed
        assert len(set(counts)) == 1
        again = target.measure(candidate, quick(reference)).sessions[0].candidate.elapsed
        assert again[0] == pytest.approx(counts[0], rel=1e-4)  # where its memory lies costs a few instructions


@pytest.fixture(autouse=True)
def _own_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Keep choices of a test to itself; the programs stay where they are."""
    if request.cls is None:
        cache = tmp_path / "cache" / "edgeprune"
        cache.mkdir(parents=True)
        (cache / "emulated").symlink_to(programs().parent)
        (cache / "tvm").symlink_to(programs().parent.parent / "tvm")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))


@pytest.fixture
def net(tmp_path: Path) -> Artifact:
    return convnet(tmp_path / "net.onnx", (16, 24), side=12)


def test_auto_takes_the_runtime_that_is_faster(tmp_path: Path) -> None:
    """Both are timed once more beside the choice; where they are as good as equal, either is right."""
    graph = convnet(tmp_path / "net.onnx", (64, 64, 64))
    with open_target(local(runtime="auto")) as target:
        assert isinstance(target, TvmRpc)
        engine = target.compile(graph)
        engines = [target._in(each, graph) for each in ("onnxruntime", "tvm")]
        seen = target.measure(engines[0], quick(engines[1], sessions_max=4))
    chosen, ratio = seen.conditions["runtimes"], seen.ratio().p50
    assert engine.kind == {"tvm": "tvm-so", "onnxruntime": "onnx"}[chosen["chosen"]]
    assert chosen["graph"] == graph.sha256
    assert chosen["times"]["low"] <= chosen["times"]["p50"] <= chosen["times"]["high"]
    assert chosen["chosen"] == ("tvm" if ratio > 1 else "onnxruntime") or abs(ratio - 1) < 0.15


def test_on_an_emulated_board_auto_chooses_the_same_every_time(net: Artifact, tmp_path: Path) -> None:
    """Its counts are the same, so the choice is as well, also where nothing is remembered."""
    programs("aarch64")
    seen = []
    for _ in range(2):
        shutil.rmtree(tmp_path / "cache" / "edgeprune" / "runtimes", ignore_errors=True)
        with open_target(emulated(runtime="auto")) as target:
            engine = target.compile(net)
            seen.append(target.measure(engine, quick(engine)).conditions["runtimes"])
    assert [each["chosen"] for each in seen] == ["tvm", "tvm"]
    assert seen[0]["times"]["p50"] == pytest.approx(seen[1]["times"]["p50"], rel=1e-3)
    assert seen[0]["times"]["p50"] > 1


def test_a_run_that_is_resumed_goes_on_in_the_runtime_it_began_with(net: Artifact, tmp_path: Path) -> None:
    with open_target(local(runtime="auto")) as target:
        first = target.compile(net)
    (kept,) = (tmp_path / "cache" / "edgeprune" / "runtimes").glob("*.json")
    facts = json.loads(kept.read_text())
    turned = {"tvm": "onnxruntime", "onnxruntime": "tvm"}[facts["chosen"]]
    kept.write_text(json.dumps(facts | {"chosen": turned}))
    with open_target(local(runtime="auto")) as target:
        assert target.compile(net).kind != first.kind


def test_the_final_measurement_says_what_the_other_runtime_takes_for_the_result(net: Artifact, tmp_path: Path) -> None:
    programs("aarch64")
    pruned = convnet(tmp_path / "pruned.onnx", (8, 16), side=12)
    with open_target(emulated(runtime="auto")) as target:
        reference, engine = target.compile(net), target.compile(pruned)
        seen = target.measure(engine, quick(reference, layers=True))
        assert sum("in onnxruntime this model takes" in each for each in seen.notes) == 1
        of_baseline = target.measure(reference, quick(reference, layers=True))
        assert not any("in onnxruntime" in each for each in of_baseline.notes)
    assert seen.conditions["runtimes"]["graph"] == net.sha256
    with open_target(emulated(runtime="auto")) as target:  # whoever checks the bundle begins with its model
        engine = target.compile(pruned)
        assert target.measure(engine, quick(engine)).conditions["runtimes"]["graph"] == pruned.sha256


def test_a_graph_that_one_runtime_refuses_is_run_in_the_other(tmp_path: Path) -> None:
    """ONNX Runtime knows operators that there are no kernels of ours for."""
    node = helper.make_node("Erf", ["x"], ["e"])
    last = helper.make_node("Det", ["e"], ["y"])
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [1, 4, 4]), ("y", [1]))
    ]
    graph = helper.make_graph([node, last], "net", ports[:1], ports[1:])
    place = tmp_path / "det.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(place))
    artifact = Artifact.of(place, kind="onnx", inputs=[TensorSpec(name="x", shape=(1, 4, 4))])
    with open_target(local()) as target, pytest.raises(CompileError):
        target.compile(artifact)
    with open_target(local(runtime="auto")) as target:
        engine = target.compile(artifact)
        found = target.measure(engine, quick(engine)).conditions["runtimes"]
    assert (engine.kind, found["chosen"], found["times"]) == ("onnx", "onnxruntime", None)
    assert found["refused"]


def test_a_graph_that_both_refuse_decides_nothing(net: Artifact, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(net.path.read_bytes()[:-50])
    with open_target(local(runtime="auto")) as target:
        with pytest.raises(CompileError, match=r"broken\.onnx"):
            target.compile(Artifact.of(broken, kind="onnx", inputs=net.inputs))
        engine = target.compile(net)
        assert target.measure(engine, quick(engine)).conditions["runtimes"]["graph"] == net.sha256


@pytest.mark.parametrize("runtime", ["onnxruntime", "auto"])
def test_a_board_without_the_library_is_a_profile_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    kit = tmp_path / "other" / "edgeprune" / "emulated" / HERE
    shutil.copytree(programs(), kit, ignore=shutil.ignore_patterns("libonnxruntime*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with (
        pytest.raises(ProfileError, match="the board has no ONNX Runtime") as caught,
        open_target(local(runtime=runtime)),
    ):
        pass
    assert 'runtime = "tvm"' in caught.value.next_step
    problems = [each for each in examine_target(local(runtime=runtime)) if each.severity == "problem"]
    assert [each.found for each in problems] == [str(caught.value).splitlines()[0]]
    with open_target(local()) as target:
        assert target


def test_a_library_that_is_none_is_a_profile_error(
    net: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = tmp_path / "other" / "edgeprune" / "emulated" / HERE
    shutil.copytree(programs(), kit, ignore=shutil.ignore_patterns("libonnxruntime*"))
    (kit / "lib" / "libonnxruntime.so.1.31.1").write_bytes(b"not a library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    refused = pytest.raises(ProfileError, match="ONNX Runtime cannot be loaded")
    with open_target(local(runtime="onnxruntime")) as target, refused:
        target.compile(net)


def test_examining_a_board_names_its_onnxruntime() -> None:
    found = {each.subject: each.found for each in examine_target(local(runtime="auto"))}
    assert found["onnxruntime"] == "1.31.1, on the board"


@pytest.mark.parametrize("options", [{"runtime": "fastest"}, {"runtime": True}, {"runtime": ""}], ids=str)
def test_a_senseless_runtime_is_a_profile_error(options: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match='"tvm", "onnxruntime" or "auto" is wanted'), open_target(local(**options)):
        pass


def test_onnxruntime_knows_no_other_precision() -> None:
    profile = load_profile(
        "arm-emulated",
        {"arch": HERE, "precision": "fp16", "options": {"board": "local", "cpu": NATIVE, "runtime": "auto"}},
    )
    with pytest.raises(ProfileError, match="knows no precision 'fp16'"), open_target(profile):
        pass


# --- bundles


@pytest.fixture(scope="module", params=["local", "emulated"])
def target(request: pytest.FixtureRequest) -> Iterator[TvmRpc]:
    profile = local(runtime="onnxruntime") if request.param == "local" else emulated(runtime="onnxruntime")
    programs(profile.arch)
    with open_target(profile) as opened:
        assert isinstance(opened, TvmRpc)
        yield opened


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return convnet(tmp_path_factory.mktemp("graph") / "net.onnx", (16, 24), side=12)


@pytest.fixture(scope="module")
def wanted(graph: Artifact) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": row[None]})[0] for row in ROWS])


def bundle_of(folder: Path, target: TvmRpc, graph: Artifact, wanted: np.ndarray, **changes: Any) -> Path:
    settings = {
        "device": target.package(target.compile(graph)),
        "parity_inputs": {"x": ROWS},
        "parity_outputs": {"y": wanted},
        "tolerances": (1e-4, 1e-4),
    }
    return write_bundle(folder / "small", contents=contents(graph.path, **(settings | changes))).path


@pytest.fixture(scope="module")
def bundle(target: TvmRpc, graph: Artifact, wanted: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(tmp_path_factory.mktemp("bundle"), target, graph, wanted)


def test_a_bundle_for_onnxruntime_holds_the_library_and_the_model_once(bundle: Path) -> None:
    check_bundle(bundle)
    held = {str(each.relative_to(bundle / "device")) for each in (bundle / "device").rglob("*") if each.is_file()}
    assert held == {"bin/edgeprune-run", "lib/libonnxruntime.so.1.31.1", "README.txt"}


def test_its_runner_answers_the_recorded_samples_on_the_device(target: TvmRpc, bundle: Path, graph: Artifact) -> None:
    said = target.selftest(bundle, graph, trusted=False)
    assert said.ok, said.detail
    assert "4 recorded samples answered within tolerance" in said.detail


def runner(target: TvmRpc, bundle: Path, *options: object) -> dict[str, Any]:
    command = [*qemu(target.profile.arch, count=False), str(bundle / "device" / "bin" / "edgeprune-run"), "--json"]
    done = subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    return {"code": done.returncode, **json.loads(done.stdout)}


def test_its_runner_answers_new_inputs_and_knows_when_it_is_emulated(
    target: TvmRpc, bundle: Path, wanted: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", ROWS[::-1])
    assert runner(target, bundle, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")["code"] == 0
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted[::-1], rtol=1e-4, atol=1e-4)
    said = runner(target, bundle, "--bench", "--seconds", 0.05)
    if target.profile.arch == HERE:
        assert said["data"]["runtime"].endswith(", onnxruntime 1.31.1")
    else:
        assert "emulat" in said["diagnostics"][0]["what"]


def test_it_reports_to_nobody(bundle: Path, target: TvmRpc, tmp_path: Path) -> None:
    """The library would keep a database of events below the home folder, and upload it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    command = [*qemu(target.profile.arch, count=False), str(bundle / "device" / "bin" / "edgeprune-run"), "--selftest"]
    environment = kept | {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    subprocess.run(command, check=True, capture_output=True, timeout=60, env=environment)
    assert not (tmp_path / "home").exists()


def test_an_answer_that_is_not_the_recorded_one_fails_the_test(
    target: TvmRpc, graph: Artifact, wanted: np.ndarray, tmp_path: Path
) -> None:
    said = target.selftest(bundle_of(tmp_path, target, graph, wanted + np.float32(0.1)), graph, trusted=False)
    assert not said.ok
    assert "times what is tolerated" in said.detail


@pytest.mark.parametrize("name", ["bin/edgeprune-run", "lib/libonnxruntime.so.1.31.1", "lib/libonnxruntime.so.9"])
def test_code_that_is_not_ours_is_run_only_if_it_is_trusted(
    graph: Artifact, wanted: np.ndarray, tmp_path: Path, name: str
) -> None:
    """A library of a higher version would be the one that is loaded."""
    with open_target(local(runtime="onnxruntime")) as opened:
        assert isinstance(opened, TvmRpc)
        device = dict(opened.package(opened.compile(graph)))
        strange = tmp_path / "strange"
        strange.write_bytes(device.get(name, device["lib/libonnxruntime.so.1.31.1"]).read_bytes() + b"\0")
        foreign = bundle_of(tmp_path, opened, graph, wanted, device=device | {name: strange})
        with pytest.raises(BundleError, match=f"device/{name} of the bundle is not what"):
            opened.selftest(foreign, graph, trusted=False)
        assert opened.selftest(foreign, graph, trusted=True).ok


def test_a_bundle_whose_library_is_gone_is_damaged(graph: Artifact, wanted: np.ndarray, tmp_path: Path) -> None:
    with open_target(local(runtime="onnxruntime")) as opened:
        assert isinstance(opened, TvmRpc)
        whole = bundle_of(tmp_path, opened, graph, wanted)
        (whole / "device" / "lib" / "libonnxruntime.so.1.31.1").unlink()
        assert runner(opened, whole, "--selftest")["code"] == 4


# --- choices

INTERVALS = st.floats(0.01, 100).map(lambda middle: Interval(p50=middle, low=0.9 * middle, high=1.1 * middle))
CHOICES = st.builds(
    Choice,
    chosen=st.sampled_from(["tvm", "onnxruntime"]),
    graph=st.text(),
    times=st.none() | INTERVALS,
    refused=st.text(),
)


@given(CHOICES)
def test_a_choice_survives_json(choice: Choice) -> None:
    assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice


def seen(candidate: int, reference: int) -> Measurement:
    calls = [Calls(elapsed=(each,) * 8, on_cpu=(each,) * 8, preempted=(0,) * 8) for each in (candidate, reference)]
    facts = {"profile_digest": "p", "artifact_sha256": "a", "reference_sha256": "r", "conditions": {}, "taken_at": ""}
    session = Session(candidate=calls[0], reference=calls[1])
    return Measurement(**facts, sessions=(session,) * 2, seconds=1.0, metric="emulated_instructions", emulated=True)


@pytest.mark.parametrize(
    ("tvm", "onnxruntime_", "chosen", "factor"),
    [(1_000_000, 2_000_000, "tvm", 2.0), (3_000_000, 1_000_000, "onnxruntime", 3.0), (1000, 1000, "tvm", 1.0)],
)
def test_the_faster_is_chosen_and_the_other_takes_so_many_times_as_much(
    tvm: int, onnxruntime_: int, chosen: str, factor: float
) -> None:
    choice = choice_from(seen(tvm, onnxruntime_), "graph")
    assert choice.chosen == chosen
    assert choice.times is not None
    assert choice.times.p50 == pytest.approx(factor)
    assert choice.times.low <= choice.times.p50 <= choice.times.high


def test_what_is_chosen_already_is_not_chosen_again() -> None:
    choice = choice_from(seen(2_000_000, 1_000_000), "graph", "tvm")
    assert choice.chosen == "tvm"
    assert note_of(choice) == "in onnxruntime this model takes 0.5 times as much as in tvm (0.5 to 0.5)"


def test_choices_are_kept_apart_by_what_they_depend_on() -> None:
    choice = Choice(chosen="tvm", graph="g", times=None, refused="no")
    mine, other = Choices({"board": "a"}), Choices({"board": "b"})
    assert mine.keep(choice) == choice
    assert mine.known("g") == choice
    assert mine.known("h") is None
    assert other.known("g") is None


@pytest.mark.parametrize("content", ["", "{}", '{"chosen": "fastest", "graph": "g", "times": null}', "[1]", "\0"])
def test_a_choice_that_cannot_be_read_is_made_again(content: str) -> None:
    choices = Choices({"board": "a"})
    choices.keep(Choice(chosen="tvm", graph="g", times=None))
    choices.place("g").write_text(content)
    assert choices.known("g") is None
