"""This machine's CPU through ONNX Runtime, timed in a pinned process of its own.

    # profiles/host.toml
    adapter = "onnxruntime_cpu"
    [options]
    threads = 1             # of one inference; the last `threads` CPUs that this process may use are pinned
    cpu = 1                 # or the first CPU to pin, if the last ones are not wanted
    priority = "auto"       # real-time FIFO, else nice -20, else normal; "normal": do not ask for more
    time_limit_s = 60       # of one request to the worker, beyond the sampling it is asked for
    slow_limit = 1.3        # the sentinel this much slower than before: the measurement is refused as Unstable

The number is a ratio to the sentinel. Each session loads both models afresh, warms both up until successive windows
agree, and times them in alternating blocks whose order is drawn at random. The calls after a switch are dropped, the
calls that were preempted are set aside. Sessions go on until the decision is clear or `sessions_max` is reached.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from edgeprune.artifact import Artifact
from edgeprune.errors import ProfileError
from edgeprune.measurement import Calls, Measurement, Sampling, Session
from edgeprune.profile import Profile
from edgeprune.target import Finding, Target

from . import _conditions, _graph_names  # noqa: TID251 private parts of this adapter
from ._worker import WatchedWorker  # noqa: TID251
from ._yardstick import SLOW_LIMIT, Yardstick  # noqa: TID251

if TYPE_CHECKING:
    from numpy.typing import NDArray

TIME_LIMIT_S = 60.0
TIMER_NEEDED_NS = 1000
MEMORY_NEEDED_MIB = 512


@contextmanager
def connect(profile: Profile) -> Iterator[Target]:
    """Yield this machine's CPU; its worker process ends with the context, or with this process.

    Raises:
        ProfileError: if an option is unknown or out of range, or onnxruntime is not installed.
        DeviceLost: if the worker does not start.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ProfileError(f"profile {profile.name!r} needs onnxruntime", next_step="pip install onnxruntime")
    target = OnnxRuntimeCpu(profile)
    try:
        target.start()
        yield target
    finally:
        target.close()


