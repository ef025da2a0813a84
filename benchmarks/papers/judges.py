"""Do judges without labels put plans in the order that accuracy does? Spearman's correlation over random plans.

    EDGEPRUNE_DATA=<folder> python benchmarks/papers/judges.py [--only resnet56] [--plans 40] [--table]

Random plans are cut, repaired by local-ridge and the statistics of their batch norms carried over by regression on
synthetic images; then each judge gives its number, and the true one is top-1 on test images that no judge saw. Once
plans of every cost are drawn, and once those of half of the multiply-accumulates, give or take 3 %: a search compares
plans of one latency, and there "smaller is worse" is no longer worth anything. The accuracy of each plan is taken three
times more: with batch norms as they were, averaged over synthetic images, and averaged over training images. Judges:

    synthetic fidelity      cosine of logits with the unpruned model's on synthetic images (`--data-free`)
    synthetic agreement     share of synthetic images answered alike
    teacher                 share of unlabelled images answered alike
    low entropy             the negative spatial entropy of activations over unlabelled images (entropy-rl)
    macs                    multiply-accumulates, the judge that looks at nothing

The interval is the 2.5 % to 97.5 % quantile over 2,000 resamplings of the plans.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import raw_results

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from networks import NETWORKS
from scipy.stats import spearmanr
from torch import Tensor

from edgeprune.cut import proven
from edgeprune.export import export
from edgeprune.importance import ranking, unit_importance
from edgeprune.plan import Plan
from edgeprune.quality import Evaluator, Statistics
from edgeprune.reconstruction import Settings, repaired
from edgeprune.structure import build_structure
from edgeprune.synthetic import synthesise

OUT = Path(__file__).parents[1] / "results/papers/judges.json"
JUDGES = ("synthetic fidelity", "synthetic agreement", "teacher", "low entropy", "macs")
ACCURACIES = (
    "accuracy, statistics as they were",
    "accuracy, averages over synthetic images",
    "accuracy, averages over training images",
    "accuracy",
)
BANDS = {"every cost": (0.2, 0.95), "half the cost": (0.47, 0.53)}
BATCH = 64
DRAWS, CONFIDENCE = 2000, (0.025, 0.975)

Seen = dict[str, Any]


class Bench:
    """One network, and everybody who judges its plans."""

    def __init__(self, name: str, images: int, synthetic: int) -> None:
        subject = NETWORKS[name](images)
        net, shape = subject.net, tuple(subject.images.shape[1:])
        example = torch.zeros_like(subject.images[:1])
        graph = export(net, example)
        self.structure = proven(net, example, build_structure(net, example, graph, multiple=1))
        self.order = ranking(unit_importance(net, self.structure, "group-norm", ()))
        started = time.monotonic()
        made = synthesise(net, shape, synthetic, seed=0)
        self.made_s = time.monotonic() - started

        def judge(x: Tensor, y: Tensor, by: str, calibration: Tensor, statistics: Statistics = "averaged") -> Evaluator:
            return Evaluator(
                net,
                self.structure,
                graph,
                validation=list(zip(x.split(BATCH), y.split(BATCH), strict=True)),
                calibration=calibration.split(BATCH),
                entropy_images=16,
                dtype=torch.float32,
                judged_by=by,
                repair=lambda plan: repaired(net, self.structure, plan, mode="local-ridge"),
                statistics=statistics,
            )

        unlabelled, unknown = subject.calibration, torch.zeros(len(subject.calibration), dtype=torch.int64)
        nobody = torch.zeros(synthetic, dtype=torch.int64)
        self.true = judge(subject.images, subject.labels, "labels", unlabelled)
        self.as_cut = judge(subject.images, subject.labels, "labels", unlabelled, statistics="kept")
        self.averaged = judge(subject.images, subject.labels, "labels", made)
        self.teacher = judge(unlabelled, unknown, "teacher", unlabelled)
        self.fidelity = judge(made, nobody, "synthetic", made, statistics="regressed")
        self.agreement = judge(made, nobody, "teacher", made)

    def plan(self, random: np.random.Generator, band: tuple[float, float]) -> tuple[Plan, float]:
        """Return a random plan whose share of the multiply-accumulates lies in a band, and that share."""
        while True:
            level, spread = random.uniform(0.3, 1.0), random.uniform(0.05, 0.5)
            kept = {}
            for group in self.structure.space.groups:
                share = float(np.clip(random.normal(level, spread), 0.1, 1.0))
                width = max(1, round(share * group.width))
                kept[group.name] = tuple(sorted(self.order[group.name][:width]))
            plan = self.structure.space.check(Plan(kept=kept))
            if band[0] <= (cost := self.macs(plan)) <= band[1]:
                return plan, cost

    def macs(self, plan: Plan) -> float:
        """Return the multiply-accumulates of a plan as a share of the unpruned network's."""
        full = self.structure.full
        spent, whole = (sum(each.macs(w, full) for each in self.structure.layers) for w in (plan.widths, full))
        return spent / whole

    def seen(self, plan: Plan, cost: float) -> Seen:
        """Return what everybody says of a plan."""
        module = self.fidelity.candidate(plan)
        true = self.true.judge(module)
        assert true.entropy is not None
        return {
            "accuracy": true.accuracy,
            "accuracy, statistics as they were": self.as_cut.quality(plan).accuracy,
            "accuracy, averages over synthetic images": self.averaged.quality(plan).accuracy,
            "accuracy, averages over training images": self.true.quality(plan).accuracy,
            "synthetic fidelity": self.fidelity.judge(module).accuracy,
            "synthetic agreement": self.agreement.judge(module).accuracy,
            "teacher": self.teacher.judge(module).accuracy,
            "low entropy": -true.entropy,
            "macs": cost,
        }


