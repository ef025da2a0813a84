"""Rules that read weights: closed forms on a few filters, and what scaling and permuting layers does to them."""

import math

import families
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from importance_toys import Pair, Three, scores, structure_of
from torch import nn

from edgeprune.importance import RULES, unit_importance
from edgeprune.importance.members import filters, levelled

FILTERS = [[3.0, 4.0], [5.0, 0.0], [0.0, -1.0]]


def test_l1_is_the_sum_of_absolute_weights_of_a_filter_over_the_layers_mean() -> None:
    """7, 5 and 1, of mean 13/3."""
    assert scores(Pair(FILTERS), "l1", channels=2) == pytest.approx([7 / (13 / 3), 5 / (13 / 3), 1 / (13 / 3)])


def test_l2_is_the_length_of_a_filter_over_the_layers_mean() -> None:
    """5, 5 and 1, of mean 11/3."""
    assert scores(Pair(FILTERS), "l2", channels=2) == pytest.approx([5 / (11 / 3), 5 / (11 / 3), 1 / (11 / 3)])


def test_geometric_median_is_the_sum_of_distances_to_the_other_filters() -> None:
    """The squared distances are 20, 34 and 26."""
    first, second, third = math.sqrt(20), math.sqrt(34), math.sqrt(26)
    sums = np.array([first + second, first + third, second + third])
    assert scores(Pair(FILTERS), "geometric-median", channels=2) == pytest.approx(sums / sums.mean())


def test_the_filter_in_the_middle_is_the_one_that_others_can_stand_in_for() -> None:
    """It is nearest to the geometric median although it is by far the longest of those near it."""
    found = scores(Pair([[10.0, 10.0], [10.0, 11.0], [10.0, 9.0], [0.0, 10.0]]), "geometric-median", channels=2)
    assert int(np.argmin(found)) == 0
    assert int(np.argmax(found)) == 3


def test_batch_norm_scale_is_the_absolute_scale() -> None:
    """Nothing is divided: scales compare layers as they are."""
    assert scores(Pair(FILTERS, [-2.0, 0.5, 1.0]), "batch-norm-scale", channels=2) == (2.0, 0.5, 1.0)


def test_group_norm_is_the_sum_of_squared_weights_of_each_layer_over_their_mean() -> None:
    """Made with 1, 2, 3 (squares 1, 4, 9; mean 14/3) and read with columns of squared length 2, 2, 8 (mean 4)."""
    module = Three((1.0, 2.0, 3.0), ((1.0, -1.0, 2.0), (1.0, 1.0, 2.0)))
    expected = [1 / (14 / 3) + 2 / 4, 4 / (14 / 3) + 2 / 4, 9 / (14 / 3) + 8 / 4]
    assert scores(module, "group-norm") == pytest.approx(expected)