class OnnxRuntimeCpu:
    """One CPU and the worker pinned to it; a worker that is lost is replaced on the next call."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._options = _options(profile)
        self._cpus = _pinned(self._options)
        threads = str(self._options["threads"])
        self._worker = WatchedWorker(
            "ONNX Runtime",
            "_onnxruntime_worker",
            {"threads": self._options["threads"], "cpus": list(self._cpus), "priority": self._options["priority"]},
            limit_s=float(self._options["time_limit_s"]),
            environment={"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        self._yardstick = Yardstick(float(self._options["slow_limit"]))

    @property
    def profile(self) -> Profile:
        """Return the profile it was opened with."""
        return self._profile

    @property
    def worker_pid(self) -> int | None:
        """Return the process id of the worker, None while there is none."""
        return self._worker.pid

    def start(self) -> None:
        """Start the worker if there is none.

        Raises:
            DeviceLost: if it does not answer.
        """
        self._worker.start()

    def close(self) -> None:
        """End the worker."""
        self._worker.close()

    def compile(self, graph: Artifact) -> Artifact:
        """Return the graph itself, once the runtime has loaded it and run it."""
        self._worker.ask({"do": "load", "model": _model(graph)}, f"loading {graph.path.name}")
        return graph

    def run(self, engine: Artifact, inputs: "Mapping[str, NDArray[Any]]") -> "Mapping[str, NDArray[Any]]":
        """Return the outputs of one call, by name."""
        _, outputs = self._worker.ask({"do": "run", "model": _model(engine)}, f"running {engine.path.name}", inputs)
        return outputs

    def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
        """Return the timing of `engine` against `sampling.reference`.

        A default measurement of nets of 1 to 10 ms takes about 2 s; with a threshold it ends once the interval is
        clear of it.

        Raises:
            Unstable: if the sentinel was slower than `slow_limit` times what it was in earlier measurements.
        """
        started, before = time.monotonic(), _conditions.read_conditions(self._cpus)
        replies: list[Mapping[str, Any]] = []
        sessions: list[Session] = []
        while not sampling.enough(sessions, time.monotonic() - started):
            replies.append(self._session(engine, sampling, len(sessions)))
            sessions.append(_session(replies[-1], single_threaded=self._options["threads"] == 1))
        layers = self._layers(engine) if sampling.layers else {}
        after = _conditions.read_conditions(self._cpus)
        seen = Measurement(
            profile_digest=self._profile.digest,
            artifact_sha256=engine.sha256,
            reference_sha256=sampling.reference.sha256,
            sessions=tuple(sessions),
            conditions=self._facts(before, after, replies),
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=time.monotonic() - started,
            layers=layers,
        )
        slow = self._yardstick.compare(seen.reference_sha256, seen.reference_latency().p50)
        flags = [*_conditions.changes(before, after), *slow, *seen.unsteady()]
        notes = _notes(seen, before, after)
        return replace(seen, flags=tuple(flags), conditions={**seen.conditions, "notes": notes})

    def _session(self, engine: Artifact, sampling: Sampling, number: int) -> Mapping[str, Any]:
        request = {
            "do": "time",
            "candidate": _model(engine),
            "reference": _model(sampling.reference),
            "session_ms": sampling.session_ms,
            "block_ms": sampling.block_ms,
            "dropped_calls": sampling.dropped_calls,
            "seed": f"{sampling.seed} {number}",
        }
        reply, _ = self._worker.ask(request, f"timing {engine.path.name}", extra_s=sampling.session_ms / 1000)
        return reply

    def _layers(self, engine: Artifact) -> dict[str, float]:
        reply, _ = self._worker.ask({"do": "layers", "model": _model(engine)}, f"profiling {engine.path.name}")
        return _graph_names.by_graph_node(engine.path, reply)

    def _facts(
        self, before: Mapping[str, Any], after: Mapping[str, Any], replies: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        return {
            "before": dict(before),
            "after": dict(after),
            "onnxruntime": self._worker.hello["onnxruntime"],
            "cpu_model": _conditions.cpu_model(),
            "cpus": list(self._cpus),
            "threads": self._options["threads"],
            "priority": replies[-1]["priority"],
            "warm_up": [each["warm_up"] for each in replies],
        }


def _model(artifact: Artifact) -> dict[str, Any]:
    inputs = [asdict(each) for each in artifact.inputs]
    return {"path": str(artifact.path.resolve()), "sha256": artifact.sha256, "inputs": inputs}


def _session(reply: Mapping[str, Any], *, single_threaded: bool) -> Session:
    candidate, reference = (
        Calls(**{name: tuple(values) for name, values in reply[which].items()}) for which in ("candidate", "reference")
    )
    return Session(candidate=candidate, reference=reference, single_threaded=single_threaded)


def _notes(seen: Measurement, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what is worth knowing but spoils nothing."""
    fallen = sum(each.clock == "cpu" for each in seen.sessions)
    stolen = _conditions.stolen_share(before, after, seen.seconds * len(seen.conditions["cpus"]))
    notes = []
    if fallen:
        notes.append(f"{fallen} of {len(seen.sessions)} sessions were preempted so often that thread CPU time was used")
    if stolen > _conditions.STEAL_NOTED:
        notes.append(f"other guests of the host took {stolen:.0%} of the CPU")
    return notes


_DEFAULTS: dict[str, Any] = {
    "threads": 1,
    "cpu": None,
    "priority": "auto",
    "time_limit_s": TIME_LIMIT_S,
    "slow_limit": SLOW_LIMIT,
}

_VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "threads": (lambda value: type(value) is int and value >= 1, "a whole number from 1"),
    "cpu": (lambda value: type(value) is int and value >= 0, "the number of a CPU"),
    "priority": (lambda value: value in ("auto", "normal"), '"auto" or "normal"'),
    "time_limit_s": (lambda value: type(value) in (int, float) and value > 0, "a number of seconds above 0"),
    "slow_limit": (lambda value: type(value) in (int, float) and value > 1, "a number above 1"),
}


def _options(profile: Profile) -> dict[str, Any]:
    for name, value in profile.options.items():
        if name not in _VALID:
            raise ProfileError(
                f"profile {profile.name!r}: unknown option {name!r}", next_step=f"one of {', '.join(_VALID)}"
            )
        valid, wanted = _VALID[name]
        if not valid(value):
            raise ProfileError(f"profile {profile.name!r}: option {name} is {value!r}", why=f"{wanted} is wanted")
    if profile.address is not None:
        raise ProfileError(
            f"profile {profile.name!r}: address is {profile.address!r}",
            why="this adapter times the CPU of this machine",
            next_step="remove the address, or take a profile of a board that is reached through ssh",
        )
    return _DEFAULTS | dict(profile.options)


