"""What a report is about: one run in a few words, and its trials without their samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune import quantities
from edgeprune.outcome import Outcome, limit_of, unit_of
from edgeprune.statistics import Interval
from edgeprune.trial import Trial


@dataclass(frozen=True, kw_only=True)
class About:
    """What every part of the page needs to know.

    Attributes:
        unit: what a latency is printed in, with `scale` units in the millisecond of the records.
        limit: the budget as a ratio, None if not known yet.
        planned: trials the search may make, None if not known.
    """

    model: str
    target: str
    strategy: str
    seed: int | None
    requested: str
    limit: float | None
    emulated: bool
    unit: str
    scale: float
    confidence: float
    quantile: float
    planned: int | None

    @property
    def sure(self) -> str:
        """Return the confidence as a word, for example "95 % interval"."""
        return f"{self.confidence * 100:g}{quantities.NBSP}% interval"

    def latency(self, milliseconds: float) -> str:
        """Return a latency with the unit that is true for this target."""
        return f"{self.latencies([milliseconds])[0]}{quantities.NBSP}{self.unit}"

    def latencies(self, milliseconds: Sequence[float]) -> list[str]:
        """Return latencies without the unit, all with the decimals that suit the first."""
        scaled = [each * self.scale for each in milliseconds]
        if self.scale != 1:
            return [quantities.count(each) for each in scaled]
        return [quantities.fixed(each, quantities.decimals(scaled[0])) for each in scaled]


def about(outcome: Outcome | None, setup: Mapping[str, Any]) -> About:
    """Return the subject of a page from the outcome, or from what is known before there is one."""
    known = dict(setup)
    if outcome:
        of_outcome = ("model", "target", "strategy", "seed", "emulated", "metric")
        known |= {name: getattr(outcome, name) for name in of_outcome}
        known |= {"requested": outcome.budget.requested, "limit_ratio": outcome.budget.limit_ratio}
    metric, emulated = known.get("metric", "latency_ns"), known.get("emulated", False)
    counted = emulated or metric == "latency_ns"
    return About(
        model=known.get("model", "a model"),
        target=known.get("target", "a target"),
        strategy=known.get("strategy", ""),
        seed=known.get("seed"),
        requested=limit_of(known.get("requested", ""), emulated),
        limit=known.get("limit_ratio"),
        emulated=emulated,
        unit=unit_of(emulated) if counted else metric,
        scale=1.0 if counted else 1e6,
        confidence=known.get("confidence", 0.95),
        quantile=known.get("quantile", 0.5),
        planned=known.get("trials"),
    )


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One trial as the page needs it; `kind` is "fits", "over", "flagged" or "failed"."""

    number: int
    phase: str
    strategy: str
    plan: str
    kind: str
    ratio: Interval | None
    accuracy: float | None
    reward: float
    terms: Mapping[str, float]
    flags: str
    failure: str
    failure_kind: str
    cached: bool

    @property
    def name(self) -> str:
        """Return what the pointer is told over this trial."""
        words = [f"{self.phase} {self.number}"]
        if self.ratio:
            words.append(f"{self.ratio.p50:.4f}x ({self.ratio.low:.4f}\u2013{self.ratio.high:.4f})")
        if self.accuracy is not None:
            words.append(f"{self.accuracy * 100:.2f} %")
        return ", ".join([*words, *filter(None, [self.flags, self.failure_kind])])


def seen(trial: Trial, subject: About) -> Seen:
    """Return what the page needs of a trial, so that its samples need not be kept."""
    timing = trial.measurement
    flags = (timing.unstable_because or "") if timing else ""
    kind = "failed" if not timing else "flagged" if flags else "fits" if trial.score.feasible else "over"
    return Seen(
        number=trial.number,
        phase=trial.phase,
        strategy=trial.strategy,
        plan=trial.plan.digest,
        kind=kind,
        ratio=timing.ratio(subject.confidence, subject.quantile) if timing and timing.sessions else None,
        accuracy=trial.quality.accuracy if trial.quality else None,
        reward=trial.score.reward,
        terms=trial.score.terms,
        flags=flags,
        failure=trial.failure.message if trial.failure else "",
        failure_kind=trial.failure.kind if trial.failure else "",
        cached=trial.cached,
    )
