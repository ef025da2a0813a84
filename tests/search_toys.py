"""Small search problems with a known truth: latency is a formula of the widths, accuracy a formula of what was cut."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edgeprune.layer import Layer
from edgeprune.measurement import Calls, Measurement, Session
from edgeprune.plan import Group, Plan, Space
from edgeprune.reward import RewardWeights, score, worst_score
from edgeprune.search.problem import Problem, Searcher
from edgeprune.statistics import Interval
from edgeprune.trial import Failure, Quality, Trial

BASELINE = Quality(accuracy=0.93, entropy=None, images=1000)
WEIGHTS = RewardWeights(entropy=0.0)


def conv(name: str, into: int, out: int, size: int, **more: object) -> Layer:
    """Return a 3×3 convolution."""
    facts = {"kind": "conv", "kernel": 9, "stride": 1, "height": size, "width": size} | more
    return Layer(name=name, node=name, in_channels=into, out_channels=out, **facts)


def residual_layers(stages: list[tuple[int, int, int]]) -> tuple[list[Layer], list[tuple[str, int]]]:
    """Return stem, blocks of two convolutions and head for stages (width, map side, blocks), and the inner groups."""
    layers, groups, before = [conv("stem", 3, stages[0][0], stages[0][1])], [], stages[0][0]
    for stage, (width, size, blocks) in enumerate(stages):
        for block in range(blocks):
            name = f"stage{stage}.{block}"
            groups.append((f"{name}.conv1", width))
            layers.append(conv(f"{name}.conv1", before, width, size, out_units={f"{name}.conv1": 1}))
            layers.append(conv(f"{name}.conv2", width, width, size, in_units={f"{name}.conv1": 1}))
            before = width
    layers.append(conv("head", before, 10, 1, kind="linear", kernel=1))
    return layers, groups


@dataclass(kw_only=True)
class Toy:
    """A problem and the truth behind it.

    Accuracy is 0.93 · exp(− Σ_g sensitivity_g · (1 − mended · r_g) · (importance lost in g)²), so groups differ in what
    they are worth, and a repair is worth `mended` at most: r_g = max(0, 1 − 4 (coefficient_g − mended_at)²). A plan
    without coefficients repairs in full, as the product does.
    Latency is the work of each layer with channels rounded up to `block`, plus a constant, times noise.
    """

    problem: Problem
    sensitivity: Mapping[str, float]
    costs: Mapping[str, float]
    block: int = 8
    noise: float = 0.0
    broken: frozenset[int] = frozenset()
    mended: float = 0.0
    mended_at: float = 1.0
    calls: int = field(default=0)

    def ratio(self, widths: Mapping[str, int]) -> float:
        """Return the true latency ratio."""
        full = self.problem.full
        total = 1 - sum(self.costs.values())
        for layer in self.problem.layers:
            into, out = (math.ceil(each / self.block) for each in layer.channels(widths, full))
            into_full, out_full = math.ceil(layer.in_channels / self.block), math.ceil(layer.out_channels / self.block)
            total += self.costs[layer.name] * into * out / (into_full * out_full)
        return total

    def accuracy(self, widths: Mapping[str, int], repair: Mapping[str, float] | None = None) -> float:
        """Return the true accuracy."""
        lost = {name: 1 - self.problem.kept_importance(name, width) for name, width in widths.items()}
        off = {name: (repair or {}).get(name, 1.0) - self.mended_at for name in lost}
        left = {name: 1 - self.mended * max(0.0, 1 - 4 * each**2) for name, each in off.items()}
        return 0.93 * math.exp(-sum(self.sensitivity[name] * left[name] * value**2 for name, value in lost.items()))

    def trial(self, plan: Plan, number: int = 0) -> Trial:
        """Return what the harness would tell about `plan`: deterministic noise from the plan's own digest."""
        shared = {"number": number, "phase": "search", "strategy": "toy", "plan": plan, "graph_sha256": None}
        if number in self.broken:
            failure = Failure(kind="CompileError", message="planted")
            worst = worst_score(self.problem.limit_ratio, WEIGHTS)
            return Trial(measurement=None, failure=failure, quality=None, score=worst, **shared)
        rng = np.random.default_rng(int(plan.digest[:12], 16))
        ratio = self.ratio(plan.widths) * math.exp(self.noise * rng.standard_normal())
        interval = Interval(p50=ratio, low=ratio * (1 - self.noise), high=ratio * (1 + self.noise))
        quality = Quality(accuracy=self.accuracy(plan.widths, plan.repair), entropy=None, images=1000)
        verdict = score(quality, interval, baseline=BASELINE, limit_ratio=self.problem.limit_ratio, weights=WEIGHTS)
        return Trial(measurement=measured(ratio), failure=None, quality=quality, score=verdict, **shared)

    def run(self, searcher: Searcher, trials: int) -> list[Trial]:
        """Return the trials of a whole search."""
        told = []
        for number in range(trials):
            told.append(self.trial(searcher.ask(), number))
            searcher.tell(told[-1])
        return told


def measured(ratio: float) -> Measurement:
    """Return a measurement of this ratio with one call a session."""
    candidate = Calls(elapsed=(round(ratio * 1e9),), on_cpu=(round(ratio * 1e9),), preempted=(0,))
    reference = Calls(elapsed=(10**9,), on_cpu=(10**9,), preempted=(0,))
    return Measurement(
        profile_digest="toy",
        artifact_sha256="toy",
        reference_sha256="toy",
        sessions=(Session(candidate=candidate, reference=reference),),
        conditions={},
        taken_at="2026-01-01T00:00:00Z",
        seconds=0.0,
        emulated=True,
    )


def best_accuracy(told: list[Trial]) -> float:
    """Return the best accuracy of the feasible trials, 0 without one."""
    return max((trial.quality.accuracy for trial in told if trial.quality and trial.score.feasible), default=0.0)


def residual_toy(
    stages: list[tuple[int, int, int]],
    *,
    limit: float = 0.5,
    seed: int = 0,
    trials: int = 100,
    noise: float = 0.0,
    removable: bool = False,
    contrast: float = 1.0,
    damage: float = 0.25,
    **more: object,
) -> Toy:
    """Return a residual network whose groups' sensitivities are drawn from a log-normal of spread `contrast`."""
    layers, groups = residual_layers(stages)
    rng = np.random.default_rng([99, seed])
    work = {layer.name: layer.macs(dict(groups), dict(groups)) for layer in layers}
    spread = {name: each * rng.uniform(0.8, 1.3) for name, each in work.items()}
    costs = {name: 0.8 * each / sum(spread.values()) for name, each in spread.items()}
    importance = {name: tuple(float(x) for x in np.sort(rng.exponential(size=width))[::-1]) for name, width in groups}
    space = Space(groups=tuple(Group(name=n, width=w, minimum=8, multiple=8, removable=removable) for n, w in groups))
    problem = Problem(
        space=space,
        layers=tuple(layers),
        ranking={name: tuple(range(width)) for name, width in groups},
        shares=costs,
        limit_ratio=limit,
        multiple=8,
        trials=trials,
        seed=seed,
        importance=importance,
    )
    drawn = rng.lognormal(0.0, contrast, len(groups))
    sensitivity = {name: damage * float(each / drawn.mean()) for (name, _), each in zip(groups, drawn, strict=True)}
    return Toy(problem=problem, sensitivity=sensitivity, costs=costs, noise=noise, **more)


RESNET56 = [(16, 32, 9), (32, 16, 9), (64, 8, 9)]
