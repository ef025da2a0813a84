"""How wide each channel group is to be for a latency: give up what is worth least for each millisecond it saves.

    next  =  argmin over groups and narrower widths of   importance of the units given up / predicted time saved

Widths are those a plan may keep, so alignment blocks go as a whole, and all narrower widths of a group are looked at,
not only the next: where the runtime pads channels, the next may save nothing. At the end widths are given back where
the last step saved more than was needed. What comes out is a proposal; whether it fits is decided by measuring.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from edgeprune.errors import NothingFits
from edgeprune.latency_model import Array, LatencyModel
from edgeprune.plan import Group

SLACK = 1e-12


def pick_widths(
    groups: Sequence[Group], importance: Mapping[str, Sequence[float]], model: LatencyModel, limit_ratio: float
) -> dict[str, int]:
    """Return group → width, predicted to take at most `limit_ratio` of the unpruned model's latency.

    Args:
        groups: in the order of the model's names.
        importance: group → importance of each of its units, comparable between groups.
        model: fed with what was measured.
        limit_ratio: the latency as a ratio of the unpruned model's.

    Raises:
        NothingFits: if no widths are predicted to fit.
    """
    picking = _Picking(groups, importance, model)
    row = np.array([group.width for group in groups], dtype=np.float64)
    while model.predict_rows(row[None])[0] > limit_ratio + SLACK:
        row = picking.narrowed(row, limit_ratio)
    return dict(zip(model.names, picking.widened(row, limit_ratio).astype(int).tolist(), strict=True))


class _Picking:
    def __init__(self, groups: Sequence[Group], importance: Mapping[str, Sequence[float]], model: LatencyModel) -> None:
        self._groups, self._model = groups, model
        self._kept = [_kept_by_width(importance[group.name]) for group in groups]

    def narrowed(self, row: Array, limit_ratio: float) -> Array:
        """Return the row with the group narrowed that loses least for what it saves.

        Raises:
            NothingFits: if nothing is predicted to save any time.
        """
        moves = self._moves(row, -1)
        saved = self._model.predict_rows(row[None])[0] - self._model.predict_rows(moves)
        lost = self._worth(row[None]) - self._worth(moves)
        useful = np.flatnonzero(saved > SLACK)
        if not len(useful):
            reached = self._model.predict_rows(row[None])[0]
            raise NothingFits(
                f"{limit_ratio:.3f}x is out of reach",
                why=f"the narrowest widths that save time are predicted to take {reached:.3f}x",
                next_step="ask for a longer latency, or lower space.minimum_ratio",
            )
        return np.asarray(moves[useful[np.argmin(lost[useful] / saved[useful])]])

    def widened(self, row: Array, limit_ratio: float) -> Array:
        """Return the row with widths given back while they fit, most importance first."""
        while len(moves := self._moves(row, 1)):
            fitting = moves[self._model.predict_rows(moves) <= limit_ratio + SLACK]
            if not len(fitting):
                break
            row = fitting[np.argmax(self._worth(fitting))]
        return row

    def _worth(self, rows: Array) -> Array:
        columns = [kept[rows[:, place].astype(np.int64)] for place, kept in enumerate(self._kept)]
        return np.asarray(np.sum(columns, axis=0))

    def _moves(self, row: Array, direction: int) -> Array:
        """Return the rows with one group at another width it may have, all narrower (−1) or all wider (+1) ones."""
        places = [
            (place, width)
            for place, group in enumerate(self._groups)
            for width in group.choices
            if (width - row[place]) * direction > 0
        ]
        rows = np.repeat(row[None], len(places), axis=0)
        for number, (place, width) in enumerate(places):
            rows[number, place] = width
        return rows


def _kept_by_width(importance: Sequence[float]) -> Array:
    """Return the importance of the best units together, for every width from 0."""
    return np.array([0.0, *accumulate(sorted(importance, reverse=True))])
