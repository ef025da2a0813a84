"""The pruners that units may decay under: each scores units, and has its own way of making the weak weaker.

| host | source | scores | makes the weak weaker by |
|---|---|---|---|
| group-norm | DepGraph, arXiv 2301.12900 | L2 norm over the whole group | grad += reg · γ_k · w, if asked to |
| gates | Gate Decorator, 1909.08174 | Σ over batches of abs(φ · ∂L/∂φ) | an L1 penalty on gates |
| half-space | OTOv2, 2303.06862 | ½ cos(x, g) + ½ size / norm, the highest go | λ · x / norm on the penalised |
"""

from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from edgeprune.decay.host import Host
from edgeprune.decay.hosts import gates, group_norm, half_space
from edgeprune.decay.units import Units
from edgeprune.errors import ConfigError
from edgeprune.plan import Plan
from edgeprune.structure import Structure

HostName = Literal["group-norm", "gates", "half-space"]

Check = Callable[[nn.Module, Structure, str], None]
Opener = Callable[[nn.Module, Structure, Plan, float | None], tuple[Units, Host]]

HOSTS: Mapping[HostName, tuple[Check, Opener]] = {
    "group-norm": (group_norm.check, group_norm.open_host),
    "gates": (gates.check, gates.open_host),
    "half-space": (half_space.check, half_space.open_host),
}
"""Host → what says whether a group can be decayed under it, and what opens it."""


def check_host(name: HostName, module: nn.Module, structure: Structure, plan: Plan | None = None) -> None:
    """Return if a host applies to every group that a plan makes narrower; without a plan, to every group.

    A group that loses all its units takes its branch along, which every host can do.

    Raises:
        ConfigError: of the first group it does not apply to, naming all.
    """
    refused: dict[str, ConfigError] = {}
    for group in structure.space.groups:
        left = len(plan.kept[group.name]) if plan is not None else 1
        if 0 < left < group.width:
            try:
                HOSTS[name][0](module, structure, group.name)
            except ConfigError as error:
                refused[group.name] = error
    if refused:
        first, names = next(iter(refused.values())), ", ".join(f'"{each}"' for each in refused)
        raise ConfigError(
            first.what,
            why=first.why,
            next_step=f'choose finetune.decay.host "group-norm", or set space.exclude = [{names}]',
        ) from first


def open_host(
    name: HostName, module: nn.Module, structure: Structure, plan: Plan, *, sparsity: float | None = None
) -> tuple[Units, Host]:
    """Return the units of every group that a plan makes narrower, and a host that picks among them.

    Args:
        name: of the host.
        module: the unpruned model; its parameters that learn become views of one tensor.
        structure: its channel groups.
        plan: only its widths count.
        sparsity: strength of the host's own penalty, 0: none; None: as usual for the host.

    Raises:
        ConfigError: if the host does not apply to a group that must lose units.
        ModelError: if the parameters differ in type or device.
    """
    check_host(name, module, structure, plan)
    return HOSTS[name][1](module, structure, plan, sparsity)
