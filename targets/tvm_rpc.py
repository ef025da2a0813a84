"""An ARM board, or an emulated one, through TVM: compiled here, brought there by RPC, timed there.

    # profiles/raspberry-pi-5.toml
    adapter = "tvm_rpc"
    arch = "aarch64"
    [options]
    board = "remote"        # "emulated": start one here under qemu; "local": start one here as it is, for tests
    cpu = "cortex-a76"      # what kernels are made for
    runtime = "tvm"         # "onnxruntime": the one on the board; "auto": both are measured, and the faster is taken
    threads = 1             # of one inference: kernels run on one
    pin = 3                 # the CPU of the board that is timed on; without it the last one
    priority = "auto"       # real-time FIFO, else nice -20, else normal; "normal": do not ask for more
    time_limit_s = 120      # of one request, beyond the sampling it is asked for
    busy_wait_s = 10        # for a board that somebody else holds
    cooldown_limit_s = 600  # for a board that is hotter than cooldown_c
    tune = 0                # trials of a search for a faster schedule of each kernel, see docs/tuning.md
    slow_limit = 1.3        # the sentinel this much slower than before: the measurement is refused as Unstable

    # edgeprune.toml
    [targets.rpi5]
    profile = "raspberry-pi-5"
    address = "ssh://me@pi.local"       # or "tcp://127.0.0.1:9190", a tunnel that you keep open yourself

One engine file goes to the board: kernels, constants and the program that calls them. The board's server,
edgeprune-board, holds one session at a time and times candidate and sentinel in alternating blocks, see deploy/arm/. An
emulated board counts executed instructions instead; they say nothing about milliseconds, and no time of an emulator is
ever recorded.
"""

import importlib.util
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

from edgeprune.artifact import Artifact
from edgeprune.errors import CompileError, CorruptArtifact, DeviceLost, EdgepruneError, ProfileError, Unstable
from edgeprune.measurement import Calls, Measurement, Sampling, Session
from edgeprune.metric import EMULATED_INSTRUCTIONS, LATENCY
from edgeprune.profile import Profile
from edgeprune.scratch import Scratch
from edgeprune.target import Finding, Selftest, Target

from ._engine_cache import kept_in  # noqa: TID251
from ._tvm_rpc_board import ChildBoard, TcpBoard, emulator, programs  # noqa: TID251 private parts
from ._tvm_rpc_bundle import ENGINE, GRAPH, answered, check_trust, shipped, with_onnxruntime  # noqa: TID251
from ._tvm_rpc_options import board_of, options_of  # noqa: TID251
from ._tvm_rpc_runtime import (  # noqa: TID251
    AUTO,
    ONNXRUNTIME,
    OTHER,
    TVM,
    Choice,
    Choices,
    choice_from,
    note_of,
)
from ._tvm_rpc_tune import Tries, tune  # noqa: TID251
from ._worker import WatchedWorker  # noqa: TID251
from ._yardstick import Yardstick  # noqa: TID251

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENGINES_KEPT = 2 << 30
"""Bytes of engines that are kept for as long as the board is held; those unused for longest go first."""

COUNTING = (
    "executed instructions of an emulated CPU were counted; they are no time",
    "each engine was counted in several calls; every session holds the same counts, because another would repeat them",
)
"""Notes of every measurement on an emulated board."""

COOLING_PAUSE_S = 5.0

COUNTS_AGREE = 1e-4
"""Share by which counts of one engine may differ within a measurement."""

PACKAGES = ("tvm", "tvm_ffi")


@contextmanager
def connect(profile: Profile) -> Iterator[Target]:
    """Yield the board; what runs here for its sake ends with the context, or with this process.

    Raises:
        ProfileError: if an option or the address makes no sense, the board is of another kind, or something that is
            needed is not installed here.
        DeviceBusy: if somebody else holds the board.
        DeviceLost: if the board cannot be reached.
    """
    _check_packages(profile)
    target = TvmRpc(profile)
    try:
        target.start()
        yield target
    finally:
        target.close()


