"""Tuning on a board of this machine, from a single search to whole deploys through the command line."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edgeprune[tvm]'")

import tiny_project
from board_programs import HERE, programs, server
from contract import convnet
from test_tvm_rpc import NATIVE, address, local, opened
from tuning_nets import GRAPH, conv, heavy, product, search_for, space_of
from tvm_on_host import host_cpu

from edgeprune.artifact import Artifact
from edgeprune.bundle import open_bundle
from edgeprune.cli import main
from edgeprune.errors import DeviceLost, ProfileError
from edgeprune.profile import Profile
from edgeprune.target import Tuner, open_target
from edgeprune.targets._engine_cache import kept_in
from edgeprune.targets._tvm.engine import read_engine
from edgeprune.targets._tvm.lower import lower
from edgeprune.targets._tvm.records import Record, Records, Trial, Verdict
from edgeprune.targets._tvm.space import choices
from edgeprune.targets._tvm.tiles import Tile
from edgeprune.targets._tvm.tuning import OURS, Search
from edgeprune.targets._tvm.winners import network_record, tuned
from edgeprune.targets._tvm_rpc_compile import _records
from edgeprune.targets._tvm_rpc_search import Tuning
from edgeprune.targets._tvm_rpc_tune import Tries, tune
from edgeprune.targets.tvm_rpc import TvmRpc

Command = Callable[..., tuple[int, str]]


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

    return Tries(ask=ask, layers=target._layers, run=target.run, timed=target._timed, forget=target._facts)


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
    verdict = known(search).verdicts[4]
    assert verdict.trial is not None
    assert verdict.ratio[verdict.trial][2] < 1
    best = tuned(search.program, host_cpu(), search.records, 4)
    assert search.records.read(network_record(GRAPH, best)).verdicts[4].trial == 0
    again = replace(tries(board, search), layers=never, run=never, timed=never)
    tune(graph, {}, again, ignore)
    assert known(search).verdicts == {4: verdict}


def known(search: Search) -> Record:
    return search.records.read(heavy(search.program), space_of(search.program))


def test_a_schedule_that_answers_otherwise_is_not_taken(board: TvmRpc, tmp_path: Path, graph: Artifact) -> None:
    def spoiled(engine: Artifact, inputs: Any) -> Any:
        return {name: each if name == OURS else each + 1 for name, each in board.run(engine, inputs).items()}

    search = search_for(lower(product(), host_cpu()), tmp_path, trials=2)
    tune(graph, {}, replace(tries(board, search), run=spoiled), ignore)
    record = known(search)
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
    board.tune(graph, never)  # its profile asks for none
    assert board.compile(graph).sha256 == plain.sha256


def test_winners_are_in_the_engine_and_in_what_a_bundle_holds(
    board: TvmRpc, graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache(tmp_path, monkeypatch)
    image = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    plain = board.compile(graph)
    with opened(local(tune=1)) as target:
        names = all_win(graph, Records(folder=records_of(target)))
        engine = target.compile(graph)
        assert {call.kernel for call in read_engine(engine.path).script.calls} == names
        assert engine.sha256 != plain.sha256
        assert target.package(engine)["engine.so"] == engine.path
        np.testing.assert_allclose(target.run(engine, image)["y"], board.run(plain, image)["y"], rtol=1e-4, atol=1e-4)
    with opened(local(tune=1)) as target:
        assert target.compile(graph).sha256 == engine.sha256


def records_of(target: TvmRpc) -> Path:
    tuning = target._tuning()
    assert tuning is not None
    return _records({"kernels": str(kept_in("tvm"))}, tuning).folder


def all_win(graph: Artifact, records: Records) -> set[str]:
    """Write that the last choice of every kernel won one trial, and return the kernels of the tuned network."""
    ratio = {0: (0.8, 0.7, 0.9)}
    program = lower(onnx.load(graph.path), host_cpu())
    for name, kernel in program.kernels.items():
        if space := choices(kernel, host_cpu()):
            trial = Trial(choice=space[-1][0], ratio=0.8)
            records.write(name, Record(trials=(trial,), verdicts={1: Verdict(trial=0, ratio=ratio)}))
    best = tuned(program, host_cpu(), records, 1)
    records.write(network_record(graph.sha256, best), Record(verdicts={1: Verdict(trial=0, ratio=ratio)}))
    assert best.kernels.keys() != program.kernels.keys()
    return set(best.kernels)


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
    whole = [json.loads(each.read_bytes())["record"] for each in tmp_path.rglob("tuning/*/k*.json")]
    assert len(whole) > 1
    assert all("2" in each["verdicts"] for each in whole)


def after(calls: int, act: Callable[[], object]) -> Callable[[float, str], None]:
    """Return a listener that acts when it is told something for so many times."""
    left = [calls]

    def told(_share: float, _note: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    return told


@pytest.mark.parametrize("trials", [-1, 1.5, True, "many"])
def test_a_number_of_trials_is_a_whole_number(trials: object) -> None:
    with pytest.raises(ProfileError, match="tune is"), open_target(local(tune=trials)):
        pass


# --- through the command line


BOARD = f"""
[targets.board]
profile = "arm-emulated"
arch = "{HERE}"
[targets.board.options]
board = "local"
cpu = "{NATIVE}"
slow_limit = 20.0
"""


@pytest.fixture
def edgeprune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Return a way to call the command in a small project, with records that start empty; it returns code and words."""
    own_cache(tmp_path, monkeypatch)
    config = tiny_project.write_project(tmp_path / "project", ("steps = 12", "steps = 2"), ("trials = 6", "trials = 1"))
    config.write_text(config.read_text() + BOARD)
    monkeypatch.chdir(config.parent)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["edgeprune", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code or 0, capfd.readouterr().err

    return call


def test_a_deploy_tunes_the_unpruned_model_and_the_result(
    edgeprune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[str] = []
    tune_one = TvmRpc.tune

    def listening(self: TvmRpc, graph: Artifact, progress: Callable[[float, str], None]) -> None:
        noted.append(graph.path.name)
        tune_one(self, graph, progress)

    monkeypatch.setattr(TvmRpc, "tune", listening)
    _, said = edgeprune("deploy", "--target", "board", "--budget", "0.9x", "--tune", "1")
    assert "tune the kernels done" in said
    assert noted[0] == "baseline.onnx"
    assert set(noted[1:]) == {"model.onnx"}
    [bundle] = [each.parent for each in tmp_path.rglob("dist/*/manifest.json") if each.parent.suffix != ".run"]
    with open_bundle(bundle) as whole:
        assert Profile.from_json(whole.manifest.profile).options["tune"] == 1
    code, said = edgeprune("verify", str(bundle), "--no-remeasure", "--tune", "1")
    assert code == 0, said
    assert records(tmp_path)


def test_measure_tunes_what_it_measures_and_searches_nothing_the_second_time(
    edgeprune: Command, graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = ("measure", "--target", "board", "--seconds", "0.3", "--tune", "1", str(graph.path))
    code, said = edgeprune(*measure)
    assert code == 0, said
    known = records(tmp_path)
    assert known
    assert all("1" in json.loads(each)["record"]["verdicts"] for each in known.values())
    monkeypatch.setattr("edgeprune.targets._tvm_rpc_tune._costs", never)
    monkeypatch.setattr("edgeprune.targets._tvm_rpc_tune._ratios", never)
    code, said = edgeprune(*measure)
    assert code == 0, said
    assert records(tmp_path) == known


def test_an_emulated_board_refuses_to_be_tuned(edgeprune: Command, graph: Artifact) -> None:
    code, said = edgeprune("measure", "--target", "arm-emulated", "--tune", "2", str(graph.path))
    assert code == ProfileError.exit_code
    assert "kernels cannot be tuned on an emulated board" in said
    assert "leave out --tune" in said


def records(folder: Path) -> dict[str, bytes]:
    """Return what is kept of searches."""
    return {each.name: each.read_bytes() for each in folder.rglob("tuning/*/*.json")}
