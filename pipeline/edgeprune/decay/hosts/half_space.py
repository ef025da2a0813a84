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

import torch
from torch import Tensor, nn

from edgeprune.decay.audible import listener
from edgeprune.decay.host import Moment
from edgeprune.decay.rectify import cosine_rate
from edgeprune.decay.units import BATCH_NORMS, Units, find_units
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
            next_step='choose finetune.decay.host "group-norm", or exclude the group',
        )


def _is_fixed(layer: nn.Module) -> bool:
    return isinstance(layer, BATCH_NORMS) and not layer.affine


class HalfSpace:
    """Picks by redundancy, and lets units go that leave their half-space."""

    def __init__(self, units: Units, *, penalty: float) -> None:
        self._units, self._penalty = units, penalty
        self._sizes = units.sizes()
        self._penalised = units.nothing.bool()
        self._product = self._length = self._gradient = units.nothing  # of the step that is being taken

    def watch(self, now: Moment) -> None:
        """Keep this step's lengths and products; at the first step choose whom to penalise."""
        flat = now.units.flat
        self._product = now.units.products(flat.values, flat.grads)
        self._length, self._gradient = now.units.lengths(flat.values), now.units.lengths(flat.grads)
        if now.step == 0:
            counts = torch.tensor([*now.units.losses.values(), 0], device=self._length.device)
            self._penalised = now.units.lowest(-self._redundancy(), counts, now.idle)

    def scores(self, _now: Moment) -> Tensor:
        """Return minus the redundancy, which is at most 1 in size, the penalised before all others."""
        return -self._redundancy() - 4.0 * self._penalised

    def ready(self, now: Moment) -> Tensor:
        """Return the penalised units that leave their half-space in this step."""
        moved = now.learning_rate * (self._product + self._strength() * self._length)
        return self._penalised & (moved > (1 - EPSILON) * self._length.square())

    def chosen(self, _now: Moment) -> None:
        """Need to forget nothing."""

    def adjust(self, now: Moment) -> None:
        """Pull the penalised units that are idle towards zero: grad += λ · x / ‖x‖."""
        if self._penalty:
            acts = self._penalised & now.idle & (self._length > 0)
            now.units.pull(torch.where(acts, self._strength() / self._length.clamp_min(TINY), 0.0))

    def state(self) -> Mapping[str, Tensor]:
        """Return whom it penalises."""
        return {"penalised": self._penalised}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up whom it penalises."""
        self._penalised = state["penalised"].to(self._penalised)

    def _redundancy(self) -> Tensor:
        cosine = -cosine_rate(self._product, self._gradient, self._length)
        thinness = torch.where(self._length > 0, self._sizes / self._length.clamp_min(TINY), 0.0)
        return 0.5 * self._normalised(cosine) + 0.5 * self._normalised(thinness)

    def _normalised(self, values: Tensor) -> Tensor:
        """Return the values with length 1 over each group."""
        lengths = self._units.per_group(values.square()).sqrt()
        return values / lengths.clamp_min(TINY)[self._units.group_of]

    def _strength(self) -> Tensor:
        """Return λ of every unit."""
        return penalties(self._product, self._length, self._gradient, self._penalty)


def penalties(product: Tensor, length: Tensor, gradient: Tensor, least: float) -> Tensor:
    """Return λ from ⟨x, g⟩, ‖x‖, ‖g‖ and λ0, elementwise."""
    growing = (product < 0) & (length > 0)
    low = -product / length.clamp_min(TINY)
    high = gradient.square() * length / (-product).clamp_min(TINY)
    wanted = (AMPLIFIED * low).clamp(least, HIGHEST * least)
    wanted = torch.where(wanted >= high, (low + high) / 2, wanted)
    return torch.where(growing, wanted, least)