def _pinned(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the CPUs to pin: the last ones that this process may use, or those from option `cpu` on."""
    usable, threads = sorted(os.sched_getaffinity(0)), options["threads"]
    first = options["cpu"]
    chosen = usable[-threads:] if first is None else [each for each in usable if each >= first][:threads]
    if len(chosen) < threads or first not in (None, chosen[0]):
        wanted = f"{threads} CPUs" if first is None else f"{threads} CPUs from CPU {first} on"
        raise ProfileError(f"{wanted} are wanted", why=f"this process may use CPUs {usable}")
    return tuple(chosen)


def examine(profile: Profile) -> list[Finding]:
    """Return what is in order and what is missing on this machine for measuring, holding nothing."""
    return [_runtime(), *_cpu(profile), _governor(), _priority(), _timer(), _load(), _memory(), _sensors()]


def _runtime() -> Finding:
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding.not_installed("onnxruntime", "pip install onnxruntime")
    return Finding(subject="onnxruntime", severity="ok", found=version("onnxruntime"))


def _cpu(profile: Profile) -> list[Finding]:
    usable = sorted(os.sched_getaffinity(0))
    flags = ", ".join(_conditions.cpu_flags()) or "none that decide kernels"
    facts = f"{_conditions.cpu_model()}; {len(usable)} usable of {os.cpu_count()}; instructions: {flags}"
    findings = [Finding(subject="cpu", severity="ok", found=facts)]
    try:
        _pinned(_options(profile))
    except ProfileError as error:
        mend = "change [options] of the profile, or the affinity (taskset -p) of this shell"
        findings.append(Finding.of_error("options", error, mend=mend))
    return findings


def _governor() -> Finding:
    seen = _conditions.read_conditions(sorted(os.sched_getaffinity(0)))["governor"]
    if seen is None:
        return Finding(
            subject="governor", severity="note", found="not visible here; a guest has none, ratios still hold"
        )
    if seen == "performance":
        return Finding(subject="governor", severity="ok", found=seen)
    return Finding(
        subject="governor",
        severity="note",
        found=f"{seen}: clocks follow the load",
        mend="sudo cpupower frequency-set -g performance",
    )


def _priority() -> Finding:
    """Try real-time scheduling for a moment in a child, so that this process never holds it."""
    attempt = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(20))"
    done = subprocess.run([sys.executable, "-I", "-c", attempt], capture_output=True, timeout=60, check=False)
    if done.returncode == 0:
        return Finding(subject="priority", severity="ok", found="real-time FIFO is granted")
    return Finding(
        subject="priority",
        severity="note",
        found="real-time FIFO is refused; preempted calls are set aside instead",
        mend="add a line '<user> - rtprio 20' to /etc/security/limits.conf and log in again",
    )


def _timer() -> Finding:
    ticks = [time.perf_counter_ns() for _ in range(1000)]
    finest = min((after - before for before, after in pairwise(ticks) if after > before), default=0)
    found = f"smallest step seen {finest} ns"
    if 0 < finest <= TIMER_NEEDED_NS:
        return Finding(subject="timer", severity="ok", found=found)
    mend = "boot with clocksource=tsc; see /sys/devices/system/clocksource/clocksource0/available_clocksource"
    return Finding(subject="timer", severity="note", found=found, mend=mend)


def _load() -> Finding:
    load, count = os.getloadavg()[0], os.cpu_count() or 1
    found = f"{load:.1f} over one minute on {count} CPUs"
    if load <= count / 2:
        return Finding(subject="load", severity="ok", found=found)
    mend = "end other jobs, or expect up to 1 % run-to-run error of the ratio"
    return Finding(subject="load", severity="note", found=found, mend=mend)


def _memory() -> Finding:
    free = _conditions.read_conditions([0])["free_memory_mib"]
    if free is None or free >= MEMORY_NEEDED_MIB:
        return Finding(subject="memory", severity="ok", found="unknown" if free is None else f"{free} MiB free")
    mend = f"free memory until {MEMORY_NEEDED_MIB} MiB are available"
    return Finding(subject="memory", severity="problem", found=f"{free} MiB free", mend=mend)


def _sensors() -> Finding:
    seen = _conditions.read_conditions(sorted(os.sched_getaffinity(0)))
    present = {"temperature": bool(seen["temperatures_c"]), "clock": seen["mhz"] is not None}
    missing = [name for name, there in present.items() if not there]
    if not missing:
        return Finding(subject="sensors", severity="ok", found="temperature and clock are readable")
    found = f"no {' and no '.join(missing)} to read; throttling is noticed by the sentinel alone"
    return Finding(subject="sensors", severity="note", found=found)
