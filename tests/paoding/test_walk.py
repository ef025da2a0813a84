"""The walk: who leaves, in what order, who answers for whom, and what is left of the network."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from dense_nets import Prepared, chain_of, mlp, network_of, prepared, small_cnn
from families import prepared as family
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgeprune.cut import cut_module
from edgeprune.errors import ConfigError, ModelError, PlanError
from edgeprune.importance import ranking
from edgeprune.paoding.network import Network, read
from edgeprune.paoding.pairs import SQUASHES
from edgeprune.paoding.propagation import Propagation
from edgeprune.paoding.schedule import widths
from edgeprune.paoding.walk import Settings, Walk, merged, walk
from edgeprune.plan import Plan

PAIRED = ("saliency", "impact", "stochastic")


@pytest.fixture(scope="module")
def cnn() -> Prepared:
    """The small CNN: two groups of filters, two of dense units."""
    return small_cnn()


@pytest.fixture(scope="module")
def perceptron() -> Prepared:
    """784-40-60-20-10 with random weights."""
    torch.manual_seed(0)
    return prepared(mlp(784, 40, 60, 20, 10), torch.rand(1, 1, 28, 28))


def candidate(found: Prepared, made: Walk, plan: Plan) -> nn.Module:
    """Return the module after merging and cutting."""
    return cut_module(merged(found.module, found.structure, plan, made), found.structure, plan)


def parameters(module: nn.Module) -> int:
    """Return how many a module has."""
    return sum(each.numel() for each in module.parameters())


# -- the schedule ----------------------------------------------------------------------------------------------------


def test_dense_layers_lose_the_same_number_each_step_and_filters_the_same_share() -> None:
    """Of 40, a tenth a step: 36, 32, .. 4, 1; and 36, 32.4, 29.16, 26.244, .. with what is gone rounded up."""
    assert list(widths(40, 0.1, dense=True)) == [40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 1]
    assert list(widths(40, 0.1, dense=False))[:7] == [40, 36, 32, 29, 26, 23, 21]
    assert list(widths(40, 0.1, dense=False))[-1] == 1


@given(full=st.integers(1, 600), step=st.floats(0.005, 1.0), dense=st.booleans())
def test_narrow_layers_lose_no_larger_share_than_wide_ones(full: int, step: float, dense: bool) -> None:
    """After any number of steps the share that is left is less than one unit below what it should be."""
    for steps, width in enumerate(widths(full, step, dense=dense)):
        left = 1 - step * steps if dense else (1 - step) ** steps
        assert max(1, full * left - 1) - 1e-6 <= width <= max(1, full * left + 1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75])
def test_interior_dense_layers_keep_the_square_of_what_is_left(perceptron: Prepared, ratio: float) -> None:
    """A layer between two that keep 1 − p has (1 − p)² of its weights; the whole count is the closed form."""
    made = walk(perceptron.network, Settings(mode="saliency", step=0.05))
    cut = candidate(perceptron, made, made.plan(made.widths(ratio)))
    left = [round(each * (1 - ratio)) for each in (40, 60, 20)]
    assert [made.widths(ratio)[name] for name in ("1", "3", "5")] == left
    sizes = [784, *left, 10]
    assert parameters(cut) == sum((into + 1) * out for into, out in pairwise(sizes))
    interior = cut.get_submodule("3").weight.numel() / 2400
    assert interior == pytest.approx((1 - ratio) ** 2, abs=0.03)


def test_half_of_a_network_with_filters_is_half_of_its_dense_units(cnn: Prepared) -> None:
    """Filters compound, so more than half of them are left."""
    made = walk(cnn.network, Settings(mode="saliency", step=0.05))
    found = made.widths(0.5)
    full = sum(made.schedule[name][0] for name in ("fc1", "fc2"))
    assert found["fc1"] + found["fc2"] == full / 2
    assert found["features.0"] + found["features.3"] > 20 / 2


def test_without_dense_units_a_ratio_counts_filters() -> None:
    """A ResNet at one half has at most half of its units."""
    found = family("resnet")
    made = walk(read(found.net, found.structure, found.graph))
    full = sum(found.structure.full.values())
    assert full * 0.4 < sum(made.widths(0.5).values()) <= full * 0.5


# -- the order -------------------------------------------------------------------------------------------------------


def test_filters_leave_weakest_first(cnn: Prepared) -> None:
    """By mean |w|; what stays longest is the strongest, and leads the ranking."""
    made = walk(cnn.network)
    scale = cnn.network.scale["features.3"]
    assert list(made.removed["features.3"]) == np.argsort(scale, kind="stable")[:-1].tolist()
    assert list(made.ranking["features.3"]) == np.argsort(-scale, kind="stable").tolist()
    assert "features.3" not in made.partners


@pytest.mark.parametrize("mode", [*PAIRED, "scale"])
def test_every_unit_but_one_leaves_once(cnn: Prepared, mode: str) -> None:
    """A ranking holds all the units of its group, whatever the mode."""
    made = walk(cnn.network, Settings(mode=mode))
    for name, units in made.ranking.items():
        assert sorted(units) == list(range(cnn.structure.full[name]))
        assert len(made.worths[name]) == len(units)


@pytest.mark.parametrize("mode", PAIRED)
def test_a_partner_is_there_when_it_is_needed(cnn: Prepared, mode: str) -> None:
    """Nothing is merged into what has left already, or into itself."""
    made = walk(cnn.network, Settings(mode=mode))
    for name, partners in made.partners.items():
        for place, (unit, partner) in enumerate(zip(made.removed[name], partners, strict=True)):
            assert partner not in made.removed[name][: place + 1]
            assert unit != partner


def test_the_least_salient_pair_goes_first(perceptron: Prepared) -> None:
    """Of all pairs, the first one included, the smallest (‖w_i − w_j‖ + bias term) · ‖a_j‖, and j is what leaves."""
    made = walk(perceptron.network, Settings(mode="saliency"))
    first, second = perceptron.network.chains[0].layers[:2]
    assert first.bias is not None
    best = min(
        (
            (np.linalg.norm(first.weight[i] - first.weight[j]) + _relative(first.bias[i], first.bias[j]))
            * np.linalg.norm(second.weight[:, j]),
            i,
            j,
        )
        for i in range(40)
        for j in range(40)
        if i != j
    )
    assert (made.partners["1"][0], made.removed["1"][0]) == best[1:]
    assert made.worths["1"][best[2]] == pytest.approx(best[0])


def _relative(one: float, other: float) -> float:
    return abs(one - other) / (abs(one + other) + 1e-8)


def test_impact_takes_the_best_of_its_pool() -> None:
    """Of the eight least salient pairs that drop different units, the four that widen the output least."""
    network = network_of(chain_of(np.random.default_rng(14), [10, 40, 6], "relu"))
    layer, after = network.chains[0].layers
    assert layer.bias is not None
    apart = np.linalg.norm(layer.weight[:, None] - layer.weight, axis=2)
    apart += np.abs(layer.bias[:, None] - layer.bias) / (np.abs(layer.bias[:, None] + layer.bias) + 1e-8)
    salient = apart * np.linalg.norm(after.weight, axis=0)
    np.fill_diagonal(salient, np.inf)
    drop = np.argsort(salient.min(0))[:8]
    keep = salient.argmin(0)[drop]
    propagation = Propagation(network.chains[0])
    spread = propagation.impacts(propagation.untouched(), 0, keep, drop).width.sum(1)
    wanted = drop[np.argsort(spread)[:4]]
    assert set(wanted.tolist()) != set(drop[:4].tolist())
    assert set(keep.tolist()).isdisjoint(drop.tolist()), "a pair would clash with another"
    made = walk(network, Settings(mode="impact", step=0.1, alpha=1.0, pool=2))
    assert list(made.removed["fc0"][:4]) == wanted.tolist()


@pytest.mark.parametrize("mode", [*PAIRED, "scale"])
def test_importance_orders_units_as_the_walk_does(cnn: Prepared, mode: str) -> None:
    """Whoever sorts by it gets the ranking; ties cannot turn it round."""
    made = walk(cnn.network, Settings(mode=mode))
    assert ranking(made.importance) == made.ranking
    equal = replace(made, worths={name: (0.0,) * len(each) for name, each in made.worths.items()})
    assert ranking(equal.importance) == made.ranking


def test_a_walk_survives_being_written_down(cnn: Prepared) -> None:
    """As JSON, every number of it."""
    for mode in (*PAIRED, "scale"):
        made = walk(cnn.network, Settings(mode=mode, alpha=0.5))
        assert Walk.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_seed_repeats_a_stochastic_walk_exactly_and_another_seed_does_not() -> None:
    """Everything random comes from it."""
    network = network_of(chain_of(np.random.default_rng(0), [12, 30, 20, 5], "relu"))
    first, again, other = (walk(network, Settings(mode="stochastic", seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first.removed != other.removed


@pytest.mark.parametrize("squash", sorted(SQUASHES))
def test_every_squash_makes_a_walk(squash: str) -> None:
    """They order differently, all of them end."""
    network = network_of(chain_of(np.random.default_rng(1), [6, 12, 4], "relu"))
    assert len(walk(network, Settings(mode="impact", squash=squash)).removed["fc0"]) == 11


@pytest.mark.parametrize("mode", PAIRED)
def test_a_walk_over_units_that_are_all_equal_ends(mode: str) -> None:
    """No saliency and no impact anywhere: ties are broken by place."""
    chain = chain_of(np.random.default_rng(0), [4, 9, 3], "relu")
    chain.layers[0].weight[:] = 1.0
    made = walk(network_of(chain), Settings(mode=mode))
    assert len(made.removed["fc0"]) == 8


def test_alpha_follows_the_activation_unless_it_is_given() -> None:
    """0.75 for ReLU and 0.05 for sigmoids, the authors' settings."""
    for activation, alpha in (("relu", 0.75), ("sigmoid", 0.05)):
        network = network_of(chain_of(np.random.default_rng(2), [8, 24, 12, 6], activation))
        by_default = walk(network, Settings(mode="impact"))
        assert by_default.removed == walk(network, Settings(mode="impact", alpha=alpha)).removed


