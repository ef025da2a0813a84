"""Axes hold their values, frames map them linearly, and text can neither escape nor act."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgeprune.svg import Axis, Frame, clean, nice_ticks, said, tag


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (0.47, 0.503, (0.47, 0.48, 0.49, 0.5)),
        (-3, 7, (-2.0, 0.0, 2.0, 4.0, 6.0)),
        (81.5, 94.2, (85.0, 90.0)),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: tuple[float, ...]) -> None:
    assert nice_ticks(low, high) == ticks


@example([5e-324])
@example([1e9, 1e9 - 1e-7])
@given(st.lists(st.floats(-1e9, 1e9), max_size=8))
def test_an_axis_holds_its_values_and_its_ticks(values: list[float]) -> None:
    axis = Axis.over(values, "x")
    assert axis.low < axis.high
    assert all(axis.low <= value <= axis.high for value in values)
    slack = (axis.high - axis.low) * 1e-6
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in axis.ticks)
    assert len(set(map(axis.write, axis.ticks))) == len(axis.ticks) <= 12


@example([5e-324])
@given(st.lists(st.floats(0, 1e9), max_size=8))
def test_an_axis_from_zero_starts_there(values: list[float]) -> None:
    axis = Axis.from_zero(values, "x")
    assert axis.low == 0 < axis.high
    assert all(value <= axis.high for value in values)
    assert all(len(axis.write(tick)) <= 16 for tick in axis.ticks)


def test_ticks_are_written_with_the_decimals_that_tell_them_apart() -> None:
    axis = Axis.over([0.4701, 0.5], "x", about=8)
    assert [axis.write(tick) for tick in axis.ticks] == ["0.470", "0.475", "0.480", "0.485", "0.490", "0.495", "0.500"]
    large = Axis.over([1e6, 2e6], "x")
    assert large.write(large.ticks[0]) == "1.0\u00a0M"


def test_a_frame_maps_its_corners() -> None:
    unit = Axis(low=0, high=10, ticks=(), title="")
    frame = Frame(width=130, height=90, left=20, right=10, top=15, bottom=25, x=unit, y=unit)
    assert (frame.px(0), frame.px(10), frame.px(5)) == (20, 120, 70)
    assert (frame.py(0), frame.py(10)) == (65, 15)


@given(st.text(st.characters(), max_size=40))
def test_any_text_can_be_written_and_acts_on_nothing(text: str) -> None:
    written = said(text, 0, 0) + tag("g", aria_label=text)
    assert written.encode()
    shape = r'<text x="0" y="0" class="" text-anchor="start">(.*)</text><g aria-label="(.*)"></g>'
    inside = re.fullmatch(shape, written, re.DOTALL)
    assert inside
    assert not re.search('[<>"\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]', inside[1] + inside[2])


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\x1b[31;1mred\x1b[0m", "red"),
        ("\x1b]0;title\x07rest", "rest"),
        ("a\tb\nc\r\x00", "a\tb\nc"),
        ("\u202egnp.exe", "gnp.exe"),
        ("\ud800", "\ufffd"),
        ("caf\u00e9 \u2192 \u4e2d", "caf\u00e9 \u2192 \u4e2d"),
    ],
)
def test_what_a_terminal_or_browser_would_act_on_is_gone(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
