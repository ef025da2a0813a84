"""FGSM and PGD: on a linear model it is known who falls; whatever the model, the ball and the pixels' range hold."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgeprune.errors import ConfigError
from edgeprune.robustness import Attack, Pixels, fgsm, pgd, robustness

GREY = Pixels(mean=(0.3,), std=(0.25,))


class Linear(nn.Module):
    """Two classes with logits (0, w · x + b)."""

    def __init__(self, weight: torch.Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.tensor(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = x.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(score), score], 1)


def case(seed: int, pixels: Pixels = GREY, count: int = 200) -> tuple[Linear, torch.Tensor, torch.Tensor]:
    """Return a linear model, images whose pixels are far from 0 and 1, and its own answers as labels; float64."""
    generator = torch.Generator().manual_seed(seed)
    raw = 0.3 + 0.4 * torch.rand(count, len(pixels.mean), 3, 3, generator=generator, dtype=torch.float64)
    mean, std = (torch.tensor(each, dtype=torch.float64).view(1, -1, 1, 1) for each in (pixels.mean, pixels.std))
    images = (raw - mean) / std
    weight = torch.randn(images[0].numel(), generator=generator, dtype=torch.float64)
    net = Linear(weight, -float((images.flatten(1) @ weight).mean()))
    return net, images, net(images).argmax(1)


def reach(net: Linear, epsilon: float, pixels: Pixels) -> float:
    """Return how far the score can be moved: ε · ‖w / σ‖₁."""
    std = torch.tensor(pixels.std, dtype=torch.float64).repeat_interleave(9)
    return epsilon * float((net.weight.detach() / std).abs().sum())


@given(seed=st.integers(0, 10**6), epsilon=st.floats(1e-4, 0.2))
def test_fgsm_flips_a_linear_model_exactly_where_the_margin_is_smaller_than_its_reach(
    seed: int, epsilon: float
) -> None:
    """margin < ε ‖w‖₁, each pixel's weight in units of pixels."""
    net, images, labels = case(seed)
    margin = net(images)[:, 1].abs()
    moved = fgsm(net, images, labels, epsilon, GREY)
    clear = (margin - reach(net, epsilon, GREY)).abs() > 1e-9
    flipped = net(moved).argmax(1) != labels
    assert torch.equal(flipped[clear], (margin < reach(net, epsilon, GREY))[clear])


def test_each_channel_moves_by_its_own_epsilon() -> None:
    """ε over the standard deviation of the channel."""
    pixels = Pixels(mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 1.0))
    net, images, labels = case(0, pixels)
    moved = (fgsm(net, images, labels, 0.1, pixels) - images).abs()
    for channel, wanted in enumerate((0.4, 0.2, 0.1)):
        np.testing.assert_allclose(moved[:, channel].detach(), wanted, atol=1e-12)


def test_pgd_does_to_a_linear_model_what_fgsm_does() -> None:
    """The gradient never turns, so both end in the same corner of the ball."""
    net, images, labels = case(1)
    by_steps = pgd(net, images, labels, 0.05, GREY, steps=7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(by_steps, fgsm(net, images, labels, 0.05, GREY))


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
def test_no_attack_leaves_the_ball_or_the_range_of_pixels(kind: str) -> None:
    """Pixels at 0 and 1 included."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    raw = torch.rand(50, 1, 3, 3).round(decimals=1)
    images, labels = (raw - 0.3) / 0.25, torch.randint(0, 3, (50,))
    attack = {"fgsm": fgsm, "pgd": pgd}[kind]
    changed = attack(net, images, labels, 0.07, GREY) * 0.25 + 0.3
    assert (changed - raw).abs().max() <= 0.07 + 1e-6
    assert changed.min() >= -1e-6
    assert changed.max() <= 1 + 1e-6


def test_pgd_hurts_a_network_at_least_as_much_as_fgsm() -> None:
    """On average over images, within the same ball: it takes its steps where the gradient is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    images, labels = torch.randn(400, 1, 3, 3), torch.randint(0, 4, (400,))
    wide = Pixels(mean=(0.5,), std=(0.1,))
    loss = [nn.functional.cross_entropy(net(attack(net, images, labels, 0.1, wide)), labels) for attack in (fgsm, pgd)]
    assert loss[1] > loss[0]


def test_counts_are_what_they_say() -> None:
    """Right before, right after, and the same answer before and after, of images in batches of any size."""
    net, images, _ = case(2)
    labels = torch.arange(200) % 2
    attack = Attack(kind="fgsm", epsilon=0.03)
    batches = [(images[start : start + 64], labels[start : start + 64]) for start in range(0, 200, 64)]
    found = robustness(net, batches, [attack], GREY)[attack.name]
    before, after = net(images).argmax(1), net(fgsm(net, images, labels, 0.03, GREY)).argmax(1)
    assert found.images == 200
    assert found.right == int((before == labels).sum())
    assert found.right_attacked == int((after == labels).sum())
    assert found.unchanged == int((after == before).sum())
    assert 0 < found.unchanged < 200


def test_no_epsilon_changes_nothing() -> None:
    """Every answer survives."""
    net, images, labels = case(3)
    found = robustness(net, [(images, labels)], [Attack(kind="pgd", epsilon=0.0)], GREY)
    assert [each.unchanged for each in found.values()] == [200]


def test_a_seed_repeats_an_attack_and_another_starts_elsewhere() -> None:
    """The points PGD starts from come from it alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
    images, labels = torch.randn(20, 1, 3, 3), torch.randint(0, 3, (20,))
    runs = []
    for seed in (5, 5, 6):
        torch.rand(3)
        generator = torch.Generator().manual_seed(seed)
        runs.append(pgd(net, images, labels, 0.1, GREY, steps=1, generator=generator))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_module_is_left_as_it_was_found() -> None:
    """Its mode, that of its parts, its parameters, their gradients, its running statistics, and global randomness."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4, 3)).train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    before = {name: each.clone() for name, each in net.state_dict().items()}
    images, labels = torch.randn(8, 1, 3, 3), torch.randint(0, 3, (8,))
    state = torch.get_rng_state()
    with torch.inference_mode():
        robustness(net, [(images.clone(), labels.clone())], [Attack(kind="pgd", epsilon=0.1)], GREY)
    assert torch.equal(state, torch.get_rng_state())
    assert [each.training for each in net] == [True, False, True, True, True]
    assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())
    assert all(each.grad is None for each in net.parameters())
    assert not net[0].weight.requires_grad


@pytest.mark.parametrize("wrong", [{"epsilon": -0.1}, {"epsilon": 8.0}, {"epsilon": math.nan}, {"steps": 0}])
def test_attacks_out_of_range_are_refused(wrong: dict) -> None:
    """8 is meant to be 8 / 255."""
    with pytest.raises(ConfigError):
        Attack(**({"kind": "pgd", "epsilon": 0.1} | wrong))


def test_attacks_have_names_for_tables() -> None:
    """Kind, steps and ε."""
    assert [Attack(kind=kind, epsilon=0.05).name for kind in ("fgsm", "pgd")] == ["fgsm 0.05", "pgd-10 0.05"]