# -- merging ---------------------------------------------------------------------------------------------------------


def test_planted_duplicates_leave_first_and_nothing_changes() -> None:
    """Pairs with equal weights and biases have saliency 0; what they did is done by the other, exactly."""
    torch.manual_seed(1)
    net = mlp(16, 20, 14, 5)
    with torch.no_grad():
        for layer, pairs in ((net[1], [(0, 7), (3, 12), (4, 19)]), (net[3], [(1, 2), (5, 9)])):
            for one, other in pairs:
                layer.weight[other], layer.bias[other] = layer.weight[one], layer.bias[one]
    found, x = prepared(net, torch.randn(1, 1, 4, 4)), torch.randn(64, 1, 4, 4)
    for mode in PAIRED:
        made = walk(found.network, Settings(mode=mode, step=0.01))
        plan = made.plan({"1": 17, "3": 12})
        np.testing.assert_allclose(candidate(found, made, plan)(x).detach(), net(x).detach(), atol=1e-5)
        assert [made.worths["1"][unit] for unit in made.removed["1"][:3]] == pytest.approx([0, 0, 0])


@pytest.mark.parametrize("mode", PAIRED)
def test_a_candidate_reads_what_was_dropped_from_its_partner(perceptron: Prepared, mode: str) -> None:
    """The cut module computes the chain with every unit replaced by the one that answers for it, in all its layers."""
    made = walk(perceptron.network, Settings(mode=mode))
    plan = made.plan({"1": 13, "3": 9, "5": 3})
    x = torch.rand(32, 1, 28, 28)
    values = x.double().flatten(1).numpy()
    for layer in perceptron.network.chains[0].layers:
        values = values @ layer.weight.T + layer.bias
        if layer.group:
            instead = np.arange(len(layer.weight))
            for unit, partner in made.representatives(layer.group, len(plan.kept[layer.group])).items():
                instead[unit] = partner
            assert set(instead.tolist()) == set(plan.kept[layer.group])
            values = np.maximum(values, 0)[:, instead]
    np.testing.assert_allclose(candidate(perceptron, made, plan)(x).detach().numpy(), values, atol=1e-5)


