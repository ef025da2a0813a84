"""How to time an engine, and what was seen. Raw samples are kept; everything else is derived from them.

Measurement
└── sessions          fresh runtime sessions of candidate and reference, each:
    ├── candidate     Calls(elapsed, on_cpu, preempted)
    └── reference     Calls(elapsed, on_cpu, preempted)      timed in alternating blocks with the candidate
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgeprune import statistics
from edgeprune.artifact import Artifact
from edgeprune.metric import EMULATED_INSTRUCTIONS, LATENCY, PER_UNIT
from edgeprune.statistics import Interval

CLEAN_CALLS_NEEDED = 20
"""With fewer calls that were never preempted, a single-threaded session falls back to its CPU clock."""

CLEAN_SHARE_NEEDED = 0.75
"""... unless at least this share of its calls is clean: a session of a slow engine has few calls to begin with."""


OVERTIME = 1.75
"""Loading and warming up add a third to the time of sampling; only a loaded device needs this many times as long."""

CALLS_OF_A_THIRD = 3
"""Fewer calls than this in a third of a session cannot show a drift."""

DRIFT_SD = 0.01
"""Standard deviation of the drift of a session that is assumed before any is seen."""

DRIFT_NOTED = 0.02
"""Change of the ratio within a session that is worth calling unsteady, if its interval excludes none."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to time.

    Attributes:
        reference: the sentinel timed in alternating blocks with the candidate.
        threshold: the ratio to the reference that the caller must decide against; sampling stops early once the
            interval is clear of it. None: there is nothing to decide, go on to `sessions_max`.
        sessions_min: sessions before stopping is considered.
        sessions_max: sessions after which the answer is given as it stands; a loaded device may stop before, but
            never before `sessions_min`.
        session_ms: milliseconds of sampling in one session.
        block_ms: milliseconds of one uninterrupted block of calls of one engine.
        dropped_calls: calls thrown away after each switch, whose caches are cold.
        confidence: of the interval that `threshold` is compared with.
        layers: also time every node of the candidate once (profiling run, not part of the ratio).
        seed: of the order of blocks.
    """

    reference: Artifact
    threshold: float | None = None
    sessions_min: int = 2
    sessions_max: int = 6
    session_ms: float = 200.0
    block_ms: float = 12.0
    dropped_calls: int = 2
    confidence: float = 0.95
    layers: bool = False
    seed: int = 0

    def to_json(self) -> dict[str, object]:
        """Return the settings as JSON values; the reference by its SHA-256."""
        return {**asdict(self), "reference": self.reference.sha256}

    def enough(self, sessions: Sequence["Session"], elapsed_s: float = 0.0) -> bool:
        """Return whether to stop: after `sessions_max`, or after `sessions_min` if the decision is clear or time is up.

        Time is up after `OVERTIME` times the sampling that was asked for: on a loaded device a session takes longer.
        """
        if len(sessions) < self.sessions_min or len(sessions) >= self.sessions_max:
            return len(sessions) >= self.sessions_max
        if elapsed_s >= OVERTIME * self.sessions_max * self.session_ms / 1000:
            return True
        if self.threshold is None:
            return False
        ratio = statistics.interval_over_sessions([each.log_ratio() for each in sessions], self.confidence)
        return statistics.clear_of(ratio, self.threshold)


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Timed calls of one engine in one session, in order; the three lists have equal length.

    Attributes:
        elapsed: what the measurement's metric counts: elapsed nanoseconds, or executed instructions.
        on_cpu: the same of the calling thread alone: its CPU time (equal to `elapsed` where there is no such clock).
        preempted: involuntary context switches during the call.
    """

    elapsed: tuple[int, ...]
    on_cpu: tuple[int, ...]
    preempted: tuple[int, ...]

    @property
    def clean(self) -> tuple[int, ...]:
        """Return the elapsed times of calls that were never preempted."""
        return tuple(wall for wall, switches in zip(self.elapsed, self.preempted, strict=True) if not switches)


