"""A search for faster schedules: what it may choose, what it keeps, and that only a kernel that is faster is taken."""

import os
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edgeprune[tvm]'")

import tiny_project
from board_programs import HERE, programs, server
from contract import convnet
from test_tvm_rpc import NATIVE, address, local, opened
from tvm_on_host import feeds_of, host_cpu, model_of, normal

from edgeprune.artifact import Artifact
from edgeprune.bundle import open_bundle
from edgeprune.deploy import deploy
from edgeprune.errors import DeviceLost, ProfileError
from edgeprune.intake.config import load_config
from edgeprune.profile import Profile, load_profile
from edgeprune.stages.prepare import Request
from edgeprune.target import Tuner, open_target
from edgeprune.targets._tvm.cache import KernelCache, library
from edgeprune.targets._tvm.cpus import Cpu, cpu_of
from edgeprune.targets._tvm.engine import read_engine
from edgeprune.targets._tvm.host import OnHost
from edgeprune.targets._tvm.lower import lower
from edgeprune.targets._tvm.program import Program
from edgeprune.targets._tvm.schedule import Choice, scheduled
from edgeprune.targets._tvm.tensorir import tvm_ffi
from edgeprune.targets._tvm.tiles import Tile
from edgeprune.targets._tvm.tuning import (
    OURS,
    Record,
    Records,
    Search,
    Task,
    Trial,
    Verdict,
    choices,
    chosen,
    draw,
    graph_record,
    traces,
    tuned,
    tuned_name,
)
from edgeprune.targets._tvm_rpc_tune import Tries, tune
from edgeprune.targets._tvm_rpc_tuning import Tuning
from edgeprune.targets.tvm_rpc import TvmRpc
from edgeprune.verify import verify

GRAPH = "12" * 32
TRIAL = Trial(choice=Choice(tile=Tile(blocks=2, pixels=4), order="yox"), trace="[]", ratio=0.75)


def conv(channels: int = 32, side: int = 8, kernel: int = 3, group: int = 1) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[kernel // 2] * 4, group=group),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    weight = normal(channels, channels // group, kernel, kernel)
    return model_of(nodes, {"x": (1, channels, side, side)}, ["y"], {"w": weight})


def product() -> onnx.ModelProto:
    return model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (12, 32)}, ["y"], {"w": normal(32, 48)})


def heavy(program: Program) -> str:
    """Return the name of the kernel whose first argument is the network's input."""
    return program.steps[0].kernel


def search_for(program: Program, folder: Path, trials: int = 4, cpu: Cpu | None = None) -> Search:
    return Search(
        program=program,
        cpu=cpu or host_cpu(),
        arch=HERE,
        records=Records(folder=folder / "records"),
        graph=GRAPH,
        trials=trials,
        kernels=KernelCache(folder=folder / "kernels"),
        folder=folder,
    )


# --- the space


MODELS = [conv(), conv(group=32), conv(kernel=1), product()]
CPUS = [host_cpu(), cpu_of("aarch64", "cortex-a72"), cpu_of("aarch64", "cortex-a76", "fp16")]


@pytest.mark.parametrize("cpu", CPUS, ids=lambda each: f"{each.name} {each.dtype}")
@pytest.mark.parametrize("model", MODELS, ids=["dense", "depthwise", "pointwise", "product"])
def test_every_choice_is_a_schedule_that_its_trace_gives_again(model: onnx.ModelProto, cpu: Cpu) -> None:
    program = lower(model, cpu)
    name = heavy(program)
    kernel = program.kernels[name]
    found = [each for each, _ in choices(kernel, cpu)]
    assert found
    assert Choice(tile=kernel.plan.tile) not in found
    assert len(set(found)) == len(found)
    drawn = random.Random(0).sample(found, min(10, len(found)))
    texts = traces(name, kernel, cpu, drawn)
    assert len(texts) == len(drawn)
    for text, again in zip(texts, traces(name, kernel, cpu, drawn), strict=True):
        one, other = (scheduled(replace(kernel, trace=each), cpu) for each in (text, again))
        assert tvm_ffi.structural_equal(one, other)
    assert len({tvm_ffi.structural_hash(scheduled(replace(kernel, trace=text), cpu)) for text in texts}) > 1


