"""Where intermediate tensors lie in one block of memory: tensors that never live at the same time share bytes.

Greedy by size (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020): the largest
tensor first, each as low as those that live beside it allow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Bytes: generated code loads whole vectors from every tensor's start."""


@dataclass(frozen=True, kw_only=True)
class Lifetime:
    """A tensor's bytes, the step that writes it and the last step that reads it."""

    bytes: int
    first: int
    last: int


def aligned(count: int) -> int:
    """Return the bytes a tensor takes with the gap behind it."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def plan(lifetimes: Sequence[Lifetime]) -> tuple[tuple[int, ...], int]:
    """Return each tensor's offset, and the bytes of all; the same lifetimes always give the same plan."""
    offsets: dict[int, int] = {}
    for place in sorted(range(len(lifetimes)), key=lambda each: (-lifetimes[each].bytes, each)):
        own = lifetimes[place]
        beside = sorted(
            (offsets[other], offsets[other] + aligned(lifetimes[other].bytes))
            for other in offsets
            if lifetimes[other].first <= own.last and own.first <= lifetimes[other].last
        )
        offsets[place] = _lowest(beside, aligned(own.bytes))
    top = max((offsets[place] + aligned(each.bytes) for place, each in enumerate(lifetimes)), default=0)
    return tuple(offsets[place] for place in range(len(lifetimes))), top


def _lowest(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Return the lowest start of a free range of `size` bytes."""
    start = 0
    for begin, end in taken:
        if start + size <= begin:
            break
        start = max(start, end)
    return start
