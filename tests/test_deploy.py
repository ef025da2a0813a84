"""From a model to a verified bundle on the formula; killed, unplugged and resumed on the way, with the same end."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_project
from pydantic import TypeAdapter

from edgeprune.budget import Budget, Latency
from edgeprune.bundle import open_bundle
from edgeprune.canonical import file_sha256
from edgeprune.deploy import deploy
from edgeprune.errors import BudgetError, DataError, DeviceBusy, DeviceLost, Interrupted, LedgerError, NothingFits
from edgeprune.intake.config import load_config
from edgeprune.ledger import Incident, Ledger
from edgeprune.manifest import Name
from edgeprune.outcome import Outcome
from edgeprune.progress import Silent
from edgeprune.run_lock import RunLock
from edgeprune.search.settle import settle
from edgeprune.stages.deliver import uncounted
from edgeprune.stages.prepare import Request, run_name
from edgeprune.target import open_target
from edgeprune.trial import Trial
from edgeprune.verify import verify

QUICK = (("steps = 12", "steps = 0"), ("trials = 6", "trials = 2"))
"""For deploys whose end does not matter."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A deploy that ended, and what it left."""

    outcome: Outcome
    trials: list[Trial]
    incidents: list[Incident]
    facts: dict[str, Any]

    @property
    def plan(self) -> str:
        """Return the digest of the plan in the bundle."""
        with open_bundle(Path(self.outcome.bundle)) as bundle:
            return bundle.manifest.plan_digest


def request(config: Path, out: Path, **changes: Any) -> Request:
    """Return a request that waits for nothing."""
    settings = {"target": "toy", "out": out, "sleep": lambda _: None} | changes
    return Request(config=load_config(config), **settings)


def done(outcome: Outcome) -> Done:
    """Return what the ledger of a finished run says."""
    with Ledger.open(Path(outcome.run_dir) / "ledger.sqlite", read_only=True) as ledger:
        run = ledger.runs()[-1]
        names = ("outcome", "final_measurement", "baseline", "baseline_quality", "test")
        facts = {name: ledger.fact(run, name) for name in names}
        return Done(outcome=outcome, trials=ledger.trials(run), incidents=ledger.incidents(run), facts=facts)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_project.write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Return the deploy that nothing disturbed."""
    return done(deploy(request(config, tmp_path_factory.mktemp("dist"))))


# -- the whole line --------------------------------------------------------------------------------------------------


def test_the_budget_is_met_and_the_bundle_proves_it(finished: Done, config: Path) -> None:
    """The upper end of the interval is under the limit, and verifying the bundle agrees on every count."""
    outcome = finished.outcome
    assert outcome.budget.met
    assert outcome.result.ratio.high <= 0.5
    assert outcome.budget.used == pytest.approx(outcome.result.ratio.p50 / 0.5)
    profile = load_config(config).profile("toy")
    with open_target(profile) as target:
        for place in (outcome.bundle, outcome.archive):
            seen = verify(Path(place), profile=profile, target=target, baseline=Path(outcome.run_dir) / "baseline.onnx")
            assert seen.ok, seen
    assert Path(outcome.report).stat().st_size > 10_000


def test_what_is_reported_is_what_the_ledger_holds(finished: Done) -> None:
    """Outcome, final timing, accuracies and counts, row by row."""
    outcome, facts = finished.outcome, finished.facts
    assert Outcome.from_json(facts["outcome"]) == outcome
    final, trials = facts["final_measurement"], finished.trials
    assert final["artifact_sha256"] == file_sha256(Path(outcome.bundle) / "model.onnx")
    assert facts["test"]["baseline"] == outcome.baseline.accuracy
    assert facts["test"]["result"] == outcome.result.accuracy
    assert facts["baseline_quality"]["quality"]["accuracy"] == outcome.baseline.validation["baseline"]
    assert [each.number for each in trials if each.phase == "search"] == list(range(outcome.trials)) == list(range(6))
    measured = sum(each.measurement is not None and not each.cached for each in trials)
    assert outcome.measurements == 2 + measured
    settled = [each for each in trials if each.phase == "settle" and each.plan.digest == finished.plan]
    assert settled
    assert settled[-1].quality.accuracy == outcome.result.validation["cut"]


@pytest.mark.parametrize("widths", ["plan", "latency"])
def test_decay_ships_the_widths_it_was_asked_for(widths: str, tmp_path: Path) -> None:
    """Stopped while channels decay and continued: within the budget, and the bundle's plan is that of its weights."""
    decay = f'[finetune.decay]\nsteps = 3\nshare = 0.6\nwidths = "{widths}"\n[measure]'
    changes = (("[measure]", decay), ("[finetune]", '[finetune]\nmethod = "decay"\ncheckpoint_s = 1e-9'))
    config = tiny_project.write_project(tmp_path / "project", *changes)
    stop = StopAfter("finetune-", tmp_path / "dist", reports=4)
    with pytest.raises(Interrupted):
        deploy(request(config, tmp_path / "dist", stop=stop))
    outcome = deploy(request(config, tmp_path / "dist", progress=(told := Told())))
    assert any("fine-tuning continues at step" in each for each in told.said)
    assert outcome.budget.met
    graph = onnx.load(Path(outcome.bundle) / "model.onnx")
    shapes = {each.name: each.dims for each in graph.graph.initializer}
    with open_bundle(Path(outcome.bundle)) as bundle:
        kept = {name: len(units) for name, units in bundle.manifest.plan.items()}
    for change in outcome.widths:
        assert kept[change.group] == change.after
        name = f"{change.group}.weight"
        assert name not in shapes or shapes[name][0] == change.after  # a branch that is gone has no weights
    settled = [each.plan.widths for each in done(outcome).trials if each.phase == "settle"]
    assert widths == "latency" or kept in settled
    assert (outcome.importance, outcome.reconstruction) == ("group-norm", "none")  # the host's choice, not the search's
    assert set(outcome.result.validation) == {"baseline", "tuned"}


