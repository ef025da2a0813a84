"""One more plan after the search: a little narrower because the winner missed the budget, a little wider because it
left some of it unused.

Both look at the plans around the winner (one group changed to any width, two groups changed by one step, one traded
against another, and a greedy walk that changes group after group) and take the one that keeps most importance among
those predicted to fit. Predictions are used as a ratio to the winner's own prediction, so a constant error of the
latency model cancels against the winner's measurement.
"""

from collections.abc import Mapping, Set

import numpy as np

from edgeprune.latency_model import Array, LatencyModel
from edgeprune.search.problem import Problem

SLACK = 1e-9


def shrink(
    problem: Problem,
    model: LatencyModel,
    widths: Mapping[str, int],
    *,
    overshoot: float,
    tried: Set[str],
    group_scores: Mapping[str, float] | None = None,
) -> dict[str, int] | None:
    """Return the most important plan around `widths` whose predicted latency is lower by the factor `overshoot`.

    Args:
        problem: the search it belongs to.
        model: predicts latency.
        widths: of the plan that missed the budget.
        overshoot: upper end of its measured ratio / limit, 1 or more.
        tried: digests of the plans not to come back to.
        group_scores: group → what all of its importance is worth compared with other groups; 1 where missing.

    Returns:
        Widths, or None when nothing narrower is left to try.
    """
    around = _Around(problem, model, widths, group_scores or {})
    candidates = np.vstack([around.singles(-1), around.pairs(-1, -1), around.pairs(-1, 1), around.walk(-1)])
    return around.best(candidates, around.predicted / overshoot, -np.inf, tried)


def grow(
    problem: Problem,
    model: LatencyModel,
    widths: Mapping[str, int],
    *,
    used: float,
    tried: Set[str],
    group_scores: Mapping[str, float] | None = None,
) -> dict[str, int] | None:
    """Return the plan around `widths` that keeps more importance and is predicted to use at most what is left.

    Args:
        problem, model, tried, group_scores: as for `shrink`.
        widths: of the plan that left some of the budget unused.
        used: upper end of its measured ratio / limit, at most 1.

    Returns:
        Widths, or None when nothing that gains importance fits or is left to try.
    """
    around = _Around(problem, model, widths, group_scores or {})
    allowed = around.predicted / used
    candidates = np.vstack([around.singles(1), around.pairs(1, 1), around.pairs(-1, 1), around.walk(1, allowed)])
    return around.best(candidates, allowed, around.worth(around.row[None])[0], tried)


class _Around:
    """The plans near one plan, as rows of widths in the order of the model's names."""

    def __init__(
        self, problem: Problem, model: LatencyModel, widths: Mapping[str, int], scores: Mapping[str, float]
    ) -> None:
        self._problem, self._model = problem, model
        self._groups = problem.space.groups
        self._worths = [
            {each: scores.get(group.name, 1.0) * problem.kept_importance(group.name, each) for each in group.choices}
            for group in self._groups
        ]
        self.row = model.row(widths)
        self.predicted = model.predict(widths)

    def worth(self, rows: Array) -> Array:
        """Return the importance kept by each row, summed over groups."""
        columns = [[table[int(width)] for width in rows[:, place]] for place, table in enumerate(self._worths)]
        return np.asarray(np.sum(np.array(columns), axis=0))

    def singles(self, direction: int) -> Array:
        """Return the rows with one group at any narrower (−1) or wider (+1) width."""
        rows = [self._changed(self.row, *move) for move in self._moves(self.row, direction, 0)]
        return np.array(rows).reshape(-1, len(self.row))

    def pairs(self, one: int, other: int) -> Array:
        """Return the rows with two groups changed by one step each, in the given directions."""
        firsts, seconds = self._moves(self.row, one, 1), self._moves(self.row, other, 1)
        rows = [self._changed(self._changed(self.row, *a), *b) for a in firsts for b in seconds if a[0] != b[0]]
        return np.array(rows).reshape(-1, len(self.row))

    def walk(self, direction: int, allowed: float = np.inf) -> Array:
        """Return the rows of a walk narrower or wider that loses least or gains most importance for the latency.

        It goes on as long as a step is predicted to be within `allowed`.
        """
        rows = [self.row]
        while steps := self._moves(rows[-1], direction, 2):
            nexts = np.array([self._changed(rows[-1], *step) for step in steps])
            nexts = nexts[self._model.predict_rows(nexts) <= allowed + SLACK]
            if not len(nexts):
                break
            rows.append(nexts[self._rates(rows[-1], nexts).argmax()])
        return np.array(rows[1:]).reshape(-1, len(self.row))

    def best(self, rows: Array, allowed: float, above: float, tried: Set[str]) -> dict[str, int] | None:
        """Return the untried row of most worth, over `above`, that is predicted within `allowed`; ties: the faster."""
        rows = np.unique(rows, axis=0)
        predicted, worth = self._model.predict_rows(rows), self.worth(rows)
        for place in np.lexsort((predicted, -worth)):
            if predicted[place] <= allowed + SLACK and worth[place] > above + SLACK:
                widths = dict(zip(self._model.names, rows[place].astype(int).tolist(), strict=True))
                if self._problem.plan(widths).digest not in tried:
                    return widths
        return None

    def _rates(self, row: Array, nexts: Array) -> Array:
        """Return importance per latency of each step, to be made large: gained when widening, kept when narrowing."""
        worth = self.worth(nexts) - self.worth(row[None])
        latency = np.abs(self._model.predict_rows(nexts) - self._model.predict_rows(row[None]))
        return np.asarray(worth / np.maximum(latency, SLACK))

    def _moves(self, row: Array, direction: int, steps: int) -> list[tuple[int, int]]:
        """Return (group, width) of the next `steps` widths of every group in one direction; all of them if 0."""
        moves = []
        for place, group in enumerate(self._groups):
            beyond = [each for each in group.choices if (each - row[place]) * direction > 0][::direction]
            moves += [(place, width) for width in beyond[: steps or None]]
        return moves

    @staticmethod
    def _changed(row: Array, place: int, width: int) -> Array:
        changed = row.copy()
        changed[place] = width
        return changed