class TvmRpc:
    """One board and the worker that talks to it; either is replaced on the next call once it is lost."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._options = options_of(profile)
        self._board = board_of(profile, self._options)
        kernels = kept_in("tvm")
        self._folder = Scratch("engines")
        self._worker = WatchedWorker(
            "TVM",
            "_tvm_rpc_worker",
            {
                "arch": profile.arch,
                "cpu": self._options["cpu"],
                "precision": profile.precision,
                "engines": str(self._folder.path),
                "kernels": str(kernels),
            },
            limit_s=float(self._options["time_limit_s"]),
            environment={"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._kind = ""
        self._sentinels: dict[str, Calls] = {}
        self._choice: Choice | None = None
        self._graphs: dict[str, Artifact] = {}
        self._yardstick = Yardstick(float(self._options["slow_limit"]))

    @property
    def profile(self) -> Profile:
        """Return the profile it was opened with."""
        return self._profile

    @property
    def worker_pid(self) -> int | None:
        """Return the process id of the worker, None while there is none."""
        return self._worker.pid

    @property
    def board_pid(self) -> int | None:
        """Return the process id of the board's server if it is a child of ours, else None."""
        return self._board.pid if isinstance(self._board, ChildBoard) else None

    def start(self) -> None:
        """Take the board and check that it is what the profile says.

        Raises:
            ProfileError: if it is not.
            DeviceBusy, DeviceLost: if it cannot be had.
        """
        self._facts()

    def close(self) -> None:
        """Give the board back, and end what runs here."""
        self._worker.close()
        self._board.close()
        self._folder.close()

    def compile(self, graph: Artifact) -> Artifact:
        """Return the engine for an ONNX graph: made on this machine by TVM, or the graph itself for ONNX Runtime.

        Where the profile leaves the runtime open, the first graph decides: it is measured in both.
        """
        graph.check()
        runtime = str(self._options["runtime"])
        if runtime == AUTO:
            self._choice = self._choice or self._chosen(graph)
            runtime = self._choice.chosen
        engine = self._in(runtime, graph)
        self._graphs[engine.sha256] = graph
        return engine

    def _in(self, runtime: str, graph: Artifact) -> Artifact:
        """Return the engine of a graph in one runtime."""
        doing = f"compiling {graph.path.name}"
        if runtime == ONNXRUNTIME:
            inputs = [asdict(each) for each in graph.inputs]
            engine = replace(graph, kind=GRAPH)
            self._ask({"do": "check", "engine": self._sent(engine), "inputs": inputs}, doing)
            return engine
        reply, _ = self._worker.ask({"do": "compile", "model": _model(graph), "tuning": self._tuning()}, doing)
        engine = Artifact.of(Path(reply["path"]), kind=ENGINE, inputs=graph.inputs)
        self._make_room(engine.path)
        return engine

    def tune(self, graph: Artifact, progress: Callable[[float, str], None]) -> None:
        """Look for faster kernels of `graph` on the board, as `edgeprune.target.Tuner` says."""
        tuning = self._tuning()
        if tuning and not (self._choice and self._choice.chosen == ONNXRUNTIME):
            tries = Tries(
                ask=self._worker.ask, layers=self._layers, run=self.run, timed=self._timed, forget=self._facts
            )
            tune(graph.check(), {"do": "tune", "model": _model(graph), "tuning": tuning}, tries, progress)

    def _tuning(self) -> dict[str, Any] | None:
        """Return what a search for faster kernels is told, None if there is to be none."""
        trials = self._options["tune"]
        return {"trials": trials, "board": self._kind} if trials else None

    def _chosen(self, graph: Artifact) -> Choice:
        """Return the runtime that is faster for `graph`: as it was found before, or found now."""
        choices = self._choices()
        with choices.one_at_a_time():
            return choices.known(graph.sha256) or choices.keep(self._compared(graph))

    def _choices(self) -> Choices:
        facts = self._facts()
        versions = [self._worker.hello["tvm"], facts.get("onnxruntime"), facts.get("version")]
        return Choices({"profile": self._profile.digest, "board": self._cpu_model(facts), "versions": versions})

    def _compared(self, graph: Artifact, chosen: str = "") -> Choice:
        """Return what is seen of a graph in both runtimes.

        Raises:
            CompileError: if both refuse it.
        """
        engines: dict[str, Artifact] = {}
        refused: dict[str, CompileError] = {}
        for runtime in (TVM, ONNXRUNTIME):
            try:
                engines[runtime] = self._in(runtime, graph)
            except CompileError as error:
                refused[runtime] = error
        if not engines:
            raise refused[TVM]
        for runtime, refusal in refused.items():
            why = f"{refusal.what}: {refusal.why}" if refusal.why else refusal.what
            return Choice(chosen=OTHER[runtime], graph=graph.sha256, times=None, refused=why)
        seen = self.measure(engines[TVM], Sampling(reference=engines[ONNXRUNTIME], threshold=1.0))
        return choice_from(seen, graph.sha256, chosen)

    def _beside(self, engine: Artifact) -> list[str]:
        """Return what the other runtime takes for the graph of an engine, in a sentence, where both were measured.

        What was chosen for this graph is kept as well: whoever checks a bundle begins with its model.
        """
        graph = self._graphs.get(engine.sha256)
        if self._choice is None or graph is None or graph.sha256 == self._choice.graph or not graph.path.is_file():
            return []
        return [note_of(self._choices().keep(self._compared(graph, self._choice.chosen)))]

    def run(self, engine: Artifact, inputs: "Mapping[str, NDArray[Any]]") -> "Mapping[str, NDArray[Any]]":
        """Return the outputs of one call on the board, by name."""
        _, outputs = self._ask({"do": "run", "engine": self._sent(engine)}, f"running {engine.path.name}", inputs)
        return outputs

    def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
        """Return the timing of `engine` against `sampling.reference`, or the count of instructions where they count.

        Raises:
            Unstable: if the sentinel was slower than `slow_limit` times what it was in earlier measurements.
        """
        started, before = time.monotonic(), self._cool_facts()
        replies, sessions = self._counted(engine, sampling) if self._emulated else self._timed(engine, sampling)
        layers = self._layers(engine) if sampling.layers else {}
        notes = [*self._beside(engine), *_of_profile(engine)] if sampling.layers else []
        after = self._facts(forget=[] if engine.sha256 == sampling.reference.sha256 else [engine.sha256])
        seen = Measurement(
            profile_digest=self._profile.digest,
            artifact_sha256=engine.sha256,
            reference_sha256=sampling.reference.sha256,
            sessions=tuple(sessions),
            conditions=self._conditions(before, after, replies) | self._of_runtimes(engine, after),
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=time.monotonic() - started,
            metric=self._metric,
            emulated=self._emulated,
            layers=layers,
        )
        seen.conditions["notes"].extend(notes)
        return replace(seen, flags=tuple(self._flags(seen, before, after)))

    def package(self, engine: Artifact) -> Mapping[str, Path]:
        """Return what runs `engine` on the board without edgeprune, as `edgeprune.target.Packager` says."""
        engine.check()
        if engine.kind == GRAPH:
            return with_onnxruntime(self._profile.arch)
        return {"engine.so": engine.path, **shipped(self._profile.arch)}

    def selftest(self, bundle: Path, model: Artifact, *, trusted: bool) -> Selftest:
        """Return what the bundle's runner says when it checks itself on the board.

        Through ``tcp://`` nothing but the server is reached, so there the bundle's engine answers by itself.
        """
        if not trusted:
            compiled = (bundle / "device" / "engine.so").is_file() or self._options["runtime"] == TVM
            runtime = TVM if compiled else ONNXRUNTIME
            check_trust(bundle, self._in(runtime, model), self._profile.arch)
        if isinstance(self._board, TcpBoard):
            return answered(bundle, model, self.run)
        return self._board.selftest(bundle)

    def _timed(self, engine: Artifact, sampling: Sampling) -> tuple[list[Mapping[str, Any]], list[Session]]:
        """Return replies and samples of as many sessions as the decision needs."""
        brought = [self._sent(each) for each in (engine, sampling.reference)]
        self._ask({"do": "bring", "engines": brought}, f"loading {engine.path.name}")
        replies: list[Mapping[str, Any]] = []
        sessions: list[Session] = []
        began = time.monotonic()
        while not sampling.enough(sessions, time.monotonic() - began):
            replies.append(self._session(engine, sampling, len(sessions)))
            sessions.append(self._calls_of(replies[-1]))
        return replies, sessions

    def _counted(self, engine: Artifact, sampling: Sampling) -> tuple[list[Mapping[str, Any]], list[Session]]:
        """Return one session's counts, as many times as sessions are asked for: another would count the same.

        An emulated call takes seconds, so the sentinel is counted once for as long as the board is held.
        """
        sentinel = sampling.reference.sha256
        if sentinel not in self._sentinels:
            self._sentinels[sentinel] = self._count(sampling.reference)
        reference = self._sentinels[sentinel]
        session = Session(candidate=self._count(engine), reference=reference, single_threaded=True)
        sessions: list[Session] = []
        while not sampling.enough(sessions):
            sessions.append(session)
        return [], sessions

    def _count(self, engine: Artifact) -> Calls:
        reply, _ = self._ask({"do": "count", "engine": self._sent(engine)}, f"counting {engine.path.name}")
        counts = reply.get("counts")
        return self._calls_of_columns(reply, {"wall_ns": counts, "cpu_ns": counts, "preempted": _zeros(counts)})

    def _session(self, engine: Artifact, sampling: Sampling, number: int) -> Mapping[str, Any]:
        request = {
            "do": "time",
            "candidate": self._sent(engine),
            "reference": self._sent(sampling.reference),
            "session_ms": sampling.session_ms,
            "block_ms": sampling.block_ms,
            "dropped_calls": sampling.dropped_calls,
            "seed": f"{sampling.seed} {number}",
            "priority": self._options["priority"],
        }
        reply, _ = self._ask(request, f"timing {engine.path.name}", extra_s=sampling.session_ms / 1000)
        return reply

    def _calls_of(self, reply: Mapping[str, Any]) -> Session:
        """Return the samples of a timed session."""
        candidate, reference = (self._calls_of_columns(reply, reply.get(each)) for each in ("candidate", "reference"))
        return Session(candidate=candidate, reference=reference, single_threaded=True)

    def _calls_of_columns(self, reply: Mapping[str, Any], columns: Any) -> Calls:
        """Return the samples in three columns of a reply, which a board may have garbled.

        A thread's CPU clock stands still now and then, once in some ten thousand calls on a virtual machine: a sample
        of 0 is no lie, and too low to be looked at (`statistics.band`).
        """
        if reply.get("metric") != self._metric:
            raise self._strange(f"its samples are of {reply.get('metric')!r}")
        try:
            elapsed, on_cpu, preempted = (tuple(columns[name]) for name in ("wall_ns", "cpu_ns", "preempted"))
        except (TypeError, LookupError) as error:
            raise self._strange("its samples are no samples") from error
        whole = all(type(each) is int for column in (elapsed, on_cpu, preempted) for each in column)
        if not whole or not len(elapsed) == len(on_cpu) == len(preempted) > 0:
            raise self._strange("its samples are no samples")
        if min(elapsed) <= 0 or min(on_cpu) < 0 or median_low(on_cpu) == 0:
            raise self._strange("its samples are no samples")
        return Calls(elapsed=elapsed, on_cpu=on_cpu, preempted=preempted)

    def _strange(self, why: str) -> DeviceLost:
        self._board.lost()
        return DeviceLost("the board answers what was not asked", why=why, next_step="install its server again")

    def _layers(self, engine: Artifact) -> dict[str, float]:
        reply, _ = self._ask({"do": "layers", "engine": self._sent(engine)}, f"profiling {engine.path.name}")
        if reply["metric"] != self._metric:
            raise self._strange(f"its costs are of {reply['metric']!r}")
        return dict(reply["costs"])

    def _flags(self, seen: Measurement, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
        if self._emulated:
            return _disagreements(seen)
        slow = self._yardstick.compare(seen.reference_sha256, seen.reference_latency().p50)
        return [*_changes(before.get("conditions"), after.get("conditions")), *slow, *seen.unsteady()]

    def _conditions(
        self, before: Mapping[str, Any], after: Mapping[str, Any], replies: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        facts = {name: value for name, value in after.items() if name not in _PASSING}
        common = {
            "board": self._profile.address or self._options["board"],
            "cpu_model": self._cpu_model(facts),
            "found": facts,
            "tvm": self._worker.hello["tvm"],
            "threads": 1,
            "cpu": self._options["cpu"],
        }
        if self._emulated:
            return {**common, "notes": list(COUNTING)}
        timing: dict[str, Any] = {"before": before.get("conditions"), "after": after.get("conditions"), "notes": []}
        how = {"priority": replies[-1].get("priority"), "warm_up": [each.get("warm_up") for each in replies]}
        return {**common, **timing, **how}

    def _of_runtimes(self, engine: Artifact, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return which runtime an engine runs in, and what is known of the other."""
        runtime = ONNXRUNTIME if engine.kind == GRAPH else TVM
        version_of = {"onnxruntime": facts.get("onnxruntime")} if runtime == ONNXRUNTIME else {}
        compared = {"runtimes": self._choice.to_json()} if self._choice else {}
        return {"runtime": runtime, **version_of, **compared}

    def _sent(self, engine: Artifact) -> dict[str, Any]:
        """Return what the worker is told of an engine, which counts as used from now on, see `_make_room`."""
        if engine.kind != ENGINE and (engine.kind != GRAPH or self._options["runtime"] == TVM):
            raise CorruptArtifact(f"{engine.path.name} is {engine.kind!r}, no engine of this target")
        if engine.kind == ENGINE:
            with suppress(OSError):
                now = time.time_ns()  # the kernel's own times of files are milliseconds apart
                os.utime(engine.path, ns=(now, now))
        return {"path": str(engine.path.resolve()), "sha256": engine.sha256, "kind": engine.kind}

    def _cpu_model(self, facts: Mapping[str, Any]) -> str:
        return f"emulated {self._options['cpu']}" if self._emulated else _what(facts)

    @property
    def _emulated(self) -> bool:
        return bool(self._options["board"] == "emulated")

    @property
    def _metric(self) -> str:
        return EMULATED_INSTRUCTIONS if self._emulated else LATENCY

    def _facts(self, forget: Sequence[str] = ()) -> Mapping[str, Any]:
        """Return what the board says of itself, once that fits the profile."""
        facts, _ = self._ask({"do": "facts", "forget": list(forget)}, "asking the board what it is")
        self._kind = _what(facts)
        if facts.get("machine") != self._profile.arch:
            raise ProfileError(
                f"the board is {facts.get('machine')!r}, profile {self._profile.name!r} is for {self._profile.arch}",
                next_step="choose the profile of the board, or correct its arch",
            )
        if facts.get("metric") != self._metric:
            raise ProfileError(
                f"the board counts {facts.get('metric')!r}, profile {self._profile.name!r} wants {self._metric}",
                why="it is emulated" if facts.get("emulated") else "it is not emulated",
                next_step='board = "emulated" belongs to emulated boards, "remote" to real ones',
            )
        if self._options["runtime"] != TVM and not facts.get("onnxruntime"):
            raise ProfileError(
                f"the board has no ONNX Runtime, and runtime = {self._options['runtime']!r} wants it",
                why="its server was installed without it",
                next_step='install the board\'s server again, which brings it along, or set runtime = "tvm"',
            )
        return facts

    def _cool_facts(self) -> Mapping[str, Any]:
        """Return what the board says of itself, once it is as cool as the profile wants it."""
        wanted, limit_s = self._profile.cooldown_c, float(self._options["cooldown_limit_s"])
        return cooled(self._facts, wanted, limit_s)

    def _ask(
        self,
        request: Mapping[str, Any],
        doing: str,
        arrays: "Mapping[str, NDArray[Any]] | None" = None,
        extra_s: float = 0.0,
    ) -> "tuple[dict[str, Any], dict[str, NDArray[Any]]]":
        wait_s, pin = float(self._options["busy_wait_s"]), self._options["pin"]
        door = asdict(self._board.door())
        whole = {"door": door, "busy_wait_s": wait_s, "pin": -1 if pin is None else pin, **request}
        try:
            return self._worker.ask(whole, doing, arrays, extra_s + wait_s)
        except DeviceLost:
            self._board.lost()
            raise

    def _make_room(self, newest: Path) -> None:
        """Remove the engines that were used longest ago where there are too many of them."""
        engines = sorted(self._folder.path.glob("*.so"), key=lambda each: each.stat().st_mtime_ns)
        excess = sum(each.stat().st_size for each in engines) - ENGINES_KEPT
        for each in engines:
            if excess > 0 and each != newest:
                excess -= each.stat().st_size
                each.unlink()


def cooled(
    read: Callable[[], Mapping[str, Any]],
    wanted_c: float | None,
    limit_s: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Mapping[str, Any]:
    """Return the first reading in which nothing on the board is hotter than `wanted_c`.

    Raises:
        Unstable: if there is none within `limit_s` seconds.
    """
    for _ in range(math.ceil(limit_s / COOLING_PAUSE_S) + 1):
        facts = read()
        hottest = max(_temperatures(facts.get("conditions")), default=None)
        if wanted_c is None or hottest is None or hottest <= wanted_c:
            return facts
        sleep(COOLING_PAUSE_S)
    raise Unstable(
        f"the board is at {hottest:g} C and does not cool down to {wanted_c:g} C",
        why=f"it was waited for {limit_s:g} s",
        next_step="fit a fan, end what else it does, or raise cooldown_c of the profile",
    )


def _temperatures(conditions: Any) -> list[float]:
    heat = conditions.get("temperatures_c") if isinstance(conditions, Mapping) else None
    return [float(each) for each in heat.values() if type(each) in (int, float)] if isinstance(heat, Mapping) else []


def _what(facts: Mapping[str, Any]) -> str:
    """Return what a board is, in words."""
    return str(facts.get("model") or facts.get("cpu_model") or facts.get("machine"))


def _zeros(counts: Any) -> list[int]:
    return [0] * len(counts) if isinstance(counts, list) else []


_PASSING = ("conditions", "folder", "last_end", "features")
"""What a board says that belongs to a moment, or to nobody else."""


def _model(graph: Artifact) -> dict[str, Any]:
    inputs = [asdict(each) for each in graph.inputs]
    return {"path": str(graph.path.resolve()), "sha256": graph.sha256, "inputs": inputs}


def _of_profile(engine: Artifact) -> list[str]:
    """Return what is to be known of the costs of the layers of an engine."""
    profiled = "the cost of each layer holds what ONNX Runtime's profiler does for it: some microseconds of work"
    return [profiled] if engine.kind == GRAPH else []


def _disagreements(seen: Measurement) -> list[str]:
    """Return a flag for each engine whose counts differ by more than they may."""
    flags = []
    for name in ("candidate", "reference"):
        counts = [each for session in seen.sessions for each in getattr(session, name).elapsed]
        spread = max(counts) / min(counts) - 1
        if spread > COUNTS_AGREE:
            flags.append(f"the counts of the {name} differ by {spread:.3%}")
    return flags


def _changes(before: Any, after: Any) -> list[str]:
    """Return what changed on the board between two readings that makes timings suspect, one sentence each."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return []
    named = (
        ("governor", "the CPU governor"),
        ("khz_max", "the highest CPU clock"),
        ("throttled", "the throttle state"),
    )
    changed = [
        f"{name} changed from {before.get(key)} to {after.get(key)} while measuring"
        for key, name in named
        if before.get(key) != after.get(key)
    ]
    return changed + [f"the board is throttled: {said}" for said in throttling(after.get("throttled"))]


def throttling(bits: object) -> list[str]:
    """Return what the low bits of a Raspberry Pi's ``get_throttled`` say goes on now, one clause each.

    The bits are those of the vcgencmd documentation of Raspberry Pi: 0 under-voltage, 1 frequency capped, 2 throttled,
    3 soft temperature limit; from 16 on, the same since the board was started.
    """
    if not isinstance(bits, str):
        return []
    try:
        now = int(bits, 16)
    except ValueError:
        return []
    names = ("the supply voltage is too low", "its clock is capped", "it is throttled", "it is at its soft heat limit")
    return [name for place, name in enumerate(names) if now >> place & 1]


def _check_packages(profile: Profile) -> None:
    missing = [each for each in PACKAGES if importlib.util.find_spec(each) is None]
    if missing:
        raise ProfileError(f"profile {profile.name!r} needs TVM", next_step="pip install 'edgeprune[tvm]'")


# --- doctor


def examine(profile: Profile) -> list[Finding]:
    """Return what is in order and what is missing, here and on the board, holding nothing."""
    findings = [_runtime()]
    try:
        options = options_of(profile)
        board_of(profile, options)  # says if the profile names none
        findings += [_linker(profile.arch), *_own_programs(profile, options)]
        if any(each.severity == "problem" for each in findings):
            return findings
        return [*findings, *_board_findings(profile)]
    except EdgepruneError as error:
        mend = "change the profile, or its table in edgeprune.toml"
        return [*findings, Finding.of_error("board", error, mend=mend)]


def _runtime() -> Finding:
    if any(importlib.util.find_spec(each) is None for each in PACKAGES):
        return Finding.not_installed("tvm", "pip install 'edgeprune[tvm]'")
    return Finding(subject="tvm", severity="ok", found=version("apache-tvm"))


def _linker(arch: str) -> Finding:
    wanted = [f"{arch}-linux-gnu-ld", *(["ld"] if platform.machine() == arch else [])]
    found = next((path for each in wanted if (path := shutil.which(each))), None)
    if found is None:
        mend = f"sudo apt-get install binutils-{arch.replace('_', '-')}-linux-gnu"
        return Finding(subject="linker", severity="problem", found=f"none for {arch}", mend=mend, blame="user")
    return Finding(subject="linker", severity="ok", found=found)


def _own_programs(profile: Profile, options: Mapping[str, Any]) -> list[Finding]:
    """Return whether what runs here is built, where the board is to run here."""
    if profile.address is not None or options["board"] == "remote":
        return []
    folder = programs(profile.arch)
    findings = [Finding(subject="programs", severity="ok", found=str(folder))]
    if options["board"] == "emulated":
        findings.append(
            Finding(subject="emulator", severity="ok", found=emulator(profile.arch, options["cpu"], count=True)[0])
        )
        note = "executed instructions are counted; they say nothing about milliseconds"
        findings.append(Finding(subject="metric", severity="note", found=note))
    return findings


def _board_findings(profile: Profile) -> list[Finding]:
    target = TvmRpc(profile)
    try:
        facts = target._facts()
    finally:
        target.close()
    found = f"{_what(facts)}, server {facts.get('version')}"
    findings = [Finding(subject="board", severity="ok", found=found)]
    if facts.get("onnxruntime"):
        findings.append(Finding(subject="onnxruntime", severity="ok", found=f"{facts['onnxruntime']}, on the board"))
    conditions = facts.get("conditions")
    return findings + (_state(conditions) if isinstance(conditions, Mapping) else [])


def _state(conditions: Mapping[str, Any]) -> list[Finding]:
    governor, bad = conditions.get("governor"), throttling(conditions.get("throttled"))
    heat = conditions.get("temperatures_c") or {}
    shown = ", ".join(f"{name} {value:g} C" for name, value in heat.items() if type(value) in (int, float))
    findings = [Finding(subject="temperature", severity="ok", found=shown or "no sensor to read")]
    if governor not in (None, "performance"):
        mend = "on the board: sudo sh -c 'echo performance | tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor'"
        findings.append(
            Finding(subject="governor", severity="note", found=f"{governor}: clocks follow the load", mend=mend)
        )
    for each in bad:
        mend = "use the supply that the board's maker sells" if "voltage" in each else "let it cool down; fit a fan"
        findings.append(Finding(subject="throttling", severity="problem", found=each, mend=mend))
    free = conditions.get("free_disk_mib")
    if isinstance(free, int):
        severity, mend = ("ok", "") if free >= 256 else ("problem", "free space on the board")
        findings.append(Finding(subject="disk", severity=severity, found=f"{free} MiB free", mend=mend))
    return findings
