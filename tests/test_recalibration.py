"""Running statistics: averages over the images, or moved by what cutting changes on images of another kind."""

import copy

import pytest
import torch
from torch import nn

from edgeprune.recalibration import recalibrate, shift_statistics


def drawn(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net() -> nn.Sequential:
    """Return a net with the momenta of a user who chose them, and statistics of images of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, 1, 1, bias=False),
            nn.BatchNorm2d(6, momentum=0.03),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, 1, 1),
            nn.BatchNorm2d(4, momentum=None),
        )
    net.train()(drawn(64))
    return net.eval()


# -- averages --------------------------------------------------------------------------------------------------------


def test_re_estimating_changes_running_statistics_and_nothing_else(net) -> None:
    """Parameters, modes and momenta stay, also those that are not PyTorch's default."""
    changed = copy.deepcopy(net)
    recalibrate(changed, drawn(32, seed=2).split(16))
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    for name, value in net.state_dict().items():
        same = torch.equal(changed.state_dict()[name], value)
        assert same != (name.rpartition(".")[2] in statistics), name
    assert [each.momentum for each in changed.modules() if isinstance(each, nn.BatchNorm2d)] == [0.03, None]
    assert not any(each.training for each in changed.modules())


def test_re_estimated_statistics_are_the_average_over_batches(net) -> None:
    """For the first batch norm they can be computed by hand: mean of means, mean of unbiased variances."""
    batches = drawn(32, seed=2).split(16)
    recalibrate(net, batches)
    with torch.no_grad():
        maps = [net[0](each) for each in batches]
    means = torch.stack([each.mean((0, 2, 3)) for each in maps]).mean(0)
    variances = torch.stack([each.transpose(0, 1).flatten(1).var(1) for each in maps]).mean(0)
    assert torch.allclose(net[1].running_mean, means, atol=1e-5)
    assert torch.allclose(net[1].running_var, variances, rtol=1e-4)


def test_every_image_counts_the_same_whatever_its_batch() -> None:
    """A small last batch weighs little, and one of a single image goes with the one before it."""
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2))
    recalibrate(net, [torch.zeros(128, 2), torch.full((2, 2), 10.0)])
    assert net[1].running_mean.tolist() == pytest.approx([20 / 130] * 2)
    recalibrate(net, [torch.zeros(128, 2), torch.full((1, 2), 10.0)])
    assert net[1].running_mean.tolist() == pytest.approx([10 / 129] * 2)


def test_without_batch_norms_there_is_nothing_to_re_estimate() -> None:
    """A net without them is left alone."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    before = copy.deepcopy(net.state_dict())
    recalibrate(net, [torch.ones(1, 1, 2, 2)])
    shift_statistics(net, [torch.ones(1, 1, 2, 2)], net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


# -- moved -----------------------------------------------------------------------------------------------------------


def seen_on(net: nn.Module, images: list[torch.Tensor]) -> nn.Module:
    """Return a copy with the statistics of these images."""
    copied = copy.deepcopy(net)
    recalibrate(copied, images)
    return copied


def statistics(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in net.state_dict().items() if "running" in name}


def test_an_uncut_model_keeps_its_statistics_whatever_the_images(net) -> None:
    """What is wrong with the images is in both estimates."""
    foreign = [3 * drawn(32, seed=2) + 5]
    moved = copy.deepcopy(net)
    shift_statistics(moved, foreign, seen_on(net, foreign))
    for name, value in statistics(net).items():
        assert torch.allclose(statistics(moved)[name], value, rtol=1e-4, atol=1e-5), name


def test_on_images_of_its_own_statistics_a_model_is_re_estimated_as_ever(net) -> None:
    """Where the unpruned model's statistics are those of the images, moving them is averaging anew."""
    own = [drawn(64, seed=2)]
    net = seen_on(net, own)
    cut, averaged = weakened(net), weakened(net)
    shift_statistics(cut, own, net)
    recalibrate(averaged, own)
    for name, value in statistics(averaged).items():
        assert torch.allclose(statistics(cut)[name], value, rtol=1e-4, atol=1e-5), name


def weakened(net: nn.Module) -> nn.Module:
    """Return a copy whose second convolution no longer reads the first two channels, as if they were cut."""
    changed = copy.deepcopy(net)
    with torch.no_grad():
        changed[3].weight[:, :2] = 0
    return changed


def test_statistics_move_by_difference_and_by_ratio() -> None:
    """By hand: a mean by the difference of means, what is divided by by the ratio of what it was divided by."""
    before, after = (nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.5)) for _ in range(2))
    for each, weight, bias in ((before, 2.0, 1.0), (after, 1.0, 0.0)):
        nn.init.constant_(each[0].weight, weight)
        nn.init.constant_(each[0].bias, bias)
        each[1].running_mean.fill_(10.0)
        each[1].running_var.fill_(3.5)
    images = [torch.tensor([[0.0], [2.0], [4.0]])]  # mean 2, variance 4: 5 and 16 before, 2 and 4 after
    shift_statistics(after, images, seen_on(before, images))
    assert after[1].running_mean.item() == pytest.approx(10 + 2 - 5)
    assert after[1].running_var.item() == pytest.approx((3.5 + 0.5) * (4 + 0.5) / (16 + 0.5) - 0.5)


def test_a_channel_that_falls_silent_keeps_a_variance() -> None:
    """Never below zero, and finite where the images do not reach a channel at all."""
    before, after = (nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)) for _ in range(2))
    nn.init.zeros_(after[0].weight)
    nn.init.zeros_(before[0].weight[1:])
    before[1].running_var.fill_(1e-9)
    after[1].running_var.fill_(1e-9)
    images = [torch.tensor([[0.0], [100.0]])]
    shift_statistics(after, images, seen_on(before, images))
    assert after[1].running_var.isfinite().all()
    assert (after[1].running_var >= 0).all()
