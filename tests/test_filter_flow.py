"""What each reader sees of a group, against derivatives of the network itself and against families of networks."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from families import FAMILIES, conv_bn, made, plan_of, prepared, randomize
from torch import nn

from edgeprune.export import export
from edgeprune.filter_flow import Flow, follow
from edgeprune.filters import Array, Filters
from edgeprune.plan import Plan
from edgeprune.structure import Structure, build_structure


def structure_of(net: nn.Module, size: int = 9) -> Structure:
    example = torch.zeros(1, 3, size, size)
    return build_structure(net.eval(), example, export(net, example), multiple=1)


def seen_by(net: nn.Module, structure: Structure, plan: Plan | None = None) -> dict[tuple[str, str], Filters]:
    """Return (reader, group) → what the reader sees when nothing is moved."""
    found: dict[tuple[str, str], Filters] = {}

    def note(reader: str, group: str, filters: Filters) -> None:
        found[reader, group] = filters

    follow(net, structure, plan or structure.space.full(), note)
    return found


def seeded(net: nn.Module, seed: int = 0) -> nn.Module:
    """Return the net in eval mode, float64, nothing neutral in its batch norms."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for each in net.modules():
            if hasattr(each, "reset_parameters"):
                each.reset_parameters()
        randomize(net)
    return net.double().eval()


def derivatives(part: nn.Module, size: int = 9) -> tuple[Array, Array]:
    """Return the filters of a linear part of a net at its middle pixel, [units, features], and the constants."""
    zero = torch.zeros(1, 3, size, size, dtype=torch.float64)

    def middle(x: torch.Tensor) -> torch.Tensor:
        return part(x)[0, :, size // 2, size // 2]

    jacobian = torch.autograd.functional.jacobian(middle, zero)
    return jacobian.flatten(1).detach().numpy(), middle(zero).detach().numpy()


@pytest.mark.parametrize(
    "part",
    [
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)),
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)),
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6)),
        nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        ),
        nn.Sequential(nn.ConvTranspose2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)),
    ],
    ids=["convolution", "batch norm", "two batch norms", "depthwise", "transposed"],
)
def test_a_reader_sees_the_derivatives_of_what_it_reads(part: nn.Sequential) -> None:
    """Batch norms folded, depthwise layers composed: inner products of Jacobians, and the answer to zeros."""
    net = seeded(nn.Sequential(part, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 5)))
    group = "0.0"
    seen = seen_by(net, structure_of(net.float()))["2", group]
    rows, constants = derivatives(part.double())
    np.testing.assert_allclose(seen.products, rows @ rows.T, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(seen.constants[0], constants, rtol=1e-5, atol=1e-7)


class Stream(nn.Module):
    """A stem, and two residual blocks that add to what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.first = nn.Sequential(conv_bn(8, 6), conv_bn(6, 8, activation=None))
        self.second = nn.Sequential(conv_bn(8, 6), conv_bn(6, 8, activation=None))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.first(x))
        x = torch.relu(x + self.second(x))
        return self.head(x.mean((2, 3)))


def test_a_reader_of_a_residual_stream_sees_the_producers_before_it() -> None:
    """The first block sees the stem alone, the second the stem and the first block, the head all three."""
    net = seeded(Stream()).float()
    seen = seen_by(net, structure_of(net))
    stem, first, second = (seen[reader, "stem.0"].products for reader in ("first.0.0", "second.0.0", "head"))
    weight = net.stem[0].weight.detach().double().flatten(1).numpy()
    norm = net.stem[1]
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double().numpy()
    np.testing.assert_allclose(stem, (weight * scale[:, None]) @ (weight * scale[:, None]).T, rtol=1e-5)
    for more, less in ((first, stem), (second, first)):
        assert np.linalg.eigvalsh(more - less).min() > -1e-9
        assert not np.allclose(more, less)


def test_a_batch_norm_before_each_reader_is_each_readers_own() -> None:
    """Pre-activation: the same stream looks different to every block, and its scales are the difference."""
    family = prepared("preactivation")
    seen = seen_by(family.net, family.structure)
    first, head = seen["blocks.0.conv1", "stem"], seen["head.linear", "stem"]
    assert first.normed
    assert not np.allclose(first.cosines, head.cosines)


def test_later_filters_are_those_after_repair_over_inputs_that_stay() -> None:
    """A reader's own filters, seen by the next one, hold the columns it was given and not those it lost."""
    net = seeded(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))
    ).float()
    structure = structure_of(net)
    plan = Plan(kept={"0": (0, 3), "2": tuple(range(5))})
    seen: dict[str, Filters] = {}

    def move(reader: str, group: str, filters: Filters) -> Array | None:
        seen[group] = filters
        return np.array([[0.5, 0.0], [0.0, -2.0]]) if group == "0" else None  # 1 to 0, 2 to 3

    flow = follow(net, structure, plan, move)
    before = net[2].weight.detach().double().numpy()
    after = np.stack([before[:, 0] + 0.5 * before[:, 1], before[:, 3] - 2 * before[:, 2]], axis=1)
    np.testing.assert_allclose(flow.changed["2"][:, [0, 3]], after)
    np.testing.assert_allclose(flow.changed["2"][:, [1, 2]], before[:, [1, 2]])
    np.testing.assert_allclose(seen["2"].products, after.reshape(5, -1) @ after.reshape(5, -1).T)
    assert set(flow.changed) == {"2"}


def test_padded_channels_of_a_shortcut_are_zeros() -> None:
    """Option A: what a stage adds to its stream starts from nothing, so its second block sees its first alone."""
    family = prepared("option_a")
    seen = seen_by(family.net, family.structure)
    assert all(np.isfinite(each.grams).all() for each in seen.values())
    assert {reader for reader, _ in seen} >= {"layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2"}


REASONS: Mapping[tuple[str, str, str], str] = {
    ("senet", "first.2.0", "first.0.0"): "it passes through Mul",
    ("half_split", "mix.0", "stem.0"): "it passes through Mul",
    ("shared", "twice", "stem.0"): "the layer reads two maps with the same weights",
}


@pytest.mark.parametrize("case", list(REASONS), ids="/".join)
def test_where_nothing_is_known_there_is_a_reason(case: tuple[str, str, str]) -> None:
    """A gate multiplies units; a shared layer reads two maps at once."""
    family, reader, group = case
    ready = prepared(family)
    seen: Flow = follow(ready.net, ready.structure, ready.structure.space.full(), lambda *_: None)
    assert seen.kept_as_they_are.get((reader, group)) == REASONS[case]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_reader_of_every_group_is_described_or_has_a_reason(name: str) -> None:
    """Nothing is passed over in silence."""
    family = prepared(name)
    seen = seen_by(family.net, family.structure)
    flow = follow(family.net, family.structure, family.structure.space.full(), lambda *_: None)
    described = set(seen) | set(flow.kept_as_they_are)
    wanted = {
        (layer.name, group)
        for layer in family.structure.layers
        if layer.kind != "depthwise"
        for group in layer.in_units
    }
    assert described == wanted
    assert not flow.changed
    for (_, group), filters in seen.items():
        assert filters.products.shape == (family.structure.full[group],) * 2


def test_following_leaves_the_module_as_it_was() -> None:
    """Moving shares changes what is returned, never the module."""
    net, _ = made("vgg")
    ready = prepared("vgg")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plan = plan_of(ready.structure.space, {"features.2.0": 12})
    flow = follow(
        net, ready.structure, plan, lambda _reader, group, _: np.ones((12, 12)) if group == "features.2.0" else None
    )
    assert set(flow.changed) == {"features.4.0"}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
