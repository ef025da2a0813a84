"""What a group's importance is worth compared with other groups', read off the accuracies that a search has seen.

    − log(accuracy / accuracy of the unpruned model)  ≈  b + Σ_g s_g · (share of g's importance that was cut)

Importance ranks the units of one group; between groups its sums mean little (half of a residual stream's channels may
be worth more than whole branches). The slopes s_g are non-negative and pulled towards one common slope, by as much as
there are trials to say otherwise.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from edgeprune.search.problem import Problem
from edgeprune.trial import Trial

NOISE_SD = 0.2
"""Error of the log accuracy that is put down to what the formula leaves out; of 0.1 to 0.5 it ranked plans best."""

SPREAD = 1.0
"""Prior standard deviation of a slope, as a share of the common one."""

LEAST = 1e-3
"""Relative accuracies below this are all the same: nothing is left."""


def _by_accuracy(trial: Trial) -> bool:
    """Return whether accuracy is what the trial's merit is: otherwise it must not guide anything."""
    terms = trial.score.terms
    return "accuracy_relative" in terms and terms["merit"] == terms["accuracy"]


def group_worths(problem: Problem, trials: Sequence[Trial]) -> dict[str, float]:
    """Return group → s_g over the mean of all; 1 for each group while no trial was chosen by its accuracy."""
    judged = {each.plan.digest: each for each in trials if each.quality and _by_accuracy(each)}
    names = list(problem.full)
    lost = np.array(
        [[1 - problem.kept_importance(name, each.plan.widths[name]) for name in names] for each in judged.values()]
    ).reshape(-1, len(names))
    fall = np.array([-np.log(max(each.score.terms["accuracy_relative"], LEAST)) for each in judged.values()])
    common = float(fall.mean() / max(lost.sum(axis=1).mean(), LEAST)) if len(fall) else 0.0
    if common <= 0:
        return dict.fromkeys(names, 1.0)
    spread = SPREAD * common
    rows = np.hstack([np.ones((len(fall), 1)), lost]) / NOISE_SD
    prior = np.hstack([np.zeros((len(names), 1)), np.eye(len(names))]) / spread
    start = np.eye(1, len(names) + 1)
    wanted = np.concatenate([fall / NOISE_SD, np.full(len(names), common / spread), [0.0]])
    slopes = nnls(np.vstack([rows, prior, start]), wanted)[0][1:]
    return (
        dict(zip(names, (slopes / slopes.mean()).tolist(), strict=True)) if slopes.any() else dict.fromkeys(names, 1.0)
    )
