"""DepGraph's group norm (arXiv 2301.12900, equations 4 and 5): a unit counts as much as all its weights together.

    I_k = mean over members of Σ w²         member: weights of one layer that make or read the unit, batch norm scales
    γ_k = 2^(4 · (√I_max − √I_k) / (√I_max − √I_min))          grad += reg · γ_k · w

The second line is its sparsity learning: weak units are pulled to zero up to 16 times as hard as strong ones. It
replaces weight decay, which the optimiser is to leave out meanwhile (the authors' settings: reg 5e-4, weight decay 0).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgeprune.decay.flat import scale_rows
from edgeprune.decay.host import Moment
from edgeprune.decay.units import Units, find_units
from edgeprune.plan import Plan
from edgeprune.structure import Structure

REFRESH = 100
"""Steps after which γ_k follows the weights; the authors renew it once an epoch."""


def open_host(module: nn.Module, structure: Structure, plan: Plan, sparsity: float | None) -> tuple[Units, "GroupNorm"]:
    """Return the units and the host. `sparsity` is reg, none if it is not given."""
    units = find_units(module, structure, plan)
    return units, GroupNorm(units, reg=sparsity or 0.0)


def check(_module: nn.Module, _structure: Structure, _name: str) -> None:
    """Return: every group has a norm."""


class GroupNorm:
    """Picks by group norm, with or without sparsity learning."""

    def __init__(self, units: Units, *, reg: float) -> None:
        self._reg = reg
        self._strength = units.nothing
        self._base: Tensor | None = None
        self._pull: tuple[int, Tensor] | None = None

    def watch(self, now: Moment) -> None:
        """Renew γ_k."""
        if self._reg and now.step % REFRESH == 0:
            self._strength = strengths(now.units)
            self._base = self._pull = None

    def scores(self, now: Moment) -> Tensor:
        """Return the group norms."""
        return group_norms(now.units)

    def ready(self, _now: Moment) -> None:
        """Wait for the rounds."""

    def chosen(self, _now: Moment) -> None:
        """Need to forget nothing."""

    def adjust(self, now: Moment) -> None:
        """Learn sparsity."""
        if self._reg:
            now.units.flat.grads.addcmul_(now.units.flat.values, self._pulled(now))

    def state(self) -> Mapping[str, Tensor]:
        """Return γ_k."""
        return {"strength": self._strength}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up γ_k."""
        self._strength = state["strength"].to(self._strength)
        self._base = self._pull = None

    def _pulled(self, now: Moment) -> Tensor:
        """Return by what share of itself each number is added to its gradient; nothing in what is not idle."""
        if self._base is None:
            self._base = _spread(now.units, self._reg * self._strength)
        if self._pull is None or self._pull[0] != now.version:
            pull = self._base.clone()
            scale_rows(now.units.flat.by_length(pull), now.idle[now.units.owner].to(pull.dtype))
            self._pull = (now.version, pull)
        return self._pull[1]


def group_norms(units: Units) -> Tensor:
    """Return I_k of every unit, [count + 1]; 0 for nobody."""
    sums, members = units.nothing, units.nothing
    for trace in units.traces:
        if trace.weighs:
            weight = units.flat.places[trace.parameter].of(units.flat.values)
            squares = weight.square().movedim(trace.axis, 0).flatten(1).sum(1) if weight.dim() > 1 else weight.square()
            sums.index_add_(0, trace.units, squares)
            members.index_add_(0, trace.units, torch.ones_like(squares))
    sums[units.count] = 0.0
    return sums / members.clamp_min(1.0)


def strengths(units: Units) -> Tensor:
    """Return γ_k of every unit, 1 to 16, [count + 1]; 0 for nobody."""
    norms = group_norms(units).sqrt()
    groups = units.nothing.new_zeros(len(units.ranges) + 1)
    highest = groups.scatter_reduce(0, units.group_of, norms, "amax", include_self=False)[units.group_of]
    lowest = groups.scatter_reduce(0, units.group_of, norms, "amin", include_self=False)[units.group_of]
    place = torch.where(highest > lowest, (highest - norms) / (highest - lowest).clamp_min(1e-30), 0.0)
    gamma = 2.0 ** (4.0 * place)
    gamma[units.count] = 0.0
    return gamma


def _spread(units: Units, strength: Tensor) -> Tensor:
    """Return the units' strengths at every weight that makes or reads them, summed; 0 elsewhere; flat."""
    base = torch.zeros_like(units.flat.values)
    for trace in units.traces:
        if trace.weighs:
            trace.add(units.flat.places[trace.parameter].of(base), strength)
    return base
