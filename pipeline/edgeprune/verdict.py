"""Whether a result keeps what its budget promises: latency, accuracy and size, each breach in one sentence."""

from edgeprune.budget import Budget
from edgeprune.metric import LATENCY, limit_of, unit_of
from edgeprune.outcome import BudgetVerdict, ModelFacts

ROUNDING = 1e-9
"""What a difference of two accuracies may be off by in floating point: far less than one image of any test split."""


def verdict(
    budget: Budget, limit_ratio: float, result: ModelFacts, baseline_accuracy: float, *, metric: str = LATENCY
) -> BudgetVerdict:
    """Return whether a result keeps every promise of its budget, and which it breaks.

    Args:
        limit_ratio: the latency limit as a ratio of the unpruned model.
        metric: what the latencies count; where no clock gave them, no sentence calls them milliseconds.
    """
    assert result.ratio is not None
    missed = []
    in_ms, limit = budget.latency.unit == "ms", budget.latency.value
    if in_ms and result.latency.high > limit:
        ends = f"{result.latency.high:.4g} {unit_of(metric)}"
        missed.append(f"latency: the interval ends at {ends}, above {limit_of(str(budget.latency), metric)}")
    if not in_ms and result.ratio.high > limit_ratio:
        missed.append(f"latency: the interval ends at {result.ratio.high:.4f}x, above {limit_ratio:.4f}x")
    drop = baseline_accuracy - result.accuracy
    if budget.max_accuracy_drop is not None and drop > budget.max_accuracy_drop + ROUNDING:
        allowed = f"{100 * budget.max_accuracy_drop:g} points"
        missed.append(f"accuracy: it fell by {100 * drop:.4g} points, more than the {allowed} allowed")
    size_mib = result.size_bytes / 2**20
    if budget.size_mib is not None and size_mib > budget.size_mib:
        missed.append(f"size: {size_mib:.2f} MiB, more than {budget.size_mib:g} MiB")
    return BudgetVerdict(
        requested=str(budget.latency),
        limit_ratio=limit_ratio,
        met=not missed,
        used=result.latency.p50 / limit if in_ms else result.ratio.p50 / limit_ratio,
        missed=tuple(missed),
    )
