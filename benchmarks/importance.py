"""Seconds of every importance rule over all groups of a ResNet-56, in one process.

    [EDGEPRUNE_DATA=<folder>] python benchmarks/importance.py [--threads 2] [--out FILE.json]

`activation-entropy` reads 64 images of 32 x 32, `taylor` 32 with labels, forward and backward pass included; the others
read none. Finding the structure is not counted: a run does it once, whatever the rule. Weights and images are the
trained ones if the data is there, else random. Beside it the rank correlation of each two rules, the mean over groups.

The aim: the seven rules l1, l2, geometric-median, taylor, batch-norm-scale, activation-entropy and random together
under 2 s.
"""

import argparse
import os
import time
from pathlib import Path
from statistics import fmean, median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import raw_results
import torch
from cifar10 import MEAN, STD, ResNet, data, resnet56
from scipy.stats import spearmanr
from torch import Tensor, nn

from edgeprune.export import export
from edgeprune.importance import RULES, unit_importance
from edgeprune.structure import Structure, build_structure

BAR_S = 2.0
IMAGES = {"activation-entropy": 64, "taylor": 32}
SEVEN = ("l1", "l2", "geometric-median", "taylor", "batch-norm-scale", "activation-entropy", "random")


def subject() -> tuple[str, nn.Module, Tensor, Tensor]:
    """Return what they are, a ResNet-56, images and labels."""
    count = max(IMAGES.values())
    if not os.environ.get("EDGEPRUNE_DATA"):
        torch.manual_seed(0)
        return "random weights and images", ResNet(9).eval(), torch.randn(count, 3, 32, 32), torch.arange(count) % 10
    pixels, labels = (torch.from_numpy(each[:count]) for each in data()["train"])
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    return "trained weights and training images of CIFAR-10", resnet56(), images, labels.long()


def scored(
    net: nn.Module, structure: Structure, rule: str, images: Tensor, labels: Tensor
) -> tuple[tuple[float, float], dict[str, tuple[float, ...]]]:
    """Return wall and CPU seconds of a rule, and what it found."""
    count = IMAGES.get(rule, 0)
    began, used = time.perf_counter(), time.process_time()
    found = unit_importance(net, structure, rule, [(images[:count], labels[:count])] if count else None)
    return (time.perf_counter() - began, time.process_time() - used), found


def agreement(one: dict[str, tuple[float, ...]], other: dict[str, tuple[float, ...]]) -> float:
    """Return the mean over groups of the rank correlation of two rules; groups that either holds equal count 0."""
    pairs = [(one[name], other[name]) for name in one]
    return fmean(float(spearmanr(a, b).statistic) if len(set(a)) > 1 < len(set(b)) else 0.0 for a, b in pairs)


def main() -> None:
    """Print the figures, keep them if asked to, and exit with 1 if the aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    what, net, images, labels = subject()
    structure = build_structure(net, images[:1], export(net, images[:1]), multiple=1)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in RULES}
    for _ in range(chosen.repeats):
        found = {}
        for rule in RULES:
            spent, found[rule] = scored(net, structure, rule, images, labels)
            taken[rule].append(spent)
    print(f"{len(structure.space.groups)} groups, {chosen.threads} threads, {what}; median (least) of {chosen.repeats}")
    for rule, each in taken.items():
        wall, cpu = zip(*each, strict=True)
        print(f"  {rule:20s} {median(wall):7.3f} s ({min(wall):.3f})   {median(cpu):7.3f} s of CPU ({min(cpu):.3f})")
    rounds = [[sum(taken[rule][place][side] for rule in SEVEN) for side in (0, 1)] for place in range(chosen.repeats)]
    together = {"wall": median(wall for wall, _ in rounds), "cpu": median(cpu for _, cpu in rounds)}
    print(f"the seven together: {together['wall']:.2f} s, {together['cpu']:.2f} s of CPU")
    alike = {one: {other: agreement(found[one], found[other]) for other in RULES} for one in RULES}
    for rule, row in alike.items():
        print(f"  {rule:20s}" + "".join(f"{value:7.2f}" for value in row.values()))
    facts = {
        "subject": what,
        "images": IMAGES,
        "columns": ["wall seconds", "cpu seconds"],
        "rounds": taken,
        "seven_together": together,
        "bar_s": BAR_S,
        "rank_correlation": alike,
    }
    raw_results.keep(chosen.out, {**raw_results.about(), **facts})
    raise SystemExit(int(together["wall"] > BAR_S))


if __name__ == "__main__":
    main()
