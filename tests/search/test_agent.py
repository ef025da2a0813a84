"""The agents: the same told trials give the same asks, nobody else's randomness moves, and they learn a toy."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from search_toys import RESNET56, Toy, best_accuracy, residual_toy

from edgeprune.errors import ConfigError
from edgeprune.search.agent import _disturbed, own_randomness
from edgeprune.search.strategies import STRATEGIES, make_searcher
from edgeprune.trial import Trial

LEARNERS = ("ddpg", "sac")
SMALL = [(16, 32, 2), (32, 16, 2)]


def small(**more: object) -> Toy:
    return residual_toy(SMALL, limit=0.6, trials=14, removable=True, **more)


def disturb() -> None:
    """Draw from every global generator, as other code of a process does."""
    random.random()
    np.random.rand(3)
    torch.rand(3)


# -- what every strategy does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_told_trials_give_the_same_asks(strategy: str) -> None:
    """Whatever else the process draws: a killed run replays its ledger to the plan it would have asked for."""
    toy = small(noise=0.01)
    first = [trial.plan for trial in toy.run(make_searcher(strategy, toy.problem), 14)]
    searcher, again = make_searcher(strategy, toy.problem), []
    for number in range(14):
        disturb()
        again.append(searcher.ask())
        disturb()
        searcher.tell(toy.trial(again[-1], number))
    assert again == first


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_ask_that_was_not_told_is_asked_again(strategy: str) -> None:
    """A measurement that the lab lost changes nothing."""
    toy = small()
    searcher = make_searcher(strategy, toy.problem)
    for number in range(8):
        plan = searcher.ask()
        assert searcher.ask() == plan
        searcher.tell(toy.trial(plan, number))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_plan_is_asked_for_twice(strategy: str) -> None:
    """A measurement of a known plan teaches nothing."""
    toy = residual_toy(RESNET56, trials=14, removable=True)
    asked = [trial.plan.digest for trial in toy.run(make_searcher(strategy, toy.problem), 14)]
    assert len(set(asked)) == 14


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_failed_trials_do_not_stop_a_search(strategy: str) -> None:
    """The first, one in the warm-up and some after it: the search goes on and finds a plan that fits."""
    toy = small(broken=frozenset({0, 3, 7, 8, 13}))
    told = toy.run(make_searcher(strategy, toy.problem), 14)
    assert sum(each.failure is not None for each in told) == 5
    assert best_accuracy(told) > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plans_are_near_the_budget_once_the_machine_is_known(strategy: str) -> None:
    """Nobody wastes measurements on plans that leave much of the budget, and few are over it by much."""
    toy = residual_toy(RESNET56, limit=0.5, trials=16, removable=True)
    told = toy.run(make_searcher(strategy, toy.problem), 16)
    ratios = [toy.ratio(each.plan.widths) for each in told[6:]]
    assert 0.44 < np.median(ratios) < 0.52


@pytest.mark.parametrize("strategy", LEARNERS)
def test_seeds_differ_in_what_they_try(strategy: str) -> None:
    """Another seed is another search; the first plan is the same for all."""
    one, other = (residual_toy(SMALL, limit=0.6, trials=8, removable=True) for _ in range(2))
    reseeded = type(other.problem)(
        **{name: getattr(other.problem, name) for name in type(other.problem).__dataclass_fields__} | {"seed": 5}
    )
    first = [each.plan for each in one.run(make_searcher(strategy, one.problem), 8)]
    second = [each.plan for each in other.run(make_searcher(strategy, reseeded), 8)]
    assert first[0] == second[0]
    assert first[1:] != second[1:]


def test_an_unknown_strategy_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        make_searcher("annealing", small().problem)
    assert all(name in str(caught.value) for name in STRATEGIES)


# -- agents ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", LEARNERS)
def test_an_agent_learns_what_is_worth_keeping(strategy: str) -> None:
    """Over five networks: among plans of one latency the later ones are more accurate than the first and chance's."""

    def accuracies(name: str) -> np.ndarray:
        toys = [
            residual_toy(RESNET56, trials=32, removable=True, contrast=1.5, damage=0.35, seed=seed, noise=0.004)
            for seed in range(5)
        ]
        told = [toy.run(make_searcher(name, toy.problem), 32) for toy in toys]
        return np.array([[each.quality.accuracy for each in trials] for trials in told])

    learned, drawn = accuracies(strategy), accuracies("random")
    assert learned[:, -8:].mean() > learned[:, 1:6].mean() + 0.08
    assert learned[:, -8:].mean() > drawn[:, -8:].mean() + 0.08


