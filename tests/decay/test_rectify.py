"""The formulae of self-rectification, by themselves."""

import math

import torch

from edgeprune.decay.rectify import cosine_rate, measured_rate, relative_length, resists


def test_the_measured_rate_is_the_relative_growth() -> None:
    """3 → 3.3 is a tenth; float32's rounding and what had no length count as nothing."""
    rate = measured_rate(torch.tensor([3.0, 3.0, 3.0, 0.0]), torch.tensor([3.3, 2.4, 3.0000005, 1.0]))
    assert torch.allclose(rate, torch.tensor([0.1, -0.2, 0.0, 0.0]))


def test_the_measured_rate_is_minus_lr_g_x_over_x_squared() -> None:
    """To first order in the learning rate."""
    x, g = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([-1.0, 2.0], dtype=torch.float64)
    rate = measured_rate(x.norm(), (x - 1e-5 * g).norm())
    assert math.isclose(float(rate), -1e-5 * float(g @ x) / 25, rel_tol=1e-4)


def test_the_cosine_is_that_of_the_descent_and_the_vector() -> None:
    """1 where descent makes it longer and nothing else, −1 where shorter, 0 where nothing is known."""
    product, gradient = torch.tensor([-6.0, 6.0, 0.0, 0.0]), torch.tensor([2.0, 2.0, 2.0, 0.0])
    assert cosine_rate(product, gradient, torch.full((4,), 3.0)).tolist() == [1.0, -1.0, 0.0, 0.0]


def test_the_relative_length_needs_a_mean() -> None:
    """A group without any gradient releases nobody."""
    assert relative_length(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0])).tolist() == [1.5, 0.0]


def test_both_tests_must_agree() -> None:
    """And being equal to a threshold is not being above it."""
    rate, length = torch.tensor([0.1, 0.1, 0.0, -0.1]), torch.tensor([2.0, 1.0, 2.0, 2.0])
    assert resists(rate, length, 0.0, 1.0).tolist() == [True, False, False, False]
