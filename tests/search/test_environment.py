"""The pruning environment: a valid gymnasium environment whose clip keeps the predicted budget."""

import itertools
import warnings
from dataclasses import replace

import gymnasium.utils.env_checker
import numpy as np
import pytest
import stable_baselines3.common.env_checker
from hypothesis import given, settings
from hypothesis import strategies as st
from search_toys import RESNET56, Toy, residual_toy

from edgeprune.latency_model import LatencyModel
from edgeprune.search.environment import FEATURES, USED, PruningEnvironment

SMALL = [(16, 32, 2), (24, 16, 1)]


def environment_of(toy: Toy, **more: object) -> PruningEnvironment:
    return PruningEnvironment(toy.problem, LatencyModel(toy.problem), **more)


def episode(environment: PruningEnvironment, actions: list[float]) -> list[dict[str, float]]:
    """Return the named features seen before each step and after the last."""
    observation, _ = environment.reset()
    seen = [observation]
    for action in actions:
        observation, _, _, _, _ = environment.step(np.array([action], dtype=np.float32))
        seen.append(observation)
    return [dict(zip(FEATURES, each.tolist(), strict=False)) for each in seen]


def test_gymnasium_and_stable_baselines_accept_it() -> None:
    """Both checkers walk through episodes, spaces, seeds and dtypes; no warning of theirs is left."""
    toy = residual_toy(SMALL, removable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized Box.*")  # a keep ratio is in [0, 1]
        warnings.filterwarnings("ignore", message=".*not at the 'spec'.*|.*spec.*")
        environment = environment_of(toy, rewarder=toy.accuracy)
        gymnasium.utils.env_checker.check_env(environment, skip_render_check=True)
        stable_baselines3.common.env_checker.check_env(environment)


def brute_force_clip(environment: PruningEnvironment, decided: dict[str, int], name: str, wished: int) -> int:
    """Return the width nearest to `wished` that some completion takes under the target and some over its used share.

    All completions are tried. What does not fit is refused first.
    """
    groups = environment.problem.space.groups
    later = [group for group in groups if group.name not in decided and group.name != name]
    choices = environment.problem.space.by_name[name].choices
    ends = {
        width: [
            environment.model.predict({**decided, name: width, **dict(zip((g.name for g in later), rest, strict=True))})
            for rest in itertools.product(*(group.choices for group in later))
        ]
        for width in choices
    }
    widest = max((each for each in choices if min(ends[each]) <= environment.target), default=choices[0])
    using = [each for each in choices if max(ends[each]) >= USED * environment.target]
    return min(max(wished, min(using, default=choices[-1])), widest)


@settings(deadline=None, max_examples=60)
@given(
    actions=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    limit=st.floats(0.2, 0.99),
    removable=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_clip_equals_brute_force(actions: list[float], limit: float, removable: bool, seed: int) -> None:
    """In a space of three groups every completion can be tried: the clip allows exactly what can fit and use."""
    toy = residual_toy(SMALL, limit=limit, removable=removable, seed=seed)
    environment, decided = environment_of(toy), {}
    environment.reset()
    for group, action in zip(toy.problem.space.groups, actions, strict=True):
        wished = group.nearest(float(np.float32(action)) * group.width)
        expected = brute_force_clip(environment, decided, group.name, wished)
        _, _, _, _, info = environment.step(np.array([action], dtype=np.float32))
        assert info["width"] == expected
        decided[group.name] = expected


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), limit=st.floats(0.46, 0.95), removable=st.booleans())
def test_no_episode_wastes_the_predicted_budget(seed: int, limit: float, removable: bool) -> None:
    """An agent that wants the least in most steps still ends with a plan near the budget."""
    toy = residual_toy(RESNET56, limit=limit, removable=removable)
    environment, rng = environment_of(toy), np.random.default_rng(seed)
    episode(environment, (rng.uniform(0, 1, 27) * (rng.uniform(0, 1, 27) < 0.2)).tolist())
    assert environment.model.predict(environment.widths) >= 0.9 * environment.target


def test_a_plan_is_followed_whatever_the_clip_says() -> None:
    """Replaying a plan from the ledger leads to that plan."""
    environment = environment_of(residual_toy(SMALL, limit=0.9, removable=True))
    environment.reset()
    for _ in range(3):
        environment.keep(0)
    assert set(environment.widths.values()) == {0}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), limit=st.floats(0.46, 0.95), removable=st.booleans())
def test_no_episode_leaves_the_predicted_budget(seed: int, limit: float, removable: bool) -> None:
    """Whatever the agent wants in 27 steps, the plan it ends with is predicted to fit."""
    toy = residual_toy(RESNET56, limit=limit, removable=removable)
    environment, rng = environment_of(toy), np.random.default_rng(seed)
    episode(environment, rng.uniform(rng.uniform(0, 0.9), 1, 27).tolist())
    assert environment.model.predict(environment.widths) <= environment.target + 1e-9
    toy.problem.plan(environment.widths)


