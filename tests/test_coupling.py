"""Classes of coupled channels, as torch-pruning's dependency graph gives them."""

import numpy as np
import pytest
import torch
from families import SIZE, Recurrent, conv_bn, made
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgeprune.coupling import Coupling, couple, is_depthwise, tied, uncoupled
from edgeprune.errors import ModelError


class Residual(nn.Module):
    """A stem, one block, a head: small enough to know every class by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4 * 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.flatten(x + self.norm(self.two(F.relu(self.one(x)))), 1))


def classes(net: nn.Module, x: torch.Tensor) -> dict[tuple[str, str], list[int]]:
    """Return axis → class of each channel."""
    return {axis: owners.tolist() for axis, owners in couple(net.eval(), x).classes.items()}


def test_addition_couples_both_operands_and_all_their_readers() -> None:
    """The stream of a residual block is one class a channel; the inside is another; the image is none."""
    found = classes(Residual(), torch.randn(1, 3, 2, 2))
    stream = found["stem", "out"]
    assert found["two", "out"] == found["norm", "out"] == found["one", "in"] == stream
    assert found["head", "in"] == [each for each in stream for _ in range(4)]
    assert found["one", "out"] == found["two", "in"]
    assert len(set(stream) | set(found["one", "out"])) == 4 + 6
    assert found["stem", "in"] == [-1, -1, -1]


def test_constant_padding_of_channels_shifts_positions() -> None:
    """Channels 2 to 5 of the wider map are those of the narrower one; the padded ones are their own."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.narrow(x)
            return self.head(F.pad(x, (0, 0, 0, 0, 2, 2)) + self.wide(x))

    found = classes(Padded(), torch.randn(1, 3, 4, 4))
    assert found["wide", "out"][2:6] == found["narrow", "out"]
    assert len(set(found["wide", "out"])) == 8


def test_depthwise_convolution_passes_its_channels_on() -> None:
    """Input and output of a depthwise convolution are one class a channel."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    found = classes(net, torch.randn(1, 3, 4, 4))
    assert found["0", "out"] == found["1", "in"] == found["1", "out"] == found["2", "in"]


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_groups_of_a_convolution_stay_equally_wide(kind: type[nn.Module]) -> None:
    """Channels at the same place of every convolution group are one class, on either side."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), kind(8, 12, 3, groups=2), nn.Conv2d(12, 2, 1))
    found = classes(net, torch.randn(1, 3, 6, 6))
    assert found["0", "out"] == found["1", "in"]
    assert found["1", "in"][:4] == found["1", "in"][4:]
    assert found["1", "out"][:6] == found["1", "out"][6:] == found["2", "in"][:6]


def test_nothing_is_said_aloud_on_the_way(recwarn: pytest.WarningsRecorder) -> None:
    """torch-pruning warns of recursion where a recurrent layer is unrolled; what it gives up on, the graph decides."""
    with pytest.raises(ModelError, match="dependencies cannot be read"):
        couple(Recurrent(nn.GRU).eval(), torch.randn(1, 3, SIZE, SIZE))
    assert not recwarn


def test_group_norm_freezes_what_it_reads_and_is_named() -> None:
    """The reason names the module that edgeprune cannot cut."""
    net, x = made("groupnorm")
    coupling = couple(net, x)
    why = {coupling.frozen.get(each) for each in coupling.classes["conv2", "out"].tolist()}
    assert why == {"it passes through GroupNorm, which edgeprune cannot cut"}


def test_layer_that_never_runs_has_no_classes() -> None:
    """Nothing reaches it: all its channels are -1."""
    net, x = made("shared")
    assert set(couple(net, x).classes["unused", "out"].tolist()) == {-1}


def test_coupling_leaves_the_module_as_it_was() -> None:
    """Frozen parameters stay frozen, and no gradient is left behind."""
    net = Residual().eval()
    net.one.weight.requires_grad_(False)
    couple(net, torch.randn(1, 3, 2, 2))
    assert [name for name, each in net.named_parameters() if not each.requires_grad] == ["one.weight"]
    assert all(each.grad is None for each in net.parameters())


def test_modules_that_cannot_be_followed_are_refused_with_the_cause() -> None:
    """A forward that raises is the model's fault, and is told."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("five is right out")

    net = Broken()
    net.conv.weight.requires_grad_(False)
    with pytest.raises(ModelError, match="ValueError: five is right out"):
        couple(net, torch.randn(1, 3, 4, 4))
    assert not net.conv.weight.requires_grad


def test_ties_join_classes_everywhere_they_occur() -> None:
    """Tying is transitive, reaches every axis, keeps reasons, and never touches fixed channels."""
    coupling = Coupling(
        classes={("a", "out"): np.array([0, 1, 2, -1]), ("b", "out"): np.array([3, 4, 5, 6])}, frozen={5: "why"}
    )
    result = tied(coupling, [(np.array([0, 1, -1]), np.array([3, 3, 6])), (np.array([2]), np.array([5]))])
    a, b = result.classes["a", "out"].tolist(), result.classes["b", "out"].tolist()
    assert a[0] == a[1] == b[0]
    assert a[2] == b[2]
    assert (a[3], b[3]) == (-1, 6)
    assert result.frozen == {a[2]: "why"}


def test_uncoupled_channels_are_all_their_own_but_for_grouped_convolutions() -> None:
    """Every channel is a class, except what a grouped or depthwise convolution holds together."""
    net = nn.Sequential(conv_bn(3, 4), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, groups=4))
    coupling = uncoupled(net)
    found = {axis: owners.tolist() for axis, owners in coupling.classes.items()}
    assert found["1", "in"][:2] == found["1", "in"][2:]
    assert found["2", "in"] == found["2", "out"]
    distinct = {each for owners in found.values() for each in owners}
    assert len(distinct) == (3 + 4) + 4 + (2 + 2) + 4
    assert not coupling.frozen


@pytest.mark.parametrize(
    ("layer", "answer"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), True),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), True),
        (nn.Conv2d(4, 8, 3, groups=4), False),
        (nn.Conv2d(4, 4, 3, groups=2), False),
        (nn.Conv2d(1, 1, 3), False),
        (nn.Linear(4, 4), False),
    ],
)
def test_depthwise_means_one_output_an_input(layer: nn.Module, answer: bool) -> None:
    """A channel multiplier or wider groups make it an ordinary grouped convolution."""
    assert is_depthwise(layer) is answer
