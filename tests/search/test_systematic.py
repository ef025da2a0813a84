"""What the searchers that go by a plan of their own, and not by chance, have in common."""

from collections.abc import Callable

import pytest
from search_toys import RESNET56, residual_toy

from edgeprune.search.problem import Problem, Searcher
from edgeprune.search.uniform import Uniform
from edgeprune.search.walk import WalkSearch

Maker = Callable[[Problem], Searcher]

pytestmark = pytest.mark.parametrize("maker", [Uniform, WalkSearch])


def test_failed_candidates_are_stepped_over(maker: Maker) -> None:
    """A plan that cannot be compiled says nothing about its neighbours: the boundary is found all the same."""
    toy = residual_toy(RESNET56, limit=0.5, broken=frozenset({0, 3, 4, 9}))
    told = toy.run(maker(toy.problem), 30)
    assert any(trial.score.feasible for trial in told)
    assert len({trial.plan.digest for trial in told}) == 30


def test_it_is_deterministic_and_asking_twice_changes_nothing(maker: Maker) -> None:
    """The asks depend on what was told alone."""
    toy = residual_toy(RESNET56, noise=0.01)
    first = [trial.plan for trial in toy.run(maker(toy.problem), 25)]
    again = maker(toy.problem)
    for number, plan in enumerate(first):
        assert again.ask() == plan
        assert again.ask() == plan
        again.tell(toy.trial(plan, number))


def test_a_small_space_is_exhausted_without_failing(maker: Maker) -> None:
    """Four plans, ten asks: all are seen, then the best one again."""
    toy = residual_toy([(16, 32, 2)], limit=0.7)
    told = toy.run(maker(toy.problem), 10)
    assert 2 <= len({trial.plan.digest for trial in told}) <= 4
    best = max((trial for trial in told if trial.score.feasible), key=lambda trial: trial.score.reward)
    assert told[-1].plan == best.plan


def test_a_budget_nothing_fits_asks_for_the_narrowest_plan(maker: Maker) -> None:
    """The nearest miss is what a user wants to know then."""
    toy = residual_toy([(16, 32, 2), (32, 16, 2), (64, 8, 2)], limit=0.05)
    told = toy.run(maker(toy.problem), 8)
    least = {group.name: group.choices[0] for group in toy.problem.space.groups}
    assert least in [dict(trial.plan.widths) for trial in told]
    assert not any(trial.score.feasible for trial in told)
