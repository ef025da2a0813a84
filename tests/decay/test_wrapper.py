"""What the Decay Pruning Method promises: lengths, directions, releases, totals, and everybody else left alone."""

import copy
from collections.abc import Callable, Iterable
from statistics import mean

import pytest
import torch
from decaying import HOST_NAMES, Rig, narrow, rig, sgd
from families import SIZE, plan_of, prepared
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.decay.hosts import HostName
from edgeprune.decay.settings import DecaySettings
from edgeprune.errors import ConfigError, PlanError

N = DecaySettings.steps
"""Of the settings that nobody touched."""


def adam(parameters: object) -> torch.optim.Optimizer:
    """Return Adam with weight decay in its gradients."""
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-3)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ lengths


@pytest.mark.parametrize("host", HOST_NAMES)
@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "densenet"])
def test_lengths_fall_linearly_to_zero(name: str, host: HostName) -> None:
    """Without rectification: L_init (1 − n/N) after n steps, for every unit of every group at once, and 0 at N."""
    ready = rig(name, host, phase=8, steps=8, rectify=False)
    before = ready.lengths()
    for step in range(8):
        ready.run(1, first=step)
        decaying = (ready.optimiser.roster.decaying | ready.optimiser.roster.removed)[:-1]
        wanted = before * (1 - (step + 1) / 8)
        assert int(decaying.sum()) == sum(ready.units.losses.values())
        assert torch.allclose(ready.lengths()[decaying], wanted[decaying], rtol=1e-6, atol=0)
    assert ready.optimiser.done


def test_lengths_are_kept_over_rounds_and_optimisers() -> None:
    """Units that begin later fall by their own clock, under Adam as well."""
    ready = rig("vgg", make=adam, phase=30, steps=5, rounds=3, rectify=False)
    for step in range(30):
        ready.run(1, first=step)
        roster = ready.optimiser.roster
        wanted = (roster.initial * (1 - roster.n / 5))[:-1].double()
        assert torch.allclose(ready.lengths()[roster.decaying[:-1]], wanted[roster.decaying[:-1]], rtol=1e-6)
    assert ready.optimiser.done


@pytest.mark.parametrize("host", HOST_NAMES)
def test_lengths_hold_in_the_step_in_which_neighbours_go(host: HostName) -> None:
    """The slices that read what goes are part of units that still decay, in rounds that overlap."""
    ready = rig("resnet", host, phase=40, steps=10, rounds=4, rectify=False)
    roster, overlaps = ready.optimiser.roster, 0
    for step in range(40):
        removed = int(roster.removed.sum())
        ready.run(1, first=step)
        decaying = roster.decaying[:-1]
        wanted = (roster.initial * (1 - roster.n / 10))[:-1].double()
        assert torch.allclose(ready.lengths()[decaying], wanted[decaying], rtol=1e-6, atol=0)
        overlaps += int(roster.removed.sum()) > removed and bool(decaying.any())
    assert overlaps == 3


@pytest.mark.parametrize("host", HOST_NAMES)
def test_directions_are_the_optimiser_s(host: HostName) -> None:
    """A decaying unit points where the inner step alone would have it point."""
    ready, plain = rig("resnet", host, rectify=False, sparsity=0.0), rig("resnet", host, sparsity=0.0)
    ready.run(2)
    plain.units.flat.values.copy_(ready.units.flat.values)
    for mine, theirs in zip(both_parts(plain), both_parts(ready), strict=True):
        momentum = ready.optimiser.inner.state[theirs]["momentum_buffer"]
        plain.optimiser.inner.state[mine]["momentum_buffer"] = momentum.clone()
    ready.backward(2)
    plain.units.flat.grads.copy_(ready.units.flat.grads)
    undecayed(ready, plain)
    plain.optimiser.inner.step()
    ready.optimiser.step()
    cosine = ready.units.products(ready.units.flat.values, plain.units.flat.values)
    cosine /= ready.units.lengths(ready.units.flat.values) * ready.units.lengths(plain.units.flat.values)
    decaying = ready.optimiser.roster.decaying
    assert int(decaying.sum()) > 10
    assert torch.allclose(cosine[decaying], torch.ones(int(decaying.sum())), atol=1e-6)


