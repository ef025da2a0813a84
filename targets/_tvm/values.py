"""A value of the graph and how it lies in memory.

    plain      [N, C, H, W] as ONNX has it
    blocked    [N, ceil(C/b), H, W, b]     b neighbouring channels fill one vector register

The layout is that of Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures"
(2018). Lanes beyond the last channel hold something finite; whoever reads them multiplies them by zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

Index = tuple[Any, ...]
Reader = Callable[..., Any]
"""Logical indices → the expression of one element."""

BYTES = {"float32": 4, "float16": 2, "int32": 4}


@dataclass(frozen=True, kw_only=True)
class Value:
    """One tensor of the graph.

    Attributes:
        name: of the ONNX value.
        shape: logical, as ONNX has it.
        dtype: of its elements in memory.
        block: channels in one block, 0: plain.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
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

    @property
    def bytes(self) -> int:
        """Return the bytes it takes, padding included."""
        return self.size * BYTES[self.dtype]

    @property
    def ragged(self) -> bool:
        """Return whether the last block has lanes beyond the last channel."""
        return bool(self.block and self.shape[1] % self.block)

    def shaped(self, *shape: int) -> "Value":
        """Return a value that lies in memory likewise and has another logical shape."""
        return replace(self, shape=tuple(shape))

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
