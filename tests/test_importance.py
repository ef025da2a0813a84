"""Importance by hand: three channels whose weights and gradients fit on a napkin, and the order they are kept in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgeprune.export import export
from edgeprune.importance import IMAGES_AT_ONCE, RULES, _gradients, ranking, unit_importance
from edgeprune.structure import Structure, build_structure


class Three(nn.Module):
    """A 1x1 convolution to three channels, read by a linear layer of two classes."""

    def __init__(self, makes: tuple[float, ...], reads: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1, bias=False)
        self.linear = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor(makes).view(3, 1, 1, 1))
            self.linear.weight.copy_(torch.tensor(reads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


def structure_of(module: nn.Module) -> Structure:
    example = torch.ones(1, 1, 2, 2)
    return build_structure(module.eval(), example, export(module, example), multiple=1)


def scores(module: nn.Module, rule: str, *batches: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, ...]:
    found = unit_importance(module.eval(), structure_of(module), rule, batches)
    return found["conv"]


def test_magnitude_is_the_sum_of_squared_weights_of_each_layer_over_their_mean() -> None:
    """Made with 1, 2, 3 (squares 1, 4, 9; mean 14/3) and read with columns of squared length 2, 2, 8 (mean 4)."""
    module = Three((1.0, 2.0, 3.0), ((1.0, -1.0, 2.0), (1.0, 1.0, 2.0)))
    expected = [1 / (14 / 3) + 2 / 4, 4 / (14 / 3) + 2 / 4, 9 / (14 / 3) + 8 / 4]
    assert scores(module, "magnitude") == pytest.approx(expected)


def test_taylor_is_the_squared_change_of_the_loss_when_a_channel_is_zeroed_to_first_order() -> None:
    """Both sides of a channel see the same g·w, so a channel is worth 2 (g·w)².

    x = 1, activations a = (1, 2, 3), logits z = R a with R = ((1, 0, 0), (0, 1, 0)) = (1, 2), label 0.
    dL/dz = softmax(z) − (1, 0) = (p − 1, 1 − p) with p = 1 / (1 + e); g·w of channel c is (dL/dz · R[:, c]) a_c.
    """
    module = Three((1.0, 2.0, 3.0), ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)))
    p = 1 / (1 + float(torch.e))
    first, second = ((p - 1) * 1) ** 2, ((1 - p) * 2) ** 2
    batch = (torch.ones(1, 1, 2, 2), torch.tensor([0]))
    assert scores(module, "taylor", batch) == pytest.approx([2 * first, 2 * second, 0.0])


def test_a_large_batch_in_parts_is_the_same_batch() -> None:
    """Gradients of the mean loss over 70 images, whatever is held in memory at once."""
    module = Three((0.5, -1.0, 2.0), ((1.0, 0.3, -0.2), (-0.5, 0.1, 0.7))).eval()
    draw = torch.Generator().manual_seed(0)
    batch = (torch.randn(70, 1, 2, 2, generator=draw), torch.arange(70) % 2)
    parameters = list(module.parameters())
    whole = torch.autograd.grad(nn.functional.cross_entropy(module(batch[0]), batch[1]), parameters)
    in_parts = _gradients(module, parameters, *batch)
    assert len(batch[1]) > 2 * IMAGES_AT_ONCE
    for one, other in zip(in_parts, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_taylor_adds_up_over_batches() -> None:
    """Two equal batches say twice what one says."""
    module = Three((1.0, 2.0, 3.0), ((1.0, 0.5, 0.0), (0.0, 1.0, -1.0)))
    batch = (torch.ones(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))
    once, twice = scores(module, "taylor", batch), scores(module, "taylor", batch, batch)
    assert twice == pytest.approx([2 * each for each in once])


@pytest.mark.parametrize("rule", list(RULES))
def test_a_channel_that_does_nothing_comes_last(rule: str) -> None:
    """Zeros on both sides are worth zero under every rule."""
    module = Three((1.0, 0.0, -3.0), ((1.0, 0.0, 2.0), (-1.0, 0.0, 1.0)))
    batch = (torch.ones(2, 1, 2, 2), torch.tensor([0, 1]))
    found = scores(module, rule, batch)
    assert found[1] == 0.0
    assert ranking({"conv": found})["conv"][-1] == 1


def test_the_module_is_left_as_it_was() -> None:
    """Neither gradients nor flags nor the mode change, also for frozen parameters."""
    module = Three((1.0, 2.0, 3.0), ((1.0, 0.5, 0.0), (0.0, 1.0, -1.0))).eval()
    module.conv.weight.requires_grad_(False)
    scores(module, "taylor", (torch.ones(1, 1, 2, 2), torch.tensor([0])))
    assert [each.requires_grad for each in module.parameters()] == [False, True]
    assert all(each.grad is None for each in module.parameters())
    assert not module.training


def test_units_in_both_layers_of_a_coupled_group_count_together() -> None:
    """The two convolutions that feed one addition are one group, and both of their weights count."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(1, 2, 1, bias=False)
            self.linear = nn.Linear(2, 2, bias=False)
            with torch.no_grad():
                self.one.weight.copy_(torch.tensor([1.0, 1.0]).view(2, 1, 1, 1))
                self.other.weight.copy_(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
                self.linear.weight.fill_(1.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear((self.one(x) + self.other(x)).mean((2, 3)))

    module = Sum()
    found = unit_importance(module.eval(), structure_of(module), "magnitude", ())
    assert found["one"] == pytest.approx((1 / 1 + 1 / 5 + 1, 1 / 1 + 9 / 5 + 1))


def test_ties_keep_their_order() -> None:
    """Equal units rank as they stand, so a ranking is the same everywhere."""
    assert ranking({"a": (1.0, 2.0, 1.0, 2.0)}) == {"a": (1, 3, 0, 2)}


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_a_ranking_is_a_permutation_in_falling_order(values: list[float]) -> None:
    """Every unit appears once, and none before a more important one."""
    order = ranking({"a": tuple(values)})["a"]
    assert sorted(order) == list(range(len(values)))
    assert [values[unit] for unit in order] == sorted(values, reverse=True)
