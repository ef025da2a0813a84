"""Where a chain of ever wider plans passes the budget: bisection on measured verdicts."""

from collections.abc import Callable, Generator, Iterable

import numpy as np

from edgeprune.latency_model import Array
from edgeprune.plan import Plan
from edgeprune.search.memory import Memory

GUIDED = 4
"""Probes of one chain that the latency model may place; bisection bounds the rest."""


def boundary(
    chain: Array, plan_of: Callable[[Array], Plan], memory: Memory, limit_ratio: float
) -> Generator[Plan, None, int]:
    """Yield the untold plans that bisection has to know; return the place of the last that fits, or -1.

    A plan that failed says nothing about its neighbours: it is taken out of the chain.

    Args:
        chain: rows of widths, narrow to wide.
        plan_of: makes the plan of a row.
        memory: of the search; every plan that is yielded must be told to it before the next is wanted.
        limit_ratio: the budget.
    """
    plans = [plan_of(row) for row in chain]
    places = [place for place, plan in enumerate(plans) if memory.fits.get(plan.digest, True) is not None]
    low, high, probes = -1, len(places), 0
    while high - low > 1:
        predicted = _predicted(chain[places], memory, limit_ratio) if probes < GUIDED else (low + high) // 2
        middle = min(max(predicted, low + 1), high - 1)
        plan = plans[places[middle]]
        if plan.digest not in memory.fits:
            yield plan
            probes += 1
        verdict = memory.fits[plan.digest]
        if verdict is None:
            del places[middle]
            high -= 1
        low, high = (middle, high) if verdict else (low, middle) if verdict is False else (low, high)
    return places[low] if low >= 0 else -1


def _predicted(chain: Array, memory: Memory, limit_ratio: float) -> int:
    """Return the last place predicted to fit."""
    fitting = memory.model.predict_rows(chain) <= limit_ratio * (1 - memory.model.margin)
    return int(fitting.sum()) - 1


def widening(low: Array, high: Array, order: Iterable[int]) -> Array:
    """Return the rows that lead from one row of widths to another, one group after the other."""
    rows = [low]
    for place in order:
        if high[place] != low[place]:
            rows.append(np.where(np.arange(len(low)) == place, high, rows[-1]))
    return np.stack(rows)
