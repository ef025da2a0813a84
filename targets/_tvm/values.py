"""A value of the graph and how it lies in memory.

    plain      [N, C, H, W] as ONNX has it
    blocked    [N, ceil(C/b), H, W, b]     b neighbouring channels fill one vector register
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

Index = tuple[Any, ...]
Reader = Callable[..., Any]
"""Logical indices → the expression of one element."""


@dataclass(frozen=True)
class Value:
    """One tensor of the graph.

    Attributes:
        name: of the ONNX value.
        shape: logical, as ONNX has it.
        block: channels in one block, 0: plain.
    """

    name: str
    shape: tuple[int, ...]
    block: int = 0

    @property
    def physical(self) -> tuple[int, ...]:
        """Return the shape in memory."""
        if not self.block:
            return self.shape
        batch, channels, *maps = self.shape
        return (batch, -(-channels // self.block), *maps, self.block)

    @property
    def size(self) -> int:
        """Return the number of elements in memory, padding included."""
        return prod(self.physical)

    def place(self, *index: Any) -> Index:
        """Return where the element with this logical index lies."""
        if not self.block:
            return index
        batch, channel, *maps = index
        return (batch, channel // self.block, *maps, channel % self.block)

    def logical(self, *place: Any) -> Index:
        """Return the logical index of the element that lies at `place`; padding continues the channels."""
        if not self.block:
            return place
        batch, outer, *maps, inner = place
        return (batch, outer * self.block + inner, *maps)
