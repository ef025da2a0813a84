"""What decay adds to a training step and to the optimiser's step: ResNet-20 and ResNet-56, every host, one run.

    python benchmarks/decay.py [--steps 15] [--batch 128] [--out benchmarks/results/decay.json]

One thread, the batch size of a fine-tuning. Two copies of a net learn from the same random batches in turn: one under
SGD with momentum as PyTorch runs it over the module's parameters, one under the same SGD in a `DecayOptimiser`, half of
every channel group decaying all the time with rectification on, its parameters flat. The gradients are those of the
batches, so units are released and others begin as they would. Reported are medians of the CPU seconds of the training
step, forward, backward and update, where the aim is at most 1.15 of plain, and beside them of the update alone,
`zero_grad` and `step`: about a hundred operations on small tensors that do not grow with the batch. --profile lists
what takes longest in it.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import raw_results
import torch
from cifar10 import ResNet
from torch import nn
from torch.nn import functional

from edgeprune.cut import proven
from edgeprune.decay.hosts import HostName, open_host
from edgeprune.decay.settings import DecaySettings
from edgeprune.decay.wrapper import DecayOptimiser
from edgeprune.export import export
from edgeprune.plan import Plan
from edgeprune.structure import Structure, build_structure

BAR = 1.15
HOSTS: tuple[tuple[HostName, float], ...] = (
    ("group-norm", 0.0),
    ("group-norm", 5e-4),  # with sparsity learning
    ("gates", 1e-3),
    ("half-space", 1e-3),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One net under one host: seconds are medians."""

    net: str
    host: str
    sparsity: float
    plain_training_s: float
    decay_training_s: float
    plain_update_s: float
    decay_update_s: float
    released: int
    decaying: int

    @property
    def ratios(self) -> tuple[float, float]:
        """Return decay over plain: of the training step, and of the update."""
        return self.decay_training_s / self.plain_training_s, self.decay_update_s / self.plain_update_s


@dataclass(kw_only=True)
class Learner:
    """A net with what updates it."""

    net: nn.Module
    zero_grad: Callable[[], None]
    step: Callable[[], None]

    def seconds(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        """Return the CPU seconds of one training step and of the update in it."""
        began = time.thread_time()
        self.zero_grad()
        cleared = time.thread_time()
        torch.autograd.backward(functional.cross_entropy(self.net(images), labels))
        backward = time.thread_time()
        self.step()
        ended = time.thread_time()
        return ended - began, ended - backward + cleared - began


def structure_of(depth: int) -> tuple[nn.Module, Structure]:
    """Return a ResNet with random weights, and its structure."""
    torch.manual_seed(0)
    net, x = ResNet((depth - 2) // 6).eval(), torch.randn(1, 3, 32, 32)
    return net, proven(net, x, build_structure(net, x, export(net, x), multiple=1))


def sgd(kernels: list[nn.Parameter], vectors: list[nn.Parameter]) -> torch.optim.SGD:
    """Return the optimiser of a fine-tuning."""
    groups = [{"params": kernels, "weight_decay": 5e-4}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)


def copy_of(net: nn.Module) -> nn.Module:
    """Return a copy in training mode, laid out as the fine-tuning lays it out."""
    twin = ResNet(len(net.layer1)).train()
    twin.load_state_dict(net.state_dict())
    return twin.to(memory_format=torch.channels_last)


def plain_of(net: nn.Module) -> Learner:
    """Return the net under plain SGD."""
    twin = copy_of(net)
    parameters = list(twin.parameters())
    optimiser = sgd([each for each in parameters if each.dim() > 1], [each for each in parameters if each.dim() <= 1])
    return Learner(net=twin, zero_grad=lambda: optimiser.zero_grad(set_to_none=True), step=optimiser.step)


def decaying_of(
    net: nn.Module, structure: Structure, host: HostName, sparsity: float
) -> tuple[Learner, DecayOptimiser]:
    """Return the net with half of every group decaying, over more steps than will be taken."""
    twin = copy_of(net)
    plan = Plan(kept={group.name: tuple(range(group.width // 2)) for group in structure.space.groups})
    units, opened = open_host(host, twin, structure, plan, sparsity=sparsity)
    settings = DecaySettings(phase=5000, steps=1000)
    optimiser = DecayOptimiser(sgd([units.flat.kernels], [units.flat.vectors]), units, opened, settings)
    return Learner(net=twin, zero_grad=optimiser.zero_grad, step=optimiser.step), optimiser


def measured(
    depth: int, net: nn.Module, structure: Structure, host: HostName, sparsity: float, steps: int, batch: int
) -> Row:
    """Return the medians of steps that are taken in turn."""
    plain, (decay, optimiser) = plain_of(net), decaying_of(net, structure, host, sparsity)
    seconds: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for number in range(steps + 3):
        images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (batch,))
        pairs = list(zip((plain, decay), seconds, strict=True))
        for learner, taken in pairs if number % 2 else pairs[::-1]:  # whoever comes first finds other caches
            spent = learner.seconds(images, labels)
            taken += [spent] if number >= 3 else []
    medians = [[statistics.median(each[place] for each in taken) for place in (0, 1)] for taken in seconds]
    return Row(
        net=f"ResNet-{depth}",
        host=host,
        sparsity=sparsity,
        plain_training_s=medians[0][0],
        decay_training_s=medians[1][0],
        plain_update_s=medians[0][1],
        decay_update_s=medians[1][1],
        released=optimiser.released,
        decaying=int(optimiser.roster.decaying.sum()),
    )


def profiled(net: nn.Module, structure: Structure, host: HostName, sparsity: float) -> None:
    """Print what takes longest in fifty updates, gradients left as they are."""
    decay, optimiser = decaying_of(net, structure, host, sparsity)
    decay.seconds(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,)))
    with cProfile.Profile() as profile:
        for _ in range(50):
            optimiser.step()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def main() -> None:
    """Print the ratios, and keep them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for depth in (20, 56):
        net, structure = structure_of(depth)
        for host, sparsity in HOSTS:
            row = measured(depth, net, structure, host, sparsity, options.steps, options.batch)
            rows.append(row)
            training, update = row.ratios
            print(
                f"{row.net:10} {host:11} sparsity {sparsity:<6g}"
                f" step {1e3 * row.plain_training_s:7.1f} -> {1e3 * row.decay_training_s:7.1f} ms ({training:.3f})"
                f"   update {1e3 * row.plain_update_s:6.2f} -> {1e3 * row.decay_update_s:6.2f} ms ({update:.2f})"
                f"   {row.decaying} decaying, {row.released} released",
                flush=True,
            )
            if options.profile:
                profiled(net, structure, host, sparsity)
    worst = [max(row.ratios[place] for row in rows) for place in (0, 1)]
    print(f"\ntraining step at most {worst[0]:.3f}, the bar is {BAR}; update alone at most {worst[1]:.2f}")
    result = {
        "bar": BAR,
        "worst_training": worst[0],
        "worst_update": worst[1],
        "rows": [asdict(row) | {"training": row.ratios[0], "update": row.ratios[1]} for row in rows],
        "batch": options.batch,
        "steps": options.steps,
    }
    raw_results.keep(options.out, {**raw_results.about(), **result})
    if worst[0] > BAR:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