def test_a_tile_leaves_registers_for_what_it_reads() -> None:
    cpu = cpu_of("aarch64", "cortex-a72")
    program = lower(conv(channels=64, side=24), cpu)
    for each, weight in choices(program.kernels[heavy(program)], cpu):
        pixels = each.tile.rows * each.tile.pixels
        assert (each.tile.blocks + 1) * pixels + each.tile.blocks <= 32
        assert weight > 0


def test_a_kernel_without_a_tile_leaves_no_choice() -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["y"])]
    program = lower(model_of(nodes, {"x": (4, 16)}, ["y"]), host_cpu())
    assert all(choices(each, host_cpu()) == [] for each in program.kernels.values() if each.plan.kind == "map")


@pytest.mark.parametrize("model", MODELS, ids=["dense", "depthwise", "pointwise", "product"])
def test_another_schedule_answers_the_same(model: onnx.ModelProto) -> None:
    cpu = host_cpu()
    program, feeds = lower(model, cpu), feeds_of(model)
    plain = OnHost(program, {name: library(name, each, cpu, 0)[name] for name, each in program.kernels.items()})
    [wanted] = plain.outputs(feeds).values()
    name = heavy(program)
    kernel = program.kernels[name]
    drawn = random.Random(1).sample([each for each, _ in choices(kernel, cpu)], 4)
    for trace in traces(name, kernel, cpu, drawn):
        kernels = {**program.kernels, name: replace(kernel, trace=trace)}
        other = OnHost(program, {own: library(own, each, cpu, 0)[own] for own, each in kernels.items()})
        [seen] = other.outputs(feeds).values()
        np.testing.assert_allclose(seen, wanted, rtol=1e-5, atol=1e-5)


def test_nothing_is_drawn_twice_and_the_same_is_drawn_again() -> None:
    program = lower(conv(), host_cpu())
    options = choices(program.kernels[heavy(program)], host_cpu())
    first = draw(options, Record(), 8, "seed")
    assert first == draw(options, Record(), 8, "seed")
    known = Record(trials=tuple(Trial(choice=each, trace="", ratio=1.0) for each in first))
    rest = draw(options, known, 10_000, "seed")
    assert len(first) == 8
    assert sorted(map(str, [*first, *rest])) == sorted(str(each) for each, _ in options)


# --- records


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    verdicts = {8: Verdict(trial=None), 16: Verdict(trial=0, ratio={0: (0.8, 0.7, 0.9)})}
    record = Record(trials=(TRIAL, replace(TRIAL, ratio=None, failed="refused")), verdicts=verdicts)
    Records(folder=tmp_path / "new").write("k1", record)
    assert Records(folder=tmp_path / "new").read("k1") == record
    assert Records(folder=tmp_path / "new").read("k2") == Record()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"null", b"\xff", None])
def test_a_damaged_record_is_none(tmp_path: Path, damage: bytes | None) -> None:
    records = Records(folder=tmp_path)
    records.write("k1", Record(trials=(TRIAL,)))
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0.75", b"0.25") if damage is None else damage)
    assert records.read("k1") == Record()


