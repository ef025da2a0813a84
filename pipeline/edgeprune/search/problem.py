"""What every searcher is given, and the two verbs it answers with.

    searcher = strategies[name](problem)
    plan = searcher.ask();  trial = evaluate(plan, ...);  searcher.tell(trial)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from edgeprune.layer import Layer
from edgeprune.plan import Plan, Space
from edgeprune.trial import Trial


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
    """

    space: Space
    layers: tuple[Layer, ...]
    ranking: Mapping[str, tuple[int, ...]]
    shares: Mapping[str, float]
    limit_ratio: float
    multiple: int
    trials: int
    seed: int

    @cached_property
    def full(self) -> dict[str, int]:
        """Return group → width of the unpruned model."""
        return {group.name: group.width for group in self.space.groups}

    def plan(self, widths: Mapping[str, int]) -> Plan:
        """Return the plan that keeps the most important units of every group at these widths.

        Raises:
            PlanError: if a width is not allowed.
        """
        kept = {name: tuple(sorted(self.ranking[name][:width])) for name, width in widths.items()}
        return self.space.check(Plan(kept=kept))


class Searcher(Protocol):
    """Anything that proposes plans and learns from their scores.

    Deterministic: the same problem and the same told trials give the same asks, so a killed run replays its ledger.
    """

    def ask(self) -> Plan:
        """Return the next plan worth measuring."""

    def tell(self, trial: Trial) -> None:
        """Learn from the trial of the plan asked for last; a failed trial carries the worst score."""
