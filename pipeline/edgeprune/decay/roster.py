"""Where every unit is on its way from whole to gone."""

from collections.abc import Mapping

import torch
from torch import Tensor

TENSORS = ("decaying", "removed", "n", "initial", "length", "releases", "until")


class Roster:
    """The units' states, each a tensor [count + 1] of one place a unit and one for nobody.

    Attributes:
        decaying, removed: bool; a unit that is neither is idle.
        n: steps of the decay that were taken.
        initial: length of the vector before the first.
        length: the length that was prescribed last.
        releases: how often the unit was released.
        until: the first step at which it may be taken again.
        version: grows with every change of `decaying` or `removed`.
    """

    def __init__(self, nothing: Tensor) -> None:
        self.decaying, self.removed = nothing.bool(), nothing.bool()
        self.n, self.releases, self.until = nothing.long(), nothing.long(), nothing.long()
        self.initial, self.length = nothing.clone(), nothing.clone()
        self.version = 0

    @property
    def idle(self) -> Tensor:
        """Return who neither decays nor is gone."""
        return ~(self.decaying | self.removed)

    def begin(self, chosen: Tensor, lengths: Tensor) -> None:
        """Let units of these lengths decay from the next update on."""
        self.initial = torch.where(chosen, lengths, self.initial)
        self.length = torch.where(chosen, lengths, self.length)
        self.n = torch.where(chosen, 0, self.n)
        self.decaying = self.decaying | chosen
        self.version += 1

    def release(self, units: Tensor, until: int) -> None:
        """Let units go on as they are, not to be taken before the step `until`."""
        self.decaying = self.decaying & ~units
        self.releases = self.releases + units
        self.until = torch.where(units, until, self.until)
        self.version += 1

    def remove(self, units: Tensor) -> None:
        """Take note that units are gone for good."""
        self.decaying, self.removed = self.decaying & ~units, self.removed | units
        self.version += 1

    def state(self) -> dict[str, Tensor]:
        """Return all tensors, those of yes and no as bytes."""
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: each.to(torch.uint8) if each.dtype == torch.bool else each for name, each in named.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        for name in TENSORS:
            setattr(self, name, state[name].to(getattr(self, name)))
        self.version += 1
