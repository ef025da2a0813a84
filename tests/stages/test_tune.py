"""The widths that decay aims at when they are picked by latency."""

import numpy as np
from search_toys import Toy, residual_toy

from edgeprune.stages.tune import plan_by_latency
from edgeprune.trial import Trial


def trials_of(toy: Toy, count: int) -> list[Trial]:
    """Return trials of random plans."""
    rng, groups = np.random.default_rng(0), toy.problem.space.groups
    plans = [toy.problem.plan({each.name: int(rng.choice(each.choices)) for each in groups}) for _ in range(count)]
    return [toy.trial(plan, number) for number, plan in enumerate(plans)]


def test_the_plan_fits_in_truth_and_keeps_what_matters() -> None:
    """After thirty measurements of a toy: within the budget, and the group that accuracy hangs on stays widest."""
    toy = residual_toy([(32, 32, 4), (64, 16, 4)])
    names = list(toy.problem.full)
    toy.sensitivity = dict.fromkeys(names, 0.1) | {names[2]: 4.0}
    plan = plan_by_latency(toy.problem, trials_of(toy, 30))
    assert toy.ratio(plan.widths) <= toy.problem.limit_ratio
    shares = {name: plan.widths[name] / toy.problem.full[name] for name in names[:4]}
    assert max(shares, key=shares.__getitem__) == names[2]


def test_a_miss_makes_the_next_pick_narrower() -> None:
    """By as much as the limit was missed by."""
    toy = residual_toy([(32, 32, 4), (64, 16, 4)])
    trials, limit = trials_of(toy, 30), toy.problem.limit_ratio
    first = plan_by_latency(toy.problem, trials)
    second = plan_by_latency(toy.problem, trials, [limit * 1.2, limit * 1.1])
    assert toy.ratio(second.widths) < toy.ratio(first.widths) / 1.1
