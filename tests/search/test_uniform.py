"""The uniform control: its chain of plans, the bisection on measured verdicts, and the roundings after it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_toys import RESNET56, Toy, best_accuracy, residual_toy

from edgeprune.latency_model import LatencyModel
from edgeprune.search.rounding import Rounding
from edgeprune.search.uniform import Uniform, uniform_chain, uniform_widths

SMALL = [(16, 32, 2), (32, 16, 2), (64, 8, 2)]


def chain_widths(toy: Toy) -> list[dict[str, int]]:
    rounding = Rounding(toy.problem.space, removal=False)
    return [rounding.widths(row) for row in uniform_chain(rounding, rounding.nearest)]


def test_the_chain_holds_every_uniform_plan_once_and_in_order() -> None:
    """Any keep ratio rounds to a member, members differ, and each is at least as wide everywhere as the one before."""
    toy = residual_toy(SMALL)
    chain = chain_widths(toy)
    for ratio in np.linspace(0.001, 1, 997):
        kept = {g.name: max(g.minimum, g.nearest(ratio * g.width)) for g in toy.problem.space.groups}
        assert kept in chain
    for narrow, wide in itertools.pairwise(chain):
        assert narrow != wide
        assert all(narrow[name] <= wide[name] for name in narrow)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 500), limit=st.floats(0.3, 0.95), removable=st.booleans())
def test_bisection_finds_the_widest_uniform_plan_that_fits(seed: int, limit: float, removable: bool) -> None:
    """Whatever the truth and the budget, a dozen measurements are enough, and removal is used only when needed."""
    toy = residual_toy(SMALL, seed=seed, limit=limit, removable=removable)
    fitting = [widths for widths in chain_widths(toy) if toy.ratio(widths) <= limit]
    told = toy.run(Uniform(toy.problem), 12)
    if fitting:
        assert fitting[-1] in [dict(trial.plan.widths) for trial in told]


def test_a_wrong_latency_model_only_costs_probes() -> None:
    """With shares that explain almost nothing the boundary is still found by measuring."""
    toy = residual_toy(RESNET56, limit=0.55)
    object.__setattr__(toy.problem, "shares", {name: share * 0.05 for name, share in toy.problem.shares.items()})
    fitting = [widths for widths in chain_widths(toy) if toy.ratio(widths) <= 0.55]
    told = toy.run(Uniform(toy.problem), 12)
    assert fitting[-1] in [dict(trial.plan.widths) for trial in told]


def test_after_the_boundary_it_looks_for_better_roundings() -> None:
    """Forty measurements ask forty different plans and end better than the best uniform plan alone."""
    toy = residual_toy(RESNET56, limit=0.5)
    told = toy.run(Uniform(toy.problem), 40)
    assert len({trial.plan.digest for trial in told}) == 40
    plain = [widths for widths in chain_widths(toy) if toy.ratio(widths) <= 0.5][-1]
    assert best_accuracy(told) > toy.accuracy(plain)


@pytest.mark.parametrize("removable", [False, True])
def test_the_predicted_uniform_plan_removes_nothing_unless_it_must(removable: bool) -> None:
    """With a reachable budget every group keeps something."""
    toy = residual_toy(SMALL, limit=0.5, removable=removable)
    widths = uniform_widths(toy.problem, LatencyModel(toy.problem))
    assert min(widths.values()) > 0
    tight = residual_toy(SMALL, limit=0.28, removable=removable)
    assert (min(uniform_widths(tight.problem, LatencyModel(tight.problem)).values()) == 0) is removable
