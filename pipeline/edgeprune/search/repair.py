"""Small changes to a measured plan: narrower where it hurts least, wider where it helps most, per predicted latency."""

from collections.abc import Mapping, Set
from itertools import pairwise

from edgeprune.latency_model import LatencyModel
from edgeprune.plan import Plan
from edgeprune.search.problem import Problem
from edgeprune.trial import Trial

CLEARANCE = 0.003
"""Share of the limit that a prediction stays under, beside the half-width of the trial's own interval."""


def shrink(problem: Problem, model: LatencyModel, trial: Trial, limit: float, tried: Set[str]) -> Plan | None:
    """Return a narrower plan that should just fit, or None if nothing narrower is left.

    Args:
        model: calibrated on the trials so far; only its differences are trusted, its level is the trial's own.
        trial: a measured plan that misses the limit.
        limit: the upper end of the next interval should lie under it.
        tried: digests of plans not to propose.
    """
    widths, level = trial.plan.widths, _Level(model, trial)
    while (move := _best(problem, level, widths, _steps(problem, widths, down=True))) is not None:
        widths = move
        plan = problem.plan(widths)
        if level.upper(widths) <= limit and plan.digest not in tried:
            return plan
    return None


def grow(problem: Problem, model: LatencyModel, trial: Trial, limit: float, tried: Set[str]) -> Plan | None:
    """Return a wider plan that should still fit, or None if no widening does; arguments as for `shrink`."""
    widths, level = trial.plan.widths, _Level(model, trial)
    grown: Plan | None = None
    while True:
        steps = [step for step in _steps(problem, widths, down=False) if level.upper(step) <= limit]
        move = _best(problem, level, widths, steps)
        if move is None:
            return grown
        widths = move
        plan = problem.plan(widths)
        grown = plan if plan.digest not in tried else grown


class _Level:
    """Predictions that agree with one measured trial."""

    def __init__(self, model: LatencyModel, trial: Trial) -> None:
        terms = trial.score.terms
        self._model = model
        self._factor = terms["latency_ratio"] / model.predict(trial.plan.widths)
        self._margin = terms["latency_high"] / terms["latency_ratio"] * (1 + CLEARANCE)

    def at(self, widths: Mapping[str, int]) -> float:
        return self._model.predict(widths) * self._factor

    def upper(self, widths: Mapping[str, int]) -> float:
        return self.at(widths) * self._margin


def _steps(problem: Problem, widths: Mapping[str, int], *, down: bool) -> list[dict[str, int]]:
    """Return the widths after one step of each group that can make one."""
    steps = []
    for group in problem.space.groups:
        for narrow, wide in pairwise(group.choices):
            before, after = (wide, narrow) if down else (narrow, wide)
            if widths[group.name] == before:
                steps.append({**widths, group.name: after})
    return steps


def _best(
    problem: Problem, level: _Level, widths: Mapping[str, int], steps: list[dict[str, int]]
) -> dict[str, int] | None:
    """Return the step with the most importance kept per latency, None if there is no step."""

    def price(step: dict[str, int]) -> float:
        importance = abs(_importance(problem, widths) - _importance(problem, step))
        latency = max(abs(level.at(widths) - level.at(step)), 1e-6)
        narrower = sum(step.values()) < sum(widths.values())
        return importance / latency if narrower else -importance / latency

    return min(steps, key=price, default=None)


def _importance(problem: Problem, widths: Mapping[str, int]) -> float:
    total = 0.0
    for name, width in widths.items():
        units = sum(problem.importance.get(name, ())) or float(problem.full[name])
        total += units * problem.kept_importance(name, width)
    return total
