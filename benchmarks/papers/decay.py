"""One-step pruning against decay against decay with rectification, under each host: a ResNet on CIFAR-10.

    EDGEPRUNE_DATA=<folder> python benchmarks/papers/decay.py --epochs 5 --seeds 0 1 2

After "Decay Pruning Method" (arXiv 2406.03879), whose tables these runs stand beside. Every run starts from the same
trained weights and takes the same number of epochs with the same batches (paired seeds): SGD with momentum 0.9,
learning rate 0.01, a tenth of it from 60 % and a hundredth from 80 % of the epochs on, cross-entropy, mirrored and
shifted images, bfloat16 in the forward and backward pass; as DepGraph's published settings for CIFAR-10, but for the
number of epochs and the arithmetic. Over the first part of
them every channel group loses the same share of its channels. In "one-step" the host's picks are zero at once (N = 1),
in "decay" they decay over N steps, in "decay+rectify" those that resist are released and others take their place.
When all are gone the model is cut, and trained to the end. Accuracy is of the last epoch, on the 10,000 test images.

Each finished run is written to --out at once, and not repeated; a run that was stopped goes on from its last epoch,
kept in --work. Two processes with different seeds may share both. The paper's own schedules take 100 epochs and more.
"""

import argparse
import fcntl
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.cut import cut_module, proven
from edgeprune.decay.hosts import HostName, open_host
from edgeprune.decay.settings import DecaySettings
from edgeprune.decay.wrapper import DecayOptimiser
from edgeprune.export import export
from edgeprune.plan import Plan
from edgeprune.structure import Structure, build_structure

sys.path.insert(0, str(Path(__file__).parents[1]))
import raw_results
from cifar10 import MEAN, STD, data, resnet20, resnet56

HOSTS: dict[str, tuple[HostName, float]] = {
    "group-norm": ("group-norm", 0.0),
    "group-norm+sparsity": ("group-norm", 5e-4),
    "gates": ("gates", 1e-3),
    "half-space": ("half-space", 1e-3),
}
METHODS = ("one-step", "decay", "decay+rectify")
PAPER = {
    "group-norm": "ResNet-56 93.53: DepGraph 93.32 -> decay 93.62 -> with rectification 93.71",
    "group-norm+sparsity": "ResNet-56 93.53: DepGraph 93.84 -> 93.96 -> 94.13",
    "gates": "VGG-16: Gate Decorator 91.50 -> 91.58 -> 91.74",
    "half-space": "VGG-16 93.2: OTOv2 93.4 -> 93.6 -> 93.8",
}
RATE, MOMENTUM, WEIGHT_DECAY, BATCH, SHIFT = 0.01, 0.9, 5e-4, 128, 4


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run."""

    depth: int
    host: str
    method: str
    seed: int
    epochs: int
    keep: float
    decay_steps: int
    share: float
    images: int
    test_images: int
    precision: str

    @property
    def name(self) -> str:
        """Return a name that no other run has."""
        return "-".join(str(each).replace("+", "_") for each in asdict(self).values())


@dataclass(kw_only=True)
class Images:
    """Pixels and labels on a device."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def of(cls, split: str, device: torch.device, count: int | None = None) -> "Images":
        """Return a split of CIFAR-10, its first images."""
        pixels, labels = data()[split]
        tensor = torch.from_numpy(pixels[:count]).permute(0, 3, 1, 2).contiguous()
        return cls(pixels=tensor.to(device), labels=torch.from_numpy(labels[:count]).long().to(device))

    def normalised(self, chosen: Tensor) -> Tensor:
        """Return images as the network wants them, channels last."""
        mean, std = (torch.tensor(each, device=self.pixels.device).view(1, 3, 1, 1) for each in (MEAN, STD))
        images = (self.pixels[chosen].float() / 255 - mean) / std
        return images.contiguous(memory_format=torch.channels_last)

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield whole batches in random order, each image mirrored and shifted by chance."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=generator)
        for chosen in order.split(BATCH):
            if len(chosen) == BATCH or len(order) < BATCH:
                here = chosen.to(self.pixels.device)
                yield moved(self.normalised(here), generator), self.labels[here]


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images mirrored and shifted by up to 4 pixels, zeros coming in."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (SHIFT,) * 4)
    rows, columns = (
        torch.randint(0, 2 * SHIFT + 1, (count, 1), generator=generator) + torch.arange(side)
        for side in (height, width)
    )
    columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    picked = padded.gather(2, rows.view(count, 1, height, 1).expand(-1, 3, -1, padded.shape[3]))
    picked = picked.gather(3, columns.view(count, 1, 1, width).expand(-1, 3, height, -1))
    return picked.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def accuracy(net: nn.Module, test: Images) -> float:
    """Return top-1 in percent."""
    net.eval()
    places = torch.arange(len(test.labels), device=test.labels.device).split(500)
    right = sum(int((net(test.normalised(each)).argmax(1) == test.labels[each]).sum()) for each in places)
    return 100 * right / len(test.labels)


