"""Self-rectification: a unit whose gradient resists its decay, and that is heard above its neighbours, is released.

    C_rate = (‖x̃‖ − ‖x‖) / ‖x‖            how much longer the optimiser's update alone would make the unit
    C_len  = ‖g‖ / mean of ‖g_j‖           how long its gradient is beside those of the units of its channel group

    released  ⇔  C_rate > T_rate  and  C_len > T_len

After arXiv 2406.03879, re-derived: the two criteria and their names are the paper's, their formulae are known here in
words only, its thresholds not at all. Both tests must agree (an or releases most of what is rightly chosen). To first
order C_rate ≈ − lr · ⟨g, x⟩ / ‖x‖²: positive exactly where descent wants the unit longer.
"""

from typing import Literal

import torch
from torch import Tensor

RateForm = Literal["measured", "per-rate", "cosine"]
"""C_rate as the update shows it; that divided by the learning rate; or the cosine of −g and x, in [−1, 1]."""

ROUNDING = 1e-6
"""Relative change of a length that float32 makes of nothing."""


def measured_rate(before: Tensor, after: Tensor) -> Tensor:
    """Return C_rate from the lengths before and after the optimiser's update; 0 where there was no length."""
    change = (after - before) / before.clamp_min(torch.finfo(before.dtype).tiny)
    return torch.where((before > 0) & (change.abs() > ROUNDING), change, 0.0)


def cosine_rate(product: Tensor, gradient: Tensor, length: Tensor) -> Tensor:
    """Return the cosine of −g and x from ⟨g, x⟩, ‖g‖ and ‖x‖; 0 where one of them has no length."""
    both = gradient * length
    return torch.where(both > 0, -product / both.clamp_min(torch.finfo(both.dtype).tiny), 0.0)


def relative_length(gradient: Tensor, mean: Tensor) -> Tensor:
    """Return C_len from ‖g‖ and the mean of it over the unit's group; 0 where nothing has a gradient."""
    return torch.where(mean > 0, gradient / mean.clamp_min(torch.finfo(mean.dtype).tiny), 0.0)


def resists(rate: Tensor, length: Tensor, t_rate: float, t_len: float) -> Tensor:
    """Return which units are to be released, by C_rate and C_len."""
    return (rate > t_rate) & (length > t_len)
