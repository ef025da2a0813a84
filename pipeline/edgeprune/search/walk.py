"""Down the walk until the budget is met, then up again wherever a layer is worth its latency.

    the walk    every layer a little narrower, again and again (Meng et al., arXiv 2405.00074); where it passes the
                budget is found by bisection on measured verdicts, the first probes placed by the latency model
    the step    between the last plan that misses and the first that fits, layer after layer; those are spared first
                whose importance costs least latency
    around      from the best plan that fits: widen what is worth it and narrow what is not, by the same quotient,
                with random plans in between to learn what is

The problem's ranking says which units leave, so this searcher knows nothing of pairs. Equal shares are the authors';
sparing layers by their latency is ours.
"""

from collections.abc import Generator, Iterator

import numpy as np

from edgeprune.latency_model import Array
from edgeprune.paoding.schedule import width_after
from edgeprune.plan import Plan
from edgeprune.search.boundary import boundary, widening
from edgeprune.search.memory import Memory
from edgeprune.search.problem import Problem
from edgeprune.search.random_search import random_plan
from edgeprune.search.repair import grow, shrink
from edgeprune.search.rounding import Rounding
from edgeprune.search.worth import group_worths
from edgeprune.trial import Trial

SCATTERED, SCATTER_EVERY = 6, 3
"""Random plans near the budget once the walk is done, at most a fifth of all trials, and then every third: plans of the
walk are all alike, and what one layer is worth more than another shows only where they differ."""

CAUTION = 0.005
"""Share of the budget left aside for every widened plan that missed it: the most optimistic prediction is picked."""

LEAST_USED = 0.9
"""However often that happens, plans are widened up to this share of the budget."""

PROMISING = 1.25
"""A plan that misses the budget by less than this factor is worth narrowing."""

SMALLEST = 1e-9


class WalkSearch:
    """Asks for the plans of the walk, then for the plans around where it meets the budget; deterministic.

    Args:
        problem: what is searched.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._rounding = Rounding(problem.space)
        self._memory = Memory(problem)
        self._trials: list[Trial] = []
        self._probes = self._search()

    def ask(self) -> Plan:
        """Return the next plan; one told before only if nothing new is found."""
        return self._memory.pending or self._memory.ask(next(self._probes, None) or self._anything())

    def tell(self, trial: Trial) -> None:
        """Remember on which side of the budget a plan lies, and what it was worth."""
        self._memory.tell(trial)
        self._trials.append(trial)

    def _anything(self) -> Plan:
        plan = self._random()
        return plan if plan.digest not in self._memory.fits else self._memory.best or plan

    def _plan(self, row: Array) -> Plan:
        return self._problem.plan(self._rounding.widths(row))

    def _boundary(self, chain: Array) -> Generator[Plan, None, int]:
        return (yield from boundary(chain, self._plan, self._memory, self._problem.limit_ratio))

    def _search(self) -> Iterator[Plan]:
        """Yield new plans one by one; each is told before the next is wanted."""
        chain, fits = np.empty((0, 0)), -1
        for removal in (False, True):
            if fits < 0:
                chain = self._walked(Rounding(self._problem.space, removal=removal))
                fits = yield from self._boundary(chain)
        if 0 <= fits < len(chain) - 1:
            low, high = chain[fits], chain[fits + 1]
            yield from self._boundary(widening(low, high, self._spared_first(low, high)))
        walked = self._memory.told
        while (plan := self._around(walked)) is not None:
            yield plan

    def _walked(self, rounding: Rounding) -> Array:
        """Return the distinct rows of the walk, narrow to wide; the last is the unpruned model's."""
        dense = _dense(self._problem)
        rows = [rounding.full]
        while (rows[-1] > 1).any():
            wished = [
                width_after(int(full), self._problem.step, len(rows), dense=each)
                for full, each in zip(rounding.full, dense, strict=True)
            ]
            rows.append(np.array(wished, dtype=np.float64))
        rounded = rounding.nearest(np.stack(rows[::-1]))
        changed = (np.diff(rounded, axis=0) != 0).any(axis=1)
        return np.asarray(rounded[np.concatenate([[True], changed])])

    def _spared_first(self, low: Array, high: Array) -> list[int]:
        """Return the groups in the order in which they are widened: most worth for the latency first."""
        scores, model = group_worths(self._problem, self._trials), self._memory.model
        quotients = []
        for place, group in enumerate(self._problem.space.groups):
            wider = np.where(np.arange(len(low)) == place, high, low)
            kept = [self._problem.kept_importance(group.name, int(row[place])) for row in (low, high)]
            before, after = model.predict_rows(np.stack([low, wider]))
            quotients.append(scores[group.name] * (kept[1] - kept[0]) / max(after - before, SMALLEST))
        return [int(place) for place in np.argsort(-np.array(quotients), kind="stable")]

    def _around(self, walked: int) -> Plan | None:
        """Return a new plan near the best one, a random one near the budget first and now and then, or None."""
        since = self._memory.told - walked
        if since < min(SCATTERED, self._problem.trials // 5) or since % SCATTER_EVERY == 0:
            plan = self._random()
            if plan.digest not in self._memory.fits:
                return plan
        widths = self._widened(walked) or self._narrowed()
        return None if widths is None else self._problem.plan(widths)

    def _random(self) -> Plan:
        rng = np.random.default_rng([self._problem.seed, self._memory.told])
        return random_plan(self._problem, self._memory, rng)

    def _widened(self, walked: int) -> dict[str, int] | None:
        """Return widths near the best plan that fits, worth more and predicted to fit; None without any.

        Args:
            walked: trials before the first call; those that missed since make it more cautious.
        """
        fitting = [each for each in self._measured if each.score.feasible]
        if not fitting:
            return None
        best = max(fitting, key=_reward)
        missed = sum(_misses(each) for each in self._trials[walked:])
        cautious = self._problem.limit_ratio * max(1 - CAUTION * missed, LEAST_USED)
        return grow(
            self._problem,
            self._memory.model,
            best.plan.widths,
            used=min(1.0, _high(best) / cautious),
            tried=set(self._memory.fits),
            group_scores=group_worths(self._problem, self._trials),
        )

    def _narrowed(self) -> dict[str, int] | None:
        """Return widths near the most rewarding plan that misses by little, predicted to fit; None without any."""
        limit = self._problem.limit_ratio
        missing = [each for each in self._measured if _misses(each) and _high(each) <= PROMISING * limit]
        scores = group_worths(self._problem, self._trials)
        for each in sorted(missing, key=_reward, reverse=True):
            widths = shrink(
                self._problem,
                self._memory.model,
                each.plan.widths,
                overshoot=_high(each) / limit,
                tried=set(self._memory.fits),
                group_scores=scores,
            )
            if widths is not None:
                return widths
        return None

    @property
    def _measured(self) -> list[Trial]:
        return [each for each in self._trials if each.measurement is not None]


def _dense(problem: Problem) -> list[bool]:
    """Return for every group whether linear layers alone make its units."""
    kinds: dict[str, set[str]] = {}
    for layer in problem.layers:
        for name in layer.out_units:
            kinds.setdefault(name, set()).add(layer.kind)
    return [kinds.get(group.name) == {"linear"} for group in problem.space.groups]


def _misses(trial: Trial) -> bool:
    return trial.measurement is not None and not trial.score.feasible


def _reward(trial: Trial) -> float:
    return trial.score.reward


def _high(trial: Trial) -> float:
    return trial.score.terms["latency_high"]
