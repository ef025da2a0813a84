"""Repair: narrower or wider by just enough, importance first, never back to a plan that was tried."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_toys import RESNET56, Toy, residual_toy

from edgeprune.latency_model import LatencyModel
from edgeprune.search.repair import grow, shrink

SMALL = [(16, 32, 2), (32, 16, 2)]


def worth(toy: Toy, widths: dict[str, int], scores: dict[str, float] | None = None) -> float:
    kept = toy.problem.kept_importance
    return sum((scores or {}).get(name, 1.0) * kept(name, width) for name, width in widths.items())


def narrowed_to_budget(toy: Toy) -> dict[str, int]:
    return dict(zip(toy.problem.full, itertools.cycle([8, 16]), strict=False)) | {}


@pytest.mark.parametrize("overshoot", [1.001, 1.02, 1.1, 1.3])
def test_shrinking_saves_the_overshoot_by_prediction(overshoot: float) -> None:
    """The new plan is predicted faster than the old one by at least the factor it was too slow."""
    toy = residual_toy(RESNET56)
    model, widths = LatencyModel(toy.problem), {**toy.problem.full}
    found = shrink(toy.problem, model, widths, overshoot=overshoot, tried=set())
    assert found is not None
    assert model.predict(found) <= model.predict(widths) / overshoot + 1e-9


def test_a_small_overshoot_costs_little() -> None:
    """1 % too slow does not cost more importance than the cheapest single step that saves 1 %."""
    toy = residual_toy(RESNET56)
    model, widths = LatencyModel(toy.problem), {name: width // 2 for name, width in toy.problem.full.items()}
    found = shrink(toy.problem, model, widths, overshoot=1.01, tried=set())
    assert found is not None
    steps = [{**widths, group.name: w} for group in toy.problem.space.groups for w in group.choices]
    enough = [each for each in steps if model.predict(each) <= model.predict(widths) / 1.01]
    assert worth(toy, found) >= max(worth(toy, each) for each in enough) - 1e-9


def test_shrinking_goes_on_until_nothing_is_left() -> None:
    """Every call gives a plan that was not tried, narrower by prediction, and at the end None."""
    toy = residual_toy(SMALL)
    model, widths, tried = LatencyModel(toy.problem), dict(toy.problem.full), set()
    tried.add(toy.problem.plan(widths).digest)
    asked = 0
    while (found := shrink(toy.problem, model, widths, overshoot=1.01, tried=tried)) is not None:
        digest = toy.problem.plan(found).digest
        assert digest not in tried
        tried.add(digest)
        asked += 1
    assert asked > 10
    least = {group.name: group.choices[0] for group in toy.problem.space.groups}
    assert toy.problem.plan(least).digest in tried
    assert shrink(toy.problem, model, least, overshoot=1.01, tried=tried) is None


@pytest.mark.parametrize("used", [0.6, 0.8, 0.93])
def test_growing_uses_what_is_left_and_gains_importance(used: float) -> None:
    """The new plan is predicted within the budget, keeps more, and leaves less unused."""
    toy = residual_toy(RESNET56)
    model, widths = LatencyModel(toy.problem), {name: width // 2 for name, width in toy.problem.full.items()}
    found = grow(toy.problem, model, widths, used=used, tried=set())
    assert found is not None
    assert model.predict(widths) < model.predict(found) <= model.predict(widths) / used + 1e-9
    assert worth(toy, found) > worth(toy, widths)


def test_a_full_network_cannot_grow() -> None:
    """Nothing is wider than everything."""
    toy = residual_toy(SMALL)
    assert grow(toy.problem, LatencyModel(toy.problem), toy.problem.full, used=0.9, tried=set()) is None


def test_no_room_may_still_allow_a_trade() -> None:
    """At exactly the budget a plan is only replaced by one that keeps more importance for no more latency."""
    toy = residual_toy(SMALL)
    model, widths = LatencyModel(toy.problem), narrowed_to_budget(toy)
    scores = dict(zip(toy.problem.full, [10.0, 0.1, 10.0, 0.1], strict=True))
    found = grow(toy.problem, model, widths, used=1.0, tried=set(), group_scores=scores)
    assert found is not None
    assert model.predict(found) <= model.predict(widths) + 1e-9
    assert worth(toy, found, scores) > worth(toy, widths, scores)


def test_group_scores_decide_where_it_cuts() -> None:
    """A group that is worth a hundred times as much is not the one that pays."""
    toy = residual_toy([(16, 32, 3)])
    model = LatencyModel(toy.problem)
    names = list(toy.problem.full)
    for dear in names:
        scores = {dear: 100.0}
        found = shrink(toy.problem, model, toy.problem.full, overshoot=1.05, tried=set(), group_scores=scores)
        assert found is not None
        assert found[dear] == toy.problem.full[dear]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), overshoot=st.floats(1.0, 1.5), used=st.floats(0.5, 1.0), data=st.data())
def test_every_repair_is_an_allowed_plan_and_the_same_each_time(
    seed: int, overshoot: float, used: float, data: st.DataObject
) -> None:
    """From any plan, also with removable branches, both directions give allowed widths, deterministically."""
    toy = residual_toy(SMALL, seed=seed, removable=True)
    widths = {group.name: data.draw(st.sampled_from(group.choices)) for group in toy.problem.space.groups}
    model = LatencyModel(toy.problem)
    for _ in range(2):
        narrower = shrink(toy.problem, model, widths, overshoot=overshoot, tried=set())
        wider = grow(toy.problem, model, widths, used=used, tried=set())
        for found in (narrower, wider):
            assert found is None or toy.problem.plan(found).widths == found
        assert narrower == shrink(toy.problem, model, widths, overshoot=overshoot, tried=set())
        assert wider == grow(toy.problem, model, widths, used=used, tried=set())
