"""What is read off a network: its filters, its chains of dense layers, what bounds them, and what is in the way."""

import numpy as np
import pytest
import torch
from dense_nets import Prepared, SmallCNN, mlp, prepared, small_cnn
from families import prepared as family
from torch import nn
from torch.nn import functional

from edgeprune.paoding.intervals import ACTIVATIONS, Bounds
from edgeprune.paoding.network import Chain, read

IMAGE = torch.randn(1, 1, 4, 4)
BOX = Bounds(low=np.array([-1.0]), high=np.array([2.0]))


class Between(nn.Module):
    """Two dense layers with something between them, and a third."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.fc1, self.between, self.fc2, self.fc3 = nn.Linear(16, 8), between, nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(torch.tanh(self.fc2(self.between(self.fc1(x.flatten(1))))))


class TwoHeads(nn.Module):
    """One hidden layer that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.other = nn.Linear(16, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.body(x.flatten(1)))
        return torch.cat([self.one(x), self.other(x)], 1)


def answers(chain: Chain, inputs: torch.Tensor) -> np.ndarray:
    """Return what a chain's layers compute."""
    values = inputs.double().flatten(1).numpy()
    for layer in chain.layers:
        values = values @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        values = ACTIVATIONS[layer.activation].function(values)
    return values


def test_a_perceptron_is_one_chain() -> None:
    """All of its layers, in order; the last one is no group; it computes what the module does."""
    net, x = mlp(16, 8, 6, 3), torch.randn(5, 1, 4, 4)
    chain = prepared(net, IMAGE, BOX).network.chains[0]
    assert [layer.name for layer in chain.layers] == ["1", "3", "5"]
    assert [layer.activation for layer in chain.layers] == ["relu", "relu", "identity"]
    assert [layer.group for layer in chain.layers] == ["1", "3", None]
    assert chain.layers[0].rows.tolist() == list(range(8))
    assert (chain.box.low.tolist(), chain.box.high.tolist(), chain.box_source) == ([-1] * 16, [2] * 16, "the input")
    np.testing.assert_allclose(answers(chain, x), net(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_between_dense_layers_is_folded(affine: bool) -> None:
    """With its running statistics, with or without a scale of its own; the layer before may do without a bias."""
    net = Between(nn.Sequential(nn.BatchNorm1d(8, affine=affine), nn.Dropout(), nn.ReLU())).eval()
    net.fc1.bias = None
    net.between[0].running_mean.normal_()
    net.between[0].running_var.uniform_(0.5, 2)
    found, x = prepared(net, IMAGE).network, torch.randn(5, 1, 4, 4)
    assert found.pairs == ("fc1", "fc2")
    np.testing.assert_allclose(answers(found.chains[0], x), net(x).detach().numpy(), atol=1e-5)


def test_an_obstacle_ends_one_chain_and_starts_another() -> None:
    """The layer before it is no group of pairs, and it is said why; the one behind still is."""
    network = prepared(Between(nn.LeakyReLU()), IMAGE).network
    assert network.pairs == ("fc2",)
    assert "LeakyRelu" in network.obstacles["fc1"]
    assert [layer.name for layer in network.chains[0].layers] == ["fc2", "fc3"]


def test_units_that_two_layers_read_end_the_chain_in_both() -> None:
    """A merge changes what both answer."""
    network = prepared(TwoHeads(), IMAGE).network
    assert network.pairs == ("body",)
    assert network.chains[0].layers[-1].weight.shape == (5, 8)


def test_convolutions_and_what_flattens_them_are_filters() -> None:
    """Only the dense layers behind are pairs."""
    found = small_cnn()
    assert found.network.pairs == ("fc1", "fc2")
    assert set(found.network.scale) == {"features.0", "features.3", "fc1", "fc2"}


def test_a_filter_is_as_strong_as_the_mean_of_its_weights() -> None:
    """mean |w|, biases left out."""
    found = small_cnn()
    weight = found.module.features[3].weight.detach()
    wanted = weight.abs().mean((1, 2, 3))
    np.testing.assert_allclose(found.network.scale["features.3"], wanted.numpy(), rtol=1e-5)


def test_units_of_a_residual_stream_take_the_mean_over_everything_that_makes_them() -> None:
    """All filters that write one channel of the stream, weight by weight."""
    found = family("resnet")
    scale = read(found.net, found.structure, found.graph).scale
    stage = [found.net.stem[0], *(found.net.layer1[place].conv2 for place in range(2))]
    total = sum(each.weight.detach().abs().sum((1, 2, 3)) for each in stage)
    count = sum(each.weight[0].numel() for each in stage)
    np.testing.assert_allclose(scale["stem.0"], (total / count).numpy(), rtol=1e-5)


def test_every_kind_of_convolution_is_read_by_its_output_channels() -> None:
    """Depthwise, grouped, and transposed, whose weight holds the input channels first."""
    net = nn.Sequential(
        nn.Conv2d(1, 8, 1),
        nn.Conv2d(8, 8, 1, groups=8),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.ConvTranspose2d(8, 6, 2, groups=2),
        nn.Conv2d(6, 2, 1),
    )
    scale = prepared(net, IMAGE).network.scale
    weights = [each.weight.detach().abs() for each in net]
    before = (weights[0].flatten(1).sum(1) + weights[1].flatten(1).sum(1)) / 2
    by_group = {
        "0": before.view(2, 4).mean(0),  # the grouped convolution behind ties the halves
        "2": weights[2].flatten(1).mean(1).view(2, 4).mean(0),
        "3": weights[3].view(2, 4, 3, 4).mean((0, 1, 3)),
    }
    assert set(scale) == set(by_group)
    for name, wanted in by_group.items():
        np.testing.assert_allclose(scale[name], wanted.numpy(), rtol=1e-5)


def test_what_follows_an_unbounded_convolution_is_assumed() -> None:
    """And the record says so; the user may say otherwise."""
    found = small_cnn()
    chain = found.network.chains[0]
    assert (chain.box.low.max(), chain.box.high.min(), chain.box_source) == (0, 1, "assumed")
    wider = read(found.module, found.structure, found.graph, assumed=(0.0, 7.0))
    assert wider.chains[0].box.high.min() == 7


def test_reading_leaves_the_module_as_it_was() -> None:
    """Every parameter and every flag."""
    found: Prepared = small_cnn()
    before = {name: each.clone() for name, each in found.module.state_dict().items()}
    read(found.module, found.structure, found.graph)
    assert isinstance(found.module, SmallCNN)
    for name, each in found.module.state_dict().items():
        assert torch.equal(each, before[name])
    assert functional.relu(found.module.fc1.weight).requires_grad
