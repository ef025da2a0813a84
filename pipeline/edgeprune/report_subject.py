"""What a report is about: one run in a few words, and its trials without their samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune import quantities
from edgeprune.metric import LATENCY, limit_of, unit_of
from edgeprune.outcome import Outcome
from edgeprune.statistics import Interval
from edgeprune.trial import JUDGES, Trial


@dataclass(frozen=True, kw_only=True)
class About:
    """What every part of the page needs to know.

    Attributes:
        unit: what a latency is printed in.
        limit: the budget as a ratio, None if not known yet.
        planned: trials the search may make, None if not known.
        judge: what the candidates' accuracies are.
        method: of pruning; empty in runs of versions that did not say.
        finetuning: how the winner is trained further; empty until there is an outcome.
    """

    model: str
    target: str
    strategy: str
    seed: int | None
    requested: str
    limit: float | None
    emulated: bool
    unit: str
    confidence: float
    quantile: float
    planned: int | None
    judge: str
    method: str
    finetuning: str

    @property
    def sure(self) -> str:
        """Return the confidence as a word, for example "95 % interval"."""
        return f"{self.confidence * 100:g}{quantities.NBSP}% interval"

    def latency(self, value: float) -> str:
        """Return a latency with the unit that is true for this target."""
        return f"{self.latencies([value])[0]}{quantities.NBSP}{self.unit}"

    def latencies(self, values: Sequence[float]) -> list[str]:
        """Return latencies without the unit, all with the decimals that suit the first."""
        return [quantities.fixed(each, quantities.decimals(values[0])) for each in values]


def about(outcome: Outcome | None, setup: Mapping[str, Any]) -> About:
    """Return the subject of a page from the outcome, or from what is known before there is one."""
    known = dict(setup)
    if outcome:
        of_outcome = ("model", "target", "strategy", "seed", "emulated", "metric", "judged_by", "method", "finetuning")
        known |= {name: getattr(outcome, name) for name in of_outcome}
        known |= {"requested": outcome.budget.requested, "limit_ratio": outcome.budget.limit_ratio}
    metric, emulated = known.get("metric", LATENCY), known.get("emulated", False)
    return About(
        model=known.get("model", "a model"),
        target=known.get("target", "a target"),
        strategy=known.get("strategy", ""),
        seed=known.get("seed"),
        requested=limit_of(known.get("requested", ""), metric),
        limit=known.get("limit_ratio"),
        emulated=emulated,
        unit=unit_of(metric),
        confidence=known.get("confidence", 0.95),
        quantile=known.get("quantile", 0.5),
        planned=known.get("trials"),
        method=known.get("method", ""),
        finetuning=known.get("finetuning", ""),
        judge=JUDGES[known.get("judged_by", "labels")],
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
