"""The formulae of smooth pruning, by themselves."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.decay.smooth import factor, target_length


def test_the_target_falls_linearly_to_zero() -> None:
    """Hand-computed: a length of 6 in 4 steps, then nothing for ever."""
    initial = torch.full((6,), 6.0)
    assert target_length(initial, torch.arange(6), 4).tolist() == [6.0, 4.5, 3.0, 1.5, 0.0, 0.0]


@given(st.floats(1e-6, 1e3), st.floats(0, 1e3), st.integers(1, 40))
def test_a_vector_gets_the_length_and_keeps_its_direction(length: float, target: float, size: int) -> None:
    """Whatever it was multiplied by, it points where it pointed."""
    vector = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    vector *= length / vector.norm()
    scaled = vector * factor(vector.norm(), torch.tensor(target, dtype=torch.float64))
    assert torch.allclose(scaled.norm(), torch.tensor(target, dtype=torch.float64))
    assert torch.allclose(scaled * length, vector * target)


def test_what_has_no_length_is_left_alone() -> None:
    """No division by zero: the factor is 1."""
    assert factor(torch.zeros(1), torch.ones(1)).tolist() == [1.0]
