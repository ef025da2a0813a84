"""OTOv2's dual half-space projected gradient (arXiv 2303.06862): penalise the redundant until they turn to zero.

A unit's vector is a zero-invariant group: set to zero, nothing of it is heard. At the first step each is scored,

    redundancy = ½ · c / ‖c‖ + ½ · m / ‖m‖          c = cos(x, g),  m = size / ‖x‖,  norms over its channel group

the most redundant of each group are penalised from then on, and a penalised unit that leaves its half-space begins to
decay (the authors set it to zero there and then; they choose among all groups at once, with norms over all units):

    x̂ = x − lr · g − lr · λ · x / ‖x‖                  leaves  ⇔  ⟨x̂, x⟩ < ε ‖x‖²
    λ = λ0;  if ⟨x, g⟩ < 0:  lb = −⟨x, g⟩ / ‖x‖,  ub = −‖g‖² ‖x‖ / ⟨x, g⟩,  λ = clip(amp · lb, λ0, hat · λ0), and
    (lb + ub) / 2 if that is ub or more

The test uses the formula's x̂, without the optimiser's momentum. A penalised unit that has not left by the time of its
round begins then: the authors train for hundreds of epochs, and here all must be gone by the end of the phase.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.coupling import BATCH_NORMS
from edgeprune.decay.audible import listener
from edgeprune.decay.host import Moment
from edgeprune.decay.rectify import cosine_rate
from edgeprune.decay.units import Units, find_units
from edgeprune.errors import ConfigError
from edgeprune.plan import Plan
from edgeprune.structure import Structure

LAMBDA, AMPLIFIED, HIGHEST, EPSILON = 1e-3, 2.0, 10.0, 0.9
"""λ0, amp, hat and ε of the authors' settings."""

TINY = 1e-30


def open_host(module: nn.Module, structure: Structure, plan: Plan, sparsity: float | None) -> tuple[Units, "HalfSpace"]:
    """Return the units and the host. `sparsity` is λ0."""
    units = find_units(module, structure, plan)
    return units, HalfSpace(units, penalty=LAMBDA if sparsity is None else sparsity)


def check(module: nn.Module, structure: Structure, name: str) -> None:
    """Return if a group is zero-invariant.

    Raises:
        ConfigError: if it is not.
    """
    made = [layer for layer, side in structure.members[name] if side == "out"]
    silenced = {layer for layer in made if not isinstance(module.get_submodule(layer), nn.PReLU)}
    silenced -= {layer for layer in made if _is_fixed(module.get_submodule(layer))}
    found = listener(structure, name, silenced)
    if found is not None:
        raise ConfigError(
            f"the half-space host needs zero-invariant groups, and {name!r} is none",
            why=f"an operation before {found!r} makes something else of zeros",
        )


def _is_fixed(layer: nn.Module) -> bool:
    return isinstance(layer, BATCH_NORMS) and not layer.affine


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """⟨x, g⟩, ‖x‖ and ‖g‖ of every unit at one step."""

    product: Tensor
    length: Tensor
    gradient: Tensor


class HalfSpace:
    """Picks by redundancy, and lets units go that leave their half-space."""

    def __init__(self, units: Units, *, penalty: float) -> None:
        self._units, self._penalty = units, penalty
        self._sizes = units.sizes()
        self._penalised = units.nothing.bool()
        self._seen: tuple[int, _Seen] | None = None
        self._acting: tuple[int, Tensor, bool] | None = None

    def watch(self, now: Moment) -> None:
        """Choose at the first step whom to penalise."""
        if now.step == 0:
            counts = torch.tensor([*now.units.losses.values(), 0], device=self._sizes.device)
            self._penalised = now.units.lowest(-self._redundancy(now), counts, now.idle)

    def scores(self, now: Moment) -> Tensor:
        """Return minus the redundancy, which is at most 1 in size, the penalised before all others."""
        return -self._redundancy(now) - 4.0 * self._penalised

    def ready(self, now: Moment) -> Tensor | None:
        """Return the penalised units that leave their half-space in this step; None if nobody idle is penalised."""
        acting, anybody = self._acts(now)
        if not anybody:
            return None
        seen = self._look(now)
        moved = now.learning_rate * (seen.product + self._strength(seen) * seen.length)
        return acting & (moved > (1 - EPSILON) * seen.length.square())

    def chosen(self, _now: Moment) -> None:
        """Need to forget nothing."""

    def adjust(self, now: Moment) -> None:
        """Pull the penalised units that are idle towards zero: grad += λ · x / ‖x‖."""
        acting, anybody = self._acts(now)
        if self._penalty and anybody:
            seen = self._look(now)
            pull = self._strength(seen) / seen.length.clamp_min(TINY)
            now.units.pull(torch.where(acting & (seen.length > 0), pull, 0.0))

    def state(self) -> Mapping[str, Tensor]:
        """Return whom it penalises."""
        return {"penalised": self._penalised}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up whom it penalises."""
        self._penalised = state["penalised"].to(self._penalised)
        self._acting = None

    def _acts(self, now: Moment) -> tuple[Tensor, bool]:
        """Return who is penalised and idle, and whether anybody is."""
        if self._acting is None or self._acting[0] != now.version:
            acting = self._penalised & now.idle
            self._acting = (now.version, acting, bool(acting.any()))
        return self._acting[1:]

    def _look(self, now: Moment) -> _Seen:
        """Return what the loss's gradients say at this step."""
        if self._seen is None or self._seen[0] != now.step:
            flat = now.units.flat
            product = now.units.products(flat.values, flat.grads)
            length, gradient = now.units.lengths(flat.values), now.units.lengths(flat.grads)
            self._seen = (now.step, _Seen(product=product, length=length, gradient=gradient))
        return self._seen[1]

    def _redundancy(self, now: Moment) -> Tensor:
        seen = self._look(now)
        cosine = -cosine_rate(seen.product, seen.gradient, seen.length)
        thinness = torch.where(seen.length > 0, self._sizes / seen.length.clamp_min(TINY), 0.0)
        return 0.5 * self._normalised(cosine) + 0.5 * self._normalised(thinness)

    def _normalised(self, values: Tensor) -> Tensor:
        """Return the values with length 1 over each group."""
        lengths = self._units.per_group(values.square()).sqrt()
        return values / lengths.clamp_min(TINY)[self._units.group_of]

    def _strength(self, seen: _Seen) -> Tensor:
        """Return λ of every unit."""
        return penalties(seen.product, seen.length, seen.gradient, self._penalty)


def penalties(product: Tensor, length: Tensor, gradient: Tensor, least: float) -> Tensor:
    """Return λ from ⟨x, g⟩, ‖x‖, ‖g‖ and λ0, elementwise."""
    growing = (product < 0) & (length > 0)
    low = -product / length.clamp_min(TINY)
    high = gradient.square() * length / (-product).clamp_min(TINY)
    wanted = (AMPLIFIED * low).clamp(least, HIGHEST * least)
    wanted = torch.where(wanted >= high, (low + high) / 2, wanted)
    return torch.where(growing, wanted, least)
