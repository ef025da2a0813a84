"""Smooth pruning: the length of a unit's vector is prescribed and falls to zero in N steps, its direction is free.

    x̃ = optimiser's update of x          x ← x̃ · L_target / ‖x̃‖          L_target = (N − n) · L_init / N

(arXiv 2406.03879; n counts the step that is being taken, so the first step already shrinks: our reading.)
"""

import torch
from torch import Tensor


def target_length(initial: Tensor, n: Tensor, steps: int) -> Tensor:
    """Return L_target of units that take their n-th of `steps` steps, from their length before the first."""
    return initial * (steps - n).clamp_min(0) / steps


def factor(length: Tensor, target: Tensor) -> Tensor:
    """Return what a vector of this length is multiplied by to have the target length; 1 where it has no length."""
    return torch.where(length > 0, target / length.clamp_min(torch.finfo(length.dtype).tiny), 1.0)