class Told(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class StopAfter:
    """Interrupts a run a few reports after a file of this name is there."""

    def __init__(self, name: str, out: Path, *, reports: int) -> None:
        self._name, self._out, self._left = name, out, reports

    def __call__(self) -> None:
        self._left -= any(self._out.glob(f"*.run/{self._name}*"))
        if not self._left:
            raise Interrupted("asked to stop")


def test_widths_are_those_of_the_shipped_graph(finished: Done) -> None:
    """Fewer parameters and less work, in the numbers and in the file."""
    outcome = finished.outcome
    assert {each.group for each in outcome.widths} >= {"stem.0", "block1.conv1", "block2.conv2"}
    assert any(each.after < each.before for each in outcome.widths)
    assert outcome.result.parameters < outcome.baseline.parameters == 72_500
    assert outcome.result.macs < outcome.baseline.macs
    assert outcome.result.size_bytes == (Path(outcome.bundle) / "model.onnx").stat().st_size
    assert sum(outcome.layer_shares.values()) == pytest.approx(1.0)


def test_the_same_request_again_measures_nothing_and_ships_the_same_bytes(finished: Done, config: Path) -> None:
    """A finished run is replayed from its ledger; only the wall seconds differ."""
    before = file_sha256(Path(finished.outcome.archive))
    again = done(deploy(request(config, Path(finished.outcome.run_dir).parent)))
    assert replace(again.outcome, seconds={}) == replace(finished.outcome, seconds={})
    assert again.trials == finished.trials
    assert again.facts["final_measurement"] == finished.facts["final_measurement"]
    assert file_sha256(Path(again.outcome.archive)) == before


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"\x08")])
def test_a_lost_baseline_graph_is_exported_again(
    finished: Done, config: Path, damage: Callable[[Path], object]
) -> None:
    """The file beside the ledger may be lost or damaged: the same bytes come back."""
    place = Path(finished.outcome.run_dir) / "baseline.onnx"
    before = file_sha256(place)
    damage(place)
    deploy(request(config, Path(finished.outcome.run_dir).parent))
    assert file_sha256(place) == before


