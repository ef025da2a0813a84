"""From the best trial to a plan that keeps its promise.

best ─time afresh─▶ misses: shrink ─┐        fits, much unused: grow ─┐
  ▲─────────────────────────────────┴───────────────────────────────────┘
                                             fits: confirm ─▶ misses: shrink, or the next best
                                                           └▶ the winner

The one of many timings that used most of the budget was probably a lucky one. So the winner is timed once more, with
samples that did not choose it; what it shows then counts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgeprune.errors import NothingFits
from edgeprune.latency_model import LatencyModel
from edgeprune.measurement import Sampling
from edgeprune.plan import Plan
from edgeprune.search.loop import Bench, best_of, merit_of, nearest_of
from edgeprune.search.problem import Problem
from edgeprune.search.repair import grow, shrink
from edgeprune.search.worth import group_worths
from edgeprune.trial import Trial

MOST_TRIES = 10
"""Fresh measurements that settling may cost, confirmations aside."""

MORE_TRIES = 3
"""Further ones for every winner that was not confirmed."""

USED_ENOUGH = 0.97
"""A winner that uses this share of its budget is not grown further."""

WORTH = 0.01
"""A plan that uses more of the budget wins if its merit is at most so much less: a share, of right answers say."""

PROMISING = 1.25
"""A plan that misses the budget by less than this factor is worth shrinking if it is more accurate than the winner."""

SEEDS = {"settle": 100_000, "confirm": 200_000}
"""Where the seeds of each phase's samplings begin: no two measurements of a run share one."""

CAUTION = 0.005
"""Share of the budget left aside for every try that missed it: growing picks the most optimistic predictions."""


