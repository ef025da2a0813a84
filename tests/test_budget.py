"""Limits are read as people write them and as we print them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.budget import Latency
from edgeprune.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("8ms", 8, "ms"),
        ("800us", 0.8, "ms"),
        ("0.008s", 8, "ms"),
        (" 0.5 x ", 0.5, "x"),
        (".5x", 0.5, "x"),
        ("1.03e+03ms", 1030, "ms"),
        ("2e-05s", 0.02, "ms"),
    ],
)
def test_limits_are_read(text: str, value: float, unit: str) -> None:
    latency = Latency.parse(text)
    assert (latency.value, latency.unit) == (pytest.approx(value), unit)


@given(st.floats(1e-9, 1e9), st.sampled_from(["ms", "x"]))
def test_a_limit_that_is_printed_can_be_read(value: float, unit: str) -> None:
    """To the six digits that are printed; errors name limits to ask for."""
    if unit == "x" and value >= 0.999:
        value = 0.5
    latency = Latency(value=value, unit=unit)
    again = Latency.parse(str(latency))
    assert (again.value, again.unit) == (pytest.approx(value, rel=1e-5), unit)


@pytest.mark.parametrize(
    "text", ["", "8", "ms", "-1ms", "0ms", "1x", "1.5x", "8 parsecs", "1e999ms", "nanms", "8ms; rm"]
)
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        Latency.parse(text)
