"""What one deploy came to: the single value behind the closing table, `--json`, the manifest and the report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgeprune.metric import limit_of, unit_of
from edgeprune.statistics import Interval, share_interval

PROMISES = ("latency", "accuracy", "size")
"""What a budget may promise; the sentence of a promise that is not kept begins with its word."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Accuracy and cost of one model on one device.

    Attributes:
        accuracy: top-1 on the test split, fraction.
        test_images: how many images it was counted on.
        validation: stage → top-1 on the validation split ("baseline", "cut", "calibrated", "tuned").
        latency: on the target, in the unit of the outcome's metric (see `edgeprune.metric`): milliseconds of a device.
        ratio: to the unpruned model on the same device; None for the unpruned model itself.
        parameters, macs, size_bytes: of the ONNX graph.
        attacked: attack → top-1 after it, fraction, see `edgeprune.robustness`; empty where none was carried out.
        attacked_images: how many of the test images were attacked.
    """

    accuracy: float
    test_images: int
    validation: Mapping[str, float]
    latency: Interval
    ratio: Interval | None
    parameters: int
    macs: int
    size_bytes: int
    attacked: Mapping[str, float] = field(default_factory=dict)
    attacked_images: int = 0

    @property
    def accuracy_interval(self) -> Interval:
        """Return the accuracy with the 95 % interval of what as many other test images could show."""
        return share_interval(self.accuracy, self.test_images)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON values, the interval of the accuracy included."""
        return asdict(self) | {"accuracy_interval": self.accuracy_interval.to_json()}


@dataclass(frozen=True, kw_only=True)
class BudgetVerdict:
    """The promise and whether it is kept.

    Attributes:
        requested: as the user wrote it, e.g. "0.5x".
        limit_ratio: as a ratio of the unpruned model.
        met: the upper end of the result's interval is under the limit, and every other limit holds.
        used: result / limit, as ratios or as milliseconds, as it was requested; 1 is a budget used in full.
        missed: what is not met, one sentence each.
    """

    requested: str
    limit_ratio: float
    met: bool
    used: float
    missed: tuple[str, ...] = ()

    @property
    def broken(self) -> tuple[str, ...]:
        """Return the words of `PROMISES` that are not kept."""
        return tuple(each for each in PROMISES if any(said.startswith(f"{each}:") for said in self.missed))

    def summary(self, metric: str) -> str:
        """Return the verdict in one line; where something is missed, what it is and whether latency is part of it."""
        limit, used = limit_of(self.requested, metric), f"{100 * self.used:.1f} % used"
        if self.met:
            return f"{limit}: met, {used}"
        latency = "latency MISSED" if "latency" in self.broken else "latency met"
        others = [f"{each} MISSED" for each in self.broken if each != "latency"]
        return f"{limit}: {', '.join([*others, latency, used])}"


@dataclass(frozen=True, kw_only=True)
class WidthChange:
    """One channel group before and after, in channels."""

    group: str
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything a deploy reports.

    Attributes:
        model: what was pruned, as the user named it.
        target: profile name.
        emulated: the latencies come from a formula or an emulator.
        metric: what a latency counts, "latency_ns" on real devices.
        strategy: the searcher.
        method: how widths and channels were chosen, see `edgeprune.methods`.
        judged_by: what candidates were judged by, see `edgeprune.trial.JUDGES`.
        tested_on: what the accuracies are counted on.
        finetuning: "one-step", "decay by <host>", or "none".
        importance, reconstruction: the rule that ranked channels, and what made up for those that went.
        entropy_rank_correlation: of low entropy with accuracy among the candidates, where the reward looks at entropy.
        measurements: latency measurements spent, repeats of failures included.
        trials: candidates tried.
        widths: every channel group before and after.
        layer_shares: layer name → share of the unpruned model's time.
        result_layer_shares: the same of the result.
        seconds: stage → wall seconds.
        versions: package → version.
        conditions: of the final measurement.
        warnings: what the user should look into, one sentence each.
        flags: what the target found wrong with the final measurement, one sentence each.
        run_dir, bundle, archive, report: paths as text; empty until written.
    """

    model: str
    target: str
    emulated: bool
    metric: str
    strategy: str
    seed: int
    baseline: ModelFacts
    result: ModelFacts
    budget: BudgetVerdict
    measurements: int
    trials: int
    widths: tuple[WidthChange, ...]
    method: str = "amc"
    judged_by: str = "labels"
    tested_on: str = "test images"
    finetuning: str = "one-step"
    importance: str = ""
    reconstruction: str = ""
    entropy_rank_correlation: float | None = None
    layer_shares: Mapping[str, float] = field(default_factory=dict)
    result_layer_shares: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    run_dir: str = ""
    bundle: str = ""
    archive: str = ""
    report: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        models = {"baseline": self.baseline.to_json(), "result": self.result.to_json()}
        return asdict(self) | models | {"unit": unit_of(self.metric)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Outcome":
        """Return the outcome that `to_json` wrote."""
        fields = {name: each for name, each in value.items() if name != "unit"}  # it follows from the metric
        fields["baseline"] = _facts(value["baseline"])
        fields["result"] = _facts(value["result"])
        fields["budget"] = BudgetVerdict(**{**value["budget"], "missed": tuple(value["budget"]["missed"])})
        fields |= {name: tuple(value.get(name, ())) for name in ("flags", "warnings")}
        fields["widths"] = tuple(WidthChange(**each) for each in value["widths"])
        return cls(**fields)


def counted(tested_on: str) -> str:
    """Return what the closing number is: "accuracy", or, without labels, "agreement" with the unpruned model."""
    return "accuracy" if tested_on == "test images" else "agreement"


def without_data(tested_on: str) -> bool:
    """Return whether the closing number is of synthetic images, no data set having been read at all."""
    return tested_on.startswith("synthetic")


def runtime_line(conditions: Mapping[str, Any], *, emulated: bool) -> str:
    """Return which of a board's runtimes was chosen and what the other takes, empty where there was no choice.

    Args:
        conditions: of a measurement; an adapter that chose says so under "runtimes".
        emulated: instructions were counted, so that nothing is known of what is faster.
    """
    seen = conditions.get("runtimes")
    if not isinstance(seen, Mapping):
        return ""
    chosen, other, times = seen["chosen"], seen["other"], seen["times"]
    if times is None:
        return f"{chosen}; {other} refuses the model"
    if emulated:
        return f"{chosen}; {other} takes {times['p50']:.2f}x its instructions"
    factor = times["p50"]
    return (
        f"{chosen}, {factor:.2f}x faster than {other}"
        if factor >= 1
        else f"{chosen}, {1 / factor:.2f}x slower than {other}"
    )


def _facts(value: Mapping[str, Any]) -> ModelFacts:
    ratio = Interval(**value["ratio"]) if value["ratio"] else None
    given = {name: each for name, each in value.items() if name != "accuracy_interval"}  # it follows from the others
    return ModelFacts(**{**given, "latency": Interval(**value["latency"]), "ratio": ratio})
