"""Activation entropy: histograms that can be counted by hand."""

import math

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from importance_toys import Pair, Three, scores, structure_of
from torch import nn

from edgeprune.errors import CandidateError, ConfigError
from edgeprune.importance import unit_importance
from edgeprune.importance.activations import IMAGES_AT_ONCE

RAMP = torch.arange(32.0).view(1, 1, 4, 8)
"""32 pixels, one on each level."""


def entropy(module: nn.Module, images: torch.Tensor) -> tuple[float, ...]:
    return unit_importance(module.eval(), structure_of(module), "activation-entropy", images=[images])["one"]


def test_a_channel_on_all_levels_has_ln_32_and_a_constant_one_nothing() -> None:
    """Times 1 every pixel has a level of its own; times 0 all share one.

    Times 1/2 levels 0 to 14 have two pixels each and levels 15 and 16 one each (the range is 31, not 32, wide).
    """
    halved = -15 * (2 / 32) * math.log(2 / 32) - 2 * (1 / 32) * math.log(1 / 32)
    assert entropy(Pair([[1.0], [0.0], [0.5]]), RAMP) == pytest.approx([math.log(32), 0.0, halved])


def test_the_range_is_that_of_the_layer() -> None:
    """A channel that moves a thousandth as far as another stays on one level: in a range of its own it would not."""
    assert entropy(Pair([[1.0], [0.001]]), RAMP)[1] == 0.0


def test_activations_are_seen_behind_the_activation_function() -> None:
    """What a ReLU cuts off does not count, although the forward method writes it as a function."""

    class Rectified(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.relu(self.one(x))).mean((2, 3))

    assert entropy(Rectified([[1.0], [-1.0]]), RAMP) == pytest.approx([math.log(32), 0.0])


def test_the_columns_of_a_flattened_channel_are_one_channel() -> None:
    """Each of four pixels is the same in every image, yet the channel has four levels."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(1, 2, 1, bias=False)
            self.linear = nn.Linear(8, 2)
            with torch.no_grad():
                self.one.weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.one(x).flatten(1))

    images = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 2, 2).expand(5, 1, 2, 2)
    assert entropy(Flat(), images) == pytest.approx([math.log(4), 0.0])


def test_the_mean_over_the_layers_that_read_a_class_is_taken() -> None:
    """One reader sees the ramp, the other its mean alone, which is the same in both images."""

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(1, 2, 1, bias=False)
            self.two, self.linear = nn.Conv2d(2, 2, 1, bias=False), nn.Linear(2, 2)
            with torch.no_grad():
                self.one.weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x)
            return self.two(x).mean((2, 3)) + self.linear(x.mean((2, 3)))

    assert entropy(Read(), RAMP.expand(2, 1, 4, 8)) == pytest.approx([math.log(32) / 2, 0.0])


def test_how_the_images_are_split_into_batches_does_not_matter() -> None:
    """More than are counted at once, in one batch or in three; the first ones span the range."""
    images = torch.rand(IMAGES_AT_ONCE + 40, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    images[0] = torch.tensor([0.0, 1.0, 0.5, 0.25]).view(1, 2, 2)
    module = Pair([[1.0], [0.7], [-0.2]]).eval()
    structure = structure_of(module)
    whole = unit_importance(module, structure, "activation-entropy", images=[images])["one"]
    assert unit_importance(module, structure, "activation-entropy", images=images.split(40))["one"] == whole


def test_labelled_images_do_as_well() -> None:
    """Labels are passed over."""
    found = scores(Pair([[1.0], [0.5]]), "activation-entropy", (RAMP, torch.tensor([0])))
    assert found[0] == pytest.approx(math.log(32))


@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(5)), factor=st.floats(0.01, 100.0))
def test_permuting_channels_permutes_and_scaling_the_layer_changes_nothing(order: list[int], factor: float) -> None:
    """The range scales along."""
    weights = torch.tensor([1.0, 0.8, -0.5, 0.3, 0.1]).view(5, 1, 1, 1)
    with torch.no_grad():
        MADE.one.weight.copy_(weights)
        before = unit_importance(MADE, MADE_STRUCTURE, "activation-entropy", images=[IMAGES])["one"]
        MADE.one.weight.copy_(weights[order])
        permuted = unit_importance(MADE, MADE_STRUCTURE, "activation-entropy", images=[IMAGES])["one"]
        MADE.one.weight.copy_(weights * factor)
        scaled = unit_importance(MADE, MADE_STRUCTURE, "activation-entropy", images=[IMAGES])["one"]
    assert permuted == pytest.approx([before[place] for place in order])
    assert scaled == pytest.approx(before, abs=0.02)  # a pixel on the edge of a level may round to the other side


MADE = Pair([[1.0]] * 5).eval()
MADE_STRUCTURE = structure_of(MADE)
IMAGES = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def test_no_images_are_refused() -> None:
    """An empty list of batches is found out when it is read."""
    module = Pair([[1.0], [0.5]]).eval()
    with pytest.raises(ConfigError, match="not seen") as caught:
        unit_importance(module, structure_of(module), "activation-entropy", images=[])
    assert caught.value.why == "there were no images"


def test_a_group_that_no_called_layer_reads_is_refused() -> None:
    """A forward method that reads a convolution's weight itself shows us nothing."""

    class Hidden(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(self.one(x), self.two.weight).mean((2, 3))

    module = Hidden([[1.0], [0.5]]).eval()
    with pytest.raises(ConfigError, match="'one' were not seen"):
        unit_importance(module, structure_of(module), "activation-entropy", images=[RAMP])


def test_activations_that_are_not_finite_are_an_error() -> None:
    """NaN has no level."""
    with pytest.raises(CandidateError, match="not finite"):
        entropy(Pair([[1.0], [math.nan]]), RAMP)


def test_the_module_is_left_as_it_was() -> None:
    """No hook stays behind, and every mode is restored."""
    module = Three((1.0, 2.0, 3.0), ((1.0, 0.5, 0.0), (0.0, 1.0, -1.0)))
    structure = structure_of(module)
    module.train()
    module.linear.eval()
    unit_importance(module, structure, "activation-entropy", images=[RAMP])
    assert (module.training, module.conv.training, module.linear.training) == (True, True, False)
    assert not any(each._forward_pre_hooks for each in module.modules())


@pytest.mark.parametrize("family", ["option_a", "mobilenetv2", "vgg", "senet", "conv1d"])
def test_every_unit_of_every_family_gets_a_number(family: str) -> None:
    """Behind shortcuts, depthwise layers, flattening, gates and in one dimension."""
    made = families.prepared(family)
    images = torch.randn(16, *made.example.shape[1:], generator=torch.Generator().manual_seed(0))
    found = unit_importance(made.net, made.structure, "activation-entropy", images=[images])
    assert {name: len(units) for name, units in found.items()} == made.structure.full
    assert all(0 <= each <= math.log(32) + 1e-9 for units in found.values() for each in units)
    assert all(max(units) > 0 for units in found.values())
