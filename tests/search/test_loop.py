"""The search writes down everything, repeats nothing, and tells the searcher only what it learnt about a plan."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import formula_bench
import pytest
import search_toys

from edgeprune.artifact import Artifact
from edgeprune.errors import CompileError, DeviceBusy, DeviceLost, Interrupted, LedgerError
from edgeprune.evaluate import Stopwatch
from edgeprune.ledger import Ledger
from edgeprune.measurement import Measurement, Sampling
from edgeprune.plan import Plan
from edgeprune.search.loop import BACK_OFF_S, best_of, insist, nearest_of, search
from edgeprune.search.problem import Problem
from edgeprune.target import Target
from edgeprune.trial import Trial


class Narrowing:
    """Asks for ever narrower uniform plans and remembers what it was told."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.told: list[Trial] = []

    def ask(self) -> Plan:
        share = 1 - 0.12 * (len(self.told) + 1)
        groups = self._problem.space.groups
        return self._problem.plan({each.name: max(each.minimum, each.nearest(share * each.width)) for each in groups})

    def tell(self, trial: Trial) -> None:
        self.told.append(trial)


class Counter:
    """A stage that counts."""

    def __init__(self) -> None:
        self.steps, self.notes = 0.0, []

    def advance(self, steps: float = 1, *, note: str = "") -> None:
        self.steps += steps
        self.notes.append(note)


class Device:
    """The formula behind a compiler and a clock that fail on cue: call number → error."""

    def __init__(self, *, compiling: Mapping[int, Exception] = {}, measuring: Mapping[int, Exception] = {}) -> None:
        self._target: Target = formula_bench.connected(formula_bench.profile())
        self._cues = {"compile": dict(compiling), "measure": dict(measuring)}
        self.calls = {"compile": 0, "measure": 0}
        self.profile = self._target.profile

    def compile(self, graph: Artifact) -> Artifact:
        return self._do("compile", graph)

    def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
        return self._do("measure", engine, sampling)

    def _do(self, what: str, *arguments: Any) -> Any:
        number, self.calls[what] = self.calls[what], self.calls[what] + 1
        if number in self._cues[what]:
            raise self._cues[what][number]
        return getattr(self._target, what)(*arguments)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.sqlite") as opened:
        yield opened


def facts(trials: list[Trial]) -> list[tuple]:
    """Return what must not depend on when and how often a run was stopped."""
    return [(each.number, each.plan.digest, each.score, each.quality, each.failure) for each in trials]


def run(folder: Path, ledger: Ledger, trials: int = 4, **changes: Any) -> tuple[list[Trial], Narrowing]:
    rig = formula_bench.rig(folder, ledger, **changes)
    searcher = Narrowing(rig.problem)
    return search(rig.bench, searcher, trials, Counter()), searcher


def test_every_trial_is_told_once_and_stands_in_the_ledger(tmp_path: Path, ledger: Ledger) -> None:
    """Returned, told and stored are the same trials, numbered from 0."""
    made, searcher = run(tmp_path, ledger)
    assert [each.number for each in made] == [0, 1, 2, 3]
    assert searcher.told == made
    assert facts(ledger.trials("run", "search")) == facts(made)
    assert all(set(each.seconds) == {"ask", "cut", "measure", "quality"} for each in made)


def test_a_stopped_search_goes_on_where_it_was_and_measures_nothing_again(tmp_path: Path, ledger: Ledger) -> None:
    """Another bench on the same ledger replays three trials and makes two."""
    undisturbed, _ = run(tmp_path, ledger, 5, run="other")
    device = Device()
    run(tmp_path, ledger, 3, target=device)
    assert device.calls["measure"] == 0, "the other run measured the same bytes under the same profile"
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    with Ledger.open(fresh / "ledger.sqlite") as own:
        first, second = Device(), Device()
        run(fresh, own, 3, target=first)
        resumed, searcher = run(fresh, own, 5, target=second)
    assert (first.calls["measure"], second.calls["measure"]) == (3, 2)
    assert facts(resumed) == facts(undisturbed)
    assert searcher.told == resumed


def test_the_same_plan_is_measured_once(tmp_path: Path, ledger: Ledger) -> None:
    """The second trial says that its timing is an earlier one; a settling trial is timed afresh all the same."""
    device = Device()
    rig = formula_bench.rig(tmp_path, ledger, target=device)
    plan = Narrowing(rig.problem).ask()
    one, other = (rig.bench.try_plan(plan, "search", number) for number in (0, 1))
    assert (one.cached, other.cached, device.calls["measure"]) == (False, True, 1)
    assert other.score == one.score
    assert not rig.bench.try_plan(plan, "settle", 0).cached
    assert device.calls["measure"] == 2


