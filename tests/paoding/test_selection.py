"""A stochastic walk takes what a coin that always shows one half lets it take, and grows cooler as units leave."""

import numpy as np
import pytest
from dense_nets import network_of

from edgeprune.paoding.intervals import Array, Bounds
from edgeprune.paoding.network import Chain, Dense
from edgeprune.paoding.selection import Heat, by_chance
from edgeprune.paoding.walk import Settings, walk


class OneHalf:
    """A generator that always draws 0.5: what is likelier than that is taken."""

    def random(self) -> float:
        return 0.5


def taken(scores: list[float], *, merged: int, last: float, quota: int = 1) -> tuple[list[float], float]:
    """Return the scores of what is taken, in order, and what is remembered.

    Unit 0 may be kept for each of the others, in this order of saliency; of the layer's ten units `merged` are gone.
    """
    saliency = np.full((len(scores) + 1, len(scores) + 1), np.inf)
    saliency[0, 1:] = np.arange(len(scores))
    found: list[float] = []
    remembered = by_chance(
        saliency,
        quota,
        lambda _keep, drop: found.append(scores[drop - 1]),
        lambda _keep, drop: np.array(scores)[drop - 1],
        heat=Heat(merged=merged, width=10, last=last),
        rng=OneHalf(),
    )
    return found, remembered


def test_what_scores_no_worse_than_the_last_is_taken() -> None:
    """Equal or lower, at once, whatever comes later; the first of all follows on nothing."""
    assert taken([1.0, 0.2], merged=0, last=1.0) == ([1.0], 1.0)
    assert taken([0.9, 0.2], merged=9, last=1.0) == ([0.9], 0.9)
    assert taken([7.0, 0.2], merged=0, last=np.inf) == ([7.0], 7.0)


def test_what_scores_worse_is_taken_by_chance() -> None:
    """Where nothing is merged yet: e^−1 < ½ is refused, e^−½ > ½ is not."""
    assert taken([2.0, 1.5, 0.9], merged=0, last=1.0) == ([1.5], 1.5)


def test_chance_falls_as_units_leave() -> None:
    """With five of ten gone the temperature is one half: e^(−½ / ½) < ½, and so on to what is no worse."""
    assert taken([2.0, 1.5, 0.9], merged=5, last=1.0) == ([0.9], 0.9)
    assert taken([1.3, 0.9], merged=5, last=1.0) == ([1.3], 1.3)


def test_the_next_is_held_against_what_was_taken_last() -> None:
    """Not against the best so far: 2.0 would be e^(−1 / 0.9) from 1.0, and is e^(−0.5 / 0.9) from 1.5."""
    assert taken([1.5, 2.0, 0.9], merged=0, last=1.0, quota=2) == ([1.5, 2.0], 2.0)


def test_where_nothing_is_taken_the_best_is() -> None:
    """A walk that takes nothing would go on for ever where it is cold."""
    assert taken([9.0, 5.0, 7.0], merged=8, last=1.0) == ([5.0], 5.0)


def steps_of_one_half() -> Chain:
    """Return units in pairs, each of which raises the score by ½ when it is merged after those before it.

    x in [0, 1] is read with weights that are d apart, so that a merge widens the one output by d: 1 + L = e^½, e, ...
    The last pair is always 0: its merge does nothing, and is more salient than those of the pairs before.
    """
    ends = np.exp(np.arange(5) / 2)
    pairs = [[1000 * place, 1000 * place + apart] for place, apart in enumerate(np.diff(ends), 1)]
    weight: Array = np.array([*np.ravel(pairs), -100, -10])[:, None]
    first = Dense(name="fc0", weight=weight, bias=None, activation="relu", group="fc0", rows=np.arange(10))
    last = Dense(name="fc1", weight=np.ones((1, 10)), bias=None, rows=np.empty(0, dtype=np.int64))
    return Chain(layers=(first, last), box=Bounds(low=np.zeros(1), high=np.ones(1)), box_source="test")


@pytest.mark.parametrize("step", [0.1, 0.2, 0.5])
def test_a_whole_walk_grows_cooler(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """At temperatures 1, .9 and .8 the next pair is taken, at .7 refused; whether a step takes one unit or five."""
    monkeypatch.setattr(np.random, "default_rng", lambda _seed: OneHalf())
    made = walk(network_of(steps_of_one_half()), Settings(mode="stochastic", step=step, alpha=1.0))
    assert made.removed["fc0"][:4] == (1, 3, 5, 9)
    assert made.partners["fc0"][:4] == (0, 2, 4, 8)
