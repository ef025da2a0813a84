"""From the best trial to a plan that keeps its promise: timed afresh, repaired if it misses, grown if it leaves much.

best ─time afresh─▶ misses: shrink ─┐        fits, much unused: grow ─┐
  ▲─────────────────────────────────┴───────────────────────────────────┘
"""

from collections.abc import Sequence
from dataclasses import replace

from edgeprune.errors import NothingFits
from edgeprune.latency_model import LatencyModel
from edgeprune.measurement import Sampling
from edgeprune.plan import Plan
from edgeprune.search.loop import Bench, best_of, nearest_of
from edgeprune.search.problem import Problem
from edgeprune.search.repair import grow, shrink
from edgeprune.trial import Trial

MOST_TRIES = 10
"""Fresh measurements that settling may cost."""

USED_ENOUGH = 0.97
"""A winner that uses this share of its budget is not grown further."""

SAFETY = 0.995
"""The upper end of a settled winner's interval stays under this share of the budget: it is timed once more later."""

WORTH = 0.01
"""A plan that uses more of the budget wins if it is at most so much less accurate before fine-tuning."""


def settle(bench: Bench, problem: Problem, trials: Sequence[Trial], sampling: Sampling) -> Trial:
    """Return the trial of the most accurate plan that was seen to fit in a fresh, longer measurement.

    Args:
        trials: of the search, the probe of the narrowest plan included.
        sampling: of the fresh measurements.

    Raises:
        NothingFits: if no plan fits; says how near the nearest came.
    """
    start = best_of(trials) or nearest_of(trials)
    if start is None:
        raise NothingFits("no candidate could be measured", next_step="see the failures in the report")
    limit = problem.limit_ratio * SAFETY
    model = LatencyModel(problem)
    for trial in trials:
        _learn(model, trial)
    settled: list[Trial] = []
    plan: Plan | None = start.plan
    while plan is not None and len(settled) < MOST_TRIES:
        seen = bench.try_plan(plan, "settle", len(settled), sampling=replace(sampling, threshold=limit))
        _learn(model, seen)
        settled.append(seen)
        plan = _next_plan(problem, model, trials, settled, limit)
    winner = settled_winner(settled, limit)
    if winner is None:
        raise _nothing_fits(problem, settled)
    return winner


def _learn(model: LatencyModel, trial: Trial) -> None:
    if trial.measurement is not None:
        model.observe(trial.plan.widths, trial.score.terms["latency_ratio"])


def settled_winner(settled: Sequence[Trial], limit: float) -> Trial | None:
    """Return the trial that wins: of those under the limit and nearly as accurate as the best, the one using most."""
    fitting = [each for each in settled if each.measurement is not None and each.score.terms["latency_high"] <= limit]
    if not fitting:
        return None
    best = max(each.score.terms["accuracy"] for each in fitting)
    near = [each for each in fitting if each.score.terms["accuracy"] >= best - WORTH]
    return max(near, key=lambda each: (each.score.terms["latency_ratio"], each.score.terms["accuracy"]))


def _next_plan(
    problem: Problem, model: LatencyModel, trials: Sequence[Trial], settled: Sequence[Trial], limit: float
) -> Plan | None:
    """Return the plan to try next, or None if the winner is good enough or nothing is left to try."""
    winner = settled_winner(settled, limit)
    tried = {each.plan.digest for each in settled}
    if winner is None:
        last = min((each for each in settled if each.measurement is not None), key=_high, default=None)
        if last is None:
            untried = [each for each in trials if each.plan.digest not in tried]
            start = best_of(untried) or nearest_of(untried)
            return start.plan if start else None
        widths = shrink(problem, model, last.plan.widths, overshoot=_high(last) / limit, tried=tried)
    elif winner.score.terms["latency_ratio"] >= USED_ENOUGH * problem.limit_ratio:
        return None
    else:
        widths = grow(problem, model, winner.plan.widths, used=_high(winner) / limit, tried=tried)
    return None if widths is None else problem.plan(widths)


def _high(trial: Trial) -> float:
    return trial.score.terms["latency_high"]


def _nothing_fits(problem: Problem, settled: Sequence[Trial]) -> NothingFits:
    reached = min((_high(each) for each in settled if each.measurement is not None), default=1.0)
    return NothingFits(
        f"no plan was seen to meet {problem.limit_ratio:.3f}x",
        why=f"the nearest of {len(settled)} fresh measurements ends at {reached:.3f}x",
        next_step="raise --trials or the budget",
    )
