"""What merges do to the output of a chain never lies outside of what was propagated."""

import numpy as np
from dense_nets import chain_of, inside, output_of
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.paoding.intervals import Array, Bounds
from edgeprune.paoding.network import Chain, Dense
from edgeprune.paoding.propagation import Propagation

ACTIVATIONS = st.sampled_from(["relu", "sigmoid", "tanh", "identity"])
SIZES = st.lists(st.integers(2, 7), min_size=3, max_size=5)


def random_merges(chain: Chain, rng: np.random.Generator) -> list[np.ndarray]:
    """Return representatives after a random number of random merges in every layer."""
    merged = Propagation(chain).untouched()
    for instead in merged:
        for _ in range(rng.integers(0, len(instead))):
            left = np.unique(instead)
            keep, drop = rng.choice(left, 2, replace=False)
            instead[instead == drop] = keep
    return merged


@settings(max_examples=200)
@given(seed=st.integers(0, 10**6), sizes=SIZES, activation=ACTIVATIONS, bias=st.booleans())
def test_the_true_change_lies_inside_whatever_was_merged(
    seed: int, sizes: list[int], activation: str, bias: bool
) -> None:
    """Random networks, boxes, merges in every layer, chains of merges, inputs at the corners of the box and inside."""
    rng = np.random.default_rng(seed)
    chain = chain_of(rng, sizes, activation, bias=bias)
    merged, points = random_merges(chain, rng), inside(chain.box, rng, 64)
    change = output_of(chain, points, merged) - output_of(chain, points, Propagation(chain).untouched())
    found = Propagation(chain).change(merged)
    slack = 1e-9 * (1 + np.abs(found.low).max() + np.abs(found.high).max())
    assert (change >= found.low - slack).all()
    assert (change <= found.high + slack).all()


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), sizes=SIZES, activation=ACTIVATIONS)
def test_the_impact_of_a_pair_is_the_change_with_it(seed: int, sizes: list[int], activation: str) -> None:
    """All pairs at once, on top of other merges, give what each gives when it is done and all is propagated anew."""
    rng = np.random.default_rng(seed)
    chain = chain_of(rng, sizes, activation)
    merged, propagation = random_merges(chain, rng), Propagation(chain)
    for layer, instead in enumerate(merged):
        left = np.unique(instead)
        keep, drop = (each.ravel() for each in np.meshgrid(left, left))
        keep, drop = keep[keep != drop], drop[keep != drop]
        found = propagation.impacts(merged, layer, keep, drop)
        for place, (one, other) in enumerate(zip(keep, drop, strict=True)):
            after = [np.where(each == other, one, each) if each is instead else each for each in merged]
            wanted = propagation.change(after)
            np.testing.assert_allclose(found.low[place], wanted.low, atol=1e-8, rtol=1e-8)
            np.testing.assert_allclose(found.high[place], wanted.high, atol=1e-8, rtol=1e-8)


def test_nothing_merged_changes_nothing() -> None:
    """Exactly: the bounds are points at 0."""
    propagation = Propagation(chain_of(np.random.default_rng(0), [5, 6, 4, 3], "relu"))
    change = propagation.change(propagation.untouched())
    assert not change.low.any()
    assert not change.high.any()


def test_a_duplicate_has_no_impact() -> None:
    """Units with equal weights and biases share their inputs: merging them changes nothing, and the bounds say so."""
    rng = np.random.default_rng(1)
    chain = chain_of(rng, [6, 5, 4, 3], "relu")
    first = chain.layers[0]
    assert first.bias is not None
    first.weight[3], first.bias[3] = first.weight[1], first.bias[1]
    found = Propagation(chain).impacts(Propagation(chain).untouched(), 0, np.array([1, 1]), np.array([3, 2]))
    np.testing.assert_allclose(found.width[0], 0, atol=1e-12)
    assert found.width[1].min() > 0.1


def test_the_bounds_of_one_linear_layer_are_reached() -> None:
    """Where nothing is lost to intervals there is an input at each end."""
    rng = np.random.default_rng(2)
    chain = chain_of(rng, [4, 3, 2], "identity")
    propagation = Propagation(chain)
    corners = np.stack(np.meshgrid(*zip(chain.box.low, chain.box.high, strict=True)), -1).reshape(-1, 4)
    merged = [np.array([0, 0, 2])]
    change = output_of(chain, corners, merged) - output_of(chain, corners, propagation.untouched())
    found = propagation.change(merged)
    np.testing.assert_allclose(change.min(0), found.low)
    np.testing.assert_allclose(change.max(0), found.high)


