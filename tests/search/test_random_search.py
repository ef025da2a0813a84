"""Random search: on the budget, never twice, the same for the same seed."""

from dataclasses import replace

import numpy as np
import pytest
from search_toys import RESNET56, best_accuracy, residual_toy

from edgeprune.latency_model import LatencyModel
from edgeprune.search.random_search import RandomSearch, draw_repair, draw_widths
from edgeprune.search.uniform import uniform_widths


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.8])
def test_draws_use_the_budget_and_keep_it_by_prediction(limit: float) -> None:
    """Most draws are predicted between 90 % and 100 % of the limit, none above."""
    toy = residual_toy(RESNET56, removable=True)
    model, rng = LatencyModel(toy.problem), np.random.default_rng(0)
    predicted = [model.predict(draw_widths(toy.problem, model, limit, rng)) / limit for _ in range(100)]
    assert max(predicted) <= 1
    assert np.mean(np.array(predicted) > 0.9) > 0.8


def test_it_asks_for_different_plans_that_mostly_fit() -> None:
    """Fifty asks, fifty plans, most of them inside the measured budget and near it."""
    toy = residual_toy(RESNET56, noise=0.005)
    told = toy.run(RandomSearch(toy.problem), 50)
    assert len({trial.plan.digest for trial in told}) == 50
    assert sum(trial.score.feasible for trial in told) > 30
    assert np.median([trial.score.terms["latency_ratio"] for trial in told]) > 0.47


def test_the_first_ask_is_the_predicted_uniform_plan() -> None:
    """So that random search and the agents start from the same anchor."""
    toy = residual_toy(RESNET56)
    expected = uniform_widths(toy.problem, LatencyModel(toy.problem))
    assert RandomSearch(toy.problem).ask().widths == expected


def test_the_seed_decides() -> None:
    """One seed, one sequence; another seed, another."""
    toys = [residual_toy(RESNET56), residual_toy(RESNET56), residual_toy(RESNET56)]
    object.__setattr__(toys[2].problem, "seed", 1)
    runs = [[trial.plan.digest for trial in toy.run(RandomSearch(toy.problem), 10)] for toy in toys]
    assert runs[0] == runs[1]
    assert runs[0][1:] != runs[2][1:]


def test_a_small_space_is_exhausted_without_failing() -> None:
    """Four plans, ten asks: every plan is seen, and later asks repeat plans rather than raise."""
    toy = residual_toy([(16, 32, 2)], limit=0.99)
    told = toy.run(RandomSearch(toy.problem), 20)
    assert 3 <= len({trial.plan.digest for trial in told}) <= 4


def test_failures_and_impossible_budgets_do_not_stop_it() -> None:
    """Failed trials are remembered as tried; with nothing feasible it stays at the narrow end."""
    toy = residual_toy(RESNET56, broken=frozenset(range(10)))
    assert best_accuracy(toy.run(RandomSearch(toy.problem), 20)) > 0
    tight = residual_toy(RESNET56, limit=0.05)
    assert not any(trial.score.feasible for trial in tight.run(RandomSearch(tight.problem), 5))


def test_coefficients_are_drawn_from_all_alike_to_anything_goes() -> None:
    """Also nearly all high and nearly all low, which independent ones never are in a network of many groups."""
    problem = replace(residual_toy(RESNET56).problem, repairs=True)
    drawn = [list(draw_repair(problem, np.random.default_rng(seed)).values()) for seed in range(200)]
    means, spreads = np.mean(drawn, axis=1), np.std(drawn, axis=1)
    assert len(drawn[0]) == len(problem.full)
    assert 0 <= np.min(drawn) <= np.max(drawn) <= 1
    assert means.min() < 0.1 < 0.9 < means.max()
    assert spreads.min() < 0.05 < 0.4 < spreads.max()
    assert draw_repair(replace(problem, repairs=False), np.random.default_rng(0)) is None
