"""What every searcher is given, and the two verbs it answers with.

searcher = strategies[name](problem)
plan = searcher.ask();  trial = evaluate(plan, ...);  searcher.tell(trial)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Protocol

from edgeprune.layer import Layer
from edgeprune.paoding.schedule import STEP
from edgeprune.plan import Plan, Space
from edgeprune.statistics import Interval
from edgeprune.trial import Trial

SAFETY = 0.995
"""The upper end of a winner's interval stays under this share of the budget: it is timed again later."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One search.

    Attributes:
        space: the channel groups, in forward order.
        layers: the layers of the unpruned graph, in forward order.
        ranking: group → its units, most important first; a width keeps a prefix.
        shares: layer name → measured share of the unpruned model's time on the target; what is left to 1 is fixed cost.
        limit_ratio: the budget as a ratio of the unpruned model's latency, in (0, 1).
        multiple: the profile's channel multiple.
        trials: measurements the search may spend.
        seed: of every random choice of the searcher.
        importance: group → importance of each of its units, in unit order, compared within the group only;
            a group that is missing has equally important units.
        repairs: a plan also decides, group by group, on the coefficient of the reconstruction.
        repair: coefficients of the plans whose widths alone are given.
        similarity: group → what its units have in common, each number in [0, 1]; for learners that repair.
        step: share of each layer that one step of a walk takes.
    """

    space: Space
    layers: tuple[Layer, ...]
    ranking: Mapping[str, tuple[int, ...]]
    shares: Mapping[str, float]
    limit_ratio: float
    multiple: int
    trials: int
    seed: int
    importance: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    repairs: bool = False
    repair: Mapping[str, float] = field(default_factory=dict)
    similarity: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    step: float = STEP

    @property
    def aim(self) -> float:
        """Return the ratio that a plan should stay under: one nearer the limit would be shrunk when it is settled."""
        return self.limit_ratio * SAFETY

    @property
    def full(self) -> Mapping[str, int]:
        """Return group → width of the unpruned model."""
        return self._full

    @cached_property
    def _full(self) -> dict[str, int]:
        return {group.name: group.width for group in self.space.groups}

    def plan(self, widths: Mapping[str, int], repair: Mapping[str, float] | None = None) -> Plan:
        """Return the plan that keeps the most important units of every group at these widths.

        Args:
            widths: group → units.
            repair: group → coefficient; None: the problem's. A group that loses nothing has none.

        Raises:
            PlanError: if a width is not allowed, or a coefficient.
        """
        kept = {name: tuple(sorted(self.ranking[name][:width])) for name, width in widths.items()}
        wanted = self.repair if repair is None else repair
        cut = {name: each for name, each in wanted.items() if widths[name] < self.full[name]}
        return self.space.check(Plan(kept=kept, repair=cut))

    def kept_importance(self, name: str, width: int) -> float:
        """Return the share, 0 to 1, of group `name`'s importance that its `width` most important units hold."""
        return self._kept_shares[name][width]

    @cached_property
    def _kept_shares(self) -> dict[str, tuple[float, ...]]:
        return {group.name: self._cumulated(group.name, group.width) for group in self.space.groups}

    def _cumulated(self, name: str, width: int) -> tuple[float, ...]:
        units = self.importance.get(name, ())
        ordered = [units[unit] for unit in self.ranking[name]] if units and sum(units) > 0 else [1.0] * width
        return tuple(value / sum(ordered) for value in accumulate(ordered, initial=0.0))


def measured_ratio(trial: Trial) -> Interval | None:
    """Return the latency ratio a trial was scored on, None if it failed.

    The score's terms come first: they hold the quantile and the confidence that the budget speaks of.
    """
    terms = trial.score.terms
    if trial.measurement is None:
        return None
    if {"latency_ratio", "latency_low", "latency_high"} <= terms.keys():
        return Interval(p50=terms["latency_ratio"], low=terms["latency_low"], high=terms["latency_high"])
    return trial.measurement.ratio()


class Searcher(Protocol):
    """Anything that proposes plans and learns from their scores.

    Deterministic: the same problem and the same told trials give the same asks, so a killed run replays its ledger.
    """

    def ask(self) -> Plan:
        """Return the next plan worth measuring."""
        ...

    def tell(self, trial: Trial) -> None:
        """Learn from the trial of the plan asked for last; a failed trial carries the worst score."""
        ...
