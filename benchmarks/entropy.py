"""Spatial entropy of every convolution of a ResNet-56 beside the forward pass that makes the maps, in one run.

    [EDGEPRUNE_DATA=<folder>] python benchmarks/entropy.py [--images 256] [--threads 2] [--out FILE.json]

Batches of 64, in turn: the forward pass (float32, inference mode; as the model is, and with batch norms folded and
channels last, as the evaluator runs it), then the entropy of all 55 convolutions' maps, counted as
`edgeprune.entropy` does and as it did before: one number for each pair in a 64-bit table of all pairs of levels, looked
up again for every pair. Both must agree. Weights and images are the trained ones if the data is there, else random.

The aim: counting takes at most 1.5 times the forward pass.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import raw_results
import torch
from cifar10 import MEAN, STD, ResNet, data, resnet56
from torch import Tensor, nn

from edgeprune.entropy import spatial_entropy
from edgeprune.quality import folded, recorded

Count = Callable[[Tensor, float, float], Tensor]
BAR = 1.5
BATCH = 64
LEVELS = 32


def plainly_counted(maps: Tensor, low: float, high: float) -> Tensor:
    """Return the spatial entropy of maps [N, C, H, W] as it was counted before."""
    quantised = ((maps.float() - low) * (LEVELS / (high - low))).clamp_(0, LEVELS - 1).to(torch.int32)
    flat = quantised.reshape(-1, *maps.shape[2:])
    rows = max(1, min(1024, (1 << 19) // (2 * maps.shape[2] * maps.shape[3])))
    return torch.cat([pair_entropy(chunk) for chunk in torch.split(flat, rows)]).reshape(maps.shape[:2])


def pair_entropy(maps: Tensor) -> Tensor:
    """Return the joint entropy of neighbouring levels for maps [M, H, W]."""
    one = torch.cat([maps[:, :, :-1].flatten(1), maps[:, :-1, :].flatten(1)], 1)
    other = torch.cat([maps[:, :, 1:].flatten(1), maps[:, 1:, :].flatten(1)], 1)
    codes = torch.minimum(one, other).mul_(LEVELS).add_(torch.maximum(one, other))
    kinds, (count, size) = LEVELS * LEVELS, codes.shape
    place = codes.long().add_(torch.arange(count)[:, None] * kinds).flatten()
    logarithms = torch.bincount(place, minlength=count * kinds)[place].float().log_().view(count, size)
    return math.log(size) - logarithms.mean(1) + math.log(2) * (one != other).float().mean(1)


FORWARD = ("forward, as the model is", "forward, folded")
COUNTED: dict[str, Count] = {"entropy": spatial_entropy, "entropy, before": plainly_counted}


def subject(count: int) -> tuple[str, nn.Module, Tensor]:
    """Return what they are, a ResNet-56 and `count` images."""
    if not os.environ.get("EDGEPRUNE_DATA"):
        torch.manual_seed(0)
        return "random weights and images", ResNet(9).eval(), torch.randn(count, 3, 32, 32)
    pixels = torch.from_numpy(data()["test"][0][:count]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    return "trained weights and test images of CIFAR-10", resnet56(), (pixels - mean) / std


Spent = tuple[float, float]
"""Wall and CPU seconds."""

Done = TypeVar("Done")


def timed(work: Callable[[], Done]) -> tuple[Spent, Done]:
    """Return wall and CPU seconds of a call, and what it returned."""
    began, used = time.perf_counter(), time.process_time()
    done = work()
    return (time.perf_counter() - began, time.process_time() - used), done


class Subject:
    """A net as it is and folded, and its images in both memory layouts."""

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        convolutions = [name for name, each in net.named_modules() if isinstance(each, nn.Conv2d)]
        self.net, self.ready = net, folded(net, {name.replace("conv", "bn"): name for name in convolutions})
        self.batches = [(each, each.to(memory_format=torch.channels_last)) for each in images.split(BATCH)]
        maps = self.maps(self.batches[0][1])[1]
        self.ranges = {name: (float(each.min()), float(each.max())) for name, each in maps.items()}

    def maps(self, batch: Tensor) -> tuple[Spent, dict[str, Tensor]]:
        """Return what the folded pass took, and the output of each convolution."""
        with recorded(self.ready, lambda layer: isinstance(layer, nn.Conv2d)) as seen:
            spent, _ = timed(lambda: self.ready(batch))
        return spent, seen

    def counted(self, count: Count, maps: dict[str, Tensor]) -> tuple[Spent, list[Tensor]]:
        """Return what counting all maps took, and the entropies."""
        return timed(lambda: [count(each, *self.ranges[name]) for name, each in maps.items()])

    def round(self, name: str, count: Count) -> dict[str, Spent]:
        """Return what the forward passes and one way of counting took for all images."""
        taken: dict[str, list[Spent]] = {}
        for plain, batch in self.batches:
            took = {"forward, as the model is": timed(partial(self.net, plain))[0]}
            took["forward, folded"], maps = self.maps(batch)
            took[name] = self.counted(count, maps)[0]
            for each, spent in took.items():
                taken.setdefault(each, []).append(spent)
        return {each: (sum(wall for wall, _ in spent), sum(cpu for _, cpu in spent)) for each, spent in taken.items()}

    def gap(self) -> float:
        """Return the largest difference between the entropies of both ways, of one batch."""
        maps = self.maps(self.batches[0][1])[1]
        both = zip(self.counted(spatial_entropy, maps)[1], self.counted(plainly_counted, maps)[1], strict=True)
        return max(float((one - other).abs().max()) for one, other in both)


def main() -> None:
    """Print the figures, keep them if asked to, and exit with 1 if the aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    what, net, images = subject(chosen.images)
    with torch.inference_mode():
        bench = Subject(net, images)
        gap = bench.gap()
        sides = {name: side(bench, name, count, chosen.repeats) for name, count in COUNTED.items()}
    print(f"{chosen.images} images, {chosen.threads} threads, {what}; {chosen.repeats} rounds, median (least)")
    for taken in sides.values():
        for name, each in taken.items():
            wall, cpu = zip(*each, strict=True)
            print(
                f"  {name:26s} {median(wall):7.3f} s ({min(wall):.3f})   {median(cpu):7.3f} s of CPU ({min(cpu):.3f})"
            )
    ratios = {name: {each: ratio(taken[name], taken[each]) for each in FORWARD} for name, taken in sides.items()}
    for name, passes in ratios.items():
        for each, found in passes.items():
            print(
                f"{name} takes {found['wall']:.2f} times the wall, {found['cpu']:.2f} times the CPU seconds of: {each}"
            )
    print(f"largest difference of entropies {gap:.1e} nats")
    facts = {
        "subject": what,
        "columns": ["wall seconds", "cpu seconds"],
        "rounds": sides,
        "ratio_to": ratios,
        "largest_difference_nats": gap,
        "bar": BAR,
    }
    raw_results.keep(chosen.out, {**raw_results.about(), **facts})
    raise SystemExit(int(ratios["entropy"][FORWARD[0]]["wall"] > BAR))


def side(bench: Subject, name: str, count: Count, repeats: int) -> dict[str, list[Spent]]:
    """Return what each round of one way of counting took, after one that warms up.

    The two ways have rounds of their own: how memory is handed out depends on what was asked for before.
    """
    rounds = [bench.round(name, count) for _ in range(repeats + 1)][1:]
    return {each: [spent[each] for spent in rounds] for each in rounds[0]}


def ratio(above: list[Spent], below: list[Spent]) -> dict[str, float]:
    """Return the medians over rounds of the ratios of wall and of CPU seconds."""
    columns = {"wall": 0, "cpu": 1}
    both = list(zip(above, below, strict=True))
    return {name: median([one[place] / other[place] for one, other in both]) for name, place in columns.items()}


if __name__ == "__main__":
    main()
