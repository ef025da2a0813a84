"""Bounds: their algebra on known answers, and that nothing true ever lies outside of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeprune.paoding.intervals import ACTIVATIONS, Bounds, affine, around, point

NUMBERS = st.floats(-8, 8, allow_subnormal=False)
SHAPES = sorted(ACTIVATIONS)


@st.composite
def bounds(draw: st.DrawFn, size: int = 3) -> Bounds:
    """Draw bounds of `size` numbers, some of them points."""
    ends = draw(arrays(np.float64, (2, size), elements=NUMBERS))
    return Bounds(low=ends.min(0), high=ends.max(0))


def inside(box: Bounds, parts: int = 9) -> np.ndarray:
    """Return points of each interval, ends included, [parts, ...]."""
    return np.linspace(box.low, box.high, parts)


def test_sum_and_difference_take_the_worst_ends() -> None:
    """[1, 2] + [−1, 3] = [0, 5] and [1, 2] − [−1, 3] = [−2, 3]."""
    one, other = Bounds(low=np.array([1.0]), high=np.array([2.0])), Bounds(low=np.array([-1.0]), high=np.array([3.0]))
    total, difference = one + other, one - other
    assert (total.low[0], total.high[0]) == (0, 5)
    assert (difference.low[0], difference.high[0]) == (-2, 3)


def test_an_interval_less_itself_is_not_zero() -> None:
    """Nothing says that the two are the same number."""
    one = Bounds(low=np.array([1.0]), high=np.array([2.0]))
    assert (one - one).width[0] == 2


def test_both_bounds_together_allow_what_both_allow() -> None:
    """[0, 2] and [1, 3] is [1, 2]; where rounding has left a gap the result is still an interval."""
    both = Bounds(low=np.array([0.0]), high=np.array([2.0])) & Bounds(low=np.array([1.0]), high=np.array([3.0]))
    assert (both.low[0], both.high[0]) == (1, 2)
    gap = point(np.array([1.0])) & point(np.array([1.0 + 1e-16]))
    assert gap.low[0] <= gap.high[0]


def test_centre_and_radius_make_the_interval() -> None:
    """3 ± 1 is [2, 4]."""
    box = around(np.array([3.0]), np.array([1.0]))
    assert (box.low[0], box.high[0], box.centre[0], box.radius[0]) == (2, 4, 3, 1)


def test_an_affine_layer_by_hand() -> None:
    """[1 −2] · ([0, 1], [−1, 3]) + 5 = [0 − 6 + 5, 1 + 2 + 5]; the same without the bias for a change."""
    box = Bounds(low=np.array([0.0, -1.0]), high=np.array([1.0, 3.0]))
    weight = np.array([[1.0, -2.0]])
    value, change = affine(box, weight, np.array([5.0])), affine(box, weight)
    assert (value.low[0], value.high[0]) == (-1, 8)
    assert (change.low[0], change.high[0]) == (-6, 3)


def test_leading_axes_are_batches() -> None:
    """Many boxes at once give what each gives alone."""
    rng = np.random.default_rng(0)
    low, weight = rng.normal(size=(4, 7, 3)), rng.normal(size=(2, 3))
    box = Bounds(low=low, high=low + rng.random(low.shape))
    together = affine(box, weight)
    alone = affine(Bounds(low=box.low[2, 5], high=box.high[2, 5]), weight)
    np.testing.assert_allclose(together.low[2, 5], alone.low)
    np.testing.assert_allclose(together.high[2, 5], alone.high)


@given(box=bounds(), weight=arrays(np.float64, (2, 3), elements=NUMBERS))
def test_an_affine_layer_reaches_both_of_its_ends_and_nothing_beyond(box: Bounds, weight: np.ndarray) -> None:
    """Over the corners of the box the extreme values are the bounds."""
    corners = np.stack(np.meshgrid(*zip(box.low, box.high, strict=True)), -1).reshape(-1, 3)
    seen, found = corners @ weight.T, affine(box, weight)
    np.testing.assert_allclose(found.low, seen.min(0), atol=1e-9)
    np.testing.assert_allclose(found.high, seen.max(0), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("identity", (-2, 3)), ("relu", (0, 3)), ("tanh", (np.tanh(-2), np.tanh(3))), ("sigmoid", (0.119203, 0.952574))],
)
def test_activations_of_values_keep_the_ends(name: str, wanted: tuple[float, float]) -> None:
    """They never fall, so the ends go to the ends; ReLU of an interval below 0 is the point 0."""
    box = ACTIVATIONS[name].values(Bounds(low=np.array([-2.0, -3.0]), high=np.array([3.0, -1.0])))
    assert (box.low[0], box.high[0]) == pytest.approx(wanted, abs=1e-6)
    if name == "relu":
        assert (box.low[1], box.high[1]) == (0, 0)


def test_a_change_through_relu_of_anything() -> None:
    """[min(0, low), max(0, high)]: a unit may be on either side of its kink."""
    change = Bounds(low=np.array([-2.0, 1.0, -3.0]), high=np.array([3.0, 2.0, -1.0]))
    found = ACTIVATIONS["relu"].change(change)
    assert found.low.tolist() == [-2, 0, -3]
    assert found.high.tolist() == [3, 2, 0]


def test_a_change_through_relu_of_a_known_value() -> None:
    """At 1 a change by [−2, 3] moves the output by [−1, 3]; at −1 by [0, 2]."""
    change = Bounds(low=np.array([-2.0, -2.0]), high=np.array([3.0, 3.0]))
    found = ACTIVATIONS["relu"].change(change, point(np.array([1.0, -1.0])))
    assert found.low.tolist() == [-1, 0]
    assert found.high.tolist() == [3, 2]


@given(change=bounds(), at=bounds(), name=st.sampled_from(SHAPES))
def test_changes_stay_inside_and_reach_the_bounds(change: Bounds, at: Bounds, name: str) -> None:
    """f(z + d) − f(z) is never outside; with z known the bounds are reached; without, they are wider."""
    activation = ACTIVATIONS[name]
    found, loose = activation.change(change, at), activation.change(change)
    d, z = inside(change)[:, None], inside(at, 401)[None]
    seen = activation.function(z + d) - activation.function(z)
    assert (seen >= found.low - 1e-9).all()
    assert (seen <= found.high + 1e-9).all()
    np.testing.assert_allclose(seen.min((0, 1)), found.low, atol=2e-3)
    np.testing.assert_allclose(seen.max((0, 1)), found.high, atol=2e-3)
    assert (loose.low <= found.low + 1e-12).all()
    assert (loose.high >= found.high - 1e-12).all()
