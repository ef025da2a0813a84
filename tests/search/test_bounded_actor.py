"""A gradient fades towards the bound it leads to, turns round beyond it, and so no actor stays stuck there."""

import pytest
import torch

from edgeprune.search.bounded_actor import Bounded


@pytest.mark.parametrize(
    ("wished", "gradient", "expected"),
    [
        (0.0, 2.0, 1.0),  # half of the range is left in either direction
        (0.5, 2.0, 1.5),  # a descent step goes down, where three quarters of the range are
        (0.5, -2.0, -0.5),
        (1.0, -2.0, 0.0),
        (-1.0, 2.0, 0.0),
        (3.0, -2.0, 2.0),  # beyond the bound: a step further out becomes a step back
        (-3.0, 2.0, -2.0),
    ],
)
def test_a_gradient_is_scaled_by_the_room_it_has(wished: float, gradient: float, expected: float) -> None:
    action = torch.tensor([wished], requires_grad=True)
    (Bounded()(action) * gradient).sum().backward()
    assert action.grad is not None
    assert action.grad.item() == pytest.approx(expected)


def test_actions_stay_inside_their_bounds() -> None:
    assert Bounded()(torch.tensor([-7.0, -0.25, 0.5, 9.0])).tolist() == [-1.0, -0.25, 0.5, 1.0]


@pytest.mark.parametrize("start", [-6.0, 6.0])
def test_an_action_far_beyond_a_bound_comes_back_when_its_worth_turns(start: float) -> None:
    """Behind a tanh the same start moves by less than a hundredth in as many steps."""
    stuck, free = (torch.tensor([start], requires_grad=True) for _ in range(2))
    optimiser = torch.optim.SGD([stuck, free], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        cost = (torch.tanh(stuck) - 0.3) ** 2 + (Bounded()(free) - 0.3) ** 2
        cost.sum().backward()
        optimiser.step()
    assert Bounded()(free).item() == pytest.approx(0.3, abs=0.05)
    assert abs(torch.tanh(stuck).item() - 0.3) > 0.6
