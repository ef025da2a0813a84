"""Which pairs of one dense layer a step merges: one function for each mode.

All of them walk pairs (keep i, drop j) by rising saliency. A unit that was kept can be kept again, or be dropped later
with all it answers for; a unit that was dropped is gone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeprune.paoding.intervals import Array

Places = NDArray[np.int64]
Judge = Callable[[Places, Places], Array]
"""(keep, drop), [pairs] each → the score of each pair on top of all merges so far; lower goes first."""

Merge = Callable[[int, int], None]
"""(keep, drop): do it. What a judge says afterwards counts it in."""

HOTTEST = 1.0001
"""Temperature of a layer of which nothing is merged yet; it falls by the share that is (the authors' setting)."""

AT_ONCE = 32
"""Pairs that a stochastic walk judges ahead; those after one that it takes are judged again."""


@dataclass(frozen=True, kw_only=True)
class Heat:
    """Where a layer stands in a stochastic walk.

    Attributes:
        merged, width: units that are gone, and that there were: the temperature falls with their ratio.
        last: score of the pair taken last, in an earlier step; infinite before the first.
    """

    merged: int
    width: int
    last: float


def by_saliency(saliency: Array, quota: int, merge: Merge) -> None:
    """Merge the least salient pairs, one after the other.

    Args:
        saliency: of each row (keep) and column (drop), [n, n]; infinite where there is no such pair.
        quota: number of merges, less than there are units.
        merge: does one.
    """
    left = saliency.copy()
    for _ in range(quota):
        keep, drop = np.unravel_index(int(left.argmin()), left.shape)
        merge(int(keep), int(drop))
        _remove(left, int(drop))


def by_impact(saliency: Array, quota: int, merge: Merge, judge: Judge, *, pool: int) -> None:
    """Merge the best of a pool of the least salient pairs, each dropping another unit; again if some clash.

    Args:
        pool: pairs that are judged, times the quota.
    """
    left = saliency.copy()
    while quota > 0:
        keep, drop = _pool(left, pool * quota)
        gone: set[int] = set()
        for place in np.argsort(judge(keep, drop), kind="stable").tolist():
            pair = int(keep[place]), int(drop[place])
            if len(gone) < quota and gone.isdisjoint(pair):
                merge(*pair)
                gone.add(pair[1])
        for each in gone:
            _remove(left, each)
        quota -= len(gone)


def by_chance(
    saliency: Array,
    quota: int,
    merge: Merge,
    judge: Judge,
    *,
    heat: Heat,
    rng: np.random.Generator,
) -> float:
    """Walk the pairs by saliency; take what scores no worse than the last taken, the rest with e^(−Δ / temperature).

    The walk starts over until the quota is met. One that took nothing takes its best pair: where the temperature is
    low it could go on for ever.

    Args:
        heat: where the layer stands.
        rng: decides.

    Returns:
        The score of the pair taken last now.
    """
    left, merged, last = saliency.copy(), heat.merged, heat.last
    end = merged + quota

    def take(keep: int, drop: int) -> None:
        merge(keep, drop)
        _remove(left, drop)

    while merged < end:
        waiting, best, before = _in_order(left), (math.inf, 0, 0), merged
        while len(waiting) and merged < end:
            ahead, waiting = waiting[:AT_ONCE], waiting[AT_ONCE:]
            scores = judge(ahead[:, 0], ahead[:, 1])
            place = _first_taken(scores, last, HOTTEST - merged / heat.width, rng)
            if place is None:
                lowest = int(scores.argmin())
                best = min(best, (float(scores[lowest]), *ahead[lowest].tolist()))
                continue
            keep, drop = ahead[place].tolist()
            take(keep, drop)
            last, merged = float(scores[place]), merged + 1
            waiting = np.concatenate([ahead[place + 1 :], waiting])
            waiting = waiting[(waiting != drop).all(1)]
        if merged == before:
            last = best[0]
            take(*best[1:])
            merged += 1
    return last


def _first_taken(scores: Array, last: float, temperature: float, rng: np.random.Generator) -> int | None:
    for place, score in enumerate(scores.tolist()):
        if score <= last or rng.random() < math.exp((last - score) / temperature):
            return place
    return None


def _in_order(saliency: Array) -> Places:
    """Return the pairs there are, least salient first, [pairs, 2]: keep, drop."""
    order = np.argsort(saliency, axis=None, kind="stable")[: int(np.isfinite(saliency).sum())]
    return np.stack(np.unravel_index(order, saliency.shape), axis=1)


def _pool(saliency: Array, count: int) -> tuple[Places, Places]:
    """Return the least salient pairs, each dropping another unit: (keep, drop), `count` of them or as many as can."""
    keep = saliency.argmin(0)
    least = saliency[keep, np.arange(len(keep))]
    drop = np.argsort(least, kind="stable")[: min(count, int(np.isfinite(least).sum()))]
    return keep[drop], drop


def _remove(saliency: Array, unit: int) -> None:
    saliency[unit, :] = np.inf
    saliency[:, unit] = np.inf