def test_a_ledger_of_another_search_is_refused(tmp_path: Path, ledger: Ledger) -> None:
    """A place that holds another plan means that searcher or libraries changed; nothing is overwritten."""
    rig = formula_bench.rig(tmp_path, ledger)
    rig.bench.try_plan(rig.problem.space.full(), "search", 0)
    with pytest.raises(LedgerError, match="another plan"):
        search(rig.bench, Narrowing(rig.problem), 1, Counter())
    assert ledger.trials("run")[0].plan == rig.problem.space.full()


# -- the lab ---------------------------------------------------------------------------------------------------------


def test_a_lost_device_is_an_incident_and_never_a_trial(tmp_path: Path, ledger: Ledger) -> None:
    """The searcher is told the same trials as if nothing had happened, after waits that grow."""
    undisturbed, _ = run(tmp_path, ledger)
    disturbed_in = tmp_path / "disturbed"
    disturbed_in.mkdir()
    waits: list[float] = []
    with Ledger.open(disturbed_in / "ledger.sqlite") as own:
        device = Device(measuring={1: DeviceLost("gone"), 2: DeviceBusy("taken"), 5: DeviceLost("gone again")})
        made, searcher = run(disturbed_in, own, target=device, sleep=waits.append)
        noted = own.incidents("run")
    assert facts(made) == facts(undisturbed)
    assert searcher.told == made
    assert [each.kind for each in noted] == ["DeviceLost", "DeviceBusy", "DeviceLost"]
    assert noted[0].plan_digest == made[1].plan.digest
    assert waits == [BACK_OFF_S[0], BACK_OFF_S[1], BACK_OFF_S[0]]


def test_a_device_that_stays_away_stops_the_run_which_can_be_resumed(tmp_path: Path, ledger: Ledger) -> None:
    """After the last wait the error says how often it was tried; the trials before it stay."""
    device = Device(measuring={number: DeviceLost("gone", why="unplugged") for number in range(2, 20)})
    waits: list[float] = []
    with pytest.raises(DeviceLost, match=r"5 times") as caught:
        run(tmp_path, ledger, target=device, sleep=waits.append)
    assert (caught.value.why, waits) == ("unplugged", list(BACK_OFF_S))
    assert "same command" in caught.value.next_step
    assert len(ledger.trials("run")) == 2
    assert len(ledger.incidents("run")) == 5
    made, _ = run(tmp_path, ledger)
    assert len(made) == 4


def test_waiting_for_the_device_is_not_booked_as_measuring(tmp_path: Path, ledger: Ledger) -> None:
    """It has a part of its own in the trial's seconds."""
    rig = formula_bench.rig(tmp_path, ledger, target=Device(measuring={0: DeviceLost("gone")}), sleep=lambda _: None)
    seen = rig.bench.try_plan(Narrowing(rig.problem).ask(), "search", 0, watch=Stopwatch())
    assert "waiting" in seen.seconds


def test_insisting_returns_what_came_at_last(tmp_path: Path, ledger: Ledger) -> None:
    """Every failure is noted; errors that are nobody's lab go straight through."""
    answers = iter([DeviceBusy("taken"), "done"])

    def action() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert insist(action, ledger, "run", sleep=lambda _: None) == "done"
    assert [each.kind for each in ledger.incidents("run")] == ["DeviceBusy"]

    def refused() -> None:
        raise CompileError("no")

    with pytest.raises(CompileError):
        insist(refused, ledger, "run", sleep=lambda _: None)


# -- candidates ------------------------------------------------------------------------------------------------------


def test_a_candidate_that_cannot_run_is_a_failed_trial_and_the_search_goes_on(tmp_path: Path, ledger: Ledger) -> None:
    """It costs no wait, is told with the worst score, and never wins."""
    made, searcher = run(tmp_path, ledger, target=Device(compiling={3: CompileError("Conv_3 refused")}))
    assert [each.failure is not None for each in made] == [False, False, False, True]
    assert searcher.told[3].score.reward == min(each.score.reward for each in made)
    assert ledger.trials("run")[3].failure.message == "Conv_3 refused"
    assert ledger.incidents("run") == []


