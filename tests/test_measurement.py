import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.artifact import Artifact
from edgeprune.measurement import Calls, Measurement, Sampling, Session
from edgeprune.metric import EMULATED_INSTRUCTIONS, LATENCY

REFERENCE = Artifact(path=Path("reference.onnx"), kind="onnx", sha256="0" * 64, inputs=())
MS = 1_000_000


def calls(wall: list[float], cpu: list[float] | None = None, preempted: list[int] | None = None) -> Calls:
    """Return calls given in milliseconds."""
    return Calls(
        elapsed=tuple(round(each * MS) for each in wall),
        on_cpu=tuple(round(each * MS) for each in (cpu or wall)),
        preempted=tuple(preempted or [0] * len(wall)),
    )


class Machine:
    """A seeded machine whose speed drifts and which preempts; it times two engines in alternating blocks."""

    def __init__(self, seed: int, *, drift: float = 0.0, spikes: float = 0.0, jitter: float = 0.02) -> None:
        self.draw = random.Random(seed)
        self.now_ms = 0.0
        self.drift, self.spikes, self.jitter = drift, spikes, jitter

    def call(self, cost_ms: float) -> tuple[float, float, int]:
        """Return (wall ms, CPU ms, switches): slower by `drift` each second, stalled with probability `spikes`."""
        cpu = cost_ms * (1 + self.drift * self.now_ms / 1000) * math.exp(abs(self.draw.gauss(0, self.jitter)))
        stalled = self.draw.random() < self.spikes
        wall = cpu + (self.draw.uniform(4, 40) if stalled else 0.0)
        self.now_ms += wall
        return wall, cpu, int(stalled)

    def session(
        self,
        candidate_ms: float | Callable[[float], float],
        reference_latency: float,
        rounds: int = 12,
        *,
        single_threaded: bool = True,
    ) -> Session:
        rows: tuple[list, list] = ([], [])
        for place in range(rounds):
            costs = candidate_ms(place / rounds) if callable(candidate_ms) else candidate_ms, reference_latency
            for which in self.draw.sample((0, 1), 2):
                rows[which].extend(self.call(costs[which]) for _ in range(5))
        candidate, reference = (calls(*(list(column) for column in zip(*each, strict=True))) for each in rows)
        return Session(candidate=candidate, reference=reference, single_threaded=single_threaded)


def measurement(*sessions: Session, **changes: object) -> Measurement:
    facts = {"profile_digest": "p", "artifact_sha256": "a", "reference_sha256": "r", "conditions": {}}
    return Measurement(
        **{**facts, "sessions": sessions, "taken_at": "2026-01-01T00:00:00+00:00", "seconds": 1.0, **changes}
    )


def error(seen: Measurement, truth: float) -> float:
    return abs(math.log(seen.ratio().p50 / truth))


def test_the_ratio_of_a_machine_whose_speed_drifts_is_that_of_the_work() -> None:
    """The machine loses a third of its speed in each second; absolute times rise, the ratio stays."""
    machine = Machine(1, drift=0.5)
    seen = measurement(*(machine.session(2.0, 1.0) for _ in range(6)))
    first, last = (each.candidate.elapsed[0] for each in (seen.sessions[0], seen.sessions[-1]))
    assert last > 1.3 * first
    assert error(seen, 2.0) < 0.01


def test_calls_that_were_preempted_do_not_count() -> None:
    machine = Machine(2, spikes=0.3)
    seen = measurement(*(machine.session(2.0, 1.0) for _ in range(6)))
    assert {each.clock for each in seen.sessions} == {"wall"}
    assert error(seen, 2.0) < 0.01


def test_with_too_few_clean_calls_one_thread_is_read_from_its_cpu_clock() -> None:
    machine = Machine(3, spikes=0.9)
    seen = measurement(*(machine.session(2.0, 1.0) for _ in range(6)))
    assert {each.clock for each in seen.sessions} == {"cpu"}
    assert error(seen, 2.0) < 0.01


def test_the_cpu_clock_of_one_thread_never_stands_for_several() -> None:
    session = Machine(4, spikes=0.9).session(2.0, 1.0, single_threaded=False)
    assert session.clock == "wall, preempted"
    assert session.clocks() == (session.candidate.elapsed, session.reference.elapsed)