def test_weights_now_are_the_sums_of_what_was_merged() -> None:
    """Unit 0 answers for 2: the next layer reads it with both columns; 2 is read with nothing."""
    chain = chain_of(np.random.default_rng(3), [4, 3, 5, 2], "relu")
    propagation = Propagation(chain)
    merged = [np.array([0, 1, 0]), np.array([0, 1, 2, 3, 3])]
    weight = chain.layers[1].weight
    wanted = np.stack([weight[:, 0] + weight[:, 2], weight[:, 1], np.zeros(5)], axis=1)
    np.testing.assert_allclose(propagation.incoming(merged, 1), wanted)
    np.testing.assert_allclose(propagation.outgoing(merged, 0), wanted.T[:, [0, 1, 2, 3]])


# -- what the authors' code does in place of it ----------------------------------------------------------------------


def with_bias_and_relu(chain: Chain, keep: int, drop: int) -> Bounds:
    """Return the impact with the bias added to the difference, and the difference itself sent through ReLU."""
    values = chain.box
    for number, layer in enumerate(chain.layers[1:]):
        first = chain.layers[0]
        if number == 0:
            centre = first.weight @ values.centre + (0 if first.bias is None else first.bias)
            radius = np.abs(first.weight) @ values.radius
            units = Bounds(low=np.maximum(centre - radius, 0), high=np.maximum(centre + radius, 0))
            values = Bounds(low=units.low[[keep]] - units.high[[drop]], high=units.high[[keep]] - units.low[[drop]])
            weight: Array = layer.weight[:, [drop]]
        else:
            weight = layer.weight
        centre, radius = weight @ values.centre, np.abs(weight) @ values.radius
        if number:
            centre = centre + (0 if layer.bias is None else layer.bias)
        values = Bounds(low=centre - radius, high=centre + radius)
        if layer.activation == "relu":
            values = Bounds(low=np.maximum(values.low, 0), high=np.maximum(values.high, 0))
    return values


def test_a_difference_sent_through_relu_is_no_bound_and_ours_is() -> None:
    """A difference that is negative is lost there: the output falls by 1 at x = 1 and the interval says 0."""

    def dense(weight: list[list[float]], activation: str = "relu") -> Dense:
        return Dense(
            name="fc", weight=np.array(weight), bias=None, activation=activation, rows=np.empty(0, dtype=np.int64)
        )

    layers = (dense([[0.0], [1.0]]), dense([[1.0, 1.0]]), dense([[1.0]], "identity"))
    chain = Chain(layers=layers, box=Bounds(low=np.zeros(1), high=np.ones(1)), box_source="test")
    merged = [np.array([0, 0]), np.array([0])]
    true = output_of(chain, np.ones((1, 1)), merged) - output_of(chain, np.ones((1, 1)), Propagation(chain).untouched())
    assert true[0, 0] == -1
    flawed, ours = with_bias_and_relu(chain, 0, 1), Propagation(chain).change(merged)
    assert flawed.low[0] > true[0, 0]
    assert ours.low[0] <= true[0, 0] <= ours.high[0]


def test_a_difference_with_a_bias_added_is_no_bound_and_ours_is() -> None:
    """A bias is in both networks and not in their difference: the output rises by x, and −2 says it falls by 1 or more.

    The difference is nowhere negative, so that nothing is lost in ReLU.
    """

    def dense(weight: list[list[float]], bias: list[float], activation: str = "relu") -> Dense:
        rows = np.empty(0, dtype=np.int64)
        return Dense(name="fc", weight=np.array(weight), bias=np.array(bias), activation=activation, rows=rows)

    layers = (dense([[0.0], [1.0]], [0.0, 0.0]), dense([[1.0, 1.0]], [0.5]), dense([[1.0]], [-2.0], "identity"))
    chain = Chain(layers=layers, box=Bounds(low=np.zeros(1), high=np.ones(1)), box_source="test")
    merged, points = [np.array([1, 1]), np.array([0])], np.array([[0.0], [1.0]])
    true = output_of(chain, points, merged) - output_of(chain, points, Propagation(chain).untouched())
    assert true.ravel().tolist() == [0, 1]
    flawed, ours = with_bias_and_relu(chain, 1, 0), Propagation(chain).change(merged)
    assert (flawed.low[0], flawed.high[0]) == (-2, -1)
    assert (ours.low[0], ours.high[0]) == (0, 1)


def test_with_biases_the_authors_intervals_seldom_hold_and_ours_always_do() -> None:
    """One merge in the first of two hidden layers of random networks."""
    merged, missed = [np.array([0, 0, 2, 3]), np.arange(4)], 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        chain = chain_of(rng, [3, 4, 4, 2], "relu")
        points = inside(chain.box, rng, 256)
        true = output_of(chain, points, merged) - output_of(chain, points, Propagation(chain).untouched())
        flawed, ours = with_bias_and_relu(chain, 0, 1), Propagation(chain).change(merged)
        missed += bool((true < flawed.low).any() or (true > flawed.high).any())
        assert (true >= ours.low - 1e-9).all()
        assert (true <= ours.high + 1e-9).all()
    assert missed > 40
