"""Widths for a latency: what is worth least for the time it saves goes first, in whole blocks."""

import itertools

import numpy as np
import pytest
from search_toys import Toy, residual_toy

from edgeprune.decay.pick import pick_widths
from edgeprune.errors import NothingFits
from edgeprune.latency_model import LatencyModel


def exact(toy: Toy) -> LatencyModel:
    """Return a model that has measured random plans of a toy without noise."""
    model, rng = LatencyModel(toy.problem), np.random.default_rng(1)
    for _ in range(30):
        widths = {group.name: int(rng.choice(group.choices)) for group in toy.problem.space.groups}
        model.observe(widths, toy.ratio(widths))
    return model


def spread(toy: Toy, worth: dict[str, float]) -> dict[str, list[float]]:
    """Return an importance for every unit: falling within a group, in all as much as the group is worth."""
    importance = {}
    for group in toy.problem.space.groups:
        units = np.linspace(2.0, 0.1, group.width)
        importance[group.name] = (units / units.sum() * worth[group.name]).tolist()
    return importance


def kept(importance: dict[str, list[float]], widths: dict[str, int]) -> float:
    """Return the importance of the best units of every group."""
    return sum(sum(sorted(importance[name], reverse=True)[:width]) for name, width in widths.items())


@pytest.mark.parametrize("limit", [0.8, 0.6, 0.45])
def test_widths_fit_and_are_allowed(limit: float) -> None:
    """Predicted within the limit, in whole blocks, and no group can be given back any of it."""
    toy = residual_toy([(32, 32, 3), (64, 16, 3)])
    model, groups = exact(toy), toy.problem.space.groups
    importance = spread(toy, dict.fromkeys(toy.problem.full, 1.0))
    widths = pick_widths(groups, importance, model, limit)
    assert model.predict(widths) <= limit
    for group in groups:
        assert widths[group.name] in group.choices
        assert all(
            model.predict({**widths, group.name: each}) > limit for each in group.choices if each > widths[group.name]
        )


def test_what_is_worth_nothing_goes_first() -> None:
    """A group without importance is narrowed before any other, whatever it costs."""
    toy = residual_toy([(32, 32, 3), (64, 16, 3)])
    names = list(toy.problem.full)
    worth = dict.fromkeys(names, 1.0) | {names[1]: 0.0}
    widths = pick_widths(toy.problem.space.groups, spread(toy, worth), exact(toy), 0.95)
    assert [name for name in names if widths[name] < toy.problem.full[name]] == [names[1]]


def test_it_is_close_to_the_best_of_all_widths() -> None:
    """Of a toy small enough to try everything: at least 97 % of the importance that any widths could keep."""
    toy = residual_toy([(32, 32, 2), (64, 16, 2)])
    model, groups = exact(toy), toy.problem.space.groups
    rng = np.random.default_rng(0)
    for limit in (0.7, 0.5, 0.4):
        importance = spread(toy, dict(zip(toy.problem.full, rng.uniform(0.2, 2.0, 4).tolist(), strict=True)))
        rows = [
            dict(zip(toy.problem.full, each, strict=True)) for each in itertools.product(*(g.choices for g in groups))
        ]
        best = max(kept(importance, each) for each in rows if model.predict(each) <= limit)
        assert kept(importance, pick_widths(groups, importance, model, limit)) > 0.97 * best


def test_a_latency_out_of_reach_is_said_to_be() -> None:
    """With what can be reached."""
    toy = residual_toy([(32, 32, 2)])
    importance = spread(toy, dict.fromkeys(toy.problem.full, 1.0))
    with pytest.raises(NothingFits, match="out of reach") as caught:
        pick_widths(toy.problem.space.groups, importance, exact(toy), 0.01)
    assert "predicted to take" in caught.value.why
