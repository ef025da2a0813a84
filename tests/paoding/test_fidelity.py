"""What the papers say of their walk, on networks of their shape trained on the example's images: means of three seeds.

Meng et al., arXiv 2405.00074 and 2204.00783. How far their figures are reached is for benchmarks/papers/paoding.py;
here stands what must not be lost.
"""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from dense_nets import PIXELS, fashion, trained
from torch import nn

from edgeprune.cut import cut_module
from edgeprune.paoding.pairs import SQUASHES, by_log
from edgeprune.paoding.walk import Settings, Walk, merged, walk
from edgeprune.robustness import Attack, Robustness, robustness

ATTACK = Attack(kind="fgsm", epsilon=0.01)
SEEDS = (0, 1, 2)
REVERSED = "impact, reversed"
"""Of the pool the pairs of highest score merge: what the score is worth is seen beside it."""


@pytest.fixture(scope="module", autouse=True)
def _reversed_score() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SQUASHES, "reversed", lambda values: -by_log(values))
        yield


@cache
def left(seed: int, mode: str, ratio: float, merge: bool = True) -> Robustness:
    """Return what is left of a trained network when a mode has taken a share of its dense units."""
    images, labels = fashion("test")
    return robustness(pruned(seed, mode, ratio, merge), [(images, labels)], [ATTACK], PIXELS)[ATTACK.name]


def pruned(seed: int, mode: str, ratio: float, merge: bool = True) -> nn.Module:
    """Return the network itself, units merged or only dropped."""
    found, made = trained(seed), _walked(seed, mode)
    plan = made.plan(made.widths(ratio))
    whole = merged(found.module, found.structure, plan, made) if merge else found.module
    return cut_module(whole, found.structure, plan)


@cache
def _walked(seed: int, mode: str) -> Walk:
    settings = Settings(mode="impact", squash="reversed") if mode == REVERSED else Settings(mode=mode)
    return walk(trained(seed).network, settings)


def right(mode: str, *ratios: float, merge: bool = True) -> int:
    """Return how many images are classified correctly, over seeds and ratios."""
    return sum(left(seed, mode, ratio, merge).right for seed in SEEDS for ratio in ratios)


def robust(mode: str, *ratios: float) -> int:
    """Return how many images are classified correctly under attack, over seeds and ratios."""
    return sum(left(seed, mode, ratio).right_attacked for seed in SEEDS for ratio in ratios)


def unchanged(mode: str, *ratios: float) -> int:
    """Return how many answers an attack leaves as they are, right or wrong: the papers' measure."""
    return sum(left(seed, mode, ratio).unchanged for seed in SEEDS for ratio in ratios)


def moved(mode: str, ratio: float) -> float:
    """Return how far pruning moves the logits on the test images, relative to their length, mean over seeds."""
    images, _ = fashion("test")
    shares = []
    for seed in SEEDS:
        cut = pruned(seed, mode, ratio)
        with torch.no_grad():
            whole = trained(seed).module(images)
            shares.append(float((cut(images) - whole).norm() / whole.norm()))
    return sum(shares) / len(SEEDS)


def test_the_networks_are_worth_pruning() -> None:
    """Trained, and robust enough for an attack to find something."""
    assert right("saliency", 0.0) > 3 * 2000 * 0.8
    assert robust("saliency", 0.0) > 3 * 2000 * 0.65


@pytest.mark.parametrize("mode", ["saliency", "impact"])
def test_merging_beats_dropping_the_same_units_from_one_half_on(mode: str) -> None:
    """What a dropped unit did is done by another, on average better than by none."""
    assert right(mode, 0.5, 0.6) > 1.05 * right(mode, 0.5, 0.6, merge=False)


@pytest.mark.parametrize("mode", ["saliency", "impact", "stochastic"])
def test_pairs_beat_magnitude_where_much_is_pruned(mode: str) -> None:
    """In accuracy and under attack, at 60 %."""
    assert right(mode, 0.6) > 1.2 * right("scale", 0.6)
    assert robust(mode, 0.6) > 1.2 * robust("scale", 0.6)


def test_impact_keeps_as_many_robust_as_saliency() -> None:
    """About equal below 30 %, and not behind at 40 and 50 % (the papers: ahead; see the benchmark)."""
    for count in (robust, unchanged):
        assert count("impact", 0.2) == pytest.approx(count("saliency", 0.2), rel=0.03)
        assert count("impact", 0.4, 0.5) >= 0.97 * count("saliency", 0.4, 0.5)


@pytest.mark.parametrize("other", ["saliency", REVERSED])
def test_impact_chooses_other_units_than_saliency_or_its_own_reverse(other: str) -> None:
    """In every layer of every network, among the first half to leave: of 63, 63 and 31 some 4 to 16 differ."""
    for seed in SEEDS:
        made, against = _walked(seed, "impact"), _walked(seed, other)
        for name, units in made.removed.items():
            half = len(units) // 2
            assert len(set(units[:half]) - set(against.removed[name][:half])) >= 2


def test_low_impact_moves_the_output_less_than_high_impact_at_first() -> None:
    """Of one pool, at 5 %: what the bounds order is true on images. Later merges pile up and it no longer shows."""
    assert moved("impact", 0.05) < 0.85 * moved(REVERSED, 0.05)


def test_impact_keeps_no_fewer_robust_than_its_own_reverse() -> None:
    """At 40 and 50 %. More it did on these three networks, not on ten: there is nothing in it to hold on to."""
    assert robust("impact", 0.4, 0.5) >= 0.97 * robust(REVERSED, 0.4, 0.5)
    assert unchanged("impact", 0.4, 0.5) >= 0.97 * unchanged(REVERSED, 0.4, 0.5)


@pytest.mark.parametrize("mode", ["saliency", "impact", "stochastic"])
def test_half_of_a_network_keeps_more_than_half_of_what_it_knew(mode: str) -> None:
    """Accuracy decays by less than 50 %, and over 50 % of robustness is kept."""
    assert right(mode, 0.5) > right(mode, 0.0) / 2
    assert robust(mode, 0.5) > robust(mode, 0.0) / 2


def test_half_of_a_network_has_two_thirds_fewer_parameters() -> None:
    """The papers' perceptron: 63.9 to 78.1 % are claimed to go; here the first layer's share is the closed form."""
    found, made = trained(0), _walked(0, "saliency")
    cut = cut_module(found.module, found.structure, made.plan(made.widths(0.5)))
    counts = [sum(each.numel() for each in net.parameters()) for net in (cut, found.module)]
    assert counts[0] == 64 * 785 + 64 * 65 + 32 * 65 + 10 * 33
    assert 1 - counts[0] / counts[1] == pytest.approx(0.55, abs=0.02)


def test_pruned_answers_are_finite_down_to_the_last_unit() -> None:
    """One unit of each layer still answers."""
    found, made = trained(0), _walked(0, "impact")
    plan = made.plan(dict.fromkeys(found.structure.full, 1))
    net = cut_module(merged(found.module, found.structure, plan, made), found.structure, plan)
    assert torch.isfinite(net(fashion("test")[0][:50])).all()
