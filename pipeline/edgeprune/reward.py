"""Why a candidate got its number: accuracy, latency against the budget, entropy, each a term of its own.

    R = w_a · acc / acc_0 − w_o · max(0, T_high / T_limit − 1) − w_u · max(0, 0.9 − T / T_limit) − w_e · H / H_0
        + w_s · min(0, 1 − T / T_0)

A new term is one function in `TERMS` and one field of `RewardWeights`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgeprune.errors import ConfigError, DataError
from edgeprune.statistics import Interval
from edgeprune.trial import Quality, Score

USED = 0.9
"""A plan that uses this share of its latency budget leaves nothing unused."""


@dataclass(frozen=True, kw_only=True)
class RewardWeights:
    """How much each term counts.

    Attributes:
        accuracy: w_a, of the accuracy relative to the unpruned model's.
        overrun: w_o, of the budget's overrun, 0.1 for 10 %. Before fine-tuning 1 % of latency buys up to some 3 % of
            relative accuracy on the CIFAR ResNets; at 5 overrunning never pays. The budget itself is hard whatever
            the weight: an infeasible plan never wins, the term only tells a learner which way to go.
        unused: w_u, of the share of the budget that is left over beyond a tenth. 0, because accuracy falls with
            latency of its own; entropy falls too, so a reward of entropy alone needs it: the emptiest network is the
            most orderly.
        entropy: w_e, of the spatial entropy relative to the unpruned model's. Small on purpose: at a fixed
            cost its correlation with accuracy had no consistent sign in our trials. 0 switches it off.
        speed: w_s, of being slower than the unpruned model; 0 because the overrun says so already.
    """

    accuracy: float = 1.0
    overrun: float = 5.0
    unused: float = 0.0
    entropy: float = 0.02
    speed: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not weight >= 0:
                raise ConfigError(f"reward weight {name} is {weight}", why="weights are 0 or more")


def reward_accuracy(facts: Mapping[str, float], weights: RewardWeights) -> float:
    """Return w_a · acc / acc_0."""
    return weights.accuracy * facts["accuracy_relative"]


def reward_latency(facts: Mapping[str, float], weights: RewardWeights) -> float:
    """Return − w_o · overrun, of the interval's upper end because that is what the budget is compared with."""
    return -weights.overrun * facts["overrun"]


def reward_unused(facts: Mapping[str, float], weights: RewardWeights) -> float:
    """Return − w_u · what is left of the budget beyond a tenth, as a share of it."""
    return -weights.unused * facts["unused"]


def reward_entropy(facts: Mapping[str, float], weights: RewardWeights) -> float:
    """Return − w_e · H / H_0 (Musat and Andonie's objective, arXiv 2312.04918, as one addend among others)."""
    return -weights.entropy * facts.get("entropy_relative", 0.0)


def reward_speed(facts: Mapping[str, float], weights: RewardWeights) -> float:
    """Return w_s · min(0, 1 − T / T_0)."""
    return weights.speed * min(0.0, 1.0 - facts["latency_ratio"])


TERMS: dict[str, Callable[[Mapping[str, float], RewardWeights], float]] = {
    "reward_accuracy": reward_accuracy,
    "reward_latency": reward_latency,
    "reward_unused": reward_unused,
    "reward_entropy": reward_entropy,
    "reward_speed": reward_speed,
}


def score(
    quality: Quality, ratio: Interval, *, baseline: Quality, limit_ratio: float, weights: RewardWeights | None = None
) -> Score:
    """Return the verdict on a candidate.

    Args:
        quality: of the candidate.
        ratio: its measured latency as a ratio of the unpruned model's.
        baseline: quality of the unpruned model on the same images.
        limit_ratio: the budget in the same unit.
        weights: defaults if not given.

    Raises:
        DataError: if the unpruned model gets nothing right, so that nothing can be compared with it.
        ConfigError: if the entropy has a weight but was not computed.
    """
    weights = weights or RewardWeights()
    facts = _latency_facts(ratio, limit_ratio) | _quality_facts(quality, baseline, weights)
    facts["merit"] = merit(facts, weights)
    return _scored(facts, weights, feasible=ratio.high <= limit_ratio)


def merit(facts: Mapping[str, float], weights: RewardWeights) -> float:
    """Return what decides between two plans that fit: accuracy, or, where it has no weight, − H / H_0 − w_u · unused.

    A reward that does not look at accuracy must not get it back through the choice of the winner.
    """
    if weights.accuracy > 0 or weights.entropy == 0:
        return facts["accuracy"]
    return -facts["entropy_relative"] + reward_unused(facts, weights)


def worst_score(limit_ratio: float, weights: RewardWeights | None = None) -> Score:
    """Return the score of a candidate that failed: nothing right, as slow and disordered as the unpruned model,
    and as much of the budget unused as if it took no time.
    """
    weights = weights or RewardWeights()
    unpruned = _latency_facts(Interval(p50=1.0, low=1.0, high=1.0), limit_ratio)
    addends = {name: term(unpruned | _NOTHING, weights) for name, term in TERMS.items()}
    return Score(reward=sum(addends.values()), feasible=False, terms=addends)


_NOTHING = {"accuracy_relative": 0.0, "entropy_relative": 1.0, "unused": USED}


def _scored(facts: Mapping[str, float], weights: RewardWeights, *, feasible: bool) -> Score:
    addends = {name: term(facts, weights) for name, term in TERMS.items()}
    return Score(reward=sum(addends.values()), feasible=feasible, terms={**facts, **addends})


def _latency_facts(ratio: Interval, limit_ratio: float) -> dict[str, float]:
    return {
        "latency_ratio": ratio.p50,
        "latency_low": ratio.low,
        "latency_high": ratio.high,
        "latency_limit": limit_ratio,
        "overrun": max(0.0, ratio.high / limit_ratio - 1),
        "unused": max(0.0, USED - ratio.p50 / limit_ratio),
    }


def _quality_facts(quality: Quality, baseline: Quality, weights: RewardWeights) -> dict[str, float]:
    if not baseline.accuracy > 0:
        raise DataError(
            "the unpruned model classifies no validation image correctly",
            why="accuracy is judged relative to it",
            next_step="check the weights, the class order and the preprocessing",
        )
    facts = {"accuracy": quality.accuracy, "accuracy_relative": quality.accuracy / baseline.accuracy}
    if quality.entropy is not None and baseline.entropy:
        return facts | {"entropy": quality.entropy, "entropy_relative": quality.entropy / baseline.entropy}
    if weights.entropy > 0:
        raise ConfigError(
            "the reward weighs entropy but there is none to compare",
            why="it was not computed, or the unpruned model's activations are constant",
            next_step="set the entropy weight to 0",
        )
    return facts