def test_every_number_of_the_promised_json_is_there(finished: Done) -> None:
    """At least these, and all of it is plain JSON."""
    value = json.loads(json.dumps(finished.outcome.to_json(), allow_nan=False))
    for part in ("baseline", "result"):
        assert 0 < value[part]["accuracy_interval"]["low"] < value[part]["accuracy"] <= 1
        assert value[part]["test_images"] > 0
        assert value[part]["latency"].keys() >= {"p50", "low", "high"}
    assert value["result"]["ratio"].keys() >= {"p50", "low", "high"}
    assert value["budget"].keys() >= {"requested", "met", "used"}
    assert value["measurements"] > 0
    assert Path(value["bundle"]).is_dir()
    assert Path(value["report"]).is_file()


def test_a_winner_that_misses_once_fine_tuned_gives_way_to_another(
    finished: Done, config: Path, tmp_path: Path
) -> None:
    """As if the last timing had ended over the budget: another plan is fine-tuned, checked and shipped."""
    out = shutil.copytree(Path(finished.outcome.run_dir).parent, tmp_path / "dist")
    ledger_path = out / Path(finished.outcome.run_dir).name / "ledger.sqlite"
    with Ledger.open(ledger_path) as ledger:
        ledger.record(ledger.runs()[-1], "missed_once_tuned", {finished.plan: 0.51})
    again = done(deploy(request(config, out)))
    assert again.plan != finished.plan
    assert again.outcome.budget.met
    assert again.trials[: len(finished.trials)] == finished.trials
    assert again.facts["final_measurement"]["artifact_sha256"] != finished.facts["final_measurement"]["artifact_sha256"]
    retried = len(again.trials) - len(finished.trials)
    assert again.outcome.measurements == finished.outcome.measurements + retried + 1  # the refused one was timed too


def exhausted(bench: Any, problem: Any, trials: Any, sampling: Any, refused: Any, tell: Any) -> Any:
    """Settle one winner and no other."""
    if refused:
        raise NothingFits("nothing else is left")
    return settle(bench, problem, trials, sampling, refused, tell)


