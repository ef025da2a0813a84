"""How many results a kernel keeps in registers while it reduces.

A contraction multiplies one vector of weights per block of channels by one element of the image per pixel:

    for every reduced element:   blocks loads of weights,  pixels loads of the image,  blocks x pixels multiply-adds

The tile is chosen by counting those, without a search. Many pixels and few blocks stream the fewest weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["contraction", "window", "map"]


@dataclass(frozen=True, kw_only=True)
class Registers:
    """What a tile may use.

    Attributes:
        count: vector registers of the CPU.
        latency: multiply-adds that must be under way at a time to keep the units busy.
        weight_cost: instructions that one load of weights is worth, cache misses included.
        image_cost: instructions that one element of the image is worth, per tile.
        by_element: whether multiply-adds take one element of a register, so that pixels lie in registers too.
    """

    count: int
    latency: int
    weight_cost: float
    image_cost: float
    by_element: bool = False


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Results of one tile: blocks of channels, rows, pixels of a row."""

    blocks: int = 1
    rows: int = 1
    pixels: int = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which schedule a kernel gets.

    Attributes:
        kind: "contraction" or "window": a stage `sum` in the tile's registers; "map": every stage by itself.
        tile: of the stage `sum`.
        joined: the last stage is computed tile by tile, from the registers.
    """

    kind: Kind = "map"
    tile: Tile = Tile()
    joined: bool = False


def contraction_tile(outer: int, rows: int, width: int, registers: Registers, *, padded: bool) -> Tile:
    """Return the cheapest tile of `outer` blocks x `rows` x `width` pixels.

    Args:
        padded: rows may be computed longer than they are, so the pixels of a tile need not divide the width.
    """
    options = _options(outer, rows, width, registers, padded=padded)
    return min(options, key=lambda each: (cost(each, width, registers), each.blocks, each.rows))


def _options(outer: int, rows: int, width: int, registers: Registers, *, padded: bool) -> Iterator[Tile]:
    for blocks in _divisors(outer, registers.count // 2):
        for high in _divisors(rows, 8):
            for pixels in range(1, min(width, registers.count) + 1):
                used = (blocks + registers.by_element) * high * pixels + blocks + (not registers.by_element)
                if used <= registers.count and (padded or width % pixels == 0):
                    yield Tile(blocks=blocks, rows=high, pixels=pixels)


def cost(tile: Tile, width: int, registers: Registers) -> float:
    """Return instructions per useful multiply-add of a contraction."""
    pixels = tile.rows * tile.pixels
    results = tile.blocks * pixels
    useful = width / (-(-width // tile.pixels) * tile.pixels)
    spent = max(results, registers.latency) + registers.weight_cost * tile.blocks + registers.image_cost * pixels + 1
    return spent / (results * useful)


def window_tile(rows: int, width: int, kernel: tuple[int, int], strides: tuple[int, int], registers: Registers) -> Tile:
    """Return the tile of a depthwise convolution or a pooling: pixels share loads of the image and of weights."""

    def instructions(tile: Tile) -> float:
        loads = ((tile.rows - 1) * strides[0] + kernel[0]) * ((tile.pixels - 1) * strides[1] + kernel[1])
        taps = kernel[0] * kernel[1]
        results = tile.rows * tile.pixels
        return (loads + taps + max(results, registers.latency) * taps) / results

    limit = registers.count // 2
    options = [
        Tile(rows=high, pixels=pixels)
        for high in _divisors(rows, 4)
        for pixels in _divisors(width, limit)
        if high * pixels <= limit
    ]
    return min(options, key=lambda each: (instructions(each), each.rows))


def _divisors(size: int, limit: int) -> list[int]:
    return [each for each in range(1, min(size, limit) + 1) if size % each == 0]
