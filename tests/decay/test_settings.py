"""When units begin: rounds between the lead and the closing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.decay.settings import DecaySettings
from edgeprune.errors import ConfigError


def test_rounds_are_evenly_spread_and_leave_time_for_substitutes() -> None:
    """Lead 20, N = 10, 100 steps: closing at 90, the last of 3 rounds at 60 or before."""
    settings = DecaySettings(phase=100, steps=10, lead=20, rounds=3)
    begins = [step for step in range(100) if settings.round(step) > settings.round(step - 1)]
    assert begins == [20, 40, 60]
    assert (settings.share(19), settings.share(20), settings.share(45)) == (0.0, 1 / 3, 2 / 3)


def test_a_phase_of_n_steps_has_no_room_for_anything_else() -> None:
    """Everything begins at once, and nothing can be released."""
    settings = DecaySettings(phase=10, steps=10, lead=5, rounds=4)
    assert settings.closing == 0
    assert settings.share(0) == 1.0


@given(st.integers(1, 60), st.integers(0, 200), st.integers(0, 300), st.integers(1, 9))
def test_everything_has_begun_by_the_closing(steps: int, more: int, lead: int, rounds: int) -> None:
    """Whatever is asked for, the share never falls, and it is 1 when the last N steps begin."""
    settings = DecaySettings(phase=steps + more, steps=steps, lead=lead, rounds=rounds)
    shares = [settings.share(step) for step in range(settings.phase)]
    assert shares == sorted(shares)
    assert shares[settings.closing] == 1.0


@pytest.mark.parametrize(("steps", "phase"), [(0, 5), (6, 5)])
def test_a_decay_that_does_not_fit_is_refused(steps: int, phase: int) -> None:
    """Every unit needs all of its steps."""
    with pytest.raises(ConfigError, match="cannot decay"):
        DecaySettings(phase=phase, steps=steps)