def test_a_few_calls_that_are_all_clean_are_enough() -> None:
    assert Session(candidate=calls([50.0] * 4), reference=calls([100.0] * 4)).clock == "wall"


@pytest.mark.parametrize(("clean", "clock"), [(20, "wall"), (19, "cpu")])
def test_twenty_clean_calls_are_enough_whatever_their_share(clean: int, clock: str) -> None:
    candidate = calls([1.0] * 100, preempted=[0] * clean + [1] * (100 - clean))
    assert Session(candidate=candidate, reference=calls([1.0] * 100)).clock == clock


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_swapping_candidate_and_reference_inverts_the_ratio(one: float, other: float) -> None:
    forward = Session(candidate=calls([one] * 8), reference=calls([other] * 8))
    backward = Session(candidate=forward.reference, reference=forward.candidate)
    assert forward.log_ratio() == pytest.approx(-backward.log_ratio())


def test_another_quantile_is_the_ratio_of_those_quantiles() -> None:
    session = Session(candidate=calls([1.0] * 18 + [4.0] * 2), reference=calls([1.0] * 20))
    assert session.log_ratio(0.5) == pytest.approx(0)
    assert session.log_ratio(0.95) == pytest.approx(math.log(4))


def test_a_tail_counts_the_calls_that_were_preempted() -> None:
    """The median speaks of the work, a tail of what users meet: a tenth of the calls takes nine times as long."""
    slow = calls([1.0] * 90 + [9.0] * 10, preempted=[0] * 90 + [1] * 10)
    session = Session(candidate=slow, reference=calls([2.0] * 100))
    seen = measurement(session)
    assert session.log_ratio(0.5) == pytest.approx(math.log(0.5))
    assert session.log_ratio(0.95) == pytest.approx(math.log(4.5))
    assert seen.latency(quantile=0.95).p50 == pytest.approx(9.0)


def test_a_a_intervals_of_a_rough_machine_hold_one() -> None:
    holds = 0
    for seed in range(200):
        machine = Machine(seed, drift=0.1, spikes=0.3, jitter=0.03)
        ratio = measurement(*(machine.session(1.5, 1.5) for _ in range(6))).ratio()
        holds += ratio.low <= 1 <= ratio.high
    assert holds >= 190


def test_a_planted_slow_down_of_two_percent_is_found_on_a_rough_machine() -> None:
    found = 0
    for seed in range(200):
        machine = Machine(seed, drift=0.1, spikes=0.3, jitter=0.03)
        found += measurement(*(machine.session(1.53, 1.5) for _ in range(6))).ratio().low > 1
    assert found >= 190


def test_a_candidate_that_keeps_slowing_down_is_called_unsteady() -> None:
    machine = Machine(5)
    seen = measurement(*(machine.session(lambda part: 1.0 + 0.3 * part, 1.0) for _ in range(6)))
    assert "not steady" in seen.unsteady()[0]
    assert "+" in seen.unsteady()[0]


def test_a_candidate_that_is_still_warming_up_is_called_unsteady() -> None:
    machine = Machine(6)
    seen = measurement(*(machine.session(lambda part: 1.3 - 0.3 * part, 1.0) for _ in range(6)))
    assert "-" in seen.unsteady()[0]


def test_a_machine_that_slows_down_under_both_is_steady() -> None:
    flagged = 0
    for seed in range(100):
        machine = Machine(seed, drift=0.3, spikes=0.2)
        flagged += bool(measurement(*(machine.session(2.0, 1.0) for _ in range(6))).unsteady())
    assert flagged <= 2


def test_sessions_too_short_to_drift_are_not_judged() -> None:
    short = Session(candidate=calls([1.0] * 8), reference=calls([1.0] * 8))
    assert short.drift() is None
    assert measurement(short).unsteady() == []


def test_milliseconds_are_milliseconds() -> None:
    seen = measurement(Session(candidate=calls([2.0] * 20), reference=calls([8.0] * 20)))
    assert seen.latency().p50 == pytest.approx(2.0)
    assert seen.reference_latency().p50 == pytest.approx(8.0)
    assert seen.ratio().p50 == pytest.approx(0.25)


