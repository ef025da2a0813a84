"""One row of the ledger: a timing or a failure, never both, and why it got its number."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgeprune.measurement import Measurement
from edgeprune.plan import Plan

JUDGES = {
    "labels": "validation accuracy",
    "teacher": "agreement with the unpruned model on validation images",
    "synthetic": "fidelity to the unpruned model on synthetic images",
}
"""What candidates are judged by → what the number is called."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a cut model is worth before fine-tuning.

    Attributes:
        accuracy: share of `images` that it answers as their labels say, or as the unpruned model does; on synthetic
            images how near its logits come, see `edgeprune.agreement.fidelity`. In [0, 1].
        entropy: mean spatial entropy of its activations, nats (see `edgeprune.entropy`); None if it was not computed.
        images: number of images looked at.
        judged_by: key of `JUDGES`.
    """

    accuracy: float
    entropy: float | None
    images: int
    judged_by: str = "labels"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Why this number.

    Attributes:
        reward: what the searcher is told; higher is better.
        feasible: the upper end of the latency interval is inside the budget.
        terms: every addend of the reward and every quantity it came from, by name.
    """

    reward: float
    feasible: bool
    terms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A candidate that could not be cut, compiled or run."""

    kind: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One plan followed from weights to a timed engine.

    Attributes:
        number: 0-based position in its run.
        phase: "probe" (the narrowest plan), "search", "settle" or "confirm".
        strategy: the searcher that asked for it.
        plan: what was tried.
        graph_sha256: of the cut ONNX, None if cutting failed.
        measurement: what was seen, or None.
        failure: why there is none, or None.
        quality: on the validation split, None on failure.
        score: the verdict; a failure has one as well, the worst.
        seconds: stage name → wall seconds ("ask", "cut", "measure", "quality").
        cached: the measurement was taken for an earlier trial of the same plan.
    """

    number: int
    phase: str
    strategy: str
    plan: Plan
    graph_sha256: str | None
    measurement: Measurement | None
    failure: Failure | None
    quality: Quality | None
    score: Score
    seconds: Mapping[str, float] = field(default_factory=dict)
    cached: bool = False

    def __post_init__(self) -> None:
        assert (self.measurement is None) != (self.failure is None), "a trial has a timing or a failure, never both"

    def to_json(self) -> dict[str, Any]:
        """Return the trial as JSON values."""
        return {
            "number": self.number,
            "phase": self.phase,
            "strategy": self.strategy,
            "plan": self.plan.to_json(),
            "graph_sha256": self.graph_sha256,
            "measurement": self.measurement.to_json() if self.measurement else None,
            "failure": asdict(self.failure) if self.failure else None,
            "quality": asdict(self.quality) if self.quality else None,
            "score": {"reward": self.score.reward, "feasible": self.score.feasible, "terms": dict(self.score.terms)},
            "seconds": dict(self.seconds),
            "cached": self.cached,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Trial":
        """Return the trial that `to_json` wrote."""
        return cls(
            number=value["number"],
            phase=value["phase"],
            strategy=value["strategy"],
            plan=Plan.from_json(value["plan"]),
            graph_sha256=value["graph_sha256"],
            measurement=Measurement.from_json(value["measurement"]) if value["measurement"] else None,
            failure=Failure(**value["failure"]) if value["failure"] else None,
            quality=Quality(**value["quality"]) if value["quality"] else None,
            score=Score(**value["score"]),
            seconds=value["seconds"],
            cached=value["cached"],
        )