def both_parts(ready: Rig) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the flat parts."""
    return ready.units.flat.kernels, ready.units.flat.vectors


def undecayed(ready: Rig, plain: Rig) -> None:
    """Take the weight decay of SGD out of a plain net's gradients where the other's units decay."""
    owned = ready.optimiser.roster.decaying[ready.units.owner]
    for bucket in plain.units.flat.buckets:
        rows = owned[bucket.numbers, None]
        bucket.of(plain.units.flat.grads).sub_(1e-3 * rows * bucket.of(plain.units.flat.values))


def test_all_of_a_unit_is_scaled_by_one_factor() -> None:
    """Filters, scales and shifts of one unit: what the step made of them, all times the same number."""
    ready, plain = rig("mobilenetv2", rectify=False), rig("mobilenetv2")
    ready.backward(0)
    plain.units.flat.grads.copy_(ready.units.flat.grads)
    ready.optimiser.step()
    undecayed(ready, plain)
    plain.optimiser.inner.step()
    ratio = ready.units.flat.values / plain.units.flat.values
    for unit in ready.optimiser.roster.decaying.nonzero().flatten().tolist():
        rows = (ready.units.owner == unit).nonzero().flatten().tolist()
        parts = [
            bucket.of(ratio)[row - bucket.first]
            for bucket in ready.units.buckets
            for row in rows
            if row in range(bucket.first, bucket.first + bucket.rows)
        ]
        factors = torch.cat(parts)
        sure = (
            torch.cat(
                [
                    bucket.of(plain.units.flat.values)[row - bucket.first]
                    for bucket in ready.units.buckets
                    for row in rows
                    if row in range(bucket.first, bucket.first + bucket.rows)
                ]
            ).abs()
            > 1e-3
        )
        assert len(rows) > 2
        assert float(factors[sure].std()) < 1e-4 * float(factors[sure].mean())


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("make", [sgd, adam])
def test_all_others_are_updated_bit_for_bit_as_ever(make: Callable[..., torch.optim.Optimizer], flat: bool) -> None:
    """Against the same optimiser on an untouched twin: every number that is not of a decaying unit.

    Flat parts are summed in other vectors by the processor, which may round the last bit otherwise.
    """
    ready = rig("resnet", make=make, flat=flat, rectify=False)
    twin = copy.deepcopy(prepared("resnet").net).to(memory_format=torch.channels_last)
    optimiser = make(list(twin.parameters()))
    ready.backward(0)
    for name, parameter in twin.named_parameters():
        parameter.grad = ready.units.flat.places[name].of(ready.units.flat.grads).clone()
    optimiser.step()
    ready.optimiser.step()
    compared = 0
    for name, parameter in twin.named_parameters():
        rows = ready.units.flat.places[name].rows
        others = ~ready.optimiser.roster.decaying[ready.units.owner[rows]]
        mine = ready.net.get_parameter(name).detach()
        same = torch.equal if not flat else torch.allclose
        assert same(mine[others], parameter.detach()[others]), name
        assert others.all() or not torch.equal(mine[~others], parameter.detach()[~others])
        compared += int(others.sum())
    assert compared > 100


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("host", HOST_NAMES)
def test_all_others_are_updated_bit_for_bit_in_the_midst_of_it(
    host: HostName, make: Callable[..., torch.optim.Optimizer]
) -> None:
    """Flat, with full momentum, before, during and after the decay of others: as by an optimiser that knows of none.

    Where a unit goes, its readers and what is remembered of it go along; the rest is compared in that step as well.
    """
    ready = rig("resnet", host, make=make, phase=30, steps=6, rounds=2, lead=3, sparsity=0.0)
    roster, compared = ready.optimiser.roster, []
    for step in range(32):
        ready.backward(step)
        wanted = plainly(ready, make)
        before, releases = roster.decaying, roster.releases
        ready.optimiser.step()
        touched = elements(ready, before | roster.decaying | (roster.releases > releases))
        others = ~touched & (ready.units.mask(roster.removed) == 1)
        for name, values in remembered(ready.optimiser.inner, both_parts(ready)).items():
            assert torch.equal(values[others], wanted[name][others]), (step, name)
        compared.append((bool(before.any()), bool(roster.removed.any()), int(others.sum())))
    assert ready.optimiser.done
    assert ready.optimiser.released > 0
    assert {each[:2] for each in compared} == {(False, False), (True, False), (True, True), (False, True)}
    assert min(count for *_, count in compared) > 0.1 * len(ready.units.flat.values)


def plainly(ready: Rig, make: Callable[..., torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return what a plain optimiser, with the same numbers behind it, makes of the flat parts and remembers."""
    parts = [nn.Parameter(each.detach().clone()) for each in both_parts(ready)]
    for mine, theirs in zip(parts, both_parts(ready), strict=True):
        mine.grad = theirs.grad.clone()
    plain = make(parts)
    plain.load_state_dict(copy.deepcopy(ready.optimiser.inner.state_dict()))
    plain.step()
    return remembered(plain, parts)