def test_a_winner_gets_a_name_of_its_own_and_stays_what_it_is_when_more_is_tried(tmp_path: Path) -> None:
    program, records = lower(conv(), host_cpu()), Records(folder=tmp_path)
    name = heavy(program)
    kernel = program.kernels[name]
    [trace] = traces(name, kernel, host_cpu(), draw(choices(kernel, host_cpu()), Record(), 1, ""))
    record = Record(trials=(replace(TRIAL, trace=trace),), verdicts={1: Verdict(trial=0)})
    records.write(name, record)
    first = tuned(program, records, 1)
    assert tuned_name(name, trace) != name
    assert heavy(first) == tuned_name(name, trace)
    assert first.kernels[heavy(first)] == replace(kernel, trace=trace)
    assert [each.buffers for each in first.steps] == [each.buffers for each in program.steps]
    more = replace(record, trials=(*record.trials, TRIAL), verdicts={**record.verdicts, 2: Verdict(trial=1)})
    records.write(name, more)
    assert tuned(program, records, 1) == first
    assert tuned(program, records, 3) == program


# --- the search


def batch_of(search: Search) -> Task:
    task = search.next_task()
    assert task is not None
    assert not task.finalists
    return task


def test_a_batch_runs_ours_and_every_trial_on_the_same_inputs(tmp_path: Path) -> None:
    search = search_for(lower(product(), host_cpu()), tmp_path)
    task = batch_of(search)
    script = read_engine(task.engines[0]).script
    assert [call.layer for call in script.calls] == [OURS, "0", "1", "2", "3"]
    assert len({call.slots[:-1] for call in script.calls}) == 1
    assert len({call.slots[-1] for call in script.calls}) == 5
    assert len({call.kernel for call in script.calls}) == 5


def test_only_the_fastest_that_were_right_are_compared_once_more(tmp_path: Path) -> None:
    search = search_for(lower(product(), host_cpu()), tmp_path)
    search.tried(batch_of(search), {OURS: 10.0, "0": 5.0, "1": 8.0, "2": 9.0, "3": 11.0}, {"0": "off by 3"})
    record = search.records.read(heavy(search.program))
    assert [each.ratio for each in record.trials] == [None, 0.8, 0.9, 1.1]
    assert record.trials[0].failed == "off by 3"
    task = search.next_task()
    assert task is not None
    assert task.finalists == (1, 2)
    assert len(task.engines) == 3


@pytest.mark.parametrize(
    ("ratios", "winner"),
    [
        ([(0.9, 0.85, 0.95), (0.8, 0.7, 0.9)], 1),
        ([(0.9, 0.85, 0.95), (0.8, 0.5, 1.1)], 0),
        ([(0.99, 0.97, 1.01), (1.0, 0.9, 1.1)], None),
    ],
)
def test_a_kernel_is_taken_only_if_the_whole_interval_is_faster(
    tmp_path: Path, ratios: list[tuple[float, float, float]], winner: int | None
) -> None:
    search = search_for(lower(product(), host_cpu()), tmp_path, trials=2)
    search.tried(batch_of(search), {OURS: 10.0, "0": 8.0, "1": 9.0}, {})
    task = search.next_task()
    assert task is not None
    search.judged(task, ratios)
    assert search.records.read(task.kernel).verdicts[2].trial == winner
    last = search.next_task()
    assert (last is None) == (winner is None)
    assert last is None or last.whole


@pytest.mark.parametrize(("ratio", "taken"), [((0.95, 0.93, 0.97), True), ((0.99, 0.97, 1.01), False)])
def test_winners_are_used_only_where_the_whole_network_is_faster_with_them(
    tmp_path: Path, ratio: tuple[float, float, float], taken: bool
) -> None:
    search = search_for(lower(product(), host_cpu()), tmp_path, trials=2)
    search.tried(batch_of(search), {OURS: 10.0, "0": 8.0, "1": 9.0}, {})
    final = search.next_task()
    assert final is not None
    search.judged(final, [(0.8, 0.7, 0.9), (0.9, 0.8, 1.0)])
    whole = search.next_task()
    assert whole is not None
    assert whole.whole
    assert [len(read_engine(each).script.calls) for each in whole.engines] == [len(search.program.steps)] * 2
    assert chosen(search.program, search.records, 2, GRAPH) == search.program
    search.judged(whole, [ratio])
    assert search.next_task() is None
    assert (chosen(search.program, search.records, 2, GRAPH) != search.program) is taken
    assert chosen(search.program, search.records, 2, "34" * 32) == search.program