def correlations(seen: list[Seen]) -> dict[str, tuple[float, float, float]]:
    """Return judge → Spearman's correlation with accuracy, and the ends of its interval."""
    random = np.random.default_rng(0)
    draws = random.integers(0, len(seen), (DRAWS, len(seen)))
    accuracy = np.array([each["accuracy"] for each in seen])
    result = {}
    for judge in JUDGES:
        says = np.array([each[judge] for each in seen])
        drawn = [spearmanr(says[draw], accuracy[draw]).statistic for draw in draws]
        low, high = np.nanquantile(drawn, CONFIDENCE)
        result[judge] = (float(spearmanr(says, accuracy).statistic), float(low), float(high))
    return result


def table(cells: list[Seen]) -> str:
    """Return a line for each network and band."""
    heads = (
        "network",
        "plans",
        "accuracy %",
        "mean: as they were, averages over synthetic, over training images, carried over",
        *JUDGES,
    )
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for network, band in dict.fromkeys((each["network"], each["band"]) for each in cells):
        mine = [each for each in cells if (each["network"], each["band"]) == (network, band)]
        found = correlations(mine)
        reach = [100 * quantile([each["accuracy"] for each in mine], share) for share in (0, 1)]
        said = " | ".join(f"{found[name][0]:+.2f} ({found[name][1]:+.2f} to {found[name][2]:+.2f})" for name in JUDGES)
        means = ", ".join(f"{100 * np.mean([each[name] for each in mine]):.1f}" for name in ACCURACIES)
        lines.append(f"| {network} | {len(mine)} of {band} | {reach[0]:.0f} to {reach[1]:.0f} | {means} | {said} |")
    return "\n".join(lines)


def quantile(values: list[float], share: float) -> float:
    """Return a quantile of some values."""
    return float(np.quantile(values, share))


def main() -> None:
    """Judge the plans that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=["resnet56", "vgg16_thin", "fashion"])
    parser.add_argument("--plans", type=int, default=40)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--synthetic", type=int, default=128)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    chosen = parser.parse_args()
    known = json.loads(chosen.out.read_text()) if chosen.out.is_file() else {"plans": []}
    cells, made_s = known["plans"], known.get("made_s", {})
    for network in [] if chosen.table else chosen.only:
        if sum(each["network"] == network for each in cells) >= chosen.plans * len(BANDS):
            continue  # making its images takes minutes
        bench = Bench(network, chosen.images, chosen.synthetic)
        made_s[network] = bench.made_s
        for band, limits in BANDS.items():
            random = np.random.default_rng(0)
            for number in range(chosen.plans):
                plan, cost = bench.plan(random, limits)
                name = {"network": network, "band": band, "plan": number}
                if not any(all(each[key] == value for key, value in name.items()) for each in cells):
                    cells.append({**name, **bench.seen(plan, cost)})
                    facts = {"distance": Settings().distance, "made_s": made_s}
                    raw_results.keep(chosen.out, {**raw_results.about(), **facts, "plans": cells})
    print(table(cells))


if __name__ == "__main__":
    main()
