"""The reward: each addend by hand, the hard budget, failures, and what cannot be scored."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import ConfigError, DataError
from edgeprune.methods import presets
from edgeprune.reward import TERMS, RewardWeights, merit, score, worst_score
from edgeprune.statistics import Interval
from edgeprune.trial import Quality

BASELINE = Quality(accuracy=0.9, entropy=2.0, images=1000)
FINE = Quality(accuracy=0.72, entropy=1.5, images=1000)


def ratio(middle: float, half: float = 0.01) -> Interval:
    return Interval(p50=middle, low=middle - half, high=middle + half)


def test_every_addend_is_the_formula_by_hand() -> None:
    """0.8·1 − 5·0.1 − 0.5·0.75 + 2·min(0, 1 − 0.54), and the reward is the sum of the addends."""
    weights = RewardWeights(accuracy=1, overrun=5, unused=3, entropy=0.5, speed=2)
    found = score(FINE, ratio(0.54), baseline=BASELINE, limit_ratio=0.5, weights=weights)
    assert found.terms["reward_accuracy"] == pytest.approx(0.8)
    assert found.terms["reward_latency"] == pytest.approx(-0.5)
    assert found.terms["reward_entropy"] == pytest.approx(-0.375)
    assert found.terms["reward_unused"] == found.terms["reward_speed"] == 0
    assert found.reward == pytest.approx(0.8 - 0.5 - 0.375)
    assert found.reward == pytest.approx(sum(found.terms[name] for name in TERMS))


def test_every_quantity_behind_the_number_is_kept() -> None:
    """Raw and relative values stand beside the addends, so a row of the ledger explains itself."""
    terms = score(FINE, ratio(0.4), baseline=BASELINE, limit_ratio=0.5).terms
    expected = {
        "accuracy": 0.72,
        "accuracy_relative": 0.8,
        "entropy": 1.5,
        "entropy_relative": 0.75,
        "latency_ratio": 0.4,
        "latency_low": 0.39,
        "latency_high": 0.41,
        "latency_limit": 0.5,
        "overrun": 0.0,
    }
    assert {name: terms[name] for name in expected} == pytest.approx(expected)


def test_being_slower_than_the_unpruned_model_can_cost_extra() -> None:
    """The speed term starts where the ratio passes 1."""
    weights = RewardWeights(speed=2)
    found = score(FINE, ratio(1.1), baseline=BASELINE, limit_ratio=0.5, weights=weights)
    assert found.terms["reward_speed"] == pytest.approx(-0.2)


def test_leaving_the_budget_unused_can_cost() -> None:
    """A tenth may be left over; of 0.5 a plan of 0.3 uses 60 %, so 30 % count, three times."""
    found = score(FINE, ratio(0.3), baseline=BASELINE, limit_ratio=0.5, weights=RewardWeights(unused=3))
    assert found.terms["reward_unused"] == pytest.approx(-0.9)
    assert score(FINE, ratio(0.45), baseline=BASELINE, limit_ratio=0.5).terms["unused"] == pytest.approx(0)


@pytest.mark.parametrize(("high", "feasible"), [(0.499, True), (0.5, True), (0.501, False)])
def test_the_budget_is_hard_and_compared_with_the_upper_end(high: float, feasible: bool) -> None:
    """An estimate inside the limit does not count while its interval reaches over it, and it is penalised."""
    found = score(FINE, Interval(p50=0.48, low=0.46, high=high), baseline=BASELINE, limit_ratio=0.5)
    assert found.feasible is feasible
    assert (found.terms["reward_latency"] == 0) is feasible


@settings(deadline=None)
@given(accuracy=st.floats(0, 1), middle=st.floats(0.02, 0.99), entropy=st.floats(0, 2), limit=st.floats(0.1, 0.9))
def test_no_candidate_faster_than_the_unpruned_model_scores_below_a_failure(
    accuracy: float, middle: float, entropy: float, limit: float
) -> None:
    """A failed trial is told the worst score."""
    quality = Quality(accuracy=accuracy, entropy=entropy, images=10)
    found = score(quality, ratio(middle, 0.01), baseline=BASELINE, limit_ratio=limit)
    assert found.reward >= worst_score(limit).reward - 1e-9
    assert not worst_score(limit).feasible


@settings(deadline=None)
@given(better=st.floats(0, 1), worse=st.floats(0, 1))
def test_more_accuracy_is_never_worth_less(better: float, worse: float) -> None:
    """At equal latency and entropy the reward orders candidates by accuracy."""
    better, worse = max(better, worse), min(better, worse)
    one, other = (
        score(Quality(accuracy=each, entropy=1.0, images=10), ratio(0.4), baseline=BASELINE, limit_ratio=0.5)
        for each in (better, worse)
    )
    assert one.reward >= other.reward


def test_entropy_can_be_left_out_when_it_has_no_weight() -> None:
    """With weight 0 nothing is computed and nothing is missing."""
    quality = Quality(accuracy=0.9, entropy=None, images=10)
    found = score(quality, ratio(0.4), baseline=quality, limit_ratio=0.5, weights=RewardWeights(entropy=0))
    assert found.reward == 1.0
    assert "entropy" not in found.terms


@pytest.mark.parametrize("baseline_entropy", [None, 0.0])
def test_a_weighed_entropy_that_is_missing_is_an_error(baseline_entropy: float | None) -> None:
    """Silently scoring without it would compare rewards of two kinds."""
    baseline = Quality(accuracy=0.9, entropy=baseline_entropy, images=10)
    with pytest.raises(ConfigError, match="entropy"):
        score(FINE, ratio(0.4), baseline=baseline, limit_ratio=0.5, weights=RewardWeights(entropy=0.1))


def test_an_unpruned_model_that_gets_nothing_right_cannot_be_compared_with() -> None:
    """Accuracy relative to 0 is no number."""
    with pytest.raises(DataError, match="no validation image"):
        score(FINE, ratio(0.4), baseline=Quality(accuracy=0.0, entropy=1.0, images=10), limit_ratio=0.5)


@pytest.mark.parametrize("name", ["accuracy", "overrun", "unused", "entropy", "speed"])
def test_weights_are_not_negative(name: str) -> None:
    """A negative weight would turn a term round; the message names it."""
    with pytest.raises(ConfigError, match=name):
        RewardWeights(**{name: -0.1})


# -- merit -------------------------------------------------------------------------------------------------------------


def test_what_decides_is_accuracy_unless_it_has_no_weight() -> None:
    """A reward of entropy alone must not get accuracy back through the choice of the winner."""
    facts = {"accuracy": 0.7, "entropy_relative": 0.4, "unused": 0.0}
    assert merit(facts, RewardWeights()) == 0.7
    assert merit(facts, RewardWeights(entropy=0.0)) == 0.7
    assert merit(facts, RewardWeights(accuracy=0.0, entropy=1.0)) == -0.4
    assert merit({"accuracy": 0.7}, RewardWeights(accuracy=0.0, entropy=0.0)) == 0.7


def test_the_emptiest_network_does_not_win_by_being_the_most_orderly() -> None:
    """Entropy alone is compared at the latency of the budget: next to nothing of a network has next to no entropy."""
    weights = RewardWeights(**presets("entropy-rl", data_free=False)["reward"])
    orderly, used = (
        score(Quality(accuracy=0.2, entropy=each, images=10), at, baseline=BASELINE, limit_ratio=0.5, weights=weights)
        for each, at in ((0.1, ratio(0.02)), (1.9, ratio(0.48)))
    )
    assert used.terms["merit"] > orderly.terms["merit"]
    assert used.reward > orderly.reward
