"""A unit's vector and trace are what cutting would take away, for every family of nets."""

import copy

import numpy as np
import pytest
import torch
from decaying import HOST_NAMES, narrow, rig
from families import gap, plan_of, prepared, run_module
from torch import nn

from edgeprune.coupling import is_depthwise
from edgeprune.cut import cut_module, masked_state
from edgeprune.decay.hosts import HostName
from edgeprune.decay.units import BRANCHES, Units, find_units
from edgeprune.plan import Plan

FAMILIES_HERE = ("resnet", "vgg", "mobilenetv2", "senet", "prelu", "densenet", "grouped_transpose", "conv1d")
"""Coupled streams, flattened maps, depthwise, gated, slopes, concatenated, grouped and transposed, one axis."""


def lost(units: Units, plan: Plan) -> torch.Tensor:
    """Return which units a plan removes, and the branches' own if there is one."""
    removed = torch.zeros(units.count + 1, dtype=torch.bool)
    for name, numbers in units.ranges.items():
        kept = set(plan.kept.get(name, ()))
        removed[[number for place, number in enumerate(numbers) if place not in kept]] = True
    return removed


@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_traces_are_what_masking_zeroes(name: str) -> None:
    """The parameters times the mask are those of `mask_module`, bit for bit; so is a net with a branch removed."""
    ready = prepared(name)
    removable = {group.name: 0 for group in ready.structure.space.groups if group.removable}
    for plan in (narrow(ready.structure), plan_of(ready.structure.space, removable)):
        net = copy.deepcopy(ready.net)
        wanted = {**dict(net.state_dict()), **masked_state(net, ready.structure, plan)}
        units = find_units(net, ready.structure, plan)
        units.flat.values.mul_(units.mask(lost(units, plan)))
        for key, parameter in net.named_parameters():
            assert torch.equal(parameter.detach().abs(), wanted[key].abs()), key


def made_axis(layer: nn.Module, parameter: torch.Tensor) -> int:
    """Return the axis of a parameter along which a layer's output channels lie."""
    sideways = getattr(layer, "transposed", False) and parameter.dim() > 1 and not is_depthwise(layer)
    return 1 if sideways else 0


@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_a_vector_is_all_that_makes_a_unit(name: str) -> None:
    """Doubling the vectors doubles every filter, bias, scale and shift over the units once, and no slope."""
    ready = prepared(name)
    net, plan = copy.deepcopy(ready.net), narrow(ready.structure)
    units = find_units(net, ready.structure, plan)
    before = {key: each.detach().clone() for key, each in net.named_parameters()}
    units.scale(torch.cat([torch.full((units.count,), 2.0), torch.ones(1)]))
    grouped = {unit for group in units.ranges for unit in ready.structure.units[group]}
    for key, parameter in net.named_parameters():
        layer = net.get_submodule(key.rpartition(".")[0])
        rows = before[key].movedim(made_axis(layer, parameter), 0)
        owners = ready.structure.classes.get((key.rpartition(".")[0], "out"), np.full(len(rows), -1))
        twice = torch.tensor([owner in grouped and not isinstance(layer, nn.PReLU) for owner in owners[: len(rows)]])
        wanted = torch.where(twice.view(-1, *[1] * (rows.dim() - 1)), 2 * rows, rows)
        assert torch.equal(parameter.detach().movedim(made_axis(layer, parameter), 0), wanted), key


@pytest.mark.parametrize(
    ("name", "host"),
    [
        *((name, "group-norm") for name in FAMILIES_HERE),
        *((name, "gates") for name in ("resnet", "mobilenetv2", "densenet")),
        *((name, "half-space") for name in ("senet", "conv1d", "grouped_transpose")),
    ],
)
def test_a_decayed_net_cut_is_the_same_net(name: str, host: HostName) -> None:
    """Once all have gone, cutting them out changes no answer; in training mode neither."""
    ready = rig(name, host, phase=12, steps=3, rounds=2)
    ready.run(12)
    assert ready.optimiser.done
    plan = ready.optimiser.plan(ready.structure)
    assert plan.widths == ready.plan.widths
    small = cut_module(ready.net, ready.structure, plan)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    assert gap(run_module(small.eval(), x), run_module(ready.net.eval(), x)) < 1e-5
    for net in (ready.net, small):
        for layer in net.train().modules():
            layer.training = layer.training and not isinstance(layer, nn.Dropout)
    assert gap(run_module(small, x), run_module(ready.net, x)) < 1e-5


@pytest.mark.parametrize("host", HOST_NAMES)
@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "preactivation"])
def test_a_branch_that_goes_falls_silent_first(name: str, host: HostName) -> None:
    """A group that loses everything takes its branch along; what else is in the branch decays as one more unit."""
    ready = prepared(name)
    removable = [group.name for group in ready.structure.space.groups if group.removable]
    plan = plan_of(ready.structure.space, {removable[0]: 0})
    decaying = rig(name, host, plan=plan, phase=8, steps=4)
    assert list(decaying.units.ranges) == [removable[0], BRANCHES]
    decaying.run(8)
    assert decaying.optimiser.done
    assert decaying.optimiser.plan(ready.structure).kept[removable[0]] == ()
    small = cut_module(decaying.net, ready.structure, decaying.optimiser.plan(ready.structure))
    x = torch.randn(4, 3, 16, 16)
    assert gap(run_module(small.eval(), x), run_module(decaying.net.eval(), x)) < 1e-5


def test_gates_are_scale_and_shift_alone() -> None:
    """Under the gates' extent nothing but batch norms is in a vector."""
    ready = prepared("resnet")
    net = copy.deepcopy(ready.net)
    units = find_units(net, ready.structure, narrow(ready.structure), "gates")
    owned = {key for key, place in units.flat.places.items() if bool((units.owner[place.rows] < units.count).any())}
    assert owned
    assert {type(net.get_submodule(key.rpartition(".")[0])) for key in owned} == {nn.BatchNorm2d}


def test_the_lowest_of_each_group_are_chosen() -> None:
    """As many as each group is to lose, among those that may be, the first of equals."""
    units = rig("vgg").units
    scores = torch.arange(units.count + 1).float() % 7
    counts = torch.tensor([*range(len(units.ranges)), 0])
    among = torch.arange(units.count + 1) % 3 != 0
    chosen = units.lowest(scores, counts, among)
    for number, numbers in enumerate(units.ranges.values()):
        free = [each for each in numbers if each % 3]
        wanted = sorted(free, key=lambda each: (float(scores[each]), each))[:number]
        assert {each for each in numbers if chosen[each]} == set(wanted)
    assert not bool(chosen[units.count])