# -- stopping --------------------------------------------------------------------------------------------------------


def test_a_user_who_stops_loses_nothing(tmp_path: Path, ledger: Ledger) -> None:
    """The trial under way is finished and written; the next is not begun."""
    asked = iter([False, False, True])

    def stop() -> None:
        if next(asked):
            raise Interrupted("stopped as asked")

    with pytest.raises(Interrupted):
        run(tmp_path, ledger, stop=stop)
    assert len(ledger.trials("run")) == 2


def test_no_trial_is_started_after_the_time_limit_but_old_ones_are_replayed(tmp_path: Path, ledger: Ledger) -> None:
    run(tmp_path, ledger, 2)
    rig = formula_bench.rig(tmp_path, ledger)
    assert len(search(rig.bench, Narrowing(rig.problem), 4, Counter(), time_limit_s=1e-9)) == 2


@pytest.mark.parametrize("limit_s", [1e-9, 1e9, None])
def test_a_search_that_its_time_ended_stays_ended(tmp_path: Path, ledger: Ledger, limit_s: float | None) -> None:
    """Whatever was settled on its trials: the same command later must not see more of them."""
    rig = formula_bench.rig(tmp_path, ledger)
    first = search(rig.bench, Narrowing(rig.problem), 4, Counter(), time_limit_s=1e-9)
    again = formula_bench.rig(tmp_path, ledger)
    assert search(again.bench, Narrowing(again.problem), 4, Counter(), time_limit_s=limit_s) == first
    assert len(first) == 1


def test_the_seconds_of_trials_before_a_kill_count(tmp_path: Path, ledger: Ledger) -> None:
    run(tmp_path, ledger, 2)
    seconds = sum(sum(each.seconds.values()) for each in ledger.trials("run"))
    rig = formula_bench.rig(tmp_path, ledger)
    assert len(search(rig.bench, Narrowing(rig.problem), 4, Counter(), time_limit_s=seconds)) == 2


def test_the_stage_advances_with_every_trial_and_says_the_best(tmp_path: Path, ledger: Ledger) -> None:
    """At first nothing fits; then the best accuracy and its ratio."""
    stage, rig = Counter(), formula_bench.rig(tmp_path, ledger)
    made = search(rig.bench, Narrowing(rig.problem), 5, stage)
    assert stage.steps == 5
    assert stage.notes[0] == "nothing fits yet"
    best = best_of(made)
    assert stage.notes[-1] == f"best {100 * best.quality.accuracy:.1f} % at {best.score.terms['latency_ratio']:.3f}x"


# -- the best --------------------------------------------------------------------------------------------------------


def trials_of(*widths_of_first: int) -> list[Trial]:
    toy = search_toys.residual_toy([(32, 8, 1), (64, 4, 1)], limit=0.6)
    full = toy.problem.full
    first = next(iter(full))
    return [toy.trial(toy.problem.plan({**full, first: width}), number) for number, width in enumerate(widths_of_first)]


def changed(trial: Trial, *, accuracy: float, ratio: float, feasible: bool) -> Trial:
    terms = {**trial.score.terms, "latency_ratio": ratio, "latency_high": ratio * 1.01, "accuracy": accuracy}
    terms["merit"] = accuracy
    quality = replace(trial.quality, accuracy=accuracy)
    return replace(trial, quality=quality, score=replace(trial.score, feasible=feasible, terms=terms))


def test_the_best_is_the_most_accurate_that_fits_and_the_faster_of_equals() -> None:
    """Whatever does not fit is out, however accurate."""
    made = trials_of(8, 16, 24, 32)
    values = [(0.9, 0.5, True), (0.9, 0.4, True), (0.99, 0.7, False), (0.8, 0.1, True)]
    table = [changed(each, accuracy=a, ratio=r, feasible=f) for each, (a, r, f) in zip(made, values, strict=True)]
    assert best_of(table) is table[1]
    assert best_of(table[2:3]) is None
    assert best_of([]) is None


def test_the_nearest_is_the_one_whose_interval_ends_lowest() -> None:
    """Accuracy does not matter; failed trials are out."""
    made = trials_of(8, 16)
    table = [
        changed(made[0], accuracy=0.9, ratio=0.7, feasible=False),
        changed(made[1], accuracy=0.1, ratio=0.6, feasible=False),
    ]
    assert nearest_of(table) is table[1]
    assert nearest_of([]) is None
