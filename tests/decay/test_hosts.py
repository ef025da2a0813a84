"""Each host scores as its paper says, acts on idle units alone, and says where it does not apply."""

import copy
from functools import cache

import pytest
import torch
from decaying import HOST_NAMES, Rig, batch, rig
from families import prepared
from torch import nn
from torch.nn import functional

from edgeprune.decay.host import Moment
from edgeprune.decay.hosts import HostName, check_host, open_host
from edgeprune.decay.hosts.group_norm import group_norms, strengths
from edgeprune.decay.hosts.half_space import penalties
from edgeprune.errors import ConfigError
from edgeprune.export import export
from edgeprune.plan import Plan
from edgeprune.structure import Structure, build_structure


def moment(ready: Rig, step: int = 0) -> Moment:
    """Return the present moment of a net whose units are all idle."""
    idle = ~(ready.optimiser.roster.decaying | ready.optimiser.roster.removed)
    version = ready.optimiser.roster.version
    return Moment(units=ready.units, step=step, version=version, learning_rate=0.02, idle=idle)


@cache
def loud() -> tuple[nn.Module, Structure]:
    """Return a chain with a sigmoid and without batch norm."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)).eval()
    x = torch.randn(1, 3, 8, 8)
    return net, build_structure(net, x, export(net, x), multiple=4)


# ---------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("host", ["group-norm", "gates"])
def test_a_host_picks_what_was_made_weak(host: HostName) -> None:
    """Units shrunk to a thousandth, scales and shifts included: those go and no others."""
    ready = rig("resnet", host, phase=3, steps=1, lead=2, sparsity=0.0)
    weak = ready.units.nothing.bool()
    for name, numbers in ready.units.ranges.items():
        weak[list(numbers)[-ready.units.losses[name] :]] = True
    ready.units.scale(torch.where(weak, 1e-3, 1.0))
    ready.run(3)
    assert torch.equal(ready.optimiser.roster.removed, weak)


@pytest.mark.parametrize("host", HOST_NAMES)
def test_a_host_leaves_decaying_units_alone(host: HostName) -> None:
    """Its own terms reach idle units, and nothing in the vector of a decaying one."""
    ready = rig("resnet", host, phase=80, steps=20, rounds=2, sparsity=1e-3, rectify=False)
    ready.run(3)
    ready.backward(3)
    before, now = ready.units.flat.grads.clone(), moment(ready, step=3)
    ready.host.watch(now)
    ready.host.adjust(now)
    changed = ready.units.lengths(ready.units.flat.grads - before)
    assert float(changed[ready.optimiser.roster.decaying].abs().max()) == 0.0
    assert float(changed[now.idle].max()) > 0.0


@pytest.mark.parametrize("host", HOST_NAMES)
def test_without_sparsity_a_host_adds_nothing(host: HostName) -> None:
    """Strength 0 is none at all."""
    ready = rig("resnet", host, sparsity=0.0)
    ready.backward(0)
    before, now = ready.units.flat.grads.clone(), moment(ready)
    ready.host.watch(now)
    ready.host.adjust(now)
    assert torch.equal(ready.units.flat.grads, before)


def test_hosts_that_do_not_apply_say_so() -> None:
    """A group without batch norm has no gates; one that a sigmoid follows is not zero-invariant."""
    net, structure = loud()
    with pytest.raises(ConfigError, match="the gates host cannot silence group '0'") as caught:
        check_host("gates", net, structure)
    assert "no batch norm" in caught.value.why
    with pytest.raises(ConfigError, match="zero-invariant groups, and '0' is none") as caught:
        check_host("half-space", net, structure)
    assert "before '2'" in caught.value.why
    check_host("group-norm", net, structure)


def test_only_groups_that_lose_units_are_looked_at() -> None:
    """A plan that leaves the group whole may be carried out by every host."""
    net, structure = loud()
    plan = structure.space.full()
    for host in HOST_NAMES:
        units, _ = open_host(host, copy.deepcopy(net), structure, plan)
        assert not units.losses
    narrow = Plan(kept={**plan.kept, "0": (0, 1, 2, 3)})
    with pytest.raises(ConfigError, match="gates"):
        open_host("gates", net, structure, narrow)


def test_a_gate_that_does_not_come_last_is_no_gate() -> None:
    """One of the layers that add to a residual stream has no batch norm of its own: something would still be heard."""
    net, structure = prepared("shared").net, prepared("shared").structure
    with pytest.raises(ConfigError, match="reads channels that pass no batch norm"):
        check_host("gates", net, structure)


# ----------------------------------------------------------------------------------------------------------- group norm


def test_the_group_norm_is_the_mean_over_members() -> None:
    """Of the squares of the filters that make a unit, the slices that read it and its batch norm scale; no bias."""
    ready = rig("vgg")
    net, norms = ready.net, group_norms(ready.units)
    first, bn, second = net.features[0][0], net.features[0][1], net.features[2][0]
    for unit in (0, 7, 15):
        members = [first.weight[unit], bn.weight[unit], second.weight[:, unit]]
        wanted = sum(float(each.detach().square().sum()) for each in members) / 3
        assert float(norms[ready.units.ranges["features.0.0"][unit]]) == pytest.approx(wanted, rel=1e-5)
    assert float(norms[ready.units.count]) == 0.0


def test_a_channel_of_a_flattened_map_is_read_in_all_its_places() -> None:
    """Four columns a channel: each a member."""
    ready = rig("vgg")
    conv, bn, linear = ready.net.features[4][0], ready.net.features[4][1], ready.net.classifier[0]
    members = [conv.weight[3], bn.weight[3], *linear.weight[:, 12:16].unbind(1)]
    wanted = sum(float(each.detach().square().sum()) for each in members) / 6
    assert float(group_norms(ready.units)[ready.units.ranges["features.4.0"][3]]) == pytest.approx(wanted, rel=1e-5)


def test_strengths_run_from_one_to_sixteen() -> None:
    """The strongest unit of a group is pulled with 1, the weakest with 2 to the 4; by the square roots between."""
    ready = rig("resnet")
    gamma, norms = strengths(ready.units), group_norms(ready.units).sqrt()
    for numbers in ready.units.ranges.values():
        mine, theirs = norms[list(numbers)], gamma[list(numbers)]
        wanted = 2 ** (4 * (mine.max() - mine) / (mine.max() - mine.min()))
        assert torch.allclose(theirs, wanted)
        assert (float(theirs.min()), float(theirs.max())) == (1.0, 16.0)


def test_sparsity_learning_pulls_makers_and_readers() -> None:
    """grad += reg · (γ of the row + γ of the column) · w, on a kernel between two groups."""
    ready = rig("vgg", sparsity=0.01)
    ready.optimiser.zero_grad()
    ready.units.flat.gather()
    now = moment(ready)
    ready.host.watch(now)
    ready.host.adjust(now)
    gamma, weight = strengths(ready.units), ready.net.features[2][0].weight
    out, into = (gamma[list(ready.units.ranges[name])] for name in ("features.2.0", "features.0.0"))
    wanted = 0.01 * (out[:, None, None, None] + into[None, :, None, None]) * weight.detach()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, wanted, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- gates


def test_theta_is_what_a_gate_of_its_own_would_collect() -> None:
    """|φ · ∂L/∂φ| of a net whose batch norms are rewritten with an explicit gate, summed over batches and gates."""
    ready = rig("resnet", "gates")
    for seed in (0, 1):
        ready.backward(seed)
        ready.host.watch(moment(ready))
    theta = ready.host.scores(moment(ready))
    wanted = ready.units.nothing.clone()
    for seed in (0, 1):
        gates = _gradients_of_gates(copy.deepcopy(prepared("resnet").net), seed)
        for name, each in gates.items():
            trace = next(trace for trace in ready.units.traces if trace.parameter == f"{name}.weight")
            wanted.index_add_(0, trace.units, each.abs())
    assert torch.allclose(theta[:-1], wanted[:-1], rtol=1e-3, atol=1e-5)


def _gradients_of_gates(net: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Return batch norm → φ · ∂L/∂φ of one batch, φ a factor after a batch norm that holds the rest."""
    gates = {}
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            gates[name] = gate = layer.weight.detach().clone().requires_grad_(True)
            with torch.no_grad():
                layer.bias.div_(layer.weight)
                layer.weight.fill_(1.0)
            layer.register_forward_hook(lambda _l, _i, out, gate=gate: out * gate.view(1, -1, 1, 1))
    x, y = batch(seed)
    torch.autograd.backward(functional.cross_entropy(net.train()(x), y))
    return {name: gate.detach() * gate.grad for name, gate in gates.items()}  # type: ignore[operator]


