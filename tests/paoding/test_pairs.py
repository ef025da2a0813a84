"""What a merge of two units costs: saliency, spread, entropy and score on known answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeprune.paoding.intervals import Bounds
from edgeprune.paoding.pairs import EPSILON, SQUASHES, by_rank, distances, entropy, saliency, score, similarity, spread


def intervals(*ends: tuple[float, float]) -> Bounds:
    """Return bounds of these ends."""
    low, high = np.array(ends, dtype=float).T
    return Bounds(low=low, high=high)


def test_saliency_by_hand() -> None:
    """(‖(3, 4) − 0‖ + |1 − 3| / |1 + 3|) · ‖a_j‖, a of the unit that is dropped."""
    found = saliency(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [6.0, 8.0]]), np.array([1.0, 3.0]))
    np.testing.assert_allclose(found, [[0, 5.5 * 10], [5.5 * 1, 0]], rtol=1e-6)


def test_without_a_bias_saliency_has_no_bias_term() -> None:
    """‖w_i − w_j‖ · ‖a_j‖."""
    found = saliency(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[1.0], [2.0]]))
    np.testing.assert_allclose(found, [[0, 10], [5, 0]])


def test_biases_that_cancel_give_a_number() -> None:
    """|b_i + b_j| may be 0: the pair is dear, not infinite; two biases of 0 are equal."""
    found = saliency(np.zeros((3, 2)), np.ones((3, 1)), np.array([1.0, -1.0, 0.0]))
    assert np.isfinite(found).all()
    assert found[0, 1] == pytest.approx(2 / EPSILON)
    assert saliency(np.zeros((2, 2)), np.ones((2, 1)), np.zeros(2)).tolist() == [[0, 0], [0, 0]]


def test_duplicates_are_exactly_zero_apart() -> None:
    """However long their weights: no square is taken of a difference of squares there."""
    rows = np.random.default_rng(0).normal(size=(40, 300)) * 1e3
    rows[7] = rows[31]
    found = distances(rows)
    assert found[7, 31] == 0
    assert (found + np.eye(40) > 0).sum() == 40 * 40 - 2


@given(rows=arrays(np.float64, (6, 4), elements=st.floats(-5, 5, allow_subnormal=False)))
def test_distances_are_euclidean(rows: np.ndarray) -> None:
    """The same as row by row."""
    wanted = np.linalg.norm(rows[:, None] - rows, axis=2)
    np.testing.assert_allclose(distances(rows), wanted, atol=1e-9, rtol=1e-6)


def test_similarity_by_hand() -> None:
    """[0, 2] and [1, 3] span [0, 3]: 1 − ½ (1 + 1) / 3; far from 0 the span counts from 0."""
    found = similarity(intervals((0, 2), (1, 3)))
    np.testing.assert_allclose(found, [[1, 2 / 3], [2 / 3, 1]])
    assert similarity(intervals((10, 12), (11, 13)))[0, 1] == pytest.approx(1 - 1 / 13)
    assert similarity(intervals((0, 0), (0, 0))).tolist() == [[1, 1], [1, 1]]


@given(ends=arrays(np.float64, (5, 2), elements=st.floats(-9, 9)))
def test_similarity_is_symmetric_and_between_zero_and_one(ends: np.ndarray) -> None:
    """And 1 for an interval with itself."""
    found = similarity(Bounds(low=ends.min(1), high=ends.max(1)))
    np.testing.assert_allclose(found, found.T)
    assert (found >= -1e-12).all()
    assert (found <= 1).all()
    assert (np.diag(found) == 1).all()


def test_entropy_is_zero_when_all_intervals_are_equal() -> None:
    """Whatever they are."""
    assert entropy(intervals(*[(-3, 5)] * 10)) == 0
    assert entropy(intervals(*[(0, 0)] * 10)) == 0


def test_entropy_by_hand() -> None:
    """Three alike and one alone among four: p = ¾ three times, ¼ once."""
    found = entropy(intervals((0, 10), (0, 10), (0, 10.1), (-50, 50)))
    assert found == pytest.approx(-(3 * 0.75 * np.log(0.75) + 0.25 * np.log(0.25)))


def test_intervals_are_alike_from_nine_tenths_on() -> None:
    """[0, 10] is 0.905 like [0, 8.1] and 0.895 like [0, 7.9]: one kind, and two."""
    assert similarity(intervals((0, 10), (0, 8.1)))[0, 1] == pytest.approx(0.905)
    assert entropy(intervals((0, 10), (0, 8.1))) == 0
    assert entropy(intervals((0, 10), (0, 7.9))) == pytest.approx(np.log(2))


def test_entropy_of_outputs_that_all_differ() -> None:
    """p = 1 / o for each: ln o. It is a sum over outputs, so shares in between make it larger."""
    assert entropy(intervals((0, 1), (0, 10), (0, 100), (0, 1000))) == pytest.approx(np.log(4))
    assert entropy(intervals((0, 1), (0, 1), (0, 100), (0, 100))) == pytest.approx(4 * 0.5 * np.log(2))


def test_spread_adds_the_widths() -> None:
    """L = 3 + 0 + 1."""
    assert spread(intervals((-1, 2), (5, 5), (0, 1))) == 4


def test_a_score_weighs_spread_against_entropy() -> None:
    """α = 1 looks at the spread alone, α = 0 at the entropy alone; nothing changed scores 0."""
    wide = Bounds(low=np.array([[0.0, 0.0]]), high=np.array([[4.0, 4.0]]))
    uneven = Bounds(low=np.array([[0.0, 0.0]]), high=np.array([[1.0, 0.0]]))
    assert score(wide, 1.0, "log1p") == pytest.approx(np.log(9))
    assert score(uneven, 1.0, "log1p") == pytest.approx(np.log(2))
    assert score(wide, 0.0, "log1p") < score(uneven, 0.0, "log1p")
    assert score(Bounds(low=np.zeros((1, 3)), high=np.zeros((1, 3))), 0.75, "log1p") == 0


@given(values=st.lists(st.floats(0, 1e4), min_size=2, max_size=20, unique=True))
def test_squashing_never_turns_an_order_round(values: list[float]) -> None:
    """Of two values the larger is not squashed below the smaller."""
    ordered = np.sort(np.array(values))
    for squash in SQUASHES.values():
        assert (np.diff(squash(ordered)) >= 0).all()


def test_the_sigmoid_makes_large_spreads_equal_and_the_logarithm_does_not() -> None:
    """Why it is not the default."""
    spreads = np.array([40.0, 400.0, 4000.0])
    assert len(set(SQUASHES["sigmoid"](spreads).tolist())) == 1
    assert len(set(SQUASHES["log1p"](spreads).tolist())) == 3


def test_ranks_run_from_zero_to_one_and_ties_share_one() -> None:
    """Three values, two of them equal."""
    assert by_rank(np.array([5.0, 1.0, 5.0])).tolist() == [0.5, 0, 0.5]
    assert by_rank(np.array([7.0])).tolist() == [0]
