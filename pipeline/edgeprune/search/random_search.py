"""Random widths near the budget: the control that a learner has to beat with the same number of measurements."""

import numpy as np

from edgeprune.latency_model import LatencyModel
from edgeprune.plan import Plan
from edgeprune.search.memory import Memory
from edgeprune.search.problem import Problem
from edgeprune.search.rounding import Rounding
from edgeprune.search.uniform import uniform_widths
from edgeprune.trial import Trial

DRAWS = 32
"""Draws before the best of them is taken."""

USED = 0.95
"""A draw is rejected if it is predicted to use less of the budget than this."""

HALVINGS = 12


class RandomSearch:
    """Asks for random plans that are predicted to use the budget; the first is the uniform plan, as for the agents."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._memory = Memory(problem)

    def ask(self) -> Plan:
        """Return a plan not told before, unless the draws find none."""
        return self._memory.pending or self._memory.ask(first_or_random(self._problem, self._memory))

    def tell(self, trial: Trial) -> None:
        """Calibrate the latency model; nothing else is learned."""
        self._memory.tell(trial)


def first_or_random(problem: Problem, memory: Memory) -> Plan:
    """Return the uniform plan if nothing was told yet, else a random one; depends on the told trials alone."""
    if not memory.told:
        return problem.plan(uniform_widths(problem, memory.model))
    return random_plan(problem, memory, np.random.default_rng([problem.seed, memory.told]))


def random_plan(problem: Problem, memory: Memory, rng: np.random.Generator) -> Plan:
    """Return the first draw that is new and predicted to use the budget, else the closest below it, new if possible."""
    limit = problem.aim * (1 - memory.model.margin)
    seen: list[tuple[bool, float, Plan]] = []
    for _ in range(DRAWS):
        widths = draw_widths(problem, memory.model, limit, rng)
        plan, used = problem.plan(widths, draw_repair(problem, rng)), memory.model.predict(widths) / limit
        new = plan.digest not in memory.fits
        if new and USED <= used <= 1:
            return plan
        seen.append((new, -abs(1 - used), plan))
    return max(seen, key=lambda each: each[:2])[2]


def draw_repair(problem: Problem, rng: np.random.Generator) -> dict[str, float] | None:
    """Return coefficients = level + noise, level and spread of the noise drawn as well; None for no repairs.

    Of many independent ones the mean would hardly ever be far from one half.
    """
    if not problem.repairs:
        return None
    noise = rng.uniform(0.0, 1.0) * rng.uniform(-1.0, 1.0, len(problem.full))
    drawn = np.clip(rng.uniform() + noise, 0.0, 1.0)
    return dict(zip(problem.full, drawn.tolist(), strict=True))


def draw_widths(problem: Problem, model: LatencyModel, limit: float, rng: np.random.Generator) -> dict[str, int]:
    """Return keep ratios = level + noise, with random noise per group and the highest level predicted under `limit`.

    The spread of the noise is itself drawn, from nearly uniform plans to anything goes: independent uniform widths
    would hardly ever land on the budget when there are many groups.
    """
    rounding = Rounding(problem.space)
    noise = rng.uniform(0.05, 1.0) * rng.uniform(-1.0, 1.0, len(rounding.full))
    low, high = -1.0, 2.0
    for _ in range(HALVINGS):
        level = (low + high) / 2
        row = rounding.nearest(np.clip(level + noise, 0.0, 1.0) * rounding.full)
        low, high = (level, high) if float(model.predict_rows(row[None])[0]) <= limit else (low, level)
    return rounding.widths(rounding.nearest(np.clip(low + noise, 0.0, 1.0) * rounding.full))
