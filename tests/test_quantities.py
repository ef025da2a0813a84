"""Numbers for people: few digits, a unit, a true minus sign."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune import quantities
from edgeprune.quantities import MINUS, NBSP
from edgeprune.statistics import Interval


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (quantities.ratio(0.48712), "0.487x"),
        (quantities.percent(0.91324), f"91.32{NBSP}%"),
        (quantities.percent(-0.5874, 0), f"{MINUS}59{NBSP}%"),
        (quantities.points(-0.0044), f"{MINUS}0.44{NBSP}points"),
        (quantities.points(0.0044), f"+0.44{NBSP}points"),
        (quantities.points(-0.00001), f"0.00{NBSP}points"),
        (quantities.points(0.00001), f"0.00{NBSP}points"),
        (quantities.milliseconds(1.8616), f"1.86{NBSP}ms"),
        (quantities.milliseconds(0.09349), f"0.0935{NBSP}ms"),
        (quantities.milliseconds(1234.5), f"1234{NBSP}ms"),
        (quantities.count(853_018), f"853{NBSP}k"),
        (quantities.count(125_485_696), f"125{NBSP}M"),
        (quantities.count(999), "999"),
        (quantities.mebibytes(3_437_721), f"3.28{NBSP}MiB"),
        (quantities.mebibytes(2048), f"2.00{NBSP}KiB"),
        (quantities.duration(6.2), f"6.2{NBSP}s"),
        (quantities.duration(59.6), f"60{NBSP}s"),
        (quantities.duration(311.4), f"5{NBSP}min 11{NBSP}s"),
        (quantities.duration(7321), f"2{NBSP}h 2{NBSP}min"),
        (quantities.span(Interval(p50=0.48, low=0.4751, high=0.4823), 3), "0.475\u20130.482"),
        (quantities.significant(0), "0"),
        (quantities.significant(-1.5e-7), f"{MINUS}1.50e{MINUS}07"),
    ],
)
def test_known_texts(written: str, text: str) -> None:
    assert written == text


@given(st.floats(-1e9, 1e9))
def test_three_significant_digits_are_right_within_half_a_per_cent(value: float) -> None:
    text = quantities.significant(value).replace(MINUS, "-")
    assert math.isclose(float(text), value, rel_tol=0.0051, abs_tol=1e-12)


@given(st.floats(-1e-3, 1e-3), st.integers(0, 6))
def test_a_rounded_zero_has_no_sign(value: float, places: int) -> None:
    text = quantities.fixed(value, places)
    assert not (set(text) <= set(MINUS + "0.") and MINUS in text)
