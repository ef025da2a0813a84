"""A real bench on the formula: a small residual net, cut, run and judged; latencies that can be computed by hand."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import families
import torch

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.cut import GraphCutter
from edgeprune.evaluate import Base, Judge, write_graph
from edgeprune.importance import ranking, unit_importance
from edgeprune.ledger import Ledger
from edgeprune.measurement import Sampling
from edgeprune.profile import Profile
from edgeprune.quality import Evaluator
from edgeprune.search.loop import Bench
from edgeprune.search.problem import Problem
from edgeprune.target import Target, open_target

FAMILY = "resnet"
IMAGES = 48


def profile(**options: Any) -> Profile:
    """Return a formula whose kernels are as wide as the channels' multiple and whose calls cost nothing."""
    settings = {"block": 4, "overhead_ns": 0.0, "noise": 0.0} | options
    return Profile(name="toy", adapter="formula", channel_multiple=4, options=settings)


@cache
def evaluator() -> Evaluator:
    """Return a judge for whom the unpruned net is right about every image."""
    made = families.prepared(FAMILY)
    images = torch.randn(IMAGES, 3, families.SIZE, families.SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        labels = made.net(images).argmax(1)
    return Evaluator(
        made.net,
        made.structure,
        made.graph,
        validation=[(images, labels)],
        calibration=[images[:16]],
        dtype=torch.float32,
    )


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A bench and the problem it stands for."""

    bench: Bench
    problem: Problem


def problem(*, limit: float = 0.5, trials: int = 6) -> Problem:
    """Return the search problem; every layer's share is its share of the formula."""
    made = families.prepared(FAMILY)
    importance = unit_importance(made.net, made.structure, "group-norm")
    full = {group.name: group.width for group in made.structure.space.groups}
    work = {layer.name: layer.macs(full, full, multiple=4) for layer in made.structure.layers}
    return Problem(
        space=made.structure.space,
        layers=made.structure.layers,
        ranking=ranking(importance),
        importance=importance,
        shares={name: each / sum(work.values()) for name, each in work.items()},
        limit_ratio=limit,
        multiple=4,
        trials=trials,
        seed=0,
    )


def rig(folder: Path, ledger: Ledger, *, target: Target | None = None, limit: float = 0.5, **changes: Any) -> Rig:
    """Return a bench in `folder` that writes to `ledger`, and its problem.

    Args:
        target: in place of the noiseless formula.
        limit: of the latency ratio.
        changes: fields of the bench.
    """
    made = families.prepared(FAMILY)
    inputs = (TensorSpec(name="input", shape=tuple(made.example.shape)),)
    reference = write_graph(made.graph, folder / "baseline.onnx", inputs)
    judge = evaluator()
    base = Base(cutter=GraphCutter(made.graph, made.structure), evaluator=judge, inputs=inputs, folder=folder)
    settings = {
        "run": "run",
        "strategy": "uniform",
        "seed": 0,
        "sleep": _refuse_to_sleep,
        "sampling": sampling(reference, limit),
    } | changes
    bench = Bench(
        base=base,
        target=target or connected(profile()),
        judge=Judge(baseline=judge.quality(made.structure.space.full()), limit_ratio=limit),
        ledger=ledger,
        **settings,
    )
    return Rig(bench=bench, problem=problem(limit=limit))


def sampling(reference: Artifact, limit: float) -> Sampling:
    """Return a sampling that stops once it is clear of the limit."""
    return Sampling(reference=reference, threshold=limit)


def connected(asked: Profile) -> Target:
    """Return the open target; a formula holds nothing that would have to be closed."""
    return open_target(asked).__enter__()


def _refuse_to_sleep(seconds: float) -> None:
    raise AssertionError(f"nothing failed, yet the bench waits {seconds} s")
