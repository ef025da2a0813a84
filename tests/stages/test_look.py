"""What a search says of its candidates afterwards."""

from dataclasses import replace

import pytest
import search_toys

from edgeprune.stages.look import FEWEST, entropy_agrees
from edgeprune.trial import Quality, Trial


def trials(*seen: tuple[float | None, float]) -> list[Trial]:
    """Return one trial of a plan of its own for each (entropy, accuracy)."""
    toy = search_toys.residual_toy([(16, 32, 2), (32, 16, 2)], limit=0.6, removable=True)
    names = list(toy.problem.full)
    plans = [
        toy.problem.plan({**toy.problem.full, names[0]: 8 * (n % 2), names[1]: 8 * (n // 2 % 2)}) for n in range(4)
    ]
    plans += [toy.problem.plan({**each.widths, names[2]: 16}) for each in plans]
    plans += [toy.problem.plan({**each.widths, names[3]: 16}) for each in plans]
    made = [toy.trial(plan, number) for number, plan in enumerate(plans[: len(seen)])]
    return [
        replace(trial, quality=Quality(accuracy=accuracy, entropy=entropy, images=10))
        for trial, (entropy, accuracy) in zip(made, seen, strict=True)
    ]


def test_low_entropy_that_goes_with_accuracy_is_a_correlation_of_one() -> None:
    """Spearman's: the order counts, not the distances."""
    assert entropy_agrees(trials(*((10.0 - n, n**3 / 1000) for n in range(FEWEST)))) == pytest.approx(1.0)
    assert entropy_agrees(trials(*((1.0 + n, n**3 / 1000) for n in range(FEWEST)))) == pytest.approx(-1.0)


def test_too_few_candidates_or_equal_ones_say_nothing() -> None:
    assert entropy_agrees(trials(*((1.0 + n, 0.1 * n) for n in range(FEWEST - 1)))) is None
    assert entropy_agrees(trials(*((1.0, 0.1 * n) for n in range(FEWEST)))) is None
    assert entropy_agrees(trials(*((1.0 + n, 0.5) for n in range(FEWEST)))) is None
    assert entropy_agrees(trials(*((None, 0.1 * n) for n in range(FEWEST)))) is None


def test_a_plan_that_was_tried_twice_counts_once() -> None:
    made = trials(*((10.0 - n, 0.1 * n) for n in range(FEWEST - 1)))
    assert entropy_agrees([*made, made[0]]) is None
