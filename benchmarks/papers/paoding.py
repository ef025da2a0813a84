"""PAODING against magnitude pruning, and against what its papers claim; nothing is trained after pruning.

    EDGEPRUNE_FASHION=<folder> EDGEPRUNE_DATA=<folder> python benchmarks/papers/paoding.py

Networks of the papers' shapes (Meng et al., arXiv 2405.00074, 2204.00783) are trained here, one for each seed, and
walked down in each mode. At each share of dense units gone it is noted what is left: parameters, accuracy on all test
images, and under FGSM and PGD on the first of them. Cells that are in the file already are not run again. The weights
are kept in --nets, so that only the first run trains.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))

import cifar10
import fashion_mnist
import raw_results

from edgeprune.cut import cut_module
from edgeprune.export import export
from edgeprune.paoding.intervals import Bounds
from edgeprune.paoding.network import read
from edgeprune.paoding.walk import Settings, Walk, merged, walk
from edgeprune.robustness import Attack, Pixels, robustness
from edgeprune.structure import build_structure

HERE = Path(__file__).parent
RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
ROUNDED = {"25 %, each step rounded up": 10, "50 %, each step rounded up": 20}
"""Where the authors' code stands after so many steps of 2.5 %: it rounds up at each, so that of 128 units 4 go a step
and after 20 steps 62.5 %, not 50 %. Their claims are about these points."""

POINTS: tuple[float | str, ...] = (*RATIOS, *ROUNDED)
MODES = ("scale", "saliency", "impact", "stochastic", "saliency, zeroed")
"""Of the last, the same units go as by saliency, and nobody answers for them: what merging is worth."""

ATTACKS = (
    Attack(kind="fgsm", epsilon=0.01),
    Attack(kind="pgd", epsilon=0.01),
    Attack(kind="fgsm", epsilon=0.05),
)
ATTACKED = 1000
"""Test images that are attacked (the papers' number)."""

BATCH = 128
RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Data:
    """Normalised images [N, C, H, W] and labels, and how the pixels were normalised."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A network, its data, how long it is trained, and whether in bf16: half the time for convolutions here."""

    make: Callable[[], nn.Module]
    load: Callable[[], Data]
    epochs: int
    bf16: bool = False


def mlp() -> nn.Module:
    """Return the papers' perceptron 784-128-128-64-10."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def cnn(channels: int, flat: int) -> nn.Module:
    """Return the papers' CNN: convolutions 32-64-64, a pool after the first two, dense 128-64-10."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(flat, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def fashion(mean: float = 0.0, std: float = 1.0) -> Data:
    """Return Fashion-MNIST; pixels are in [0, 1], as in the papers, unless they are normalised."""
    arrays = fashion_mnist.load(fashion_mnist.folder())
    images = {
        name: (torch.from_numpy(arrays[name]).unsqueeze(1).float() / 255 - mean) / std for name in ("x_train", "x_test")
    }
    labels = {name: torch.from_numpy(arrays[name]).long() for name in ("y_train", "y_test")}
    return Data(**images, **labels, pixels=Pixels(mean=(mean,), std=(std,)))


def cifar() -> Data:
    """Return CIFAR-10, pixels in [0, 1]."""
    found = {}
    for split, (images, labels) in cifar10.data().items():
        found[f"x_{split}"] = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        found[f"y_{split}"] = torch.from_numpy(labels).long()
    return Data(**found, pixels=Pixels(mean=(0.0,) * 3, std=(1.0,) * 3))


WORKLOADS = {
    "MLP, Fashion-MNIST": Workload(make=mlp, load=fashion, epochs=10),
    "MLP, Fashion-MNIST, normalised": Workload(
        make=mlp, load=lambda: fashion(fashion_mnist.MEAN, fashion_mnist.STD), epochs=10
    ),
    "CNN, Fashion-MNIST": Workload(make=lambda: cnn(1, 576), load=fashion, epochs=6, bf16=True),
    "CNN, CIFAR-10": Workload(make=lambda: cnn(3, 1024), load=cifar, epochs=8, bf16=True),
}


# -- running ---------------------------------------------------------------------------------------------------------


def trained(name: str, seed: int, data: Data, folder: Path) -> nn.Module:
    """Return the network of a seed, trained unless its weights are in the folder: Adam, cosine to zero."""
    workload = WORKLOADS[name]
    torch.manual_seed(seed)
    net = workload.make().to(memory_format=torch.channels_last)
    path = folder / f"{name.lower().replace(', ', '-')}-{workload.epochs}-{seed}.pt"
    if path.is_file():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    steps = workload.epochs * -(-len(data.y_train) // BATCH)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(workload.epochs):
        for chosen in torch.randperm(len(data.y_train)).split(BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=workload.bf16):
                loss = nn.functional.cross_entropy(net(data.x_train[chosen]), data.y_train[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{name} {seed}: epoch {epoch + 1}, loss {float(loss):.3f}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net.eval()


def run_cell(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return what is left of one network in every mode at every ratio."""
    data = WORKLOADS[name].load()
    net = trained(name, seed, data, folder)
    example = data.x_test[:1]
    graph = export(net, example)
    structure = build_structure(net, example, graph, multiple=1)
    mean, std = np.array(data.pixels.mean), np.array(data.pixels.std)
    network = read(net, structure, graph, box=Bounds(low=-mean / std, high=(1 - mean) / std))
    full = sum(each.numel() for each in net.parameters())
    rows, whole = [], judged(net, data)
    for mode in MODES:
        began = time.perf_counter()
        made = walk(network, Settings(mode=mode.partition(",")[0], seed=seed))  # type: ignore[arg-type]
        took = time.perf_counter() - began
        for point in POINTS:
            left = candidate(net, structure, made, point, merge="zeroed" not in mode)
            removed = 1 - sum(each.numel() for each in left.parameters()) / full
            found = whole if not removed else judged(left, data)
            rows.append({"mode": mode, "point": point, "removed": removed, "walk_s": took, **found})
        print(f"{name} {seed} {mode}: {[round(each['accuracy'], 3) for each in rows[-9:]]}", file=sys.stderr)
    return {"workload": name, "seed": seed, "epochs": WORKLOADS[name].epochs, "parameters": full, "rows": rows}


def candidate(net: nn.Module, structure: Any, made: Walk, point: float | str, *, merge: bool) -> nn.Module:
    """Return the network cut where a walk stands at a point, channels last."""
    widths = made.widths(point) if isinstance(point, float) else rounded_up(made, ROUNDED[point])
    plan = made.plan(widths)
    cut = cut_module(merged(net, structure, plan, made) if merge else net, structure, plan)
    return cut.eval().to(memory_format=torch.channels_last)


def rounded_up(made: Walk, steps: int) -> dict[str, int]:
    """Return the widths after so many steps when each step's quota is rounded up."""
    found = {}
    for name, schedule in made.schedule.items():
        width = schedule[0]
        for _ in range(steps):
            width -= ceil(made.settings.step * (schedule[0] if name in made.dense else width) - 1e-9)
        found[name] = max(1, width)
    return found


def judged(net: nn.Module, data: Data) -> dict[str, Any]:
    """Return accuracy on the test images and what survives each attack on the first of them."""
    with torch.inference_mode():
        answers = torch.cat([net(part).argmax(1) for part in data.x_test.split(1000)])
    x, y = data.x_test[:ATTACKED], data.y_test[:ATTACKED]
    batches = list(zip(x.split(500), y.split(500), strict=True))
    survived = robustness(net, batches, ATTACKS, data.pixels)
    accuracy = float((answers == data.y_test).float().mean())
    return {"accuracy": accuracy, "attacks": {name: asdict(each) for name, each in survived.items()}}


def main() -> None:
    """Run the cells that are missing, one at a time, and print the tables and the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "papers" / "paoding.json")
    parser.add_argument("--nets", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-paoding-nets")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    chosen = parser.parse_args()
    cells: list[dict[str, Any]] = json.loads(chosen.out.read_text())["cells"] if chosen.out.is_file() else []
    for name in [] if chosen.table else chosen.workloads:
        for seed in chosen.seeds:
            if not any((each["workload"], each["seed"]) == (name, seed) for each in cells):
                cells.append(run_cell(name, seed, chosen.nets))
                raw_results.keep(chosen.out, {**raw_results.about(), "attacked": ATTACKED, "cells": cells})
    print(tables(cells))
    print(claims(cells))


# -- reading the results ---------------------------------------------------------------------------------------------


Cells = list[dict[str, Any]]
Value = Callable[[dict[str, Any]], float]


def right(row: dict[str, Any], attack: str) -> float:
    """Return the share of attacked images that are classified correctly after the attack."""
    return row["attacks"][attack]["right_attacked"] / row["attacks"][attack]["images"]


def unchanged(row: dict[str, Any], attack: str) -> float:
    """Return the share of attacked images whose answer the attack does not change."""
    return row["attacks"][attack]["unchanged"] / row["attacks"][attack]["images"]


MEASURES: dict[str, Value] = {
    "parameters removed": lambda row: row["removed"],
    "accuracy": lambda row: row["accuracy"],
    "right under FGSM 0.01": lambda row: right(row, "fgsm 0.01"),
    "right under PGD-10 0.01": lambda row: right(row, "pgd-10 0.01"),
    "right under FGSM 0.05": lambda row: right(row, "fgsm 0.05"),
    "unchanged by FGSM 0.01": lambda row: unchanged(row, "fgsm 0.01"),
}


def values(cells: Cells, workload: str, mode: str, point: float | str, value: Value) -> list[float]:
    """Return a value for every seed of a workload."""
    rows = [row for cell in cells if cell["workload"] == workload for row in cell["rows"]]
    return [value(row) for row in rows if (row["mode"], row["point"]) == (mode, point)]


def tables(cells: Cells) -> str:
    """Return one table for each workload and measure: a row a mode, a column a point, means over seeds and spread."""
    lines = []
    for workload in dict.fromkeys(cell["workload"] for cell in cells):
        seeds = sum(cell["workload"] == workload for cell in cells)
        for measure, value in MEASURES.items():
            head = " | ".join(each if isinstance(each, str) else f"{each:.0%}" for each in POINTS)
            lines += ["", f"{workload}: {measure}, % ({seeds} seeds, ± standard deviation)", ""]
            lines += [f"| mode | {head} |", f"| --- |{' --- |' * len(POINTS)}"]
            for mode in MODES[:1] if measure == "parameters removed" else MODES:
                row = " | ".join(spread(values(cells, workload, mode, point, value)) for point in POINTS)
                lines.append(f"| {mode} | {row} |")
    return "\n".join(lines)


def spread(found: list[float]) -> str:
    """Return mean ± standard deviation in per cent."""
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{100 * statistics.fmean(found):.1f} ± {100 * deviation:.1f}"


def claims(cells: Cells) -> str:
    """Return every claim of the papers, what was seen here, and whether it held."""
    lines = ["", "| claim | workload | mode | seen | held |", "| --- | --- | --- | --- | --- |"]
    for workload in dict.fromkeys(cell["workload"] for cell in cells):
        for claim in (_size_claims, _decay_claims, _robust_claims, _merge_claims, _impact_claims, _chance_claims):
            lines += [f"| {each} |" for each in claim(cells, workload)]
    return "\n".join(lines)


def _mean(cells: Cells, workload: str, mode: str, point: float | str, measure: str) -> float:
    return statistics.fmean(values(cells, workload, mode, point, MEASURES[measure]))


def _held(truth: bool) -> str:
    return "yes" if truth else "NO"


HALF = (0.5, "50 %, each step rounded up")
"""What the claims about 50 % are read at: half of the dense units, and where the authors' code stands."""


ROBUST = ("unchanged by FGSM 0.01", "right under FGSM 0.01", "right under PGD-10 0.01", "right under FGSM 0.05")

MNIST_GAINS = {"accuracy": 0.30, "right under FGSM 0.01": 0.43, "right under FGSM 0.05": 0.53}
CIFAR_GAINS = {"accuracy": 0.09}
"""What `stochastic` is said to gain over `saliency` at 50 %, read by eye off the curves of arXiv 2204.00783's code."""


def _at(point: float | str) -> str:
    return point if isinstance(point, str) else f"{point:.0%}"


def _size_claims(cells: Cells, workload: str) -> list[str]:
    lines = []
    for point in HALF:
        seen = _mean(cells, workload, "saliency", point, "parameters removed")
        claim = f"63.9 to 78.1 % of the parameters are removed at {_at(point)}"
        lines.append(f"{claim} | {workload} | all | {seen:.1%} | {_held(0.639 <= seen <= 0.781)}")
    return lines


def _decay_claims(cells: Cells, workload: str) -> list[str]:
    lines = []
    for point in HALF:
        for mode in MODES[:4]:
            full, half = (_mean(cells, workload, mode, each, "accuracy") for each in (0.0, point))
            seen = f"{full:.1%} to {half:.1%}, {1 - half / full:.1%} lost"
            claim = f"accuracy decays by less than 50 % at {_at(point)}"
            lines.append(f"{claim} | {workload} | {mode} | {seen} | {_held(half > full / 2)}")
    return lines


def _robust_claims(cells: Cells, workload: str) -> list[str]:
    lines = []
    for point in HALF:
        for mode in MODES[:4]:
            for measure in ROBUST:
                full, half = (_mean(cells, workload, mode, each, measure) for each in (0.0, point))
                claim = f"over 50 % of robustness is kept at {_at(point)} ({measure})"
                lines.append(f"{claim} | {workload} | {mode} | {half / full:.1%} kept | {_held(half > full / 2)}")
    return lines


def _merge_claims(cells: Cells, workload: str) -> list[str]:
    lines = []
    for ratio in (0.5, 0.6):
        ours, control = (_mean(cells, workload, mode, ratio, "accuracy") for mode in ("saliency", "saliency, zeroed"))
        claim = f"merging beats dropping the same units at {ratio:.0%}"
        lines.append(f"{claim} | {workload} | saliency | {ours:.1%} against {control:.1%} | {_held(ours > control)}")
    return lines


def _impact_claims(cells: Cells, workload: str) -> list[str]:
    lines = []
    for ratio in (0.2, 0.4, 0.5):
        impact, baseline = (_mean(cells, workload, m, ratio, "right under FGSM 0.01") for m in ("impact", "saliency"))
        wanted = "impact keeps as many robust as saliency" if ratio > 0.3 else "impact and saliency are about equal"
        held = impact >= baseline if ratio > 0.3 else abs(impact - baseline) < 0.03
        seen = f"{impact:.1%} against {baseline:.1%}"
        lines.append(f"{wanted} at {ratio:.0%} | {workload} | impact | {seen} | {_held(held)}")
    return lines


def _chance_claims(cells: Cells, workload: str) -> list[str]:
    lines = []
    claims = CIFAR_GAINS if "CIFAR" in workload else MNIST_GAINS
    for measure, claimed in claims.items():
        ours, baseline = (_mean(cells, workload, mode, 0.5, measure) for mode in ("stochastic", "saliency"))
        claim = f"stochastic gains about {claimed:.0%} over saliency at 50 % ({measure})"
        gain = ours / baseline - 1
        lines.append(f"{claim} | {workload} | stochastic | {gain:+.1%} | {_held(gain > claimed / 2)}")
    return lines


if __name__ == "__main__":
    main()