def narrowed(structure: Structure, keep: float) -> Plan:
    """Return a plan that keeps this share of every group; only its widths count."""
    kept = {group.name: tuple(range(max(1, round(keep * group.width)))) for group in structure.space.groups}
    return structure.space.check(Plan(kept=kept))


def macs(structure: Structure, plan: Plan) -> float:
    """Return the multiply-accumulates of a plan as a share of the unpruned model's."""
    full = structure.full
    return sum(each.macs(plan.widths, full) for each in structure.layers) / sum(
        each.macs(full, full) for each in structure.layers
    )


def sgd(kernels: list[nn.Parameter], vectors: list[nn.Parameter], weight_decay: float) -> torch.optim.SGD:
    """Return the optimiser of every phase."""
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM)


def rate_of(step: int, steps: int) -> float:
    """Return the learning rate of a step, from 0."""
    return RATE * (0.01 if step >= 0.8 * steps else 0.1 if step >= 0.6 * steps else 1.0)


class Run:
    """One run: the whole model under decay, then the cut one; saved after every epoch."""

    def __init__(self, task: Task, train: Images, test: Images, folder: Path) -> None:
        self.task, self.train, self.test = task, train, test
        self.path = folder / f"{task.name}.pt"
        self.module = {20: resnet20, 56: resnet56}[task.depth]()
        example = torch.randn(1, 3, 32, 32)
        found = build_structure(self.module, example, export(self.module, example), multiple=1)
        self.structure = proven(self.module, example, found)
        self.per_epoch = max(1, min(task.images, len(train.labels)) // BATCH)
        self.steps = task.epochs * self.per_epoch
        self.facts: dict[str, Any] = {"step": 0, "seconds": 0.0, "released": 0}
        self._begin()

    def _begin(self) -> None:
        device = self.train.labels.device
        self.net: nn.Module = self.module.to(device=device, memory_format=torch.channels_last)
        host, sparsity = HOSTS[self.task.host]
        plan = narrowed(self.structure, self.task.keep)
        units, opened = open_host(host, self.net, self.structure, plan, sparsity=sparsity)
        learns_sparsity = host == "group-norm" and sparsity > 0
        inner = sgd([units.flat.kernels], [units.flat.vectors], 0.0 if learns_sparsity else WEIGHT_DECAY)
        phase = max(self.task.decay_steps, round(self.task.share * self.steps))
        settings = DecaySettings(
            phase=phase,
            steps=1 if self.task.method == "one-step" else self.task.decay_steps,
            lead=round((0.5 if sparsity else 0.1) * phase),
            rounds=4,
            rectify=self.task.method == "decay+rectify",
        )
        self.decay: DecayOptimiser | None = DecayOptimiser(inner, units, opened, settings)
        self.inner: torch.optim.Optimizer = inner

    def finish(self) -> dict[str, Any]:
        """Return the result, from wherever the run is."""
        self._restore()
        while self.facts["step"] < self.steps:
            began, epoch = time.perf_counter(), self.facts["step"] // self.per_epoch
            batches = self.train.epoch(1000 * self.task.seed + epoch)
            for images, labels in itertools.islice(batches, self.per_epoch):
                self._step(images, labels)
            self.facts["seconds"] += time.perf_counter() - began
            self._save()
            print(
                f"  {self.task.name}: epoch {epoch + 1} of {self.task.epochs}, {self.facts['seconds']:.0f} s",
                flush=True,
            )
        result = {"accuracy": accuracy(self.net, self.test), **self.facts}
        self.path.unlink(missing_ok=True)
        return result

    def _step(self, images: Tensor, labels: Tensor) -> None:
        optimiser = self.inner if self.decay is None else self.decay
        for group in self.inner.param_groups:
            group["lr"] = rate_of(self.facts["step"], self.steps)
        optimiser.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.task.precision == "bf16"):
            loss = functional.cross_entropy(self.net.train()(images), labels)
        torch.autograd.backward(loss)
        optimiser.step()
        self.facts["step"] += 1
        if self.decay is not None and self.decay.done:
            plan = self.decay.plan(self.structure)
            self.facts |= {
                "released": self.decay.released,
                "cut_at": self.facts["step"],
                "plan": plan.to_json(),
                "macs": macs(self.structure, plan),
            }
            self._cut(plan)
            self.facts["accuracy_at_cut"] = accuracy(self.net, self.test)

    def _cut(self, plan: Plan) -> None:
        """Go on with the cut model; its momentum begins anew."""
        self.net, self.decay = cut_module(self.net, self.structure, plan), None
        self.net = self.net.to(memory_format=torch.channels_last)
        parameters = list(self.net.parameters())
        kernels, vectors = ([each for each in parameters if (each.dim() > 1) == many] for many in (True, False))
        self.inner = sgd(kernels, vectors, WEIGHT_DECAY)

    def _save(self) -> None:
        decay = self.decay.state() if self.decay is not None else None
        state = {
            "facts": self.facts,
            "net": self.net.state_dict(),
            "inner": self.inner.state_dict(),
            "decay": decay,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(".half")
        torch.save(state, half)
        half.replace(self.path)

    def _restore(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location=self.train.labels.device, weights_only=True)
        self.facts = state["facts"]
        if state["decay"] is None:
            self._cut(Plan.from_json(self.facts["plan"]))
        elif self.decay is not None:
            self.decay.restore(*state["decay"])
        self.net.load_state_dict(state["net"])
        self.inner.load_state_dict(state["inner"])


def summary(runs: list[dict[str, Any]]) -> list[str]:
    """Return a line a host and method: mean and spread over seeds, and the paired gain over one-step."""
    lines = []
    for host in HOSTS:
        found = {
            method: {run["seed"]: run["accuracy"] for run in runs if (run["host"], run["method"]) == (host, method)}
            for method in METHODS
        }
        for method, by_seed in found.items():
            if by_seed:
                gains = [
                    value - found["one-step"][seed] for seed, value in by_seed.items() if seed in found["one-step"]
                ]
                gain = f", {statistics.mean(gains):+.2f} of one-step" if gains and method != "one-step" else ""
                spread = f" ± {statistics.stdev(by_seed.values()):.2f}" if len(by_seed) > 1 else ""
                mean = statistics.mean(by_seed.values())
                lines.append(f"{host:20} {method:14} {mean:.2f} %{spread} ({len(by_seed)} seeds){gain}")
        lines += [f"{'':20} the paper: {PAPER[host]}"] if any(found.values()) else []
    return lines


def main() -> None:
    """Make the runs that are missing, and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hosts", nargs="+", choices=tuple(HOSTS), default=tuple(HOSTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--keep", type=float, default=0.7, help="share of the channels of every group")
    parser.add_argument("--decay-steps", type=int, default=20, help="N")
    parser.add_argument("--share", type=float, default=0.4, help="of the steps, in which channels go")
    parser.add_argument("--images", type=int, default=50_000, help="of an epoch; fewer to try it out")
    parser.add_argument("--test-images", type=int, default=10_000, help="fewer to try it out")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-decay")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results/papers/decay.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.table:
        show(options)
        return
    train, test = Images.of("train", device), Images.of("test", device, options.test_images)
    for seed, host, method in itertools.product(options.seeds, options.hosts, options.methods):
        task = Task(
            depth=options.depth,
            host=host,
            method=method,
            seed=seed,
            epochs=options.epochs,
            keep=options.keep,
            decay_steps=options.decay_steps,
            share=options.share,
            images=options.images,
            test_images=options.test_images,
            precision=options.precision,
        )
        if not any(all(run[name] == value for name, value in asdict(task).items()) for run in known(options.out)):
            result = Run(task, train, test, options.work).finish()
            keep(options, {**asdict(task), **result, "about": raw_results.about()})
            print(f"{host} {method} seed {seed}: {result['accuracy']:.2f} %", flush=True)
    show(options)


def show(options: argparse.Namespace) -> None:
    """Print the table of the runs of one depth and length."""
    wanted = options.epochs, options.depth
    print("\n".join(summary([each for each in known(options.out) if (each["epochs"], each["depth"]) == wanted])))


def known(path: Path) -> list[dict[str, Any]]:
    """Return the runs that are finished."""
    return json.loads(path.read_text())["runs"] if path.exists() else []


def keep(options: argparse.Namespace, run: dict[str, Any]) -> None:
    """Add a run to those that are finished, by now perhaps also in another process."""
    options.work.mkdir(parents=True, exist_ok=True)
    with (options.work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        facts = {**raw_results.about(), "device": options.device, "runs": [*known(options.out), run]}
        raw_results.keep(options.out, facts)


if __name__ == "__main__":
    main()
