"""Fidelity is 1 for equal answers, a half where the error is as large as the answers vary, and falls with the error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.agreement import fidelity

TEACHER = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 2.0], [-1.0, 2.0]])


def test_equal_answers_are_worth_one() -> None:
    assert fidelity(TEACHER, TEACHER) == 1.0


def test_an_answer_that_is_always_the_mean_is_worth_a_half() -> None:
    """Its error is the spread itself."""
    assert fidelity(TEACHER.mean(0).expand_as(TEACHER), TEACHER) == pytest.approx(0.5)


@given(st.floats(0.01, 10), st.floats(1.01, 5))
def test_a_larger_error_is_worth_less(error: float, factor: float) -> None:
    towards = torch.tensor([[0.3, -1.0], [0.2, 0.5], [-0.7, 0.1], [0.4, 0.4]])
    near, far = fidelity(TEACHER + error * towards, TEACHER), fidelity(TEACHER + factor * error * towards, TEACHER)
    assert 0 < far < near < 1
    assert (1 / far - 1) / (1 / near - 1) == pytest.approx(factor**2, rel=1e-3)


def test_the_scale_of_the_logits_does_not_matter() -> None:
    student = TEACHER + 0.3
    assert fidelity(100 * student, 100 * TEACHER) == pytest.approx(fidelity(student, TEACHER))


def test_a_teacher_that_always_answers_the_same_is_either_met_or_not() -> None:
    constant = torch.ones(4, 2)
    assert fidelity(constant, constant) == 1.0
    assert fidelity(constant + 0.1, constant) < 1e-6
