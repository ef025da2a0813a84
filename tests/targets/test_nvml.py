"""What a GPU's states say about the timings between them."""

from hypothesis import given
from hypothesis import strategies as st

from edgeprune.targets._nvml import THROTTLING, company, suspicions


def test_states_that_tell_nothing_raise_no_suspicion() -> None:
    assert suspicions([]) == suspicions([{}, {}]) == []
    assert suspicions([{"throttling": None, "sm_mhz": None}]) == []
    assert company([{}, {"processes": None}, {"processes": 1}]) == []


def test_every_reason_is_told_once() -> None:
    states = [{"throttling": ["hardware slowdown"]}, {"throttling": ["hardware slowdown", "software power cap"]}]
    assert suspicions(states) == ["the GPU was throttled while measuring: hardware slowdown, software power cap"]


def test_clocks_may_differ_by_three_percent() -> None:
    assert suspicions([{"sm_mhz": 1000}, {"sm_mhz": 1030}]) == []
    assert suspicions([{"sm_mhz": 1031}, {"sm_mhz": 1000}]) == [
        "the GPU's clock moved between 1000 and 1031 MHz while measuring"
    ]
    assert suspicions([{"memory_mhz": 5000}, {"memory_mhz": 10000}]) != []


@given(st.lists(st.sampled_from([*THROTTLING.values()]), max_size=5), st.integers(1, 3))
def test_throttled_states_are_always_flagged(reasons: list[str], sessions: int) -> None:
    flags = suspicions([{"throttling": reasons, "sm_mhz": 1500}] * sessions)
    assert bool(flags) == bool(reasons)
    assert all(each in flags[0] for each in reasons)