def test_theta_starts_anew_after_a_round() -> None:
    """What was collected for one round does not count in the next."""
    ready = rig("resnet", "gates")
    ready.backward(0)
    ready.host.watch(moment(ready))
    ready.host.chosen(moment(ready))
    assert float(ready.host.scores(moment(ready)).abs().max()) == 0.0


def test_the_penalty_is_on_scales_alone() -> None:
    """grad += ρ · sign(γ)."""
    ready = rig("resnet", "gates", sparsity=0.25)
    ready.optimiser.zero_grad()
    ready.units.flat.gather()
    with torch.no_grad():
        ready.net.stem[1].weight[:8] *= -1
    ready.host.adjust(moment(ready))
    scale, shift = ready.net.stem[1].weight.grad, ready.net.stem[1].bias.grad
    assert scale.tolist() == [-0.25] * 8 + [0.25] * 8
    assert not shift.any()


# ----------------------------------------------------------------------------------------------------------- half-space


def test_the_penalty_grows_where_descent_wants_a_unit_longer() -> None:
    """λ by hand: λ0 unless ⟨x, g⟩ < 0; then twice lb, between λ0 and 10 λ0, and the middle of lb and ub beyond ub."""
    product = torch.tensor([1.0, -0.002, -0.01, -1.0, -0.004])
    length = torch.tensor([2.0, 2.0, 4.0, 1.0, 2.0])
    gradient = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0025])
    found = penalties(product, length, gradient, 1e-3)
    low, high = 0.004 / 2, 0.0025**2 * 2 / 0.004
    assert torch.allclose(found, torch.tensor([1e-3, 2e-3, 5e-3, 1e-2, (low + high) / 2]))