def settle(
    bench: Bench,
    problem: Problem,
    trials: Sequence[Trial],
    sampling: Sampling,
    refused: Mapping[str, float] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Trial:
    """Return the trial of the most accurate plan that was seen to fit in two fresh, longer measurements.

    Args:
        trials: of the search, the probe of the narrowest plan included.
        sampling: of the fresh measurements.
        refused: digest of a plan → upper end of its ratio, of winners that missed the budget once fine-tuned.
        tell: told after each measurement what was seen.

    Raises:
        NothingFits: if no plan fits; says how near the nearest came.
    """
    start = best_of(trials) or nearest_of(trials)
    if start is None:
        raise NothingFits("no candidate could be measured", next_step="see the failures in the report")
    settling = _Settling(problem, trials)
    plan: Plan | None = start.plan
    confirmed = 0
    while True:
        while plan is not None and len(settling.settled) < MOST_TRIES + MORE_TRIES * len(settling.unconfirmed):
            fresh = replace(sampling, threshold=settling.limit, seed=SEEDS["settle"])
            tried = bench.try_plan(plan, "settle", len(settling.settled), sampling=fresh)
            settling.learn(tried)
            tell(f"try {len(settling.settled)}: {_said(tried, problem.limit_ratio)}")
            plan = settling.next_plan()
        winner = settling.winner()
        if winner is None:
            raise settling.nothing_fits()
        fresh = replace(sampling, threshold=None, seed=SEEDS["confirm"])
        again = bench.try_plan(winner.plan, "confirm", confirmed, sampling=fresh)
        confirmed += 1
        tell(f"once more: {_said(again, problem.limit_ratio)}")
        high = max(_seen_high(again), (refused or {}).get(winner.plan.digest, 0.0))
        if high <= problem.limit_ratio:
            return winner
        settling.disbelieve(again, high)
        plan = settling.next_plan()


def settled_winner(settled: Sequence[Trial], limit: float) -> Trial | None:
    """Return the trial that wins: of those under the limit and nearly as accurate as the best, the one using most."""
    fitting = [each for each in settled if each.measurement is not None and _high(each) <= limit]
    if not fitting:
        return None
    best = max(merit_of(each) for each in fitting)
    near = [each for each in fitting if merit_of(each) >= best - WORTH]
    return max(near, key=lambda each: (each.score.terms["latency_ratio"], merit_of(each)))


@dataclass
class _Settling:
    """What was tried so far, and what to try next."""

    problem: Problem
    searched: Sequence[Trial]
    settled: list[Trial] = field(default_factory=list)
    unconfirmed: dict[str, float] = field(default_factory=dict)
    shrunk: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.limit = self.problem.aim
        self.model = LatencyModel(self.problem)
        for trial in self.searched:
            self._observe(trial)

    def learn(self, trial: Trial) -> None:
        """Take in a fresh measurement."""
        self._observe(trial)
        self.settled.append(trial)

    def disbelieve(self, trial: Trial, high: float) -> None:
        """Take in that a winner missed the budget when it was timed again, or failed: then `high` is infinite."""
        self._observe(trial)
        self.unconfirmed[trial.plan.digest] = high

    def winner(self) -> Trial | None:
        """Return the settled trial that wins, of those not disbelieved."""
        return settled_winner([each for each in self.settled if each.plan.digest not in self.unconfirmed], self.limit)

    def next_plan(self) -> Plan | None:
        """Return the plan to try next, or None if the winner is good enough or nothing is left to try."""
        winner = self.winner()
        if winner is None:
            return self._nearer()
        return self._from_the_more_accurate(winner) or self._grown(winner)

    def nothing_fits(self) -> NothingFits:
        """Return the error to raise when nothing is left to try."""
        reached = min((self._highest(each) for each in self.settled if each.measurement is not None), default=1.0)
        return NothingFits(
            f"no plan was seen to meet {self.problem.limit_ratio:.3f}x",
            why=f"the nearest of {len(self.settled)} fresh measurements ends at {reached:.3f}x",
            next_step="raise --trials or the budget",
        )

    def _nearer(self) -> Plan | None:
        """Return the nearest plan so far, made narrower; the best untried one if nothing could be measured."""
        measured = [each for each in self.settled if each.measurement is not None]
        if measured:
            return self._narrower(min(measured, key=self._highest))
        untried = [each for each in self.searched if each.plan.digest not in self._tried()]
        start = best_of(untried) or nearest_of(untried)
        return start.plan if start else None

    def _from_the_more_accurate(self, winner: Trial) -> Plan | None:
        """Return the most accurate plan that misses the budget by little, made narrower; each is tried once."""
        more = [
            each
            for each in (*self.searched, *self.settled)
            if each.measurement is not None
            and each.plan.digest not in self.shrunk
            and self.limit < self._highest(each) <= PROMISING * self.limit
            and merit_of(each) > merit_of(winner) + WORTH
        ]
        if not more:
            return None
        best = max(more, key=merit_of)
        self.shrunk.add(best.plan.digest)
        return self._narrower(best)

    def _narrower(self, trial: Trial) -> Plan | None:
        high = self._highest(trial)
        overshoot = max(1.0, high / self._cautious_limit()) if math.isfinite(high) else 1.0
        around, widths = self._repaired_as(trial.plan), trial.plan.widths
        return _plan(around, shrink(around, self.model, widths, overshoot=overshoot, **self._known()))

    def _grown(self, winner: Trial) -> Plan | None:
        if winner.score.terms["latency_ratio"] >= USED_ENOUGH * self.problem.limit_ratio:
            return None
        used = min(1.0, _high(winner) / self._cautious_limit())
        around, widths = self._repaired_as(winner.plan), winner.plan.widths
        return _plan(around, grow(around, self.model, widths, used=used, **self._known()))

    def _repaired_as(self, plan: Plan) -> Problem:
        """Return the problem whose plans repair as `plan` does, and as ever where it leaves a group whole."""
        return replace(self.problem, repair={**self.problem.repair, **plan.repair})

    def _cautious_limit(self) -> float:
        missed = sum(each.measurement is not None and _high(each) > self.limit for each in self.settled)
        return self.limit * max(1 - CAUTION * (missed + len(self.unconfirmed)), USED_ENOUGH)

    def _known(self) -> dict[str, Any]:
        """Return what a repair should know: where not to go, and what groups are worth."""
        return {
            "tried": self._tried(),
            "group_scores": group_worths(self.problem, (*self.searched, *self.settled)),
        }

    def _tried(self) -> set[str]:
        return {each.plan.digest for each in self.settled}

    def _highest(self, trial: Trial) -> float:
        return max(_high(trial), self.unconfirmed.get(trial.plan.digest, 0.0))

    def _observe(self, trial: Trial) -> None:
        if trial.measurement is not None:
            self.model.observe(trial.plan.widths, trial.score.terms["latency_ratio"])


def _said(trial: Trial, limit: float) -> str:
    """Return what a fresh measurement showed, for people who wait."""
    high = _seen_high(trial)
    return f"at most {high:.3f}x of {limit:.3f}x" if math.isfinite(high) else "could not be measured"


def _plan(problem: Problem, widths: Mapping[str, int] | None) -> Plan | None:
    return None if widths is None else problem.plan(widths)


def _high(trial: Trial) -> float:
    return trial.score.terms["latency_high"]


def _seen_high(trial: Trial) -> float:
    """Return the upper end of a trial's ratio; infinity for one that failed."""
    return math.inf if trial.measurement is None else _high(trial)
