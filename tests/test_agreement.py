"""Fidelity is 1 for equal answers, 0 for answers that do not look at the image, and falls with the error."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.agreement import fidelity

TEACHER = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 2.0], [-1.0, 2.0]])
APART = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, -1.0], [0.0, 1.0]])
"""An error as long as three fifths of the teacher's spread, and at right angles to it."""


def test_equal_answers_are_worth_one() -> None:
    assert fidelity(TEACHER, TEACHER) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0.0, 1.0, -30.0])
def test_an_answer_that_does_not_look_at_the_image_is_worth_nothing(value: float) -> None:
    assert fidelity(torch.full_like(TEACHER, value), TEACHER) == pytest.approx(0.0, abs=1e-12)
    assert fidelity(TEACHER.mean(0).expand_as(TEACHER), TEACHER) == 0.0


def test_answers_turned_round_are_worth_nothing() -> None:
    assert fidelity(2 * TEACHER.mean(0) - TEACHER, TEACHER) == 0.0


@given(st.floats(0.01, 10))
def test_an_error_that_has_nothing_to_do_with_the_answers_costs_by_its_size(size: float) -> None:
    spread = (TEACHER - TEACHER.mean(0)).norm()
    relative = size * float(APART.norm() / spread)
    assert fidelity(TEACHER + size * APART, TEACHER) == pytest.approx(1 / math.hypot(1, relative), rel=1e-6)


def test_how_sure_both_are_does_not_matter() -> None:
    student = TEACHER + 0.3 * APART
    assert fidelity(100 * student, 100 * TEACHER) == pytest.approx(fidelity(student, TEACHER))


def test_a_teacher_that_always_answers_the_same_is_either_met_or_not() -> None:
    constant = torch.ones(4, 2)
    assert fidelity(constant, constant) == 1.0
    assert fidelity(constant + 0.1, constant) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_it_is_never_more_than_one(seed: int) -> None:
    """However the products round."""
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) * 3
    assert 0 <= fidelity(logits * 1.1, logits) <= 1
    assert fidelity(logits, logits) == pytest.approx(1)
