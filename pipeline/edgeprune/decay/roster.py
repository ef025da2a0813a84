"""Where every unit is on its way from whole to gone."""

from collections.abc import Mapping

import torch
from torch import Tensor

TENSORS = ("decaying", "removed", "n", "initial", "length", "releases", "until", "scores")


class Roster:
    """The units' states, each a tensor [count + 1] of one place a unit and one for nobody.

    Attributes:
        decaying, removed: bool; a unit that is neither is idle.
        n: steps of the decay that were taken.
        initial: length of the vector before the first.
        length: the length that was prescribed last.
        releases: how often the unit was released.
        until: the first step at which it may be taken again.
        scores: what the host said of the unit when the last round was chosen.
        version: grows with every change of `decaying` or `removed`.
        idle: who neither decays nor is gone, bool.
        busy: whether anybody decays.
        there: 1 for who is not gone.
    """

    def __init__(self, nothing: Tensor) -> None:
        self.decaying, self.removed = nothing.bool(), nothing.bool()
        self.n, self.releases, self.until = nothing.long(), nothing.long(), nothing.long()
        self.initial, self.length, self.scores = nothing.clone(), nothing.clone(), nothing.clone()
        self.version = 0
        self._changed()

    def _changed(self) -> None:
        self.idle = ~(self.decaying | self.removed)
        self.busy = bool(self.decaying.any())
        self.there = (~self.removed).to(self.length.dtype)
        self.version += 1

    def begin(self, chosen: Tensor, lengths: Tensor) -> None:
        """Let units of these lengths decay from the next update on."""
        self.initial = torch.where(chosen, lengths, self.initial)
        self.length = torch.where(chosen, lengths, self.length)
        self.n = torch.where(chosen, 0, self.n)
        self.decaying = self.decaying | chosen
        self._changed()

    def release(self, units: Tensor, until: int) -> None:
        """Let units go on as they are, not to be taken before the step `until`."""
        self.decaying = self.decaying & ~units
        self.releases = self.releases + units
        self.until = torch.where(units, until, self.until)
        self._changed()

    def remove(self, units: Tensor) -> None:
        """Take note that units are gone for good."""
        self.decaying, self.removed = self.decaying & ~units, self.removed | units
        self._changed()

    def state(self) -> dict[str, Tensor]:
        """Return all tensors, those of yes and no as bytes."""
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: each.to(torch.uint8) if each.dtype == torch.bool else each for name, each in named.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        for name in TENSORS:
            setattr(self, name, state[name].to(getattr(self, name)))
        self._changed()
