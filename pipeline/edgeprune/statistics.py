"""Latency statistics that hold on a noisy machine; pure, standard library only.

The number is a ratio to a reference timed in alternating blocks: absolute latency drifts with the machine (33 %
run to run on a loaded two-core host), the ratio does not (0.4-0.7 %). A session's ratio is the quotient of two
*bands* (the mean of the 5..50 % quantiles): less biased than the minimum, steadier than the median. The interval
is over sessions, never inside one: an in-run bootstrap covered 57-85 % where it said 95 %. Sessions of one run agree
more closely than runs do, so what runs differ by is added.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

PRIOR_SD = 0.003
"""Standard deviation of the log ratio between fresh sessions that is assumed before any is seen."""

PRIOR_DF = 3
"""Weight of that prior, in degrees of freedom."""

RUN_SD = 0.005
"""Standard deviation of the log ratio between runs that no number of sessions in one run averages away.

It comes from what else the machine does, and lasts for minutes: two nets lose different shares of their speed to the
neighbours in their caches. A/A runs do not show it (0.1 %), different nets do: 0.1-0.4 % in
`benchmarks/measurement.py`, 0.6 % over half an hour for a pruned residual net of 0.7 ms. A process of its own for
every session changes nothing about it.
"""

ABSOLUTE_RUN_SD = 0.02
"""The same for a latency in milliseconds, which follows every change of the machine's speed."""

COUNT_SD = 2e-5
"""Standard deviation of the log ratio of two instruction counts: the same to a few dozen in tens of millions."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and its two-sided interval, in the unit of the estimate."""

    p50: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """Return the interval times a positive factor."""
        return Interval(p50=self.p50 * factor, low=self.low * factor, high=self.high * factor)

    def to_json(self) -> dict[str, float]:
        """Return the interval as JSON values."""
        return {"p50": self.p50, "low": self.low, "high": self.high}


def quantile(values: Sequence[float], q: float) -> float:
    """Return the `q`-quantile by linear interpolation between order statistics (Hyndman and Fan's type 7)."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def band(values: Sequence[float], low: float = 0.05, high: float = 0.5) -> float:
    """Return the mean of the values between two quantiles; at least one value is used."""
    ordered = sorted(values)
    first = int(len(ordered) * low)
    chosen = ordered[first : max(int(len(ordered) * high), first + 1)]
    return math.fsum(chosen) / len(chosen)


def share_interval(share: float, count: int, confidence: float = 0.95) -> Interval:
    """Return the interval of a proportion, such as accuracy, that was seen in `count` independent cases.

    Wilson's score interval ("Probable inference, the law of succession, and statistical inference", 1927): inside
    [0, 1] and honest near both ends. It says what another draw of as many cases could show.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    return Interval(p50=share, low=max(0.0, centre - spread), high=min(1.0, centre + spread))


def interval_over_sessions(
    logs: Sequence[float], confidence: float, *, prior_sd: float = PRIOR_SD, run_sd: float = RUN_SD
) -> Interval:
    """Return exp(mean) of session log estimates with the t-interval of where another run would put it.

    The variance is that of the sessions, shrunk towards the prior and divided by their number, plus that of runs. The
    degrees of freedom are those of the sessions alone, which is on the wide side because `run_sd` is a guess as well.

    Args:
        logs: one natural log per session, at least one.
        confidence: two-sided, in (0, 1).
        prior_sd: standard deviation between sessions that is assumed before any is seen.
        run_sd: standard deviation between runs, which is known beforehand only.
    """
    count = len(logs)
    mean = math.fsum(logs) / count
    spread = math.fsum((each - mean) ** 2 for each in logs)
    degrees = PRIOR_DF + count - 1
    variance = (PRIOR_DF * prior_sd**2 + spread) / degrees
    half = student_quantile((1 + confidence) / 2, degrees) * math.sqrt(variance / count + run_sd**2)
    return Interval(p50=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))


def clear_of(interval: Interval, threshold: float) -> bool:
    """Return whether more sampling cannot matter: the half-width is at most half the gap to the threshold, in logs."""
    half = math.log(interval.high / interval.low) / 2
    return half <= 0.5 * abs(math.log(interval.p50 / threshold))


def student_quantile(p: float, degrees: int) -> float:
    """Return the `p`-quantile of Student's t with a whole number of degrees of freedom, p in [0.5, 1).

    Bisection on the closed-form distribution function (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, degrees: int) -> float:
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    if degrees % 2:
        term, total = cosine, cosine if degrees > 1 else 0.0
        for k in range(3, degrees - 1, 2):
            term *= cosine**2 * (k - 1) / k
            total += term
        return 0.5 + (theta + sine * total) / math.pi
    term, total = 1.0, 1.0
    for k in range(2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 0.5 + sine * total / 2