def test_random_repeats_with_its_seed_and_differs_with_another() -> None:
    """The control of all other rules is a function of its seed."""
    module, structure = Pair(FILTERS).eval(), structure_of(Pair(FILTERS), 2)
    first, again, other = (unit_importance(module, structure, "random", seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert all(0 <= each < 1 for each in first["one"])


class Sum(nn.Module):
    """The two convolutions that feed one addition are one group, each with its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(1, 2, 1, bias=False)
        self.norm_one, self.norm_other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.linear = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.one.weight.copy_(torch.tensor([1.0, 1.0]).view(2, 1, 1, 1))
            self.other.weight.copy_(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
            self.norm_one.weight.copy_(torch.tensor([1.0, 2.0]))
            self.norm_other.weight.copy_(torch.tensor([5.0, -1.0]))
            self.linear.weight.fill_(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear((self.norm_one(self.one(x)) + self.norm_other(self.other(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("l1", ((1 + 1 / 2) / 2, (1 + 3 / 2) / 2)),
        ("l2", ((1 + 1 / 2) / 2, (1 + 3 / 2) / 2)),
        ("geometric-median", ((0 + 1) / 2, (0 + 1) / 2)),
        ("batch-norm-scale", ((1 + 5) / 2, (2 + 1) / 2)),
        ("group-norm", (1 + 1 / 5 + 1 / 2.5 + 25 / 13 + 1, 1 + 9 / 5 + 4 / 2.5 + 1 / 13 + 1)),
    ],
)
def test_members_of_a_coupled_group_count_together(rule: str, expected: tuple[float, float]) -> None:
    """Filters and scales as a mean over those that make the sum, the group norm as a sum over everything."""
    assert scores(Sum(), rule) == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["l1", "l2", "group-norm"])
def test_a_channel_of_zeros_is_worth_nothing(rule: str) -> None:
    """Zeros on both sides."""
    module = Three((1.0, 0.0, -3.0), ((1.0, 0.0, 2.0), (-1.0, 0.0, 1.0)))
    assert scores(module, rule)[1] == 0.0


READS_WEIGHTS = [name for name, rule in RULES.items() if not rule.needs.images and name != "random"]


@pytest.mark.parametrize("rule", READS_WEIGHTS)
@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(6)), seed=st.integers(0, 1000))
def test_permuting_channels_permutes_their_importance(rule: str, order: list[int], seed: int) -> None:
    """A rule looks at a channel's weights and at the others, never at its place."""
    made = noisy_pair(seed)
    before = unit_importance(made, NOISY, rule)["one"]
    with torch.no_grad():
        made.one.weight.copy_(made.one.weight[order].clone())
        made.norm.weight.copy_(made.norm.weight[order].clone())
        made.norm.bias.copy_(made.norm.bias[order].clone())
        made.two.weight.copy_(made.two.weight[:, order].clone())
    assert unit_importance(made, NOISY, rule)["one"] == pytest.approx([before[place] for place in order])


@pytest.mark.parametrize("rule", READS_WEIGHTS)
@settings(deadline=None, max_examples=20)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_scaling_a_layer_changes_nothing_but_batch_norm_scales(rule: str, factor: float, seed: int) -> None:
    """All filters times c: the same importance. All scales times c: c times the importance, where scales are read."""
    made = noisy_pair(seed)
    before = unit_importance(made, NOISY, rule)["one"]
    with torch.no_grad():
        made.one.weight.mul_(factor)
        made.norm.weight.mul_(factor)
    expected = np.array(before) * (factor if rule == "batch-norm-scale" else 1)
    assert unit_importance(made, NOISY, rule)["one"] == pytest.approx(expected, rel=1e-5)


def noisy_pair(seed: int) -> Pair:
    """Return a pair of six random channels with random scales, eval mode."""
    draw = torch.Generator().manual_seed(seed)
    made = Pair(torch.randn(6, 2, generator=draw).tolist(), (torch.rand(6, generator=draw) + 0.1).tolist())
    with torch.no_grad():
        made.two.weight.copy_(torch.randn(2, 6, 1, 1, generator=draw))
        made.norm.bias.copy_(torch.randn(6, generator=draw))
    return made.eval()


NOISY = structure_of(noisy_pair(0), 2)

LAYERS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv2d(4, 8, 3, padding=1, groups=4),
    nn.ConvTranspose2d(4, 6, 2, 2),
    nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
    nn.ConvTranspose2d(4, 4, 3, padding=1, groups=4),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_a_filter_is_every_weight_that_its_channel_depends_on(layer: nn.Module) -> None:
    """Where the gradient of one output channel is not zero is its filter, in grouped and transposed layers too."""
    channels = filters(layer).shape[0]
    images = torch.rand(1, 4, 5, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    for channel in range(channels):
        (gradient,) = torch.autograd.grad(layer(images)[:, channel].sum(), layer.weight)
        where = type(layer)(
            layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups, bias=False
        ).requires_grad_(False)
        where.weight.copy_(gradient)
        rows = filters(where)
        assert (rows[channel] != 0).all()
        assert not rows[[other for other in range(channels) if other != channel]].any()


def test_levelling_leaves_a_layer_of_zeros() -> None:
    """No division by zero, no channels no mean."""
    assert levelled(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert levelled(np.zeros(0)).tolist() == []
    assert levelled(np.array([1.0, 3.0])).tolist() == [0.5, 1.5]


@pytest.mark.parametrize("family", ["option_a", "mobilenetv2", "shufflenet", "densenet", "conv1d", "grouped_transpose"])
def test_every_unit_of_every_family_gets_a_number(family: str) -> None:
    """Also across shifted shortcuts, depthwise, grouped, concatenated, one-dimensional and transposed layers."""
    made = families.prepared(family)
    for rule in READS_WEIGHTS:
        if rule != "batch-norm-scale" or family in {"option_a", "mobilenetv2", "shufflenet", "densenet"}:
            found = unit_importance(made.net, made.structure, rule)
            assert {name: len(units) for name, units in found.items()} == made.structure.full
            values = np.concatenate([np.array(units) for units in found.values()])
            assert (values > 0).all()
