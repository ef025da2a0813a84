"""Synthetic images look to a network as its training images did, and leave it as it was."""

import copy

import pytest
import torch
from torch import nn

from edgeprune.errors import ModelError
from edgeprune.synthetic import BATCH, synthesise

SHAPE = (2, 6, 6)


def net(*, norms: bool = True) -> nn.Sequential:
    """Return a net whose first batch norm reads the image itself and whose statistics are far from those of noise."""
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(2), nn.BatchNorm2d(8)
    first.running_mean.copy_(torch.tensor([1.5, -0.5]))
    first.running_var.copy_(torch.tensor([0.25, 1.0]))
    second.running_var.mul_(0.3)
    last = nn.Linear(8, 3)
    with torch.no_grad():  # sure of what it sees, as a trained one is
        last.weight.mul_(30)
        last.bias.zero_()
    layers = [first, nn.Conv2d(2, 8, 3), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last]
    return nn.Sequential(*(each for each in layers if norms or not isinstance(each, nn.BatchNorm2d))).eval()


def test_they_have_the_statistics_that_the_batch_norms_know() -> None:
    images = synthesise(net(), SHAPE, 48, seed=0)
    mean, spread = images.mean((0, 2, 3)), images.std((0, 2, 3))
    assert mean.tolist() == pytest.approx([1.5, -0.5], abs=0.3)
    assert spread.tolist() == pytest.approx([0.5, 1.0], abs=0.25)


@pytest.mark.parametrize("norms", [True, False])
def test_every_class_is_seen_as_often_as_the_others(norms: bool) -> None:
    module = net(norms=norms)
    answers = module(synthesise(module, SHAPE, 48, seed=1)).argmax(1)
    assert answers.bincount(minlength=3).tolist() == pytest.approx([16, 16, 16], abs=3)


def test_classes_go_on_from_one_batch_to_the_next() -> None:
    """More classes than a batch has images: those beyond it are asked for as well."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(72, BATCH + 36)).eval()
    answers = module(synthesise(module, SHAPE, 2 * BATCH, seed=0)).argmax(1)
    right = answers == torch.arange(2 * BATCH) % (BATCH + 36)
    assert float(right.float().mean()) > 0.9


def test_without_batch_norms_pixels_keep_the_scale_of_normalised_images() -> None:
    images = synthesise(net(norms=False), SHAPE, 32, seed=0)
    assert float(images.square().mean()) == pytest.approx(1.0, abs=0.15)


def test_a_seed_is_a_set_of_images() -> None:
    one, same, other = (synthesise(net(), SHAPE, 8, seed=seed, steps=4) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (8, *SHAPE)
    assert one.dtype == torch.float32


def test_every_step_says_which_share_of_all_work_it_was() -> None:
    """Two batches of four steps."""
    told: list[float] = []
    synthesise(net(), SHAPE, BATCH + 1, seed=0, steps=4, advance=told.append)
    assert told == [1 / 8] * 8


def test_the_network_and_the_generators_are_left_as_they_were() -> None:
    module = net().train()
    module[1].weight.requires_grad_(False)
    before, drawn = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    synthesise(module, SHAPE, 8, seed=0, steps=3)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    assert module.training
    assert [each.requires_grad for each in module[1].parameters()] == [False, True]
    assert all(each.grad is None for each in module.parameters())
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_a_network_that_leads_nowhere_is_told() -> None:
    module = net()
    with torch.no_grad():
        module[1].weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="synthetic images"):
        synthesise(module, SHAPE, 8, seed=0, steps=3)
