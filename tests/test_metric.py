import pytest

from edgeprune.errors import BudgetError
from edgeprune.metric import EMULATED_INSTRUCTIONS, FORMULA, LATENCY, check_limit, limit_of, unit_of


def test_only_a_clock_gives_milliseconds() -> None:
    assert unit_of(LATENCY) == "ms"
    assert all("ms" not in unit_of(each) for each in (EMULATED_INSTRUCTIONS, FORMULA, "cache_misses"))


def test_an_unknown_metric_is_shown_under_its_own_name() -> None:
    assert unit_of("cache_misses") == "M cache_misses"


def test_a_limit_is_shown_as_asked_unless_it_would_call_a_formula_a_time() -> None:
    assert limit_of("8ms", LATENCY) == "8ms"
    assert limit_of("0.5x", FORMULA) == "0.5x"
    assert limit_of("8ms", FORMULA) == "8 formula units"


@pytest.mark.parametrize("metric", [EMULATED_INSTRUCTIONS, "cache_misses"])
def test_milliseconds_are_refused_where_instructions_are_counted(metric: str) -> None:
    with pytest.raises(BudgetError) as caught:
        check_limit("8ms", "ms", metric)
    assert "counts no time" in caught.value.what
    assert "--budget 0.5x" in caught.value.next_step


@pytest.mark.parametrize(("requested", "unit", "metric"), [("8ms", "ms", LATENCY), (".5x", "x", EMULATED_INSTRUCTIONS)])
def test_a_limit_in_the_unit_of_its_target_passes(requested: str, unit: str, metric: str) -> None:
    check_limit(requested, unit, metric)