def test_the_redundant_are_the_thin_and_those_that_shrink_anyway() -> None:
    """½ cos(x, g) + ½ size/‖x‖, each of length 1 over a group: by a loop over rows."""
    ready = rig("resnet", "half-space")
    ready.backward(0)
    now = moment(ready)
    ready.host.watch(now)
    flat, cosine, thin = ready.units.flat, [], []
    for unit in range(ready.units.count):
        rows = (ready.units.owner == unit).nonzero().flatten().tolist()
        spans = [(b, row - b.first) for row in rows for b in flat.buckets if b.first <= row < b.first + b.rows]
        x = torch.cat([bucket.of(flat.values)[row] for bucket, row in spans])
        g = torch.cat([bucket.of(flat.grads)[row] for bucket, row in spans])
        cosine.append(float(functional.cosine_similarity(x, g, dim=0)))
        thin.append(len(x) / float(x.norm()))
    redundancy = torch.zeros(ready.units.count)
    for numbers in ready.units.ranges.values():
        mine = [torch.tensor(each)[list(numbers)] for each in (cosine, thin)]
        redundancy[list(numbers)] = sum(0.5 * functional.normalize(each, dim=0) for each in mine)
    penalised = ready.host.state()["penalised"][:-1]
    assert torch.allclose(-ready.host.scores(now)[:-1], redundancy + 4.0 * penalised, atol=1e-5)
    for name, numbers in ready.units.ranges.items():
        ranked = redundancy[list(numbers)].argsort(descending=True)[: ready.units.losses[name]]
        assert set(ranked.tolist()) == set(penalised[list(numbers)].nonzero().flatten().tolist())


def test_a_penalised_unit_that_leaves_its_half_space_begins_at_once() -> None:
    """Long before the round: the formula's step takes more than a tenth of it, 0.12; one that loses 0.09 stays."""
    ready = rig("resnet", "half-space", phase=60, steps=10, lead=50, rectify=False)
    ready.run(1)
    leaving, staying = ready.host.state()["penalised"].nonzero().flatten().tolist()[:2]
    assert not bool(ready.optimiser.roster.decaying.any())
    ready.backward(1)
    for unit, lost in ((leaving, 0.12), (staying, 0.09)):
        for bucket in ready.units.buckets:
            mine = (ready.units.owner == unit)[bucket.numbers]
            bucket.of(ready.units.flat.grads)[mine] = lost / 0.02 * bucket.of(ready.units.flat.values)[mine]
    ready.optimiser.step()
    assert ready.optimiser.roster.decaying.nonzero().flatten().tolist() == [leaving]
