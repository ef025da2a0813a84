"""How units decay, and when."""

from dataclasses import dataclass

from edgeprune.decay.rectify import RateForm
from edgeprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DecaySettings:
    """One decay phase, in optimiser steps.

        0 ······ lead ·· round ·· round ·· round ······ closing ── N ── phase
        score    the first of `rounds` parts begins      all that is left begins, nothing is released any more

    Attributes:
        phase: after so many steps every unit that must go is gone.
        steps: N, in how many steps a unit decays; 1: it goes at once, as in the host's own one-step pruning.
        lead: steps before the first unit begins: the host looks on, and its sparsity learning acts.
        rounds: in how many parts, one after the other, the units begin.
        rectify: whether units that resist are released.
        t_rate, t_len: thresholds of C_rate and C_len; 0 and 1 separated best in trials of our own, the paper's are
            not known here.
        rate: in which form C_rate is compared with `t_rate`.
        releases: how often one unit may be released.
        cooldown: steps after a release in which the unit is not taken again; None: N.
    """

    phase: int
    steps: int = 20
    lead: int = 0
    rounds: int = 1
    rectify: bool = True
    t_rate: float = 0.0
    t_len: float = 1.0
    rate: RateForm = "measured"
    releases: int = 2
    cooldown: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.phase:
            raise ConfigError(
                f"units cannot decay over {self.steps} steps within {self.phase}",
                why="every unit needs all of its steps before the model is cut",
                next_step="lower finetune.decay.steps, or raise finetune.decay.share or finetune.epochs",
            )

    @property
    def closing(self) -> int:
        """Return the last step, from 0, at which a unit may begin to decay."""
        return self.phase - self.steps

    def round(self, step: int) -> int:
        """Return the number of the round that a step, from 0, is in; -1 before the first.

        The last round begins N steps before the end at the latest, and where there is room, so early that the
        substitutes of what it releases still have all their steps.
        """
        first = min(self.lead, self.closing)
        if step < first:
            return -1
        gap = max(0, self.closing - self.steps - first) // self.rounds
        return self.rounds - 1 if step >= self.closing or not gap else min((step - first) // gap, self.rounds - 1)

    def share(self, step: int) -> float:
        """Return the share, 0 to 1, of the units that must go which is to have begun at a step, from 0."""
        return (self.round(step) + 1) / self.rounds
