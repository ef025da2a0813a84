"""What a layer costs, against counting every multiplication it does."""

import pytest
import torch
from families import plan_of, prepared
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgeprune.cut import cut_module
from edgeprune.layer import Layer
from edgeprune.silence import Silence


def multiplications(module: nn.Module, x: torch.Tensor) -> float:
    """Return how many products of an input and a weight a layer adds up: all ones in, all ones as weights, sum.

    Padding is made of ones too, so that it counts like pixels; a transposed convolution crops nothing.
    """
    ones = torch.ones_like(x, dtype=torch.float64)
    weight = torch.ones_like(module.weight, dtype=torch.float64)
    if isinstance(module, nn.Linear):
        return float(F.linear(ones, weight).sum())
    if isinstance(module, nn.ConvTranspose2d):
        return float(F.conv_transpose2d(ones, weight, None, module.stride, 0, 0, module.groups).sum())
    pads = [each for side in reversed(module.padding) for each in (side, side)]
    return float(F.conv2d(F.pad(ones, pads, value=1), weight, None, module.stride, 0, 1, module.groups).sum())


def counted(net: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Return layer → multiplications of one forward pass; 0 for a layer of which only silence is left."""
    counts: dict[str, float] = {}

    def watch(name: str) -> None:
        def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            counts[name] = 0.0 if isinstance(module, Silence) else multiplications(module, inputs[0])

        net.get_submodule(name).register_forward_hook(count)

    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | Silence):
            watch(name)
    with torch.no_grad():
        net(x)
    return counts


@pytest.mark.parametrize("name", ["vgg", "resnext", "mobilenetv2", "grouped_transpose", "bottleneck", "unet"])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_macs_are_what_the_cut_layer_multiplies(name: str, data: st.DataObject) -> None:
    """Ordinary, grouped, depthwise, transposed and linear layers, at any widths, branches removed or not."""
    family = prepared(name)
    structure = family.structure
    widths = {group.name: data.draw(st.sampled_from(group.choices)) for group in structure.space.groups}
    net = cut_module(family.net, structure, plan_of(structure.space, widths))
    wanted = counted(net, family.example)
    assert {layer.name: layer.macs(widths, structure.full) for layer in structure.layers} == wanted


def layer(**facts: object) -> Layer:
    """Return a 3x3 convolution from 16 to 32 channels on a map of 8x8, but for the facts given."""
    usual = {"name": "l", "node": "n", "kind": "conv", "in_channels": 16, "out_channels": 32, "kernel": 9, "stride": 1}
    return Layer(**{**usual, "height": 8, "width": 8, **facts})


def test_channels_follow_the_units_of_their_groups() -> None:
    """A unit of "a" is 2 input channels, one of "b" is 1 of 32 outputs, of which 4 are fixed."""
    one = layer(in_units={"a": 2}, out_units={"b": 1})
    assert one.channels({"a": 8, "b": 28}, {"a": 8, "b": 28}) == (16, 32)
    assert one.channels({"a": 3, "b": 10}, {"a": 8, "b": 28}) == (6, 14)


def test_macs_round_up_to_the_kernels_block() -> None:
    """9 channels cost 16 on a multiple of 8; a depthwise layer is rounded once, not twice."""
    one = layer(in_units={"a": 1})
    assert one.macs({"a": 9}, {"a": 16}) == 9 * 32 * 9 * 64
    assert one.macs({"a": 9}, {"a": 16}, multiple=8) == 16 * 32 * 9 * 64
    deep = layer(kind="depthwise", out_channels=16, groups=16, in_units={"a": 1}, out_units={"a": 1})
    assert deep.macs({"a": 9}, {"a": 16}, multiple=8) == 16 * 9 * 64


def test_groups_left() -> None:
    """A depthwise layer has a group a channel; a grouped one keeps its groups."""
    deep = layer(kind="depthwise", out_channels=16, groups=16, in_units={"a": 1}, out_units={"a": 1})
    assert deep.groups_left({"a": 9}, {"a": 16}) == 9
    assert layer(kind="grouped", groups=4, in_units={"a": 4}).groups_left({"a": 1}, {"a": 4}) == 4


def test_layer_of_a_removed_branch_costs_nothing() -> None:
    """Whatever its own groups keep, it is gone with the one that keeps nothing."""
    one = layer(out_units={"b": 1}, gone_with=("a",))
    assert one.gone({"a": 0, "b": 32})
    assert one.channels({"a": 0, "b": 32}, {"a": 8, "b": 32}) == (0, 0)
    assert one.macs({"a": 0, "b": 32}, {"a": 8, "b": 32}, multiple=8) == 0
    assert not one.gone({"a": 8, "b": 0})
