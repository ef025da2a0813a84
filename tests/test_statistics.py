import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from edgeprune.statistics import (
    ABSOLUTE_RUN_SD,
    RUN_SD,
    Interval,
    band,
    clear_of,
    interval_over_sessions,
    quantile,
    share_interval,
    student_quantile,
)

POSITIVE = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=60)


def test_a_quantile_lies_between_order_statistics_as_in_type_7() -> None:
    assert quantile([4, 1, 3, 2], 0.5) == 2.5
    assert quantile([10, 20], 0.25) == 12.5
    assert quantile([7], 0.9) == 7


@settings(max_examples=50, deadline=None)
@given(POSITIVE, st.floats(0, 1))
def test_a_quantile_is_inside_the_values_and_grows_with_q(values: list[float], q: float) -> None:
    assert min(values) <= quantile(values, q) <= max(values)
    assert quantile(values, 0) == min(values)
    assert quantile(values, 1) == max(values)
    assert quantile(values, q / 2) <= quantile(values, q) * (1 + 1e-12)


def test_a_band_is_the_mean_of_the_lower_half_without_the_lowest_twentieth() -> None:
    assert band(range(100)) == sum(range(5, 50)) / 45


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1, 2), min_size=4, max_size=60), st.floats(10, 1e6))
def test_no_stall_however_long_moves_a_band_beyond_the_undisturbed_values(calls: list[float], stall: float) -> None:
    """A third of the calls may be preempted for any time."""
    spoiled = calls + [stall] * (len(calls) // 3)
    assert min(calls) <= band(spoiled) <= max(calls)


@settings(max_examples=50, deadline=None)
@given(POSITIVE)
def test_a_band_is_inside_the_values(values: list[float]) -> None:
    assert min(values) * (1 - 1e-12) <= band(values) <= max(values) * (1 + 1e-12)


@settings(max_examples=50, deadline=None)
@given(POSITIVE, st.floats(0.1, 10))
def test_a_band_scales_with_its_unit(values: list[float], factor: float) -> None:
    assert band([factor * each for each in values]) == pytest.approx(factor * band(values))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 30, 101])
@pytest.mark.parametrize("p", [0.5, 0.75, 0.9, 0.975, 0.995, 0.9995])
def test_student_quantiles_are_those_of_scipy(p: float, degrees: int) -> None:
    assert student_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-9, abs=1e-9)


def test_an_interval_of_one_session_rests_on_the_prior_alone() -> None:
    """t(0.975, 3) = 3.18245, sd² = 0.003² + 0.005²."""
    seen = interval_over_sessions([0.0], 0.95)
    assert seen.p50 == 1
    assert math.log(seen.high) == pytest.approx(3.182446 * math.sqrt(0.003**2 + 0.005**2), rel=1e-6)


def test_an_interval_adds_the_variance_of_sessions_and_of_runs() -> None:
    """Two sessions 0.02 apart: spread 2e-4, (3·9e-6 + 2e-4) / 4 / 2 + 25e-6, times t(0.975, 4) = 2.776445."""
    seen = interval_over_sessions([0.99, 1.01], 0.95)
    half = 2.776445 * math.sqrt((3 * 9e-6 + 2e-4) / 8 + 25e-6)
    assert math.log(seen.p50) == pytest.approx(1.0)
    assert math.log(seen.high) - 1 == pytest.approx(half, rel=1e-6)
    assert 1 - math.log(seen.low) == pytest.approx(half, rel=1e-6)


def test_no_number_of_sessions_makes_an_interval_narrower_than_runs_differ() -> None:
    seen = interval_over_sessions([0.0] * 1000, 0.95)
    assert math.log(seen.high) > 1.95 * RUN_SD
    assert math.log(interval_over_sessions([0.0] * 1000, 0.95, run_sd=ABSOLUTE_RUN_SD).high) > 1.95 * ABSOLUTE_RUN_SD


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=10), st.floats(0.5, 0.99))
def test_an_interval_holds_its_estimate_and_widens_with_confidence(logs: list[float], confidence: float) -> None:
    narrow, wide = interval_over_sessions(logs, confidence), interval_over_sessions(logs, confidence + 0.009)
    assert wide.low < narrow.low <= narrow.p50 <= narrow.high < wide.high


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("sessions", [2, 3, 6])
def test_intervals_cover_the_truth_at_least_as_often_as_they_say(sessions: int, confidence: float) -> None:
    """4000 runs with the spreads that the constants state: runs differ by 0.5 %, their sessions by another 0.3 %."""
    draw = random.Random(sessions)
    covered = 0
    for _ in range(4000):
        run = draw.gauss(0.1, RUN_SD)
        seen = interval_over_sessions([draw.gauss(run, 0.003) for _ in range(sessions)], confidence)
        covered += seen.low <= math.exp(0.1) <= seen.high
    assert confidence - 0.01 <= covered / 4000 < 1


def test_six_ordinary_sessions_tell_one_and_a_half_percent_apart() -> None:
    seen = interval_over_sessions([0.003, -0.003, 0.002, -0.002, 0.001, -0.001], 0.95)
    assert 0.01 < math.log(seen.high) < 0.015


def test_intervals_hold_when_sessions_are_worse_than_the_prior() -> None:
    draw = random.Random(1)
    covered = 0
    for _ in range(4000):
        seen = interval_over_sessions([draw.gauss(0, 0.01) for _ in range(6)], 0.95)
        covered += seen.low <= 1 <= seen.high
    assert covered / 4000 >= 0.92


def test_a_planted_slow_down_of_two_percent_is_found_and_none_is_not() -> None:
    draw = random.Random(2)

    def excludes_one(true_log: float) -> bool:
        run = draw.gauss(true_log, 0.0015)
        seen = interval_over_sessions([draw.gauss(run, 0.004) for _ in range(6)], 0.95)
        return not seen.low <= 1 <= seen.high

    assert sum(excludes_one(math.log(1.02)) for _ in range(1000)) >= 950
    assert sum(excludes_one(0.0) for _ in range(1000)) <= 20


def test_a_decision_is_clear_when_the_gap_is_twice_the_half_width() -> None:
    seen = Interval(p50=0.5, low=0.5 / 1.01, high=0.5 * 1.01)
    assert clear_of(seen, 0.5 * 1.021)
    assert clear_of(seen, 0.5 / 1.021)
    assert not clear_of(seen, 0.5 * 1.019)
    assert not clear_of(seen, 0.5)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (9, 10), (93, 100), (9345, 10_000), (10, 10)])
def test_the_interval_of_a_share_is_scipys_wilson_interval(right: int, count: int) -> None:
    seen = share_interval(right / count, count, 0.9)
    wilson = stats.binomtest(right, count).proportion_ci(0.9, method="wilson")
    assert (seen.low, seen.high) == pytest.approx((wilson.low, wilson.high), abs=1e-9)
    assert seen.p50 == right / count


def test_an_interval_scales() -> None:
    assert Interval(p50=1.0, low=0.5, high=2.0).scaled(3) == Interval(p50=3.0, low=1.5, high=6.0)
    assert Interval(p50=1.0, low=0.5, high=2.0).to_json() == {"p50": 1.0, "low": 0.5, "high": 2.0}