def test_a_trial_that_cannot_be_compiled_is_noted_and_the_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = search_for(lower(product(), host_cpu()), tmp_path, trials=2)

    def nonsense(*arguments: Any) -> list[str]:
        return ['[[["Nothing", [], [], []]], []]', *traces(*arguments)[1:]]

    monkeypatch.setattr("edgeprune.targets._tvm.tuning.traces", nonsense)
    task = batch_of(search)
    assert [bool(each.failed) for each in task.trials] == [True, False]
    search.tried(task, {OURS: 10.0, "0": 9.0}, {})
    assert [each.ratio for each in search.records.read(task.kernel).trials] == [None, 0.9]


# --- on a board of this machine


@pytest.fixture(scope="module")
def board() -> Any:
    programs()
    with opened(local()) as target:
        yield target


def tries(target: TvmRpc, search: Search) -> Tries:
    """Return the measurements of a board for a search that runs here."""
    tuning = Tuning(search)

    def ask(request: Mapping[str, Any], _doing: str) -> tuple[Mapping[str, Any], Any]:
        return tuning.next(request.get("told")), None

    return Tries(ask=ask, layers=target._layers, run=target.run, timed=target._timed)


def ignore(_share: float, _note: str) -> None:
    pass


def never(*_: object) -> Any:
    raise AssertionError("nothing is measured again")


@pytest.fixture
def graph(tmp_path: Path) -> Artifact:
    return convnet(tmp_path / "net.onnx", (16,), side=8)


def test_a_deliberately_bad_schedule_is_improved_and_what_is_known_is_not_measured_again(
    board: TvmRpc, tmp_path: Path, graph: Artifact
) -> None:
    program = lower(conv(channels=64, side=16), host_cpu())
    name = heavy(program)
    bad = replace(program.kernels[name], plan=replace(program.kernels[name].plan, tile=Tile()))
    search = search_for(replace(program, kernels={**program.kernels, name: bad}), tmp_path)
    tune(graph, {}, tries(board, search), ignore)
    verdict = search.records.read(name).verdicts[4]
    assert verdict.trial is not None
    assert verdict.ratio[verdict.trial][2] < 1
    assert search.records.read(graph_record(GRAPH)).verdicts[4].trial == 0
    again = replace(tries(board, search), layers=never, run=never, timed=never)
    tune(graph, {}, again, ignore)
    assert search.records.read(name).verdicts == {4: verdict}


def test_a_schedule_that_answers_otherwise_is_not_taken(board: TvmRpc, tmp_path: Path, graph: Artifact) -> None:
    def spoiled(engine: Artifact, inputs: Any) -> Any:
        return {name: each if name == OURS else each + 1 for name, each in board.run(engine, inputs).items()}

    search = search_for(lower(product(), host_cpu()), tmp_path, trials=2)
    tune(graph, {}, replace(tries(board, search), run=spoiled), ignore)
    record = search.records.read(heavy(search.program))
    assert all("off by 1.00e+00" in each.failed for each in record.trials)
    assert record.verdicts == {2: Verdict(trial=None)}