def test_when_nothing_else_is_left_the_plan_that_missed_is_delivered_as_missed(
    finished: Done, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is not thrown away: a bundle, and the truth about it; the same again the next time."""
    out = shutil.copytree(Path(finished.outcome.run_dir).parent, tmp_path / "dist")
    with Ledger.open(out / Path(finished.outcome.run_dir).name / "ledger.sqlite") as ledger:
        ledger.record(ledger.runs()[-1], "missed_once_tuned", {finished.plan: 0.51})

    monkeypatch.setattr("edgeprune.deploy.settle", exhausted)
    for _ in range(2):
        again = done(deploy(request(config, out)))
        assert again.plan == finished.plan
        assert Path(again.outcome.bundle).is_dir()


def test_widths_picked_anew_after_a_miss_are_trained_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is left: the same winner again, narrower by what it missed; it is not the run of its checkpoint."""
    decay = '[finetune.decay]\nsteps = 3\nshare = 0.6\nwidths = "latency"\n[measure]'
    changes = (("[measure]", decay), ("[finetune]", '[finetune]\nmethod = "decay"'))
    config, out = tiny_project.write_project(tmp_path / "project", *changes), tmp_path / "dist"
    first = done(deploy(request(config, out)))
    (settled,) = {each.plan.digest for each in first.trials if each.phase == "confirm"}
    with Ledger.open(Path(first.outcome.run_dir) / "ledger.sqlite") as ledger:
        ledger.record(ledger.runs()[-1], "missed_once_tuned", {settled: 0.65})
    monkeypatch.setattr("edgeprune.deploy.settle", exhausted)
    again = deploy(request(config, out))
    assert again.budget.met
    assert again.result.macs < first.outcome.result.macs


# -- budgets ---------------------------------------------------------------------------------------------------------


def test_a_budget_out_of_reach_names_one_that_can_be_met(tmp_path: Path) -> None:
    """Nothing fits; the budget that the error suggests fits."""
    out = tmp_path / "dist"
    config = tiny_project.write_project(tmp_path, *QUICK, ('"0.5x"', '"0.01x"'))
    with pytest.raises(NothingFits) as caught:
        deploy(request(config, out))
    assert re.search(r"narrowest plan takes 0\.\d+x \(.* formula units\)", caught.value.what)
    assert caught.value.why
    reachable = re.search(r"at least (\S+x)", caught.value.next_step)[1]
    assert not list(out.glob("*.tar"))
    config = tiny_project.write_project(tmp_path, *QUICK, ('"0.5x"', f'"{reachable}"'))
    assert deploy(request(config, out)).budget.met


def test_a_budget_in_milliseconds_is_a_limit_in_milliseconds(tmp_path: Path) -> None:
    """About half of the 0.28 ms that the formula gives the unpruned net; too little is said in milliseconds too.

    It is met when the upper end of the result's own milliseconds is under it; those spread more than a ratio does.
    """
    config = tiny_project.write_project(tmp_path, *QUICK, ('"0.5x"', '"0.14ms"'))
    outcome = deploy(request(config, tmp_path / "dist"))
    assert outcome.budget.requested == "0.14ms"
    assert outcome.budget.limit_ratio == pytest.approx(0.14 / outcome.baseline.latency.high, rel=0.01)
    assert outcome.budget.met
    assert outcome.result.latency.high <= 0.14
    assert outcome.budget.used == pytest.approx(outcome.result.latency.p50 / 0.14)
    config = tiny_project.write_project(tmp_path, *QUICK, ('"0.5x"', '"10us"'))
    with pytest.raises(NothingFits, match=r"0\.01ms is out of reach") as caught:
        deploy(request(config, tmp_path / "dist"))
    assert re.search(r"at least 0\.\d+ms", caught.value.next_step)


def changed_arrays(config: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Replace some arrays of a project's data."""
    path = config.with_name("images.npz")
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **arrays | change(arrays))


def test_a_model_at_chance_is_warned_of(tmp_path: Path) -> None:
    """Labels that have nothing to do with the images: it says so, in the run and on its page, and goes on."""
    config = tiny_project.write_project(tmp_path, *QUICK)
    rng = np.random.default_rng(0)
    changed_arrays(config, lambda arrays: {"train_labels": rng.permutation(arrays["train_labels"])})
    said: list[str] = []

    class Told(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    outcome = deploy(request(config, tmp_path / "dist", progress=Told()))
    (warned,) = outcome.warnings
    assert re.search(r"chance is (2|3)\d\.\d%", warned)
    assert f"warning: {warned}" in said
    assert warned.partition(":")[0] in Path(outcome.report).read_text()


def test_a_model_that_is_right_is_not_warned_of(finished: Done) -> None:
    assert finished.outcome.warnings == ()


def test_work_of_unknown_cost_is_said_to_be_missing_from_the_count(finished: Done) -> None:
    graph = onnx.load(finished.outcome.run_dir + "/baseline.onnx")
    assert uncounted(graph) == []
    graph.graph.node.append(onnx.helper.make_node("Einsum", ["a", "b"], ["c"], "strange", equation="ij,jk->ik"))
    assert uncounted(graph) == ["the MACs are at least so many: Einsum (strange) could not be counted"]


def test_a_run_that_continues_says_so(finished: Done, config: Path, tmp_path: Path) -> None:
    """Its stages look the same, but one would wonder at their speed."""
    out = shutil.copytree(Path(finished.outcome.run_dir).parent, tmp_path / "dist")
    deploy(request(config, out, progress=(told := Told())))
    assert any("is finished already" in each for each in told.said)
    with closing(sqlite3.connect(out / Path(finished.outcome.run_dir).name / "ledger.sqlite")) as ledger:
        ledger.execute("DELETE FROM facts WHERE name = 'outcome'")
        ledger.commit()
    deploy(request(config, out, progress=(told := Told())))
    assert any(re.match(r"continuing .*: \d+ of \d+ candidates are known", each) for each in told.said)


def test_two_validation_images_are_enough(tmp_path: Path) -> None:
    """A bundle records more samples than that; they are training images."""
    config = tiny_project.write_project(tmp_path, *QUICK, ("validation = 80", "validation = 2"))
    outcome = deploy(request(config, tmp_path / "dist"))
    with open_bundle(Path(outcome.bundle)) as bundle:
        assert bundle.manifest.parity.samples == 4


def test_too_few_training_images_are_refused_before_anything_is_searched(tmp_path: Path) -> None:
    """At the start of a run, not when its bundle is written."""
    config = tiny_project.write_project(tmp_path, *QUICK, ("validation = 80", "validation = 398"))
    with pytest.raises(DataError, match="only 2 training images"):
        deploy(request(config, tmp_path / "dist"))
    assert not (tmp_path / "dist").exists()


def test_a_bundle_says_how_pixels_become_its_input(tmp_path: Path, finished: Done) -> None:
    """Without mean and standard deviation nobody could use it; images that came normalised have none."""
    config = tiny_project.write_project(
        tmp_path, *QUICK, ("calibration = 64", "calibration = 64\nmean = [0.5]\nstd = [0.125]")
    )
    changed_arrays(
        config,
        lambda arrays: {
            name: np.clip(128 + 32 * arrays[name], 0, 255).astype(np.uint8) for name in ("train_images", "test_images")
        },
    )
    outcome = deploy(request(config, tmp_path / "dist"))
    with open_bundle(Path(outcome.bundle)) as bundle:
        facts = bundle.manifest.preprocessing
    assert facts is not None
    assert (facts.layout, facts.scale, facts.mean, facts.std) == ("N x C x H x W", 1 / 255, (0.5,), (0.125,))
    assert "(pixel / 255 - mean) / std of each channel, mean 0.5" in (Path(outcome.bundle) / "README.txt").read_text()
    with open_bundle(Path(finished.outcome.bundle)) as bundle:
        assert bundle.manifest.preprocessing is None


def test_a_budget_that_the_unpruned_model_meets_is_refused(tmp_path: Path) -> None:
    """There is nothing to prune for; the error says how fast it is already."""
    config = tiny_project.write_project(tmp_path, *QUICK, ('"0.5x"', '"5ms"'))
    with pytest.raises(BudgetError, match="meets 5ms already") as caught:
        deploy(request(config, tmp_path / "dist"))
    assert "it takes 0.2" in caught.value.why


def test_a_space_without_a_choice_is_refused_with_reasons(tmp_path: Path) -> None:
    """Excluding everything leaves nothing to decide."""
    config = tiny_project.write_project(tmp_path, *QUICK, ("[space]", '[space]\nexclude = ["*"]'))
    with pytest.raises(NothingFits, match="no layer of the model can be pruned") as caught:
        deploy(request(config, tmp_path / "dist"))
    assert "excluded by '*'" in caught.value.why


# -- the device fails ------------------------------------------------------------------------------------------------


def losing(folder: Path, *numbers: int) -> Path:
    """Write the project on a formula that is lost in these measurements of a connection."""
    return tiny_project.write_project(folder, ("block = 8", f"block = 8\nlose_at = {list(numbers)}"))


def test_a_lost_device_changes_neither_the_trials_nor_the_plan(tmp_path: Path, finished: Done) -> None:
    """Lost while timing the baseline, in the search, while settling: each is an incident, none a trial."""
    waits: list[float] = []
    disturbed = done(deploy(request(losing(tmp_path, 0, 2, 5, 10), tmp_path / "dist", sleep=waits.append)))
    assert [each.kind for each in disturbed.incidents] == ["DeviceLost"] * 4
    assert len(waits) == 4
    assert [(each.plan, each.score) for each in disturbed.trials] == [
        (each.plan, each.score) for each in finished.trials
    ]
    assert disturbed.plan == finished.plan
    assert disturbed.outcome.measurements == finished.outcome.measurements + 4


def test_a_device_that_stays_away_pauses_the_run_until_the_same_command_is_given_again(
    tmp_path: Path, finished: Done
) -> None:
    """Five losses in a row end a run; every resumed run gets further, to the same plan."""
    config, pauses, ended = losing(tmp_path, 3, 4, 5, 6, 7), [], None
    while ended is None and len(pauses) < 10:
        try:
            ended = deploy(request(config, tmp_path / "dist"))
        except DeviceLost as error:
            pauses.append(error.next_step)
    resumed = done(ended)
    assert len(pauses) >= 2
    assert all("resumes" in each for each in pauses)
    assert resumed.plan == finished.plan
    assert len(resumed.trials) == len(finished.trials)


# -- killed ----------------------------------------------------------------------------------------------------------


def rows(run: Path, query: str) -> list[tuple]:
    """Return what the ledger of a run holds now, nothing while there is none."""
    try:
        with closing(sqlite3.connect(f"file:{run}/ledger.sqlite?mode=ro", uri=True)) as connection:
            return connection.execute(query).fetchall()
    except sqlite3.OperationalError:
        return []


def run_folder(out: Path) -> Path:
    return next(iter(out.glob("*.run")), out / "none.run")


def holds(query: str, count: int = 1) -> Callable[[Path], bool]:
    return lambda out: len(rows(run_folder(out), query)) >= count


KILLED_WHEN: dict[str, Callable[[Path], bool]] = {
    "the graph is exported": holds("SELECT 1 FROM facts WHERE name = 'baseline.onnx'"),
    "the baseline is timed": holds("SELECT 1 FROM facts WHERE name = 'baseline'"),
    "two candidates are tried": holds("SELECT 1 FROM trials WHERE phase = 'search'", 2),
    "settling has begun": holds("SELECT 1 FROM trials WHERE phase = 'settle'"),
    "fine-tuning has begun": lambda out: any(run_folder(out).glob("finetune-*")),
    "the result is timed": holds("SELECT 1 FROM facts WHERE name = 'final_measurement'"),
}


def command(out: Path) -> list[str]:
    return [sys.executable, "-m", "edgeprune", "deploy", "--target", "toy", "--json", "--quiet", "--out", str(out)]


def killed_when(reached: Callable[[Path], bool], config: Path, out: Path) -> bool:
    """Start the deploy, SIGKILL it as soon as a point is reached, and return whether it was still running."""
    with subprocess.Popen(command(out), cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not reached(out):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        said, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    assert process.returncode == 0 or said == b""
    return process.returncode != 0


def test_killed_at_any_point_the_same_command_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """One run, killed six times: no row is written twice, and plan, weights and trials are those of an unkilled run."""
    changes = (("steps = 12", "steps = 40\ncheckpoint_s = 0.001"),)
    config = tiny_project.write_project(tmp_path / "project", *changes)
    out, kept, killed = tmp_path / "killed", [], []
    for point, reached in KILLED_WHEN.items():
        if killed_when(reached, config, out):
            killed.append(point)
        found = rows(run_folder(out), "SELECT phase, number, created_at, sha256 FROM trials ORDER BY seq")
        assert found[: len(kept)] == kept, point
        kept = found
    assert len(killed) >= 4, killed
    finish = subprocess.run(command(out), cwd=config.parent, capture_output=True, check=True, text=True)
    resumed = done(Outcome.from_json(json.loads(finish.stdout)["data"]))
    unkilled = done(deploy(request(config, tmp_path / "unkilled")))
    assert [(each.plan, each.score) for each in resumed.trials] == [(each.plan, each.score) for each in unkilled.trials]
    assert resumed.plan == unkilled.plan
    assert resumed.incidents == []
    assert resumed.outcome.measurements == unkilled.outcome.measurements
    assert model_sha256(resumed) == model_sha256(unkilled)
    assert len(rows(Path(resumed.outcome.run_dir), "SELECT 1 FROM measurements")) == len(
        rows(Path(unkilled.outcome.run_dir), "SELECT 1 FROM measurements")
    )


def model_sha256(one: Done) -> str:
    return file_sha256(Path(one.outcome.bundle) / "model.onnx")


# -- folders ---------------------------------------------------------------------------------------------------------


def test_fresh_starts_over_but_not_under_a_run_that_is_going_on(tmp_path: Path) -> None:
    """What an earlier run found is forgotten; a ledger that is in use is left alone."""
    config, out = tiny_project.write_project(tmp_path, *QUICK), tmp_path / "dist"
    first = deploy(request(config, out))
    before = rows(Path(first.run_dir), "SELECT created_at FROM trials")
    lock = RunLock.take(Path(first.run_dir) / "ledger.sqlite.lock")
    try:
        with pytest.raises(DeviceBusy):
            deploy(request(config, out, fresh=True))
    finally:
        lock.release()
    assert rows(Path(first.run_dir), "SELECT created_at FROM trials") == before
    second = deploy(request(config, out, fresh=True))
    after = rows(Path(second.run_dir), "SELECT created_at FROM trials")
    assert len(after) == len(before)
    assert min(after) > max(before)


def test_a_profile_given_as_a_path_names_run_and_bundle_by_its_name(tmp_path: Path) -> None:
    """No slash of the path gets into a name."""
    config = tiny_project.write_project(tmp_path, *QUICK)
    (tmp_path / "boards").mkdir()
    (tmp_path / "boards" / "my.toml").write_text('adapter = "formula"\n[options]\nblock = 8\n')
    outcome = deploy(request(config, tmp_path / "dist", target="boards/my.toml"))
    assert re.fullmatch(r"net-my-0\.5x-[0-9a-f]{8}", Path(outcome.bundle).name)
    assert Path(outcome.bundle).parent == tmp_path / "dist"


@pytest.mark.parametrize("latency", ["0.5x", "0.0000123457x", "0.0123457us", "1234567ms", "12345678s", "999999ms"])
@pytest.mark.parametrize(
    "model", ["net:net", "models:a_factory_with_thirty_two_letters", "timm:mobilenetv3_small.ra4-x", "?"]
)
def test_a_bundle_is_named_as_its_manifest_wants_however_long_the_names(model: str, latency: str) -> None:
    """Both names are cut; the budget is spelled without a plus; the digest stays whole."""
    budget = Budget(latency=Latency.parse(latency))
    name = run_name(model, "jetson_orin_nano_super_15w", budget, "0123456789abcdef")
    assert TypeAdapter(Name).validate_python(name) == name
    assert name.endswith("-01234567")


def test_another_request_is_another_run(tmp_path: Path) -> None:
    """A changed setting never continues an earlier run's ledger."""
    out = tmp_path / "dist"
    one = deploy(request(tiny_project.write_project(tmp_path, *QUICK), out))
    other = deploy(request(tiny_project.write_project(tmp_path, *QUICK, ("seed = 1", "seed = 2")), out))
    assert one.run_dir != other.run_dir
    assert Path(one.bundle).is_dir()


def test_a_ledger_of_another_code_is_not_continued(finished: Done, config: Path, tmp_path: Path) -> None:
    """A row that says another plan was tried at this place ends the run, and says what to do."""
    source, run = Path(finished.outcome.run_dir), tmp_path / Path(finished.outcome.run_dir).name
    run.mkdir()
    with Ledger.open(source / "ledger.sqlite", read_only=True) as old, Ledger.open(run / "ledger.sqlite") as new:
        name = old.runs()[-1]
        for each in old.trials(name):
            other = finished.trials[0].plan if each.number == 1 and each.phase == "search" else each.plan
            new.append(name, replace(each, plan=other), seed=1)
        for fact in ("baseline.onnx", "baseline", "baseline_quality"):
            new.record(name, fact, old.fact(name, fact))
    with pytest.raises(LedgerError, match="another plan") as caught:
        deploy(request(config, tmp_path))
    assert "--fresh" in caught.value.next_step


# -- a real device ---------------------------------------------------------------------------------------------------


def test_on_this_machine_the_numbers_are_measured(tmp_path: Path) -> None:
    """The whole line on ONNX Runtime: real milliseconds, a ratio of its own, a bundle that verifies."""
    changes = (*QUICK, ('"0.5x"', '"0.95x"'), ("session_ms = 20.0", "session_ms = 60.0\nsessions_max = 3"))
    config = tiny_project.write_project(tmp_path, *changes)
    outcome = deploy(request(config, tmp_path / "dist", target="host", sleep=time.sleep))
    assert (outcome.emulated, outcome.metric) == (False, "latency_ns")
    assert outcome.conditions["onnxruntime"]
    assert 0 < outcome.result.ratio.low <= outcome.result.ratio.p50 <= outcome.result.ratio.high
    assert 0 < outcome.result.latency.p50 < outcome.baseline.latency.p50
    assert set(outcome.layer_shares) >= {"stem.0", "block1.conv1", "block2.conv2"}
    profile = load_config(config).profile("host")
    with open_target(profile) as target:
        seen = verify(Path(outcome.bundle), profile=profile, target=target, remeasure=False)
    assert {each.name: each.ok for each in seen.checks}["parity"]
    assert {each.name: each.ok for each in seen.checks}["selftest"]
