"""The pruner that decay is put into: it says which units go and what else acts on the gradients until they do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from edgeprune.decay.units import Units


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One optimiser step between the backward pass and the update, as a host sees it.

    Attributes:
        units: with the present parameters and gradients.
        step: number of the step, from 0.
        version: grows whenever units begin, are released or go.
        learning_rate: the highest of the optimiser's.
        idle: units that neither decay nor are gone, bool [count + 1]; nobody is idle.
    """

    units: Units
    step: int
    version: int
    learning_rate: float
    idle: Tensor


class Host(Protocol):
    """A structured pruner.

    Its own one-step pruning is what `DecayOptimiser` does with N = 1: the units it picks are zero after one step.
    """

    def watch(self, now: Moment, /) -> None:
        """Look at the gradients of the loss alone; called at every step until all units have gone."""
        ...

    def scores(self, now: Moment, /) -> Tensor:
        """Return the importance of every unit, [count + 1]: of each group the lowest go first.

        Asked for when a round begins; until the next, substitutes are taken by the same scores.
        """
        ...

    def ready(self, now: Moment, /) -> Tensor | None:
        """Return the units that ask to begin at once, bool [count + 1]; None if the host waits for its rounds."""
        ...

    def chosen(self, now: Moment, /) -> None:
        """Take note that a round begins, with the scores that were asked for."""
        ...

    def adjust(self, now: Moment, /) -> None:
        """Add the host's own terms to the gradients, those of decaying units left as they are."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Return what the host remembers from step to step."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Remember what `state` returned."""
        ...
