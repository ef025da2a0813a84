"""How wide a layer is after so many steps of the walk.

    filters        C_n = C_0 − ⌈C_0 · (1 − (1 − step)^n)⌉     a share of what is left: 20 steps of 2.5 % leave 60 %
    dense units    C_n = C_0 − ⌈C_0 · step · n⌉               a share of what there was: 20 steps of 2.5 % leave half

So "50 % pruning" halves the dense layers and leaves more of the filters (Meng et al., arXiv 2405.00074). Their code
rounds up at every step, so that a layer of 16 loses one unit of 16 a step, not one of 40, and is gone before a wide one
is halved; here the total is rounded up. One unit is always left.
"""

from collections.abc import Iterator
from math import ceil

STEP = 0.025
"""Share of a layer that one step takes (the authors' setting)."""

SLACK = 1e-9
"""So that ten steps of 0.1 are the whole, whatever binary makes of a tenth."""


def width_after(full: int, step: float, steps: int, *, dense: bool) -> int:
    """Return how many of `full` units are left after so many steps."""
    gone = step * steps if dense else 1 - (1 - step) ** steps
    return max(1, full - ceil(full * gone - SLACK))


def widths(full: int, step: float, *, dense: bool) -> Iterator[int]:
    """Yield the width after no step, one step, two and so on, until it is 1."""
    steps = 0
    while True:
        width = width_after(full, step, steps, dense=dense)
        yield width
        if width == 1:
            return
        steps += 1