def remembered(optimiser: torch.optim.Optimizer, parts: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the values of parts and all that is remembered of each of them, flat."""
    found = [{"value": each.detach()} | optimiser.state[each] for each in parts]
    return {name: torch.cat([each[name] for each in found]) for name in found[0] if found[0][name].dim()}


def elements(ready: Rig, units: Tensor) -> Tensor:
    """Return which elements of the flat parts are of these units' vectors."""
    found = torch.zeros_like(ready.units.flat.values, dtype=torch.bool)
    for bucket in ready.units.flat.buckets:
        bucket.of(found).copy_(units[ready.units.owner[bucket.numbers], None])
    return found


@pytest.mark.parametrize("host", HOST_NAMES)
def test_one_step_of_decay_is_the_host_s_own_pruning(host: HostName) -> None:
    """N = 1: after the step in which they begin the host's picks are zero, and nothing else differs from a step."""
    ready, plain = rig("resnet", host, phase=1, steps=1), rig("resnet", host, phase=5, steps=1, lead=3)
    ready.run(1)
    plain.run(1)
    assert ready.optimiser.done
    assert not bool(plain.optimiser.roster.removed.any())
    removed = ready.optimiser.roster.removed
    assert torch.equal(ready.units.flat.values.abs(), (plain.units.flat.values * ready.units.mask(removed)).abs())
    picks = rig("resnet", host, phase=1, steps=1)
    picks.backward(0)
    now = picks.optimiser._moment()
    picks.host.watch(now)
    losses = torch.tensor([*picks.units.losses.values(), 0])
    assert torch.equal(picks.units.lowest(picks.host.scores(now), losses, now.idle), removed)


# --------------------------------------------------------------------------------------------------- self-rectification


def planted(ready: Rig, sign: float, strength: float, others: float) -> Tensor:
    """Step with a gradient along themselves for decaying units, a random one for others; return who was released."""
    flat, roster = ready.units.flat, ready.optimiser.roster
    ready.optimiser.zero_grad()
    flat.gather()
    noise = torch.randn(flat.grads.shape, generator=torch.Generator().manual_seed(3))
    flat.grads.copy_(noise)
    lengths = ready.units.lengths(flat.grads)
    target = roster.decaying if bool(roster.decaying.any()) else ready.units.nothing.bool()
    for bucket in ready.units.buckets:
        mine = target[ready.units.owner[bucket.numbers], None]
        scale = lengths[ready.units.owner[bucket.numbers], None].clamp_min(1e-9)
        along = sign * strength * bucket.of(flat.values)
        bucket.of(flat.grads).copy_(torch.where(mine, along, others * bucket.of(flat.grads) / scale))
    before = roster.releases.clone()
    ready.optimiser.step()
    return (roster.releases > before)[:-1]


def begun(host: HostName = "group-norm", momentum: float = 0.0, **settings: object) -> Rig:
    """Return a net whose units have just begun to decay, under SGD without weight decay."""

    def make(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01, momentum=momentum)  # type: ignore[arg-type]

    ready = rig("resnet" if host == "gates" else "vgg", host, make=make, phase=400, steps=100, **settings)  # type: ignore[arg-type]
    planted(ready, 0.0, 0.0, 0.0)
    assert bool(ready.optimiser.roster.decaying.any())
    return ready


@pytest.mark.parametrize("rate", ["measured", "per-rate", "cosine"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("host", HOST_NAMES)
def test_a_unit_that_descent_wants_longer_is_released(host: HostName, momentum: float, rate: str) -> None:
    """A gradient −c·x with a large c."""
    ready = begun(host, momentum, rate=rate, t_rate=1e-3)
    decaying = ready.optimiser.roster.decaying[:-1].clone()
    assert torch.equal(planted(ready, -1.0, 50.0, 1.0), decaying)


@pytest.mark.parametrize("rate", ["measured", "per-rate", "cosine"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("host", HOST_NAMES)
def test_a_unit_that_descent_wants_shorter_goes_in_one_decay(host: HostName, momentum: float, rate: str) -> None:
    """A gradient +c·x until n = N: no release at any length, whatever momentum holds of longer days.

    C_rate alone decides, and c is too small for momentum to overshoot zero.
    """
    ready = begun(host, momentum, rate=rate, t_len=0.0)
    roster = ready.optimiser.roster
    for n in range(2, 101):
        assert int(roster.decaying.sum()) == sum(ready.units.losses.values())
        assert not bool(planted(ready, 1.0, 1.0, 1.0).any())
        assert int(roster.n[roster.decaying | roster.removed].min()) == n
    assert ready.optimiser.done
    assert ready.optimiser.released == 0


def test_a_threshold_of_the_rate_blocks_a_release() -> None:
    """lr · c is the rate that −c·x makes: 0.01 · 50 = 0.5."""
    assert not bool(planted(begun(t_rate=0.51), -1.0, 50.0, 1.0).any())
    assert bool(planted(begun(t_rate=0.49), -1.0, 50.0, 1.0).any())


def test_a_gradient_that_is_short_beside_its_neighbours_blocks_a_release() -> None:
    """The same resistance among loud neighbours counts for nothing."""
    loud = begun()
    decaying = loud.optimiser.roster.decaying[:-1].clone()
    assert not bool(planted(loud, -1.0, 1.0, 1e3).any())
    quiet = begun(t_len=0.0)
    assert torch.equal(planted(quiet, -1.0, 1.0, 1e3), decaying)


def test_without_rectification_nothing_is_released() -> None:
    """However much it resists."""
    assert not bool(planted(begun(rectify=False), -1.0, 50.0, 1.0).any())


def test_weight_decay_does_not_hide_resistance() -> None:
    """A weight decay far stronger than the gradient: the unit is released all the same, and on all others it acts."""

    def make(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01, weight_decay=20.0)  # type: ignore[arg-type]

    ready = rig("vgg", make=make, phase=400, steps=100)
    planted(ready, 0.0, 0.0, 0.0)
    decaying = ready.optimiser.roster.decaying[:-1].clone()
    before = ready.units.lengths(ready.units.flat.values)[:-1]
    assert torch.equal(planted(ready, -1.0, 5.0, 0.0), decaying)
    after = ready.units.lengths(ready.units.flat.values)[:-1]
    assert torch.allclose((after / before)[~decaying], torch.tensor(1 - 0.01 * 20.0), atol=1e-3)
    assert torch.allclose((after / before)[decaying], torch.tensor(1 + 0.01 * 5.0), atol=1e-3)


def test_a_released_unit_rests_and_another_takes_its_place() -> None:
    """Not taken again for as long as the cooldown, the substitute begins at the next step; the totals still hold."""
    ready = begun(cooldown=60)
    roster = ready.optimiser.roster
    released = planted(ready, -1.0, 50.0, 1.0)
    for _ in range(60):
        planted(ready, 1.0, 1.0, 1.0)
        assert not bool((roster.decaying[:-1] & released).any())
    under_way = ready.units.per_group(roster.decaying.float()).tolist()[:-1]
    assert under_way == [float(each) for each in ready.units.losses.values()]
    for _ in range(400):
        planted(ready, 1.0, 1.0, 1.0)
    assert ready.optimiser.done
    assert ready.optimiser.plan(ready.structure).widths == ready.plan.widths


def stubborn(phase: int) -> Rig:
    """Return a net that loses a quarter of two groups, whose turn comes again and again if everyone resists.

    The groups are no neighbours: what reads a unit goes with it, and is part of the units that a neighbour makes.
    """
    return rig(
        "vgg",
        plan=plan_of(prepared("vgg").structure.space, {"features.0.0": 12, "features.4.0": 12}),
        make=lambda each: torch.optim.SGD(each, lr=0.01),
        phase=phase,
        steps=N,
        t_len=0.0,
    )


def test_a_released_unit_rests_for_as_long_as_a_decay_takes() -> None:
    """Not taken in the N steps after its release, and in the next if it is its turn."""
    ready = stubborn(phase=6 * N)
    roster, rested = ready.optimiser.roster, ready.units.nothing[:-1] + torch.inf
    shortest = torch.inf
    for _ in range(3 * N):
        released = planted(ready, -1.0, 50.0, 1.0)
        taken = released | roster.decaying[:-1]
        shortest = min(shortest, float(torch.where(taken, rested, torch.inf).min()))
        rested = torch.where(released, 0.0, rested + 1)
    assert shortest == N


def test_a_unit_is_released_twice_and_no_more() -> None:
    """However often it would be: the third time it goes."""
    ready = stubborn(phase=6 * N)
    for _ in range(6 * N):
        planted(ready, -1.0, 50.0, 1.0)
    releases, removed = ready.optimiser.roster.releases, ready.optimiser.roster.removed
    assert ready.optimiser.done
    assert int(releases.max()) == 2
    assert int(releases[removed].min()) == 2


def test_a_unit_that_begins_again_falls_from_the_length_it_has_then() -> None:
    """L (1 − n/N) with the L of its last beginning, and a release here leaves it half as long again as it was."""
    ready = stubborn(phase=6 * N)
    roster, start = ready.optimiser.roster, torch.zeros(ready.units.count, dtype=torch.float64)
    n, longer, at = torch.zeros_like(start), torch.zeros_like(start), ready.lengths()
    for _ in range(6 * N):
        idle = ~roster.decaying[:-1]
        planted(ready, -1.0, 50.0, 1.0)
        decaying = roster.decaying[:-1]
        begins = decaying & idle
        longer = torch.where(begins & (start > 0), at / start, longer)
        start, n = torch.where(begins, at, start), torch.where(begins, 0, n) + decaying
        at = ready.lengths()
        assert torch.allclose(at[decaying], (start * (1 - n / N))[decaying], rtol=1e-6, atol=0)
    assert ready.optimiser.done
    assert int((roster.removed[:-1] & (longer > 1.4)).sum()) > 3


@pytest.mark.parametrize("host", HOST_NAMES)
def test_everything_goes_in_time_however_much_resists(host: HostName) -> None:
    """Every decaying unit resists at every step: at most so many releases of each, and all gone by the end."""
    ready = rig("resnet", host, phase=60, steps=5, rounds=2, releases=1, t_len=0.0, cooldown=7)
    for _ in range(60):
        planted(ready, -1.0, 50.0, 1.0)
    assert ready.optimiser.done
    assert int(ready.optimiser.roster.releases.max()) == 1
    assert ready.optimiser.released > 20
    assert ready.optimiser.plan(ready.structure).widths == ready.plan.widths


def test_a_group_that_loses_all_of_itself_releases_nobody() -> None:
    """There would be nobody to take the place."""
    structure = prepared("resnet").structure
    removable = next(group.name for group in structure.space.groups if group.removable)
    ready = rig("resnet", plan=plan_of(structure.space, {removable: 0}), phase=50, steps=10, t_len=0.0)
    for _ in range(50):
        planted(ready, -1.0, 50.0, 1.0)
    assert ready.optimiser.released == 0
    assert ready.optimiser.done


# -------------------------------------------------------------------------------------------------------- after the end


@pytest.mark.parametrize("host", HOST_NAMES)
def test_what_has_gone_stays_exactly_zero(host: HostName) -> None:
    """Through more steps with momentum and weight decay: parameters, their readers, the momentum of both."""
    ready = rig("vgg" if host != "gates" else "resnet", host, phase=10, steps=4)
    ready.run(10)
    mask = ready.units.mask(ready.optimiser.roster.removed)
    gone = mask == 0
    for seed in range(10, 16):
        ready.run(1, first=seed)
        assert float(ready.units.flat.values[gone].abs().max()) == 0.0
    assert float(ready.units.flat.values[~gone].abs().min()) >= 0.0
    assert int(gone.sum()) > 100


@pytest.mark.parametrize("flat", [True, False])
def test_momentum_is_left_during_decay_and_cleared_at_the_end(flat: bool) -> None:
    """Of parts of a flat tensor and of a module's parameters alike."""
    ready = rig("resnet", flat=flat, phase=4, steps=4)
    ready.run(3)
    parameter = ready.units.flat.kernels if flat else ready.net.get_parameter("layer1.0.conv1.weight")
    mask = dict(ready.units.flat.views(ready.units.mask(ready.optimiser.roster.decaying)))[parameter]
    gone = mask == 0
    assert float(ready.optimiser.inner.state[parameter]["momentum_buffer"][gone].abs().max()) > 0
    ready.run(1, first=3)
    assert float(ready.optimiser.inner.state[parameter]["momentum_buffer"][gone].abs().max()) == 0
    assert float(ready.optimiser.inner.state[parameter]["momentum_buffer"][~gone].abs().max()) > 0


def test_the_loss_jumps_less_when_the_last_of_it_goes() -> None:
    """A trained net, the same picks: what the step of the removal adds to the loss, after N steps and at once."""
    once = losses(trained(), steps=1, lead=0)
    decayed = losses(trained(), steps=20, lead=0)
    assert once[-1] - once[-2] > 0.2
    assert decayed[-1] - decayed[-2] < 0.2 * (once[-1] - once[-2])


def test_the_net_is_better_off_after_a_decay_than_after_one_step() -> None:
    """Three trained nets, twenty steps for both: the mean loss right after the last step, all of it gone."""
    nets = [trained(seed) for seed in range(3)]
    once = mean(losses(each, steps=1, lead=19)[-1] for each in nets)
    decayed = mean(losses(each, steps=20, lead=0)[-1] for each in nets)
    assert decayed < 0.8 * once


def losses(ready: tuple[nn.Module, Tensor, Tensor], *, steps: int, lead: int) -> list[float]:
    """Return the loss of a trained net before each step until all that must go is gone, and after the last."""
    net, images, labels = ready
    phase = lead + steps
    mine = rig(
        "vgg", rectify=False, phase=phase, steps=steps, lead=lead, make=lambda each: torch.optim.SGD(each, lr=0.01)
    )
    mine.net.load_state_dict(net.state_dict())
    found = []
    for _ in range(phase + 1):
        mine.optimiser.zero_grad()
        loss = functional.cross_entropy(without_dropout(mine.net)(images), labels)
        torch.autograd.backward(loss)
        found.append(float(loss.detach()))
        assert mine.optimiser.done == (len(found) > phase)
        mine.optimiser.step()
    return found


def without_dropout(net: nn.Module) -> nn.Module:
    """Return the net in training mode but for its dropout."""
    for layer in net.train().modules():
        layer.training = layer.training and not isinstance(layer, nn.Dropout)
    return net


def trained(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the family's VGG after a little training on patterns under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(100) % 5
    patterns = torch.randn(5, 3, SIZE, SIZE, generator=generator)
    images = patterns[labels] + torch.randn(100, 3, SIZE, SIZE, generator=generator)
    net = without_dropout(copy.deepcopy(prepared("vgg").net))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(25):
        optimiser.zero_grad()
        loss = functional.cross_entropy(net(images), labels)
        torch.autograd.backward(loss)
        optimiser.step()
    assert float(loss.detach()) < 0.1
    return net, images, labels


# ----------------------------------------------------------------------------------------------------- state and errors


@pytest.mark.parametrize("host", HOST_NAMES)
@pytest.mark.parametrize("stop", [3, 11, 29])
def test_a_run_goes_on_bit_for_bit_from_its_state(host: HostName, stop: int) -> None:
    """Weights, statistics, momentum, and the state: whether units wait, decay or are gone when it stops."""
    make = {"phase": 30, "steps": 6, "rounds": 3, "lead": 5, "sparsity": 1e-3}
    whole, first, second = rig("resnet", host, **make), rig("resnet", host, **make), rig("resnet", host, **make)  # type: ignore[arg-type]
    whole.run(34)
    first.run(stop)
    facts, tensors = first.optimiser.state()
    second.net.load_state_dict(first.net.state_dict())
    for mine, theirs in zip(both_parts(second), both_parts(first), strict=True):
        momentum = first.optimiser.inner.state[theirs]["momentum_buffer"]
        second.optimiser.inner.state[mine]["momentum_buffer"] = momentum.clone()
    second.optimiser.restore(facts, {name: each.clone() for name, each in tensors.items()})
    second.run(34 - stop, first=stop)
    assert torch.equal(second.units.flat.values, whole.units.flat.values)
    assert second.optimiser.released == whole.optimiser.released > 0
    assert all(
        torch.equal(each, whole.optimiser.state()[1][name]) for name, each in second.optimiser.state()[1].items()
    )


def test_a_plan_before_the_end_is_refused() -> None:
    """Its widths would be others than those that were asked for."""
    ready = rig("vgg", phase=20, steps=5)
    ready.run(2)
    ready.optimiser.roster.removed[0] = True
    with pytest.raises(PlanError, match="width"):
        ready.optimiser.plan(ready.structure)


def test_weight_decay_apart_from_gradients_is_refused_where_it_would_count() -> None:
    """AdamW shrinks every unit; a cosine of the gradient does not see it."""

    def adamw(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, weight_decay=0.01)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="AdamW's weight decay") as caught:
        rig("vgg", make=adamw)
    assert "cosine" in caught.value.next_step
    assert rig("vgg", make=adamw, rate="cosine").optimiser.steps == 0
    assert rig("vgg", make=adamw, rectify=False).optimiser.steps == 0


def test_nothing_to_lose_is_done_at_once() -> None:
    """The full plan: the wrapper is the inner optimiser."""
    ready = rig("vgg", plan=prepared("vgg").structure.space.full())
    assert ready.optimiser.done
    ready.run(1)
    assert ready.optimiser.plan(ready.structure) == prepared("vgg").structure.space.full()
    assert narrow(ready.structure) != ready.plan
