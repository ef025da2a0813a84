"""A net of `families` under a `DecayOptimiser`, ready to take steps on random images."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from families import SIZE, plan_of, prepared
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.decay.host import Host
from edgeprune.decay.hosts import HostName, open_host
from edgeprune.decay.settings import DecaySettings
from edgeprune.decay.units import Units
from edgeprune.decay.wrapper import DecayOptimiser
from edgeprune.plan import Plan
from edgeprune.structure import Structure

Making = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
HOST_NAMES: tuple[HostName, ...] = ("group-norm", "gates", "half-space")


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return SGD with all its trimmings."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3)


@dataclass(frozen=True, kw_only=True)
class Rig:
    """One net and everything that decays it."""

    net: nn.Module
    structure: Structure
    plan: Plan
    units: Units
    host: Host
    optimiser: DecayOptimiser

    def backward(self, seed: int) -> float:
        """Leave the gradients of a random batch where they belong, and return its loss."""
        x, y = batch(seed)
        self.optimiser.zero_grad()
        answer = self.net.train()(x)
        answer = answer.flatten(2).mean(2) if answer.dim() > 2 else answer
        loss = functional.cross_entropy(answer, y.clamp(max=answer.shape[1] - 1))
        torch.autograd.backward(loss)
        self.units.flat.gather()
        return float(loss.detach())

    def run(self, steps: int, first: int = 0) -> None:
        """Take steps on random batches."""
        for seed in range(first, first + steps):
            self.backward(seed)
            self.optimiser.step()

    def lengths(self) -> Tensor:
        """Return the length of every unit's vector, computed in float64 from each row by itself."""
        squares = torch.zeros(self.units.count + 1, dtype=torch.float64)
        for bucket in self.units.flat.buckets:
            rows = bucket.of(self.units.flat.values).double().square().sum(1)
            squares.index_add_(0, self.units.owner[bucket.numbers], rows)
        return squares[: self.units.count].sqrt()


def batch(seed: int, count: int = 8) -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIZE, SIZE, generator=generator), torch.arange(count) % 5


def narrow(structure: Structure, keep: float = 0.5) -> Plan:
    """Return a plan that keeps about this share of every group, and at least its narrowest width above 0."""
    widths = {}
    for group in structure.space.groups:
        choices = [each for each in group.choices if each > 0]
        widths[group.name] = min(choices, key=lambda each, group=group: abs(each - keep * group.width))
    return plan_of(structure.space, widths)


def rig(
    name: str,
    host: HostName = "group-norm",
    *,
    plan: Plan | None = None,
    make: Making = sgd,
    flat: bool = True,
    sparsity: float | None = None,
    **settings: Any,
) -> Rig:
    """Return the family's net, freshly copied, with the parameters of its optimiser flat or the module's own."""
    ready = prepared(name)
    net = copy.deepcopy(ready.net).to(memory_format=torch.channels_last)
    plan = plan or narrow(ready.structure)
    units, opened = open_host(host, net, ready.structure, plan, sparsity=sparsity)
    parameters = [units.flat.kernels, units.flat.vectors] if flat else list(net.parameters())
    wanted = DecaySettings(**{"phase": 40, "steps": 5} | settings)
    return Rig(
        net=net,
        structure=ready.structure,
        plan=plan,
        units=units,
        host=opened,
        optimiser=DecayOptimiser(make(parameters), units, opened, wanted),
    )
