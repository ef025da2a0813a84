"""Tiles fit the registers, divide what they must, and are the ones that were measured to be good."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.targets._tvm.cpus import NEON, YMM, ZMM
from edgeprune.targets._tvm.tiles import Registers, Tile, contraction_tile, window_tile

SIZES = st.integers(1, 70)


@pytest.mark.parametrize("registers", [NEON, YMM, ZMM])
@given(outer=SIZES, rows=SIZES, width=SIZES, padded=st.booleans())
def test_any_tile_fits(registers: Registers, outer: int, rows: int, width: int, padded: bool) -> None:
    tile = contraction_tile(outer, rows, width, registers, padded=padded)
    assert outer % tile.blocks == 0
    assert rows % tile.rows == 0
    assert padded or width % tile.pixels == 0
    pixels = tile.rows * tile.pixels
    images = pixels if registers.by_element else 1
    assert tile.blocks * pixels + tile.blocks + images <= registers.count


@pytest.mark.parametrize(
    ("outer", "size", "tile"),
    [(4, 56, Tile(blocks=2, pixels=14)), (16, 14, Tile(blocks=2, pixels=14)), (32, 7, Tile(blocks=2, pixels=7))],
)
def test_resnet18_on_wide_registers_gets_the_tiles_that_were_fastest(outer: int, size: int, tile: Tile) -> None:
    """58 of 59 billion multiply-adds a second on the machine of benchmarks/results/tvm_cpu.json."""
    assert contraction_tile(outer, size, size, ZMM, padded=size > 7) == tile


def test_small_maps_take_rows_into_the_tile() -> None:
    assert contraction_tile(8, 4, 4, ZMM, padded=True).rows > 1


def test_a_prime_width_is_padded_rather_than_taken_pixel_by_pixel() -> None:
    assert contraction_tile(8, 31, 31, NEON, padded=False).pixels == 1
    assert contraction_tile(8, 31, 31, NEON, padded=True).pixels > 4


def test_a_single_pixel_takes_several_blocks() -> None:
    assert contraction_tile(16, 1, 1, ZMM, padded=False).blocks >= 8


def test_a_window_takes_several_pixels() -> None:
    tile = window_tile(56, 56, (3, 3), (1, 1), ZMM)
    assert 8 <= tile.rows * tile.pixels <= 16