@pytest.mark.parametrize("strategy", LEARNERS)
def test_an_agent_leaves_global_randomness_and_threads_alone(strategy: str) -> None:
    """The states of Python's, NumPy's and PyTorch's generators are what they were, and so is the thread count."""
    toy = small()

    def state() -> list[object]:
        numpy_words = np.random.get_state()[1].tolist()
        return [random.getstate(), numpy_words, torch.get_rng_state().tolist(), torch.get_num_threads()]

    before = state()
    toy.run(make_searcher(strategy, toy.problem), 8)
    assert state() == before


@pytest.mark.parametrize("strategy", LEARNERS)
def test_an_agent_learns_inside_inference_mode(strategy: str) -> None:
    """An evaluator that forgot to leave inference mode does not break its gradients."""
    toy = small()
    with torch.inference_mode():
        told = toy.run(make_searcher(strategy, toy.problem), 8)
    assert len(told) == 8


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_a_policy_that_diverged_stops_the_search_instead_of_drawing_for_ever(sigma: float) -> None:
    with pytest.raises(FloatingPointError):
        _disturbed(np.array([np.nan]), sigma, np.random.default_rng(0))


def test_own_randomness_depends_on_its_seed_alone() -> None:
    """Two blocks of one seed draw the same; another seed draws otherwise."""

    def drawn(*seed: int) -> tuple[float, float, float]:
        disturb()
        with own_randomness(*seed):
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert drawn(1, 2) == drawn(1, 2)
    assert all(a != b for a, b in zip(drawn(1, 2), drawn(1, 3), strict=True))


# -- repairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["sac", "random"])
def test_plans_of_a_problem_that_repairs_say_how(strategy: str) -> None:
    """The uniform plan apart, which has the method's own; and they are replayed like any others."""
    toy = small()
    toy = replace(toy, problem=replace(toy.problem, repairs=True))
    told = toy.run(make_searcher(strategy, toy.problem), 12)
    cut = [each.plan for each in told[1:] if any(w < toy.problem.full[n] for n, w in each.plan.widths.items())]
    assert cut
    assert all(plan.repair for plan in cut)
    assert len({round(each, 6) for plan in cut for each in plan.repair.values()}) > len(cut)
    assert [each.plan for each in toy.run(make_searcher(strategy, toy.problem), 12)] == [each.plan for each in told]


def test_an_agent_of_two_actions_beats_chance_and_uniform_plans() -> None:
    """Over three networks and equal evaluations it learns widths and how much to repair at once.

    Uniform plans repair in full, which is not best here. Where it is, they win: there is nothing to learn then.
    """

    def runs(name: str) -> list[list[Trial]]:
        toys = [
            residual_toy(
                RESNET56, trials=32, removable=True, contrast=1.5, damage=0.5, seed=seed, mended=0.8, mended_at=0.3
            )
            for seed in range(3)
        ]
        toys = [replace(toy, problem=replace(toy.problem, repairs=name != "uniform")) for toy in toys]
        return [toy.run(make_searcher(name, toy.problem), 32) for toy in toys]

    learned, drawn, even = runs("sac"), runs("random"), runs("uniform")
    late, chance = (
        np.mean([each.quality.accuracy for told in made for each in told[-8:]]) for made in (learned, drawn)
    )
    assert late > chance + 0.05
    best, random, uniform = (np.mean([best_accuracy(told) for told in made]) for made in (learned, drawn, even))
    assert best > random
    assert best > uniform
