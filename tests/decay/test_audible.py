"""Whether zeros stay zeros until nobody hears them."""

import copy
from functools import cache

import pytest
import torch
from families import prepared
from torch import nn

from edgeprune.decay.audible import listener
from edgeprune.export import export
from edgeprune.structure import Structure, build_structure


@cache
def chain() -> tuple[nn.Module, Structure]:
    """Return a chain whose groups end in different operations."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1),
        nn.Hardswish(), nn.Conv2d(8, 8, 1), nn.Hardsigmoid(), nn.Flatten(), nn.Linear(128, 3),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 8, 8)
    return net, build_structure(net, x, export(net, x), multiple=4)


@pytest.mark.parametrize(
    ("group", "silenced", "who"),
    [
        ("0", {"0"}, "2"),  # a sigmoid makes one half of nothing
        ("2", {"2", "3"}, None),
        ("2", {"3"}, None),  # a gate is enough: it comes last
        ("2", set(), "5"),  # nothing is silent
        ("5", {"5"}, None),  # hard swish keeps zeros
        ("7", {"7"}, "10"),  # hard sigmoid does not, and flattening passes it on
    ],
)
def test_who_hears_a_group_of_a_chain(group: str, silenced: set[str], who: str | None) -> None:
    """The layer that hears something in place of nothing is named."""
    assert listener(chain()[1], group, silenced) == who


@pytest.mark.parametrize("name", ["resnet", "senet", "densenet", "mobilenetv2"])
def test_zeros_in_all_that_makes_a_group_silence_it(name: str) -> None:
    """Also where a sigmoid of the group's own channels multiplies them, and where they are concatenated."""
    structure = prepared(name).structure
    for group in structure.space.groups:
        assert listener(structure, group.name, makers(structure, group.name)) is None, group.name


def test_it_agrees_with_running_the_net() -> None:
    """Heard if and only if zeroing the readers as well changes an answer."""
    net, structure = chain()
    x = torch.randn(2, 3, 8, 8)
    for group in structure.space.groups:
        silent = copy.deepcopy(net)
        with torch.no_grad():
            for layer in makers(structure, group.name):
                for parameter in silent.get_submodule(layer).parameters():
                    parameter.zero_()
            before = silent(x)
            reader = silent[max(int(layer) for layer, side in structure.members[group.name] if side == "in")]
            reader.weight.zero_()
            heard = not torch.allclose(silent(x), before)
        assert heard == (listener(structure, group.name, makers(structure, group.name)) is not None), group.name


def makers(structure: Structure, name: str) -> set[str]:
    """Return the layers that put a group's channels out."""
    return {layer for layer, side in structure.members[name] if side == "out"}