@dataclass(frozen=True, kw_only=True)
class Session:
    """One fresh runtime session of both engines."""

    candidate: Calls
    reference: Calls
    single_threaded: bool = True

    @property
    def clock(self) -> str:
        """Return which times are compared: "wall" of clean calls, else "cpu", else "wall, preempted".

        CPU time counts one thread only, so it stands in for wall time only where the engine runs on one thread.
        """
        if all(_mostly_clean(each) for each in (self.candidate, self.reference)):
            return "wall"
        return "cpu" if self.single_threaded else "wall, preempted"

    def clocks(self, quantile: float = 0.5) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return comparable samples of candidate and reference, read from `clock`.

        A quantile above the median speaks of what users meet, so nothing is set aside for it: every call counts, by
        its elapsed time.
        """
        if quantile > 0.5:
            return self.candidate.elapsed, self.reference.elapsed
        if self.clock == "wall":
            return self.candidate.clean, self.reference.clean
        if self.clock == "cpu":
            return self.candidate.on_cpu, self.reference.on_cpu
        return self.candidate.elapsed, self.reference.elapsed

    def log_ratio(self, quantile: float = 0.5) -> float:
        """Return ln(candidate / reference): of bands for the median's neighbourhood, else of the quantile asked for."""
        candidate, reference = self.clocks(quantile)
        return math.log(_typical(candidate, quantile) / _typical(reference, quantile))

    def drift(self) -> float | None:
        """Return ln of the ratio in the last third of the session over that in the first; None with too few calls."""
        thirds = [len(each) // 3 for each in self.clocks()]
        if min(thirds) < CALLS_OF_A_THIRD:
            return None
        (c0, c1), (r0, r1) = (
            (statistics.band(each[:third]), statistics.band(each[-third:]))
            for each, third in zip(self.clocks(), thirds, strict=True)
        )
        return math.log(c1 / c0) - math.log(r1 / r0)


def _mostly_clean(calls: Calls) -> bool:
    clean = len(calls.clean)
    return clean >= CLEAN_CALLS_NEEDED or clean >= CLEAN_SHARE_NEEDED * len(calls.elapsed)


def _typical(samples: tuple[int, ...], quantile: float) -> float:
    return statistics.band(samples) if quantile == 0.5 else statistics.quantile(samples, quantile)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was seen when one engine was timed against the sentinel.

    Attributes:
        profile_digest: of the profile it was taken with.
        artifact_sha256: the candidate's engine.
        reference_sha256: the sentinel's engine.
        sessions: raw samples; empty only if nothing could be timed.
        conditions: clock, temperature, load, runtime version, threads, priority: JSON values, as read before and after.
        taken_at: UTC, ISO 8601.
        seconds: wall time the measurement cost.
        metric: what one sample counts, see `edgeprune.metric`.
        emulated: True when the numbers come from a formula or an emulator; never mixed with measured ones.
        layers: graph node name → what the metric counts in one call, if asked for.
        flags: what the target found wrong, one sentence each.
    """

    profile_digest: str
    artifact_sha256: str
    reference_sha256: str
    sessions: tuple[Session, ...]
    conditions: Mapping[str, Any]
    taken_at: str
    seconds: float
    metric: str = LATENCY
    emulated: bool = False
    layers: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    def ratio(self, confidence: float = 0.95, quantile: float = 0.5) -> Interval:
        """Return latency of the candidate as a ratio of the sentinel's, with its interval."""
        logs = [each.log_ratio(quantile) for each in self.sessions]
        return statistics.interval_over_sessions(logs, confidence, **self._noise(statistics.RUN_SD))

    def _noise(self, run_sd: float) -> dict[str, float]:
        """Return what an interval assumes beside what was seen: a count knows neither neighbours nor temperature."""
        if self.metric == EMULATED_INSTRUCTIONS:
            return {"prior_sd": statistics.COUNT_SD, "run_sd": 0.0}
        return {"prior_sd": statistics.PRIOR_SD, "run_sd": run_sd}

    def latency(self, confidence: float = 0.95, quantile: float = 0.5) -> Interval:
        """Return the candidate's latency in the metric's unit, see `edgeprune.metric`: milliseconds of a device.

        They are of interleaved calls, so 1-4 % above undisturbed ones.
        """
        return self._absolute(0, confidence, quantile)

    def reference_latency(self, confidence: float = 0.95, quantile: float = 0.5) -> Interval:
        """Return the sentinel's latency in the same unit, of the same sessions."""
        return self._absolute(1, confidence, quantile)

    def _absolute(self, which: int, confidence: float, quantile: float) -> Interval:
        logs = [math.log(_typical(each.clocks(quantile)[which], quantile) / PER_UNIT) for each in self.sessions]
        return statistics.interval_over_sessions(logs, confidence, **self._noise(statistics.ABSOLUTE_RUN_SD))

    @property
    def unstable_because(self) -> str | None:
        """Return why this measurement should not be trusted, or None."""
        return "; ".join(self.flags) or None

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what is worth knowing about how it was taken but spoils nothing, one sentence each."""
        return tuple(self.conditions.get("notes", ()))

    def unsteady(self, confidence: float = 0.99) -> list[str]:
        """Return a flag if the ratio moved, up or down, between the first and the last thirds of the sessions."""
        drifts = [drift for each in self.sessions if (drift := each.drift()) is not None]
        if not drifts:
            return []
        moved = statistics.interval_over_sessions(drifts, confidence, prior_sd=DRIFT_SD)
        if moved.low <= 1 <= moved.high or abs(math.log(moved.p50)) < DRIFT_NOTED:
            return []
        return [f"not steady: the ratio moved by {moved.p50 - 1:+.1%} within its sessions"]

    def comparable(self, other: "Measurement") -> bool:
        """Return whether two ratios may be compared: same profile, same sentinel, same metric."""
        mine = (self.profile_digest, self.reference_sha256, self.metric, self.emulated)
        return mine == (other.profile_digest, other.reference_sha256, other.metric, other.emulated)

    def to_json(self) -> dict[str, Any]:
        """Return everything, raw samples included, as JSON values."""
        return asdict(self) | {"conditions": dict(self.conditions), "layers": dict(self.layers)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Measurement":
        """Return the measurement that `to_json` wrote."""
        sessions = tuple(
            Session(
                candidate=_calls(each["candidate"]),
                reference=_calls(each["reference"]),
                single_threaded=each["single_threaded"],
            )
            for each in value["sessions"]
        )
        return cls(**{**value, "sessions": sessions, "flags": tuple(value["flags"])})


def _calls(value: Mapping[str, list[int]]) -> Calls:
    return Calls(**{name: tuple(samples) for name, samples in value.items()})
