"""Running statistics: averages over the images, or carried over by regression on images of another kind."""

import copy

import pytest
import torch
from torch import nn

from edgeprune.recalibration import numbered, numbers, recalibrate, regress_statistics


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
    regress_statistics(net, [torch.ones(1, 1, 2, 2)], net, {})
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


# -- regression ------------------------------------------------------------------------------------------------------


def regressed(cut: nn.Module, unpruned: nn.Module, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the statistics of a model that kept all channels, carried over; the models stay as they are."""
    changed, beside = copy.deepcopy(cut), copy.deepcopy(unpruned)
    regress_statistics(changed, images, beside, numbers(numbered(changed)))
    assert statistics(beside).keys() == statistics(unpruned).keys()
    assert all(map(torch.equal, statistics(beside).values(), statistics(unpruned).values()))
    return statistics(changed)


def statistics(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in net.state_dict().items() if "running" in name}


def agree(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    for name, value in some.items():
        assert torch.allclose(value, others[name], rtol=1e-4, atol=1e-5), name


def test_an_uncut_model_keeps_its_statistics_whatever_the_images(net) -> None:
    agree(regressed(net, net, [3 * drawn(32, seed=2) + 5]), statistics(net))


def test_a_channel_that_is_scaled_and_shifted_is_carried_over_exactly() -> None:
    """Whatever the images: y = 3 x + 2 has mean 3 μ + 2 and variance 9 σ²."""
    before, after = (nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)) for _ in range(2))
    for net, weight, bias in ((before, 1.0, 0.0), (after, 3.0, 2.0)):
        nn.init.constant_(net[0].weight, weight)
        nn.init.constant_(net[0].bias, bias)
        net[1].running_mean.fill_(10.0)
        net[1].running_var.fill_(4.0)
    found = regressed(after, before, [torch.tensor([[0.0], [2.0], [7.0]]), torch.tensor([[-1.0], [5.0]])])
    assert found["1.running_mean"].item() == pytest.approx(32.0, rel=1e-5)
    assert found["1.running_var"].item() == pytest.approx(36.0, rel=1e-5)


def test_a_channel_that_has_nothing_to_do_with_what_it_was_gets_averages() -> None:
    """The images say nothing then of how far off they are."""
    before, after = (nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1)) for _ in range(2))
    before[0].weight.data, after[0].weight.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for net in (before, after):
        net[1].running_mean.fill_(10.0)
        net[1].running_var.fill_(4.0)
    found = regressed(after, before, [torch.tensor([[1.0, 1.0], [1.0, 3.0], [-1.0, 1.0], [-1.0, 3.0]])])
    assert found["1.running_mean"].item() == pytest.approx(2.0)
    assert found["1.running_var"].item() == pytest.approx(4 / 3)


def test_on_images_of_its_own_statistics_a_model_is_re_estimated_as_ever(net) -> None:
    """Where the unpruned model's statistics are those of the images, nothing has to be made up for."""
    own = [drawn(64, seed=2)]
    recalibrate(net, own)
    cut = copy.deepcopy(net)
    with torch.no_grad():
        cut[3].weight[:, :2] = 0
    averaged = copy.deepcopy(cut)
    recalibrate(averaged, own)
    agree(regressed(cut, net, own), statistics(averaged))


def test_what_a_channel_was_is_looked_up_among_all_that_there_were() -> None:
    """The second of two channels is kept: its statistics are carried over, not those of the first."""
    before = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2))
    before[0].weight.data = torch.tensor([[-5.0], [1.0]])
    before[1].running_mean.copy_(torch.tensor([70.0, 10.0]))
    after = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    after[0].weight.data = torch.tensor([[2.0]])
    after[1].running_mean.fill_(10.0)
    regress_statistics(after, [torch.tensor([[0.0], [2.0], [7.0]])], before, {"1": torch.tensor([1])})
    assert after[1].running_mean.item() == pytest.approx(20.0, rel=1e-5)


def test_silent_channels_have_finite_statistics() -> None:
    """Where images do not reach a channel, before the cut or after it."""
    before, after = (nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)) for _ in range(2))
    nn.init.zeros_(after[0].weight)
    nn.init.zeros_(before[0].weight[1:])
    found = regressed(after, before, [torch.tensor([[0.0], [100.0]])])
    assert all(each.isfinite().all() for each in found.values())
    assert (found["1.running_var"] >= 0).all()


def test_a_layer_called_twice_is_looked_at_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.norm(x + 10)

    net = Twice().eval()
    recalibrate(net, [torch.tensor([[0.0], [2.0]])])
    agree(regressed(net, net, [torch.tensor([[5.0], [9.0]])]), statistics(net))
    assert net.norm.running_mean.item() > 1


def test_maps_that_are_written_into_later_are_looked_at_as_they_were_read() -> None:
    """A block before an in-place sum, as residual networks have it."""

    class Block(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale, self.norm = scale, nn.BatchNorm1d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * self.scale
            out = self.norm(x)
            x += 100
            return out + x

    before, after = Block(1.0).eval(), Block(3.0).eval()
    for each in (before, after):
        each.norm.running_mean.fill_(10.0)
    regress_statistics(after, [torch.tensor([[0.0], [2.0], [7.0]])], before, {"norm": torch.tensor([0])})
    assert after.norm.running_mean.item() == pytest.approx(30.0, rel=1e-5)
