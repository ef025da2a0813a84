"""How numbers are written for people: few digits, a unit, a true minus sign.

milliseconds(1.2345) -> "1.23 ms"    ratio(0.4871) -> "0.487x"    percent(0.9132) -> "91.32 %"
"""

import math

from edgeprune.statistics import Interval

NBSP = "\u00a0"
MINUS = "\u2212"
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def significant(value: float, digits: int = 3) -> str:
    """Return `value` with about `digits` significant digits and no exponent between 1e-4 and 1e6."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    return fixed(value, decimals(value, digits))


def decimals(value: float, digits: int = 3) -> int:
    """Return how many decimals give `value` about `digits` significant digits, never below 0."""
    return 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))


def fixed(value: float, places: int) -> str:
    """Return `value` with `places` decimals; a rounded zero has no sign."""
    text = f"{value:.{places}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def percent(fraction: float, places: int = 2) -> str:
    """Return a fraction as per cent."""
    return fixed(fraction * 100, places) + NBSP + "%"


def points(difference: float) -> str:
    """Return a difference of two fractions in percentage points, signed."""
    text = fixed(difference * 100, 2)
    return ("+" if difference > 0 and text.strip("0.") else "") + text + NBSP + "points"


def ratio(value: float) -> str:
    """Return a ratio of the unpruned model."""
    return fixed(value, 3) + "x"


def milliseconds(value: float) -> str:
    """Return milliseconds."""
    return significant(value) + NBSP + "ms"


def span(interval: Interval, places: int) -> str:
    """Return the ends of an interval with `places` decimals."""
    return f"{fixed(interval.low, places)}\u2013{fixed(interval.high, places)}"


def count(value: float) -> str:
    """Return a count with a decimal prefix, such as 272 k."""
    size, prefix = prefix_of(value)
    return significant(value / size) + NBSP + prefix if prefix else fixed(value, 0)


def prefix_of(value: float) -> tuple[float, str]:
    """Return the largest decimal prefix that is not above `value`, as (1000.0, "k"); (1.0, "") below a thousand."""
    return next((each for each in _PREFIXES if abs(value) >= each[0]), (1.0, ""))


def mebibytes(value: float) -> str:
    """Return bytes as KiB or MiB."""
    if value < 2**20:
        return significant(value / 2**10) + NBSP + "KiB"
    return significant(value / 2**20) + NBSP + "MiB"


def duration(seconds: float) -> str:
    """Return seconds as the two largest of h, min and s."""
    if seconds < 60:
        return significant(seconds, 2) + NBSP + "s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


def three_digits(value: float) -> str:
    """Return three significant digits, without the exponent that ``.3g`` gives a thousand."""
    return f"{float(f'{value:.3g}'):.15g}"
