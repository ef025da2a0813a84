"""Gate Decorator (arXiv 1909.08174): a batch norm's scale is a gate, and a unit counts by what closing it would cost.

    y = φ · (x̂ + β/γ),  φ = γ            Θ = Σ over batches  Σ over gates of the unit  |φ · ∂L/∂φ|

With the gate's scale taken out of the shift, φ · ∂L/∂φ = γ · ∂L/∂γ + β · ∂L/∂β, so nothing has to be rewritten in the
module. The vector of a unit is the scale and shift of its gates: both fall together, as the gate does.

Simplified: the authors collect Θ in epochs with frozen convolutions (tick) and let the network recover in others under
a penalty ρ · Σ|φ| (tock). Here everything learns all the time, Θ is collected from one round to the next, and the
penalty acts between the rounds as well.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgeprune.coupling import BATCH_NORMS
from edgeprune.decay.audible import listener
from edgeprune.decay.flat import add_rows, products_of
from edgeprune.decay.host import Moment
from edgeprune.decay.units import Units, find_units
from edgeprune.errors import ConfigError
from edgeprune.plan import Plan
from edgeprune.structure import Structure

PENALTY = 1e-3
"""ρ of the authors' tock."""


def open_host(module: nn.Module, structure: Structure, plan: Plan, sparsity: float | None) -> tuple[Units, "Gates"]:
    """Return the units and the host. `sparsity` is ρ."""
    units = find_units(module, structure, plan, "gates")
    return units, Gates(module, units, penalty=PENALTY if sparsity is None else sparsity)


def check(module: nn.Module, structure: Structure, name: str) -> None:
    """Return if closing all gates of a group silences it.

    Raises:
        ConfigError: if it does not.
    """
    gates = {
        layer for layer, side in structure.members[name] if side == "out" and _is_gate(module.get_submodule(layer))
    }
    found = listener(structure, name, gates)
    if not gates or found is not None:
        raise ConfigError(
            f"the gates host cannot silence group {name!r}",
            why=f"{found!r} reads channels that pass no batch norm with a scale" if gates else "it has no batch norm",
        )


def _is_gate(layer: nn.Module) -> bool:
    return isinstance(layer, BATCH_NORMS) and bool(layer.affine)


class Gates:
    """Picks by the sum of |φ · ∂L/∂φ| since the last round."""

    def __init__(self, module: nn.Module, units: Units, *, penalty: float) -> None:
        self._penalty = penalty
        self._theta = units.nothing
        gate = torch.zeros(units.flat.rows, dtype=torch.int64, device=units.owner.device)  # 0: of no gate
        scales = torch.zeros_like(gate, dtype=torch.bool)
        owners = [torch.tensor([units.count], device=gate.device)]
        for trace in units.traces:
            layer, _, tensor = trace.parameter.rpartition(".")
            if tensor == "weight" and _is_gate(module.get_submodule(layer)):
                first = sum(len(each) for each in owners)
                numbers = torch.arange(first, first + len(trace.units), device=gate.device)
                for name in (trace.parameter, f"{layer}.bias" if layer else "bias"):
                    gate[units.flat.places[name].rows] = numbers
                scales[units.flat.places[trace.parameter].rows] = True
                owners.append(trace.units)
        self._gate, self._scales = gate[units.rows], scales[units.rows]
        self._unit = torch.cat(owners)

    def watch(self, now: Moment) -> None:
        """Add |φ · ∂L/∂φ| of this batch."""
        units = now.units
        rows = products_of(units.of(units.flat.values), units.of(units.flat.grads))
        gates = rows.new_zeros(len(self._unit)).index_add_(0, self._gate, rows)
        self._theta.index_add_(0, self._unit, gates.abs_())

    def scores(self, _now: Moment) -> Tensor:
        """Return Θ."""
        return self._theta

    def ready(self, _now: Moment) -> None:
        """Wait for the rounds."""

    def chosen(self, _now: Moment) -> None:
        """Collect anew."""
        self._theta.zero_()

    def adjust(self, now: Moment) -> None:
        """Pull the idle units' scales to zero: grad += ρ · sign(γ)."""
        if self._penalty:
            units = now.units
            strength = self._penalty * (self._scales & now.idle[units.owners]).to(self._theta.dtype)
            signs = [each.sign() for each in units.of(units.flat.values)]
            add_rows(units.of(units.flat.grads), signs, strength)

    def state(self) -> Mapping[str, Tensor]:
        """Return Θ."""
        return {"theta": self._theta}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up Θ."""
        self._theta = state["theta"].to(self._theta).clone()
