"""From wished widths to allowed ones, for all groups at once."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgeprune.plan import Space

Array = NDArray[np.float64]


class Rounding:
    """The allowed widths of a space as arrays: rounds wishes [groups] or [n, groups] to them.

    Args:
        space: the channel groups.
        removal: whether a removable group may be rounded to 0.
    """

    def __init__(self, space: Space, *, removal: bool = True) -> None:
        self._choices = [
            np.array([each for each in group.choices if each > 0 or removal], dtype=np.float64)
            for group in space.groups
        ]
        self._names = [group.name for group in space.groups]
        self.full = np.array([group.width for group in space.groups], dtype=np.float64)
        self.least = np.array([choices[0] for choices in self._choices])

    def nearest(self, wished: Array) -> Array:
        """Return the closest allowed widths; ties go to the wider."""
        places = [np.searchsorted((c[1:] + c[:-1]) / 2, wished[..., i], "right") for i, c in enumerate(self._choices)]
        return self._at(places)

    def down(self, wished: Array) -> Array:
        """Return the widest allowed widths that are not wider, else the narrowest."""
        places = [np.searchsorted(c, wished[..., i], "right") - 1 for i, c in enumerate(self._choices)]
        return self._at([np.maximum(place, 0) for place in places])

    def up(self, wished: Array) -> Array:
        """Return the narrowest allowed widths that are not narrower, else the widest."""
        places = [np.searchsorted(c, wished[..., i], "left") for i, c in enumerate(self._choices)]
        return self._at([np.minimum(place, len(c) - 1) for place, c in zip(places, self._choices, strict=True)])

    def ratios(self) -> Array:
        """Return, ascending, every uniform keep ratio at which one of the three roundings changes a width."""
        turns = [np.concatenate([c, (c[1:] + c[:-1]) / 2]) / c[-1] for c in self._choices]
        return np.unique(np.asarray(np.concatenate(turns), dtype=np.float64).round(9))

    def widths(self, row: Array) -> dict[str, int]:
        """Return a row as group → width."""
        return dict(zip(self._names, row.astype(int).tolist(), strict=True))

    def row(self, widths: Mapping[str, int]) -> Array:
        """Return group → width as a row."""
        return np.array([widths[name] for name in self._names], dtype=np.float64)

    def _at(self, places: list[NDArray[np.intp]]) -> Array:
        return np.stack([c[place] for c, place in zip(self._choices, places, strict=True)], axis=-1)