def test_an_absolute_latency_is_known_less_well_than_a_ratio() -> None:
    seen = measurement(*[Session(candidate=calls([2.0] * 20), reference=calls([8.0] * 20))] * 6)
    assert math.log(seen.latency().high / seen.latency().p50) > 3 * math.log(seen.ratio().high / seen.ratio().p50)


def session_of(ratio: float) -> Session:
    return Session(candidate=calls([ratio] * 20), reference=calls([1.0] * 20))


@pytest.mark.parametrize(
    ("threshold", "ratios", "enough"),
    [
        (0.5, [], False),
        (0.5, [0.9], False),
        (0.5, [0.9, 0.9], True),
        (0.5, [0.1, 0.1], True),
        (0.5, [0.501, 0.499], False),
        (0.5, [0.9, 0.2], False),
        (0.5, [0.501] * 6, True),
        (None, [0.9] * 5, False),
        (None, [0.9] * 6, True),
    ],
)
def test_sampling_stops_when_the_decision_is_clear_or_the_time_is_spent(
    threshold: float | None, ratios: list[float], enough: bool
) -> None:
    sampling = Sampling(reference=REFERENCE, threshold=threshold)
    assert sampling.enough([session_of(each) for each in ratios]) is enough


def test_time_is_up_on_a_loaded_device_but_never_before_the_fewest_sessions() -> None:
    """Six sessions of 200 ms may take 2.1 s."""
    sampling = Sampling(reference=REFERENCE, sessions_min=3)
    assert not sampling.enough([session_of(1.0)] * 2, 100.0)
    assert not sampling.enough([session_of(1.0)] * 3, 2.0)
    assert sampling.enough([session_of(1.0)] * 3, 2.2)


def test_a_single_session_is_enough_only_if_it_is_all_there_may_be() -> None:
    assert Sampling(reference=REFERENCE, sessions_min=1, sessions_max=1).enough([session_of(1.0)])


def test_two_measurements_compare_on_the_same_device_sentinel_and_metric_only() -> None:
    seen = measurement(session_of(1.0))
    assert seen.comparable(measurement(session_of(0.5), artifact_sha256="other"))
    for change in ({"profile_digest": "q"}, {"reference_sha256": "q"}, {"metric": "q"}, {"emulated": True}):
        assert not seen.comparable(measurement(session_of(1.0), **change))


def test_flags_spoil_a_measurement_and_notes_do_not() -> None:
    noted = measurement(session_of(1.0), conditions={"notes": ["load was high"]})
    assert noted.unstable_because is None
    assert noted.notes == ("load was high",)
    assert measurement(session_of(1.0), flags=("hot", "slow")).unstable_because == "hot; slow"


def test_every_sample_survives_json() -> None:
    seen = measurement(
        Machine(7, spikes=0.5).session(2.0, 1.0),
        Machine(8).session(2.0, 1.0, single_threaded=False),
        conditions={"before": {"governor": None}, "notes": ["one"]},
        layers={"conv": 1.5},
        flags=("hot",),
        emulated=True,
        metric="formula_ns",
    )
    assert Measurement.from_json(json.loads(json.dumps(seen.to_json()))) == seen


def test_sampling_names_its_reference_by_content() -> None:
    facts = Sampling(reference=REFERENCE, threshold=0.5).to_json()
    assert facts["reference"] == "0" * 64
    assert json.loads(json.dumps(facts)) == facts


def test_a_count_of_instructions_has_no_run_to_run_noise() -> None:
    """Its interval is that of the counts themselves; a clock that showed the same would not be believed so far."""
    session = Session(candidate=calls([2.0, 2.0]), reference=calls([4.0, 4.0]))
    counted, timed = (
        measurement(session, metric=metric, emulated=metric != LATENCY).ratio()
        for metric in (EMULATED_INSTRUCTIONS, LATENCY)
    )
    assert counted.p50 == timed.p50 == pytest.approx(0.5)
    assert counted.high / counted.low < 1.001 < timed.high / timed.low
