"""What a board says of itself is text of a stranger: numbers that are none are left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import DeviceLost
from edgeprune.targets._jetson_board import board_from_text

BOOT = "0123abcd-0000-4000-8000-000000000000"
KEYS = (
    "gpu_hz",
    "gpu_load",
    "memory_kib",
    "load",
    "temperature gpu-thermal",
    "oc1",
    "l4t_core",
    "release",
    "compatible",
)


def told(**facts: str) -> str:
    return "".join(
        f"{name}\t{value}\n" for name, value in {"boot_id": BOOT, "cache": "/home/me/.cache", **facts}.items()
    )


def test_clocks_are_read_in_mhz() -> None:
    assert board_from_text(told(gpu_hz="306000000 306000000 624750000"), "b").gpu_mhz == (306, 306, 624)


@pytest.mark.parametrize("hertz", ["\N{SUPERSCRIPT TWO} 1 2", "9" * 190, "1 2", "x y z"])
def test_clocks_that_are_no_numbers_are_unknown(hertz: str) -> None:
    assert board_from_text(told(gpu_hz=hertz), "b").gpu_mhz is None


@given(st.sampled_from(KEYS), st.text(max_size=250))
def test_whatever_a_board_says_it_is_a_board_or_lost(key: str, value: str) -> None:
    try:
        board = board_from_text(told(**{key: value}), "b")
    except DeviceLost:
        return
    assert board.boot_id == BOOT