def test_an_unreachable_budget_ends_in_the_fastest_plan() -> None:
    """When nothing can fit, every step takes the width of least prediction."""
    environment = environment_of(residual_toy(SMALL, limit=0.05))
    episode(environment, [1.0, 1.0, 1.0])
    assert environment.widths == {group.name: group.choices[0] for group in environment.problem.space.groups}


def test_the_action_is_the_keep_ratio_of_the_nearest_width() -> None:
    """0, one half and 1 of 16, 16 and 24 units, with a budget that does not bind."""
    environment = environment_of(residual_toy(SMALL, limit=0.999, removable=True), used=0.0)
    episode(environment, [0.0, 0.5, 0.9])
    assert list(environment.widths.values()) == [0, 8, 24]


def test_features_follow_the_episode() -> None:
    """Saved latency rises as groups are cut, the rest falls, the last action is what was kept, the end is marked."""
    environment = environment_of(residual_toy(SMALL, limit=0.9), used=0.0)
    first, second, _, last = episode(environment, [0.5, 1.0, 0.4])
    assert first["latency_saved"] == pytest.approx(0, abs=1e-6)
    assert first["last_action"] == 1
    assert second["last_action"] == 0.5
    assert second["latency_saved"] == pytest.approx(
        1 - environment.model.predict({**environment.problem.full, "stage0.0.conv1": 8}), abs=1e-6
    )
    assert second["latency_rest"] < first["latency_rest"]
    assert last["latency_rest"] == pytest.approx(0, abs=1e-6)
    assert [first["past_end"], last["past_end"]] == [0, 1]
    assert first["macs_saved"] == 0 < last["macs_saved"]


def test_the_slope_is_what_one_step_narrower_saves() -> None:
    """Scaled by the number of groups, so that an average group is near its own share."""
    environment = environment_of(residual_toy(SMALL, limit=0.9))
    first = episode(environment, [])[0]
    saved = 1 - environment.model.predict({**environment.problem.full, "stage0.0.conv1": 8})
    assert first["latency_slope"] == pytest.approx(3 * saved, rel=1e-5)


def test_fill_ratio_and_widest_ratio_say_what_is_still_possible() -> None:
    """A loose budget leaves both near 1; a tight one brings the fill ratio down to a plan that just fits."""
    loose = episode(environment_of(residual_toy(RESNET56, limit=0.999)), [])[0]
    assert loose["fill_ratio"] > 0.85
    assert loose["widest_ratio"] == 1
    tight = episode(environment_of(residual_toy(RESNET56, limit=0.55)), [])[0]
    assert 0.2 < tight["fill_ratio"] < 0.7


def test_every_observation_names_its_group() -> None:
    """The last entries are the group's identity, one-hot."""
    environment = environment_of(residual_toy(SMALL))
    observation, _ = environment.reset()
    for place in range(3):
        assert observation[len(FEATURES) :].tolist() == [float(place == each) for each in range(3)]
        observation, _, _, _, _ = environment.step(np.array([0.5], dtype=np.float32))


def test_a_rewarder_prices_the_finished_episode_only() -> None:
    """The environment measures nothing itself: 0 until the last step, then what the rewarder says."""
    toy = residual_toy(SMALL)
    environment = environment_of(toy, rewarder=toy.accuracy)
    environment.reset()
    rewards = [environment.step(np.array([0.5], dtype=np.float32))[1] for _ in range(3)]
    assert rewards[:2] == [0, 0]
    assert rewards[2] == toy.accuracy(environment.widths)


# -- repairs -----------------------------------------------------------------------------------------------------------


def repairing(toy: Toy) -> Toy:
    alike = {group.name: (0.25 * place, 0.5) for place, group in enumerate(toy.problem.space.groups)}
    return replace(toy, problem=replace(toy.problem, repairs=True, similarity=alike))


def test_a_problem_that_repairs_takes_two_numbers_for_each_group() -> None:
    """The second becomes the coefficient of a group that loses units, and of no other."""
    environment = environment_of(repairing(residual_toy([(16, 32, 1), (24, 16, 1)], limit=0.9)), used=0.0)
    assert environment.action_space.shape == (2,)
    environment.reset()
    for number, action in enumerate([(0.5, 0.75), (1.0, 0.1), (0.5, 2.0)]):
        environment.step(np.array(action, dtype=np.float32))
        if number + 1 == len(environment.problem.space.groups):
            break
    full, plan = environment.problem.full, environment.plan
    assert set(plan.repair) == {name for name, width in plan.widths.items() if width < full[name]}
    assert next(iter(plan.repair.values())) == 0.75
    assert all(0 <= each <= 1 for each in plan.repair.values())


def test_the_observation_ends_with_how_alike_the_units_of_a_group_are() -> None:
    environment = environment_of(repairing(residual_toy(SMALL)))
    observation, _ = environment.reset()
    following, *_ = environment.step(np.array([0.5, 0.5], dtype=np.float32))
    assert observation[-2:].tolist() == [0.0, 0.5]
    assert following[-2:].tolist() == [0.25, 0.5]
