"""Where elements are: flat indices, broadcasting, and the border that a window needs."""

import math
from collections.abc import Sequence
from typing import Any

from .graph import Node
from .values import Index, Reader


def ravel(index: Index, shape: Sequence[int]) -> Any:
    """Return the flat index."""
    flat: Any = 0
    for each, size in zip(index, shape, strict=True):
        flat = flat * size + each
    return flat


def unravel(flat: Any, shape: Sequence[int]) -> Index:
    """Return the indices of a flat index."""
    index = []
    for size in reversed(shape):
        index.append(0 if size == 1 else flat % size)
        flat = flat // size
    return tuple(reversed(index))


def broadcast(read: Reader, shape: Sequence[int], rank: int) -> Reader:
    """Return a reader of a tensor with `shape` at indices of a result with `rank`, by NumPy's rules."""

    def at(*index: Any) -> Any:
        own = index[rank - len(shape) :]
        return read(*(0 if size == 1 else each for each, size in zip(own, shape, strict=True)))

    return at


def spatial(node: Node, key: str, rank: int, default: int = 1) -> tuple[int, ...]:
    """Return a setting with one number per spatial axis."""
    return tuple(int(each) for each in node.attributes.get(key, (default,) * rank))


def border(
    node: Node, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the padding before and after each spatial axis, `auto_pad` resolved (ONNX, operator Conv)."""
    auto, rank = node.text("auto_pad", "NOTSET"), len(size)
    if auto == "NOTSET":
        pads = [int(each) for each in node.attributes.get("pads", (0,) * 2 * rank)]
        return tuple(pads[:rank]), tuple(pads[rank:])
    if auto == "VALID":
        return (0,) * rank, (0,) * rank
    total = [
        max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
        for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)
    ]
    return halves(total, upper=auto == "SAME_UPPER")


def halves(total: Sequence[int], *, upper: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return each padding in two parts; the larger one comes last if `upper`."""
    small, large = tuple(each // 2 for each in total), tuple(each - each // 2 for each in total)
    return (small, large) if upper else (large, small)
