"""One keep ratio for every group: the control that any search has to beat, played as well as it can be.

The uniform ratio of a finite space yields a finite *chain* of plans, each at least as wide as the one before. Where
the chain passes the budget is found by bisection on measured verdicts, the first probes placed by the latency model.
What is then left is rounding: chains that lead from the last plan that fits to the first that does not by widening one
group after the other, in several orders, each bisected in turn.
"""

from collections.abc import Callable, Generator, Iterator

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency_model import Array, LatencyModel
from edgeprune.plan import Plan
from edgeprune.search.boundary import boundary, widening
from edgeprune.search.memory import Memory
from edgeprune.search.problem import Problem
from edgeprune.search.rounding import Rounding
from edgeprune.trial import Trial

SHUFFLES = 8
"""Random orders tried before the two ends move further apart."""

FRUITLESS = 200
"""Chains without a new plan after which the space around the boundary counts as exhausted."""


def uniform_chain(rounding: Rounding, rounded: Callable[[Array], Array]) -> Array:
    """Return the distinct rows of widths that uniform keep ratios give under one rounding, narrow to wide."""
    ratios = np.concatenate([[0.0], rounding.ratios()])
    around = np.unique(np.concatenate([ratios, (ratios[1:] + ratios[:-1]) / 2]))
    rows = rounded(around[:, None] * rounding.full + 1e-6)
    changed = (np.diff(rows, axis=0) != 0).any(axis=1)
    return np.asarray(rows[np.concatenate([[True], changed])])


def uniform_widths(problem: Problem, model: LatencyModel) -> dict[str, int]:
    """Return the widest uniform plan predicted to meet the limit; it removes nothing unless it must."""
    for removal in (False, True):
        rounding = Rounding(problem.space, removal=removal)
        chain = uniform_chain(rounding, rounding.nearest)
        fitting = chain[model.predict_rows(chain) <= problem.aim * (1 - model.margin)]
        if len(fitting):
            return rounding.widths(fitting[-1])
    return rounding.widths(chain[0])


class Uniform:
    """Asks for uniform plans until the boundary is known, then for the roundings around it; deterministic."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._rounding = Rounding(problem.space)
        self._memory = Memory(problem)
        self._probes = self._search()

    def ask(self) -> Plan:
        """Return the next probe; a plan told before if nothing new is left around the boundary."""
        return self._memory.pending or self._memory.ask(next(self._probes, None) or self._fallback())

    def tell(self, trial: Trial) -> None:
        """Remember on which side of the budget the plan lies."""
        self._memory.tell(trial)

    def _fallback(self) -> Plan:
        return self._memory.best or self._plan(self._rounding.least)

    def _plan(self, row: Array) -> Plan:
        return self._problem.plan(self._rounding.widths(row))

    def _search(self) -> Iterator[Plan]:
        """Yield new plans one by one; each is told before the next is wanted."""
        keeping = Rounding(self._problem.space, removal=False)
        chain = uniform_chain(keeping, keeping.nearest)
        fits = yield from self._bisect(chain)
        if fits < 0:
            chain = uniform_chain(self._rounding, self._rounding.nearest)
            fits = yield from self._bisect(chain)
        for order in self._orders():
            yield from self._bisect(_widening(chain, fits, 0, order))
        for rounded in (keeping.down, keeping.up, self._rounding.nearest):
            yield from self._bisect(uniform_chain(keeping, rounded))
        yield from self._shuffled(chain, fits)

    def _shuffled(self, chain: Array, fits: int) -> Iterator[Plan]:
        """Widen in random orders, from ever further below the boundary to ever further above it."""
        fruitless = number = 0
        while fruitless < FRUITLESS:
            order = np.random.default_rng([self._problem.seed, number]).permutation(len(self._rounding.full))
            before = self._memory.told
            yield from self._bisect(_widening(chain, fits, number // SHUFFLES, order))
            fruitless = 0 if self._memory.told > before else fruitless + 1
            number += 1

    def _bisect(self, chain: Array) -> Generator[Plan, None, int]:
        return (yield from boundary(chain, self._plan, self._memory, self._problem.limit_ratio))

    def _orders(self) -> list[NDArray[np.intp]]:
        """Return the first orders of widening: forward, backward, most importance for the latency first."""
        forward = np.arange(len(self._rounding.full))
        return [forward, forward[::-1], np.argsort(-self._worth(), kind="stable")]

    def _worth(self) -> Array:
        """Return for every group the importance gained per predicted latency by its last widening to full width."""
        model, full = self._memory.model, self._rounding.full
        worth = np.zeros(len(full))
        for place, group in enumerate(self._problem.space.groups):
            row = full.copy()
            row[place] = max((each for each in group.choices if each < group.width), default=group.width)
            gained = 1 - self._problem.kept_importance(group.name, int(row[place]))
            saved = 1 - float(model.predict_rows(row[None])[0])
            worth[place] = gained / max(saved, 1e-9)
        return worth


def _widening(chain: Array, fits: int, reach: int, order: NDArray[np.intp]) -> Array:
    """Return the rows between two plans of a chain around its boundary, one group widened after the other."""
    low, high = chain[max(fits - reach, 0)], chain[min(max(fits, 0) + 1 + reach, len(chain) - 1)]
    return widening(low, high, order.tolist())
