"""A budget is kept only if every promise of it is; each breach has a sentence."""

from dataclasses import replace

import pytest

from edgeprune.budget import Budget, Latency
from edgeprune.metric import FORMULA, LATENCY
from edgeprune.outcome import ModelFacts
from edgeprune.statistics import Interval
from edgeprune.verdict import verdict


def facts_of(*, accuracy: float = 0.9, high: float = 0.49, mib: float = 1.0) -> ModelFacts:
    ratio = Interval(p50=high - 0.01, low=high - 0.02, high=high)
    return ModelFacts(
        accuracy=accuracy,
        test_images=100,
        validation={},
        latency=ratio,
        ratio=ratio,
        parameters=1,
        macs=1,
        size_bytes=round(mib * 2**20),
    )


@pytest.mark.parametrize(
    ("facts", "missed"),
    [
        (facts_of(), []),
        (facts_of(high=0.5), []),
        (facts_of(high=0.501), ["latency"]),
        (facts_of(accuracy=0.87), ["accuracy"]),
        (facts_of(mib=2.5), ["size"]),
        (facts_of(high=0.6, accuracy=0.1, mib=9), ["latency", "accuracy", "size"]),
    ],
)
def test_every_promise_of_a_budget_is_held_against_the_result(facts: ModelFacts, missed: list[str]) -> None:
    """Latency by its upper end, the drop of accuracy on test, the size of the file; each breach has a sentence."""
    budget = Budget(latency=Latency.parse("0.5x"), max_accuracy_drop=0.02, size_mib=2.0)
    seen = verdict(budget, 0.5, facts, 0.91 if facts.accuracy == 0.9 else 0.9)
    assert [each.partition(":")[0] for each in seen.missed] == missed
    assert seen.met == (not missed)


def test_milliseconds_over_the_limit_are_missed_whatever_the_ratio_says() -> None:
    """The machine slowed down between the baseline and the end."""
    result = replace(facts_of(high=0.5), latency=Interval(p50=0.139, low=0.134, high=0.145))
    seen = verdict(Budget(latency=Latency.parse("0.14ms")), 0.9, result, 0.9)
    assert not seen.met
    assert seen.missed == ("latency: the interval ends at 0.145 ms, above 0.14ms",)
    assert seen.summary(LATENCY) == "0.14ms: latency MISSED, 99.3 % used"


def test_what_no_clock_gave_is_not_called_milliseconds() -> None:
    """Neither in the sentence nor in the limit that was asked for; a ratio stays what it is."""
    result = replace(facts_of(high=0.5), latency=Interval(p50=0.139, low=0.134, high=0.145))
    seen = verdict(Budget(latency=Latency.parse("0.14ms")), 0.9, result, 0.9, metric=FORMULA)
    assert seen.missed == ("latency: the interval ends at 0.145 formula units, above 0.14 formula units",)
    assert seen.summary(FORMULA) == "0.14 formula units: latency MISSED, 99.3 % used"
    ratio = verdict(Budget(latency=Latency.parse("0.5x")), 0.5, facts_of(), 0.9, metric=FORMULA)
    assert ratio.summary(FORMULA) == "0.5x: met, 96.0 % used"


def test_a_latency_that_is_met_does_not_read_as_missed() -> None:
    """What is missed comes first, with its unit; latency is said to be met beside its share."""
    budget = Budget(latency=Latency.parse("0.5x"), max_accuracy_drop=0.0001, size_mib=2.0)
    seen = verdict(budget, 0.5, facts_of(accuracy=0.5, mib=3), 0.9)
    assert seen.summary(LATENCY) == "0.5x: accuracy MISSED, size MISSED, latency met, 96.0 % used"
    assert seen.missed == (
        "accuracy: it fell by 40 points, more than the 0.01 points allowed",
        "size: 3.00 MiB, more than 2 MiB",
    )


@pytest.mark.parametrize(("before", "after", "met"), [(0.95, 0.94, True), (0.3, 0.29, True), (0.95, 0.9399, False)])
def test_exactly_the_tolerated_drop_is_tolerated(before: float, after: float, met: bool) -> None:
    """One point is one point, though 0.95 - 0.94 is a little more than 0.01 in floating point; one image is more."""
    budget = Budget(latency=Latency.parse("0.5x"), max_accuracy_drop=0.01)
    assert verdict(budget, 0.5, replace(facts_of(accuracy=after), test_images=10_000), before).met == met
