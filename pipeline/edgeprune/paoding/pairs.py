"""How much a merge of two dense units would cost: kernels over pairs (keep i, drop j), NumPy, float64.

Unit j is dropped and i answers for it: what read j with weights a_j reads i with them, on top of its own (a_i += a_j;
Srinivas and Babu, arXiv 1507.06149). That is exact where the two always agree.
"""

from collections.abc import Callable, Mapping

import numpy as np

from edgeprune.paoding.intervals import Array, Bounds

EPSILON = 1e-8
"""Keeps the relative difference of two biases that cancel finite."""

ALIKE = 0.9
"""Two output intervals at least so similar count as the same when the entropy is taken (the authors' setting)."""

NEAR = 1e-6
"""Squared distances below this share of the lengths are computed again, exactly: they come from a difference."""


def saliency(incoming: Array, outgoing: Array, bias: Array | None = None) -> Array:
    """Return s_ij = (‖w_i − w_j‖ + |b_i − b_j| / |b_i + b_j|) · ‖a_j‖ for every pair, [n, n], 0 on the diagonal.

    Args:
        incoming: w, [n, in].
        outgoing: a, [n, out].
        bias: b, [n]; without one its term is left out.
    """
    apart = distances(incoming)
    if bias is not None:
        apart = apart + np.abs(bias[:, None] - bias) / (np.abs(bias[:, None] + bias) + EPSILON)
    return np.asarray(apart * np.linalg.norm(outgoing, axis=1))


def distances(rows: Array) -> Array:
    """Return the Euclidean distance of every two rows, [n, n]; equal rows are exactly 0 apart."""
    squares = (rows * rows).sum(1)
    squared = squares[:, None] + squares - 2 * (rows @ rows.T)
    near_i, near_j = np.nonzero(squared < NEAR * (squares[:, None] + squares))
    for start in range(0, len(near_i), 4096):
        part = slice(start, start + 4096)
        squared[near_i[part], near_j[part]] = ((rows[near_i[part]] - rows[near_j[part]]) ** 2).sum(1)
    return np.asarray(np.sqrt(np.maximum(squared, 0)))


def similarity(bounds: Bounds) -> Array:
    """Return how alike any two of the intervals [..., o] are, [..., o, o]: 1 where equal.

    1 − ½ (|low_a − low_b| + |high_a − high_b|) / range of everything the two and 0 span; 1 if that is nothing.
    """
    low_a, low_b = bounds.low[..., :, None], bounds.low[..., None, :]
    high_a, high_b = bounds.high[..., :, None], bounds.high[..., None, :]
    span = np.maximum(np.maximum(high_a, high_b), 0) - np.minimum(np.minimum(low_a, low_b), 0)
    apart = (np.abs(low_a - low_b) + np.abs(high_a - high_b)) / 2
    return np.asarray(1 - np.divide(apart, span, out=np.zeros_like(span), where=span > 0))


def spread(bounds: Bounds) -> Array:
    """Return L = Σ_o (high_o − low_o) of intervals [..., o]."""
    return np.asarray(bounds.width.sum(-1))


def entropy(bounds: Bounds) -> Array:
    """Return ENT = − Σ_u p_u ln p_u of intervals [..., o], p_u the share of them that are like u; 0 if all are alike.

    A sum over outputs, as the authors have it, and so not normalised: with o outputs up to o / e.
    """
    share = (similarity(bounds) >= ALIKE).mean(-1)
    return np.asarray(-(share * np.log(share)).sum(-1))


def by_log(values: Array) -> Array:
    """Return ln(1 + x): keeps the order, and tells large values apart."""
    return np.log1p(values)


def by_sigmoid(values: Array) -> Array:
    """Return 1 / (1 + e^−x), as the authors have it: near 1 for all but small values, so that most become equal."""
    return np.asarray(1 / (1 + np.exp(-values)))


def by_rank(values: Array) -> Array:
    """Return the place of each of [n] among them, 0 to 1; equal values share the lowest."""
    return np.asarray(np.searchsorted(np.sort(values), values) / max(1, len(values) - 1))


SQUASHES: Mapping[str, Callable[[Array], Array]] = {"log1p": by_log, "rank": by_rank, "sigmoid": by_sigmoid}
"""How the two addends of a score are brought to one scale."""


def score(bounds: Bounds, alpha: float, squash: str) -> Array:
    """Return α · squash(L) + (1 − α) · squash(ENT) of the output changes [n, o] of n candidates; lower goes first."""
    squashed = SQUASHES[squash]
    return alpha * squashed(spread(bounds)) + (1 - alpha) * squashed(entropy(bounds))
