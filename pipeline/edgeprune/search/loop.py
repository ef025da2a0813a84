"""The search itself: ask, evaluate, write down, tell. A killed search replays its ledger and goes on.

What the lab does wrong is repeated, noted as an incident and never told to the searcher.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from edgeprune.errors import DeviceBusy, DeviceLost, LabError, LedgerError, Unstable
from edgeprune.evaluate import Base, Judge, Stopwatch, evaluate
from edgeprune.ledger import Ledger
from edgeprune.measurement import Sampling
from edgeprune.plan import Plan
from edgeprune.progress import Stage
from edgeprune.search.problem import Searcher
from edgeprune.target import Target
from edgeprune.trial import Trial

BACK_OFF_S = (0.5, 2.0, 8.0, 30.0)
"""Waits before a measurement is tried again after the lab failed; then the run stops, resumable."""

ENDED = "search_ended"
"""The ledger's fact: how many trials the search made before its time was up."""

Done = TypeVar("Done")


@dataclass(kw_only=True)
class Bench:
    """Where plans of one run are tried: the model, the device, the ledger, and what was done so far.

    Attributes:
        run: key of the run in the ledger.
        seed: written with every trial.
        sleep: waits between two tries of the lab.
        stop: raises `Interrupted` when the user asked to stop; called between trials.
    """

    base: Base
    target: Target
    judge: Judge
    sampling: Sampling
    ledger: Ledger
    run: str
    strategy: str
    seed: int
    sleep: Callable[[float], None] = time.sleep
    stop: Callable[[], None] = lambda: None
    _past: dict[tuple[str, int], Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._past = {(trial.phase, trial.number): trial for trial in self.ledger.trials(self.run)}

    def past(self, phase: str, number: int) -> Trial | None:
        """Return the trial at this place of the run if it was made already, perhaps before a kill."""
        return self._past.get((phase, number))

    def try_plan(
        self, plan: Plan, phase: str, number: int, *, sampling: Sampling | None = None, watch: Stopwatch | None = None
    ) -> Trial:
        """Return the trial of a plan: from the ledger if this place of the run was reached before, else made now.

        Raises:
            LedgerError: if the ledger holds another plan at this place.
            LabError: if the lab failed too often.
        """
        past = self.past(phase, number)
        if past is not None:
            return _same_plan(past, plan)
        self.stop()
        trial = self._evaluated(plan, phase, number, sampling or self.sampling, watch or Stopwatch())
        self.ledger.append(self.run, trial, seed=self.seed)
        self._past[phase, number] = trial
        return trial

    def _evaluated(self, plan: Plan, phase: str, number: int, sampling: Sampling, watch: Stopwatch) -> Trial:
        def attempt() -> Trial:
            return evaluate(
                plan,
                self.base,
                self.target,
                self.judge,
                replace(sampling, seed=sampling.seed + number),
                number=number,
                phase=phase,
                strategy=self.strategy,
                watch=watch,
                cache=self.ledger.measurement if phase == "search" else None,
            )

        def pause(seconds: float) -> None:
            with watch.part("waiting"):
                self.sleep(seconds)

        return insist(attempt, self.ledger, self.run, plan=plan, sleep=pause)


def insist(
    action: Callable[[], Done], ledger: Ledger, run: str, *, plan: Plan | None = None, sleep: Callable[[float], None]
) -> Done:
    """Return what `action` returns, tried again after ever longer waits while the lab fails.

    Every failure is noted in the ledger as an incident.

    Args:
        plan: that is being tried, for the incident.
        sleep: waits so many seconds.

    Raises:
        DeviceLost, DeviceBusy, Unstable: if the lab failed too often.
    """
    for wait in (*BACK_OFF_S, None):
        try:
            return action()
        except (DeviceLost, DeviceBusy, Unstable) as error:
            ledger.note_incident(run, kind=type(error).__name__, message=str(error), plan=plan)
            if wait is None:
                raise _paused(error) from error
            sleep(wait)
    raise AssertionError("the last wait is None")


def _same_plan(trial: Trial, plan: Plan) -> Trial:
    if trial.plan.digest == plan.digest:
        return trial
    raise LedgerError(
        f"trial {trial.number} of phase {trial.phase!r} in the ledger tried another plan than this run would",
        why="the run was made by another version of edgeprune or of its libraries",
        next_step="give --out another folder, or --fresh to start over",
    )


def _paused(error: LabError) -> LabError:
    tries = len(BACK_OFF_S) + 1
    return type(error)(
        f"{error.what} ({tries} times)", why=error.why, next_step="mend it and run the same command again: it resumes"
    )


def search(
    bench: Bench, searcher: Searcher, trials: int, stage: Stage, *, time_limit_s: float | None = None
) -> list[Trial]:
    """Return the trials of one search, those made before a kill included.

    Args:
        trials: how many to make.
        stage: is advanced by one for every trial.
        time_limit_s: no trial is started once the trials took so many seconds, those before a kill included. Where the
            search ended is written down: what was settled on its trials must not see others later.

    Raises:
        LabError, StorageFull, Interrupted: the same call continues.
    """
    made: list[Trial] = []
    spent = 0.0
    ended = bench.ledger.fact(bench.run, ENDED)
    for number in range(trials if ended is None else min(trials, ended)):
        if bench.past("search", number) is None and time_limit_s is not None and spent >= time_limit_s:
            bench.ledger.record(bench.run, ENDED, number)
            break
        watch = Stopwatch()
        with watch.part("ask"):
            plan = searcher.ask()
        trial = bench.try_plan(plan, "search", number, watch=watch)
        searcher.tell(trial)
        made.append(trial)
        spent += sum(trial.seconds.values())
        stage.advance(note=_summary(best_of(made)))
    return made


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the feasible trial with the highest merit, the faster of two equals; None if none is feasible."""
    fitting = [each for each in trials if each.score.feasible and each.quality is not None]
    return max(fitting, key=lambda each: (merit_of(each), -_ratio(each)), default=None)


def nearest_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the measured trial with the lowest upper end of its interval."""
    measured = [each for each in trials if each.measurement is not None]
    return min(measured, key=lambda each: each.score.terms["latency_high"], default=None)


def merit_of(trial: Trial) -> float:
    """Return what decides between trials that fit, see `edgeprune.reward.merit`."""
    return trial.score.terms["merit"]


def _ratio(trial: Trial) -> float:
    return trial.score.terms["latency_ratio"]


def _summary(best: Trial | None) -> str:
    if best is None:
        return "nothing fits yet"
    assert best.quality is not None
    name = {"labels": "", "teacher": " agreement", "synthetic": " fidelity"}[best.quality.judged_by]
    return f"best{name} {100 * best.quality.accuracy:.1f} % at {_ratio(best):.3f}x"
