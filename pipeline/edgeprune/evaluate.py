"""The straight line: one plan, from weights to a timed engine.

plan ─cut─▶ graph ─compile─▶ engine ─measure─▶ timing ─┐
  └───────────cut, re-estimate, classify─────▶ quality ─┴─score─▶ trial
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.cut import GraphCutter
from edgeprune.durable import replacing, storage_errors
from edgeprune.errors import CandidateError
from edgeprune.measurement import Measurement, Sampling
from edgeprune.plan import Plan
from edgeprune.quality import Evaluator
from edgeprune.reward import RewardWeights, score, worst_score
from edgeprune.statistics import Interval
from edgeprune.target import Target
from edgeprune.trial import Failure, Quality, Score, Trial

Cache = Callable[[str, str, str], Measurement | None]
"""(profile digest, artifact SHA-256, reference SHA-256) → an earlier measurement, or None."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The unpruned model, ready to be cut again and again.

    Attributes:
        cutter: of its exported graph.
        evaluator: on its validation images.
        inputs: of the graph.
        folder: where cut graphs are written; each is deleted once it is judged.
    """

    cutter: GraphCutter
    evaluator: Evaluator
    inputs: tuple[TensorSpec, ...]
    folder: Path

    def cut(self, plan: Plan) -> Artifact:
        """Return the graph cut by a plan, written under its digest.

        Raises:
            PlanError: if the plan does not fit the space.
            StorageFull: if there is no room for it.
        """
        return write_graph(self.cutter.cut(plan), self.folder / f"{plan.digest[:16]}.onnx", self.inputs)

    def quality(self, plan: Plan) -> Quality:
        """Return accuracy and entropy of the model cut by a plan."""
        return self.evaluator.quality(plan)


def write_graph(
    graph: onnx.ModelProto, path: Path, inputs: tuple[TensorSpec, ...], *, lasting: bool = False
) -> Artifact:
    """Write a graph and return it as an artifact.

    Args:
        lasting: in place of an earlier one at once or not at all, whatever is killed; slower.

    Raises:
        StorageFull: if there is no room for it.
    """
    content = graph.SerializeToString(deterministic=True)
    with storage_errors(path):
        if lasting:
            with replacing(path) as stream:
                stream.write(content)
        else:
            path.write_bytes(content)
    return Artifact.of(path, kind="onnx", inputs=inputs)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What turns a timing and a quality into a score.

    Attributes:
        baseline: quality of the unpruned model on the same images.
        limit_ratio: the budget as a ratio of the unpruned model.
        confidence: of the interval that must lie inside the budget.
        quantile: of the latency that the budget speaks of.
        weights: of the reward's terms.
    """

    baseline: Quality
    limit_ratio: float
    confidence: float = 0.95
    quantile: float = 0.5
    weights: RewardWeights = field(default_factory=RewardWeights)

    def ratio(self, timing: Measurement) -> Interval:
        """Return the timing in the budget's terms."""
        return timing.ratio(self.confidence, self.quantile)


class Stopwatch:
    """Seconds spent in each named part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to part `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def evaluate(
    plan: Plan,
    base: Base,
    target: Target,
    judge: Judge,
    sampling: Sampling,
    *,
    number: int,
    phase: str,
    strategy: str,
    watch: Stopwatch,
    cache: Cache | None = None,
) -> Trial:
    """Follow one plan from weights to a timed engine.

    A candidate that cannot be cut, compiled or run is a failed trial; trouble with the device is raised.

    Args:
        number, phase, strategy: of the trial.
        watch: takes the time of each part.
        cache: asked for an earlier timing of the same bytes on the same profile first.

    Raises:
        LabError: if the device is lost, busy or unsteady; nothing was learnt about the plan.
    """
    digest: str | None = None
    timing: Measurement | None = None
    quality: Quality | None = None
    failure: Failure | None = None
    cached = False
    try:
        with watch.part("cut"):
            graph = base.cut(plan)
        digest = graph.sha256
        try:
            with watch.part("measure"):
                engine = target.compile(graph)
                timing = cache(target.profile.digest, engine.sha256, sampling.reference.sha256) if cache else None
                cached = timing is not None
                timing = timing or target.measure(engine, sampling)
        finally:
            graph.path.unlink(missing_ok=True)
        with watch.part("quality"):
            quality = base.quality(plan)
    except CandidateError as error:
        timing, failure = None, Failure(kind=type(error).__name__, message=str(error))
    return Trial(
        number=number,
        phase=phase,
        strategy=strategy,
        plan=plan,
        graph_sha256=digest,
        measurement=timing,
        failure=failure,
        quality=quality,
        score=_score(timing, quality, judge),
        seconds=dict(watch.seconds),
        cached=cached,
    )


def _score(timing: Measurement | None, quality: Quality | None, judge: Judge) -> Score:
    if timing is None or quality is None:
        return worst_score(judge.limit_ratio, judge.weights)
    return score(
        quality, judge.ratio(timing), baseline=judge.baseline, limit_ratio=judge.limit_ratio, weights=judge.weights
    )
