"""Folded filters by hand: what batch norms, depthwise layers and sums do to inner products, and who is similar."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeprune.filters import NOISE, Filters, cluster, cosines

NUMBERS = st.floats(-3, 3, allow_nan=False)
DRAW = np.random.default_rng(0)


def filters(units: int = 4, features: int = 6, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return random filters, [channels, units, features], and constants, [channels, units]."""
    return DRAW.normal(size=(channels, units, features)), DRAW.normal(size=(channels, units))


def test_plain_filters_are_kept_as_inner_products() -> None:
    """Two filters (1, 2) and (3, −1): lengths √5 and √10, product 1, cosine 1 / √50."""
    seen = Filters.of(np.array([[[1.0, 2.0], [3.0, -1.0]]]), np.array([[0.5, 2.0]]))
    np.testing.assert_allclose(seen.products, [[5, 1], [1, 10]])
    np.testing.assert_allclose(seen.norms, [5**0.5, 10**0.5])
    np.testing.assert_allclose(seen.cosines, [[1, 1 / 50**0.5], [1 / 50**0.5, 1]])
    np.testing.assert_allclose(seen.constant_products, [[0.25, 1], [1, 4]])
    np.testing.assert_allclose(seen.means, seen.constants)
    np.testing.assert_allclose(seen.variances, [[5, 10]])
    assert not seen.normed


@given(arrays(np.float64, (1, 3, 4), elements=NUMBERS), arrays(np.float64, (2, 1, 3), elements=NUMBERS))
def test_batch_norm_scales_filters_and_shifts_constants(plain: np.ndarray, norm: np.ndarray) -> None:
    """Normalising inner products is the inner products of normalised filters."""
    scales, shifts = norm
    constants = plain[:, :, 0] + 1
    seen = Filters.of(plain, constants).normalised(scales, shifts, means=2 * shifts, spreads=3 * scales)
    wanted = Filters.of(plain * scales[:, :, None], constants * scales + shifts)
    np.testing.assert_allclose(seen.grams, wanted.grams, atol=1e-9)
    np.testing.assert_allclose(seen.constants, wanted.constants, atol=1e-9)
    np.testing.assert_array_equal(seen.means, 2 * shifts)
    np.testing.assert_allclose(seen.variances, 9 * scales**2)
    assert seen.normed


def test_a_depthwise_layer_makes_the_outer_product_of_kernel_and_filter() -> None:
    """Each pixel of the kernel weighs the whole filter once, and the constant with the sum of the kernel."""
    plain, constants = filters()
    kernels, biases = DRAW.normal(size=(1, 4, 9)), DRAW.normal(size=(1, 4))
    seen = Filters.of(plain, constants).convolved(kernels, biases)
    outer = np.einsum("cuf,cuk->cufk", plain, kernels).reshape(1, 4, -1)
    np.testing.assert_allclose(seen.grams, Filters.of(outer, constants).grams)
    np.testing.assert_allclose(seen.constants, constants * kernels.sum(2) + biases)
    np.testing.assert_allclose(seen.variances, Filters.of(outer, constants).variances)


def test_producers_that_are_added_are_one_long_filter() -> None:
    """A residual stream's unit reads what all its producers read, side by side."""
    (one, one_constants), (other, other_constants) = filters(features=3), filters(features=5)
    seen = Filters.of(one, one_constants) + Filters.of(other, other_constants)
    wanted = Filters.of(np.concatenate([one, other], axis=2), one_constants + other_constants)
    np.testing.assert_allclose(seen.grams, wanted.grams)
    np.testing.assert_allclose(seen.constants, wanted.constants)
    np.testing.assert_allclose(seen.variances, wanted.variances)


def test_channels_of_one_unit_are_kept_apart_and_counted_together() -> None:
    """A unit of two channels has the inner products of both; a flattened map repeats each."""
    (one, first), (other, second) = filters(), filters()
    both = Filters.of(one, first).beside(Filters.of(other, second))
    assert both.channels == 2
    np.testing.assert_allclose(both.products, (one @ one.swapaxes(1, 2) + other @ other.swapaxes(1, 2))[0])
    flat = both.repeated(3)
    assert flat.channels == 6
    np.testing.assert_allclose(flat.constants[:3], np.repeat(first, 3, axis=0))
    np.testing.assert_allclose(flat.products, 3 * both.products)


def test_silence_is_zero_and_similar_to_nothing() -> None:
    """Filters of zeros have no direction: their cosines are 0, also with themselves."""
    assert not Filters.silent(2, 3).products.any()
    assert not cosines(np.zeros((3, 3))).any()


def test_labels_are_numbered_by_first_units_and_singletons_are_noise() -> None:
    """Units 0, 3 and 4 hang together in a chain (0 and 4 are not near each other); 2 and 5 are a pair; 1 is alone."""
    near = np.eye(6)
    for one, other in ((0, 3), (3, 4), (2, 5)):
        near[one, other] = near[other, one] = 0.95
    assert cluster(near, 0.1).tolist() == [0, NOISE, 1, 0, 0, 1]
    assert cluster(near, 0.01).tolist() == [NOISE] * 6


def scanned(similarity: np.ndarray, distance: float) -> list[int]:
    """Return the labels of DBSCAN with minPts 2, written as in its paper: grow a cluster from every core point."""
    near = [np.flatnonzero(1 - row <= distance) for row in similarity]
    labels = [NOISE] * len(near)
    found = 0
    for start in range(len(near)):
        if labels[start] != NOISE or len(near[start]) < 2:
            continue
        waiting = [start]
        while waiting:
            point = waiting.pop()
            if labels[point] == NOISE:
                labels[point] = found
                waiting += near[point].tolist() if len(near[point]) >= 2 else []
        found += 1
    return labels


@given(arrays(np.float64, (9, 3), elements=NUMBERS), st.floats(0.01, 0.5))
def test_clusters_are_those_of_dbscan_with_two_points(plain: np.ndarray, distance: float) -> None:
    """Connected components of the graph of neighbours, whatever the filters."""
    similarity = cosines((plain + 1e-3) @ (plain + 1e-3).T)
    np.fill_diagonal(similarity, 1.0)
    assert cluster(similarity, distance).tolist() == scanned(similarity, distance)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_cosines_do_not_depend_on_scale(scale: float) -> None:
    """However small or large the filters are."""
    plain, _ = filters()
    np.testing.assert_allclose(cosines(scale**2 * (plain @ plain.swapaxes(1, 2))[0]), cosines(plain[0] @ plain[0].T))
