"""What groups are worth: planted sensitivities come back, without trials all are equal."""

import numpy as np
import pytest
from search_toys import Toy, residual_toy

from edgeprune.search.random_search import RandomSearch
from edgeprune.search.worth import group_worths
from edgeprune.trial import Trial


def random_trials(toy: Toy, count: int) -> list[Trial]:
    rng, groups = np.random.default_rng(0), toy.problem.space.groups
    plans = [toy.problem.plan({each.name: int(rng.choice(each.choices)) for each in groups}) for _ in range(count)]
    return [toy.trial(plan, number) for number, plan in enumerate(plans)]


def planted(seed: int = 0) -> Toy:
    """Return a toy of twelve groups, one of which is worth far more than the rest."""
    toy = residual_toy([(32, 32, 6), (64, 16, 6)], seed=seed, removable=True)
    names = list(toy.problem.full)
    return Toy(problem=toy.problem, sensitivity=dict.fromkeys(names, 0.1) | {names[3]: 3.0}, costs=toy.costs)


def test_without_trials_all_groups_are_worth_the_same() -> None:
    toy = planted()
    assert set(group_worths(toy.problem, []).values()) == {1.0}


def test_failed_trials_say_nothing() -> None:
    toy = planted()
    toy.broken = frozenset(range(5))
    assert set(group_worths(toy.problem, random_trials(toy, 5)).values()) == {1.0}


@pytest.mark.parametrize("seed", range(3))
def test_the_group_that_matters_is_found(seed: int) -> None:
    """Twenty random plans: the planted group comes first, and is worth several times the mean."""
    toy = planted(seed)
    worths = group_worths(toy.problem, random_trials(toy, 20))
    assert max(worths, key=worths.__getitem__) == list(toy.problem.full)[3]
    assert max(worths.values()) > 3
    assert np.mean(list(worths.values())) == pytest.approx(1)
    assert min(worths.values()) >= 0


def test_sensitivities_are_ranked() -> None:
    """Log-normal sensitivities of twelve groups correlate with what forty trials near the budget tell."""
    toy = residual_toy([(32, 32, 6), (64, 16, 6)], removable=True, contrast=1.5, damage=0.5, trials=40)
    worths = group_worths(toy.problem, toy.run(RandomSearch(toy.problem), 40))
    names = list(worths)
    truth = [toy.sensitivity[name] for name in names]
    ranks = [np.argsort(np.argsort(values)) for values in (truth, [worths[name] for name in names])]
    assert np.corrcoef(*ranks)[0, 1] > 0.5


def test_a_plan_that_lost_everything_is_no_infinity() -> None:
    toy = planted()
    toy.sensitivity = dict.fromkeys(toy.problem.full, 1000.0)
    assert all(np.isfinite(each) for each in group_worths(toy.problem, random_trials(toy, 5)).values())