def test_partners_that_leave_later_are_resolved_to_the_end() -> None:
    """2 goes into 1, 1 into 0: both are answered for by 0."""
    made = Walk(
        settings=Settings(),
        taken={"fc": "saliency"},
        removed={"fc": (2, 1)},
        partners={"fc": (1, 0)},
        worths={"fc": (1.0, 1.0, 1.0)},
        dense=("fc",),
        schedule={"fc": (3, 2, 1)},
        obstacles={},
    )
    assert made.ranking == {"fc": (0, 1, 2)}
    assert made.representatives("fc", 2) == {2: 1}
    assert made.representatives("fc", 1) == {1: 0, 2: 0}
    assert made.representatives("fc", 3) == {}


def test_merging_behind_a_batch_norm_changes_the_readers_alone() -> None:
    """Weights of the layer whose units leave, and of the batch norm, are as they were; so is the module passed in."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5)).eval()
    found = prepared(net, torch.randn(1, 1, 4, 4))
    made = walk(found.network)
    before = {name: each.clone() for name, each in net.state_dict().items()}
    after = merged(net, found.structure, made.plan({"1": 5}), made).state_dict()
    assert all(torch.equal(each, net.state_dict()[name]) for name, each in before.items())
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["4.weight"]
    np.testing.assert_allclose(after["4.weight"][:, made.ranking["1"][:5]].sum(1), before["4.weight"].sum(1), atol=1e-6)


def test_a_plan_that_leaves_the_walk_is_refused(cnn: Prepared) -> None:
    """Nobody would answer for what it drops."""
    made = walk(cnn.network)
    plan = made.plan(cnn.structure.full | {"fc1": 10})
    astray = replace(plan, kept={**plan.kept, "fc1": tuple(sorted(made.removed["fc1"][:10]))})
    with pytest.raises(PlanError, match="fc1"):
        merged(cnn.module, cnn.structure, astray, made)


def test_the_full_plan_merges_nothing(cnn: Prepared) -> None:
    """The candidate is the module."""
    made, x = walk(cnn.network), torch.randn(4, 1, 16, 16)
    same = candidate(cnn, made, cnn.structure.space.full())
    assert torch.equal(same(x), cnn.module(x))


# -- where it does not apply -----------------------------------------------------------------------------------------


def test_auto_pairs_where_there_are_pairs_and_says_what_it_took(cnn: Prepared) -> None:
    """Impact for dense units, magnitude for filters."""
    made = walk(cnn.network)
    assert made.taken == {"features.0": "scale", "features.3": "scale", "fc1": "impact", "fc2": "impact"}
    assert made.assumed == ("fc1",)


def test_auto_takes_magnitude_where_there_are_none() -> None:
    """A ResNet has one dense layer, its last."""
    found = family("resnet")
    made = walk(read(found.net, found.structure, found.graph))
    assert set(made.taken.values()) == {"scale"}
    assert not made.partners


@pytest.mark.parametrize("mode", PAIRED)
def test_asking_for_pairs_where_there_are_none_is_an_error(mode: str) -> None:
    """It says what to choose instead."""
    network = Network(scale={"conv": np.ones(4)}, chains=(), obstacles={})
    with pytest.raises(ConfigError, match="no dense layer to merge in") as raised:
        walk(network, Settings(mode=mode))
    assert '"scale"' in raised.value.next_step


def test_an_unknown_operator_is_an_error_in_a_mode_of_pairs_and_a_note_in_auto() -> None:
    """Both name it."""
    network = Network(scale={"fc": np.arange(4.0)}, chains=(), obstacles={"fc": "Erf (node_erf) follows it"})
    with pytest.raises(ModelError, match="Erf"):
        walk(network, Settings(mode="impact"))
    made = walk(network)
    assert made.taken == {"fc": "scale"}
    assert "Erf" in made.obstacles["fc"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": 0.0},
        {"step": 1.5},
        {"alpha": -0.1},
        {"squash": "cube"},
        {"pool": 0},
        {"mode": "stochastic", "squash": "rank"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    """Before anything is computed."""
    with pytest.raises(ConfigError):
        Settings(**wrong)
