"""The walk as a search: down to the budget in few measurements, then up where a layer is worth its latency."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_toys import RESNET56, Toy, best_accuracy, conv, residual_toy

from edgeprune.paoding.schedule import STEP, width_after
from edgeprune.plan import Group, Space
from edgeprune.search.problem import Problem
from edgeprune.search.random_search import RandomSearch
from edgeprune.search.rounding import Rounding
from edgeprune.search.strategies import make_searcher
from edgeprune.search.uniform import Uniform
from edgeprune.search.walk import WalkSearch

SMALL = [(16, 32, 2), (32, 16, 2), (64, 8, 2)]


def walked(toy: Toy) -> list[dict[str, int]]:
    """Return the plans of the walk by stepping through it, wide to narrow, nothing removed altogether."""
    rounding = Rounding(toy.problem.space, removal=False)
    rows = [[width_after(int(full), STEP, n, dense=False) for full in rounding.full] for n in range(200)]
    found = [rounding.widths(row) for row in rounding.nearest(np.array(rows, dtype=float))]
    return [widths for widths, _ in itertools.groupby(found)]


def mixed_toy(limit: float = 0.5) -> Toy:
    """Return two convolutions and two dense layers inside, single units allowed."""
    shapes = {"kernel": 1, "height": 1, "width": 1, "kind": "linear"}
    layers = (
        conv("conv1", 3, 32, 16, out_units={"conv1": 1}),
        conv("conv2", 32, 64, 8, in_units={"conv1": 1}, out_units={"conv2": 1}),
        conv("fc1", 64 * 16, 128, 1, in_units={"conv2": 16}, out_units={"fc1": 1}, **shapes),
        conv("fc2", 128, 64, 1, in_units={"fc1": 1}, out_units={"fc2": 1}, **shapes),
        conv("fc3", 64, 10, 1, in_units={"fc2": 1}, **shapes),
    )
    widths = {"conv1": 32, "conv2": 64, "fc1": 128, "fc2": 64}
    work = {layer.name: layer.macs(widths, widths) for layer in layers}
    costs = {name: 0.9 * each / sum(work.values()) for name, each in work.items()}
    problem = Problem(
        space=Space(groups=tuple(Group(name=n, width=w, minimum=1, multiple=1) for n, w in widths.items())),
        layers=layers,
        ranking={name: tuple(range(width)) for name, width in widths.items()},
        shares=costs,
        limit_ratio=limit,
        multiple=1,
        trials=40,
        seed=0,
    )
    return Toy(problem=problem, sensitivity=dict.fromkeys(widths, 0.3), costs=costs, block=1)


@settings(max_examples=25)
@given(seed=st.integers(0, 500), limit=st.floats(0.3, 0.95), removable=st.booleans())
def test_a_dozen_measurements_find_the_first_step_that_fits(seed: int, limit: float, removable: bool) -> None:
    """The same plan that stepping down and measuring every step would stop at."""
    toy = residual_toy(SMALL, seed=seed, limit=limit, removable=removable)
    first = next((widths for widths in walked(toy) if toy.ratio(widths) <= limit), None)
    told = toy.run(WalkSearch(toy.problem), 12)
    if first is not None:
        assert first in [dict(trial.plan.widths) for trial in told]


def test_it_asks_for_plans_of_the_walk_until_it_knows_where_it_fits() -> None:
    """The first plans are all on it."""
    toy = residual_toy(RESNET56, limit=0.5)
    steps = walked(toy)
    told = toy.run(WalkSearch(toy.problem), 2)
    assert all(dict(trial.plan.widths) in steps for trial in told)


def test_dense_layers_lose_the_same_number_each_step_and_filters_the_same_share() -> None:
    """The first two plans lie on the authors' two curves."""
    toy = mixed_toy()
    seen = [trial.plan.widths for trial in toy.run(WalkSearch(toy.problem), 2)]
    curves = [
        {name: width_after(full, STEP, steps, dense=name.startswith("fc")) for name, full in toy.problem.full.items()}
        for steps in range(60)
    ]
    assert all(widths in curves for widths in seen)
    assert any(widths["fc1"] / 128 < widths["conv2"] / 64 < 1 for widths in seen)


def test_its_steps_are_as_large_as_the_problem_says() -> None:
    toy = residual_toy(RESNET56, limit=0.5)
    coarse = replace(toy, problem=replace(toy.problem, step=0.3))
    steps = [[width_after(full, 0.3, n, dense=False) for full in toy.problem.full.values()] for n in range(12)]
    rounding = Rounding(toy.problem.space, removal=False)
    wanted = [rounding.widths(row) for row in rounding.nearest(np.array(steps, dtype=float))]
    assert all(dict(trial.plan.widths) in wanted for trial in coarse.run(WalkSearch(coarse.problem), 2))


def test_after_the_walk_it_spares_what_is_worth_its_latency() -> None:
    """It ends better than the walk alone, within the budget."""
    toy = residual_toy(RESNET56, limit=0.5, contrast=1.5)
    told = toy.run(WalkSearch(toy.problem), 40)
    plain = next(widths for widths in walked(toy) if toy.ratio(widths) <= 0.5)
    assert best_accuracy(told) > toy.accuracy(plain)
    assert len({trial.plan.digest for trial in told}) == 40


def test_it_does_no_worse_than_the_controls_on_average() -> None:
    """The same number of measurements, six networks."""
    strategies = {"walk": WalkSearch, "uniform": Uniform, "random": RandomSearch}
    found = {name: [] for name in strategies}
    for seed in range(6):
        toy = residual_toy(RESNET56, seed=seed, noise=0.005)
        for name, made in strategies.items():
            found[name].append(best_accuracy(toy.run(made(toy.problem), 30)))
    means = {name: np.mean(each) for name, each in found.items()}
    assert means["walk"] >= max(means["uniform"], means["random"])


def test_a_layer_that_costs_nothing_is_spared_before_one_that_costs_all() -> None:
    """Between two steps the order is importance for the latency."""
    toy = residual_toy(SMALL, limit=0.6)
    search = WalkSearch(toy.problem)
    names = [group.name for group in toy.problem.space.groups]
    rounding = Rounding(toy.problem.space)
    order = [names[place] for place in search._spared_first(rounding.full / 2, rounding.full)]
    model = search._memory.model

    def saved(name: str) -> float:
        return 1 - model.predict({**toy.problem.full, name: toy.problem.full[name] // 2})

    gained = {name: 1 - toy.problem.kept_importance(name, toy.problem.full[name] // 2) for name in names}
    quotient = [gained[name] / saved(name) for name in order]
    assert quotient[0] > quotient[-1]
    assert np.corrcoef(quotient, np.arange(len(order)))[0, 1] < -0.8


@pytest.mark.parametrize("limit", [0.2, 0.28])
def test_branches_are_removed_only_where_nothing_else_fits(limit: float) -> None:
    """A tight budget reaches width 0; a wide one never asks for it while it walks."""
    toy = residual_toy(SMALL, limit=limit, removable=True)
    told = toy.run(WalkSearch(toy.problem), 12)
    assert any(min(trial.plan.widths.values()) == 0 for trial in told)
    assert min(toy.run(WalkSearch(replace(toy.problem, limit_ratio=0.7)), 3)[-1].plan.widths.values()) > 0


def test_it_goes_by_the_name_of_walk() -> None:
    """In the configuration."""
    assert isinstance(make_searcher("walk", residual_toy(SMALL).problem), WalkSearch)