def test_a_tuned_engine_answers_as_ours_and_is_the_same_every_time(
    board: TvmRpc, graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache(tmp_path, monkeypatch)
    image = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    plain = board.compile(graph)
    shares: list[float] = []
    with opened(local(tune=2)) as target:
        assert isinstance(target, Tuner)
        target.tune(graph, lambda share, _: shares.append(share))
        engine = target.compile(graph)
        np.testing.assert_allclose(
            target.run(engine, {"x": image})["y"], board.run(plain, {"x": image})["y"], rtol=1e-4, atol=1e-4
        )
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    with opened(local(tune=2)) as target:
        monkeypatch.setattr(target, "_layers", never)
        monkeypatch.setattr(target, "_timed", never)
        target.tune(graph, ignore)
        assert target.compile(graph).sha256 == engine.sha256
    with opened(local()) as target:
        target.tune(graph, never)  # the profile asks for none
        assert target.compile(graph).sha256 == plain.sha256


def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let records start empty; the programs of boards stay those that are built."""
    (folder / "edgeprune").mkdir()
    (folder / "edgeprune" / "emulated").symlink_to(programs().parent)
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", str(folder))


def test_a_board_lost_in_the_middle_is_lost_and_the_search_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache(tmp_path, monkeypatch)
    graph = convnet(tmp_path / "two.onnx", (16, 32), side=8)
    with ExitStack() as stack:
        port, process = stack.enter_context(server(tmp_path / "uploads"))
        with opened(local(address(port), tune=2)) as target:
            with pytest.raises(DeviceLost):
                target.tune(graph, after(2, process.kill))
            process.wait()
            kept = {each.name: each.read_bytes() for each in tmp_path.rglob("tuning/*/*.json")}
            assert kept
            stack.enter_context(server(tmp_path / "uploads", "--port", str(port)))
            shares: list[float] = []
            target.tune(graph, lambda share, _: shares.append(share))
            assert shares[0] > 0
    assert len(list(tmp_path.rglob("tuning/*/k*.json"))) > 1
    assert len(list(tmp_path.rglob("tuning/*/graph-*.json"))) == 1


def after(calls: int, act: Callable[[], object]) -> Callable[[float, str], None]:
    """Return a listener that acts when it is told something for so many times."""
    left = [calls]

    def told(_share: float, _note: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    return told


def test_an_emulated_board_is_not_tuned() -> None:
    wanted = load_profile("arm-emulated", {"options": {"tune": 4}})
    with pytest.raises(ProfileError, match="cannot be tuned on an emulated board"), open_target(wanted):
        pass


@pytest.mark.parametrize("trials", [-1, 1.5, True, "many"])
def test_a_number_of_trials_is_a_whole_number(trials: object) -> None:
    with pytest.raises(ProfileError, match="tune is"), open_target(local(tune=trials)):
        pass


def test_a_deploy_tunes_the_unpruned_model_and_the_result_and_its_bundle_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache(tmp_path, monkeypatch)
    board = f'[targets.board]\nprofile = "arm-emulated"\narch = "{HERE}"\n[targets.board.options]\n'
    board += f'board = "local"\ncpu = "{NATIVE}"\nslow_limit = 20.0\n'
    config = tiny_project.write_project(tmp_path / "project", ("[targets.toy]", f"{board}[targets.toy]"))
    wanted = load_config(
        config, {"budget.latency": "0.9x", "search.trials": 1, "finetune.steps": 2}, {"board": {"tune": 1}}
    )
    tuned_graphs: list[str] = []
    tune_one = TvmRpc.tune

    def noted(self: TvmRpc, graph: Artifact, progress: Callable[[float, str], None]) -> None:
        tuned_graphs.append(graph.path.name)
        tune_one(self, graph, progress)

    monkeypatch.setattr(TvmRpc, "tune", noted)
    outcome = deploy(Request(config=wanted, target="board", out=tmp_path / "out"))
    assert tuned_graphs[0] == "baseline.onnx"
    assert set(tuned_graphs[1:]) == {"model.onnx"}
    with open_bundle(Path(outcome.bundle)) as whole:
        profile = Profile.from_json(whole.manifest.profile)
    assert profile.options["tune"] == 1
    with open_target(profile) as target:
        report = verify(Path(outcome.bundle), profile=profile, target=target, remeasure=False)
    assert {each.name for each in report.checks if each.ok} >= {"parity", "device", "profile"}
    assert load_config(config).profile("board").digest != profile.digest
