"""The process that holds the ONNX Runtime sessions of `edgeprune.targets.onnxruntime_cpu`: pinned, quiet, disposable.

    parent ── request frame ──▶ stdin   load · time · layers · run
    parent ◀── reply frame ──── stdout  {"ok": ...} or {"refused": why, "kind": "compile" | "corrupt" | "machine"}

It ends when its input ends, when its parent dies, and when a request overruns its time. Only numpy, onnxruntime and
the standard library are loaded, so that nothing else runs threads or touches the caches of the pinned CPU.
"""

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from edgeprune.scratch import Scratch
from edgeprune.statistics import band

from ._blocks import Row, alternate, block_of, columns, model_bytes, noise_like, quiet, warm_up  # noqa: TID251
from ._serve import Answer, Arrays, RefusedError, serve  # noqa: TID251 private parts of the adapters

FIFO_PRIORITY = 20
"""Above every ordinary process, below the kernel's own threads and audio."""

FIFO_STRETCH_S = 1.0
"""Longest time at real-time priority before others are let in; the kernel throttles at 0.95 s in each second."""

BREATH_S = 0.01
"""How long others are let in."""

PROFILE_S, PROFILE_CALLS = 0.3, (4, 50)
"""Time for a profiling run, and the fewest and most calls in it."""

_REFUSALS: tuple[type[Exception], ...] = (
    *(
        each
        for each in vars(import_module("onnxruntime.capi.onnxruntime_pybind11_state")).values()
        if isinstance(each, type) and issubclass(each, Exception)
    ),
    RuntimeError,
    ValueError,
    MemoryError,
)
"""ONNX Runtime's exceptions share no base class of their own."""

_SHORTAGES = ("failed to allocate", "bad_alloc", "out of memory", "cannot allocate memory", "pthread_create")
"""What ONNX Runtime and the C++ library say when the machine has no memory or threads left."""

_NUMPY_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16"}
_DROP_SUFFIX = "_kernel_time"


def lacking(error: Exception) -> bool:
    """Return whether the machine failed the model, not the model the machine: no reason to think ill of a candidate."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(each in said for each in _SHORTAGES)


class Engine:
    """One runtime session with its inputs and outputs bound to fixed buffers, so that a call is only the inference."""

    def __init__(self, model: Mapping[str, Any], threads: int, profile_prefix: str | None = None) -> None:
        self.session = _session(model, threads, profile_prefix)
        self.inputs = {each["name"]: noise_like(each) for each in model["inputs"]}
        _check_inputs(self.session, self.inputs)
        self._binding = self.session.io_binding()
        self._bind()

    def _bind(self) -> None:
        for name, value in self.inputs.items():
            self._binding.bind_cpu_input(name, value)
        for each in self.session.get_outputs():
            self._binding.bind_output(each.name, "cpu")
        start = time.perf_counter()
        self()
        self.first_s = time.perf_counter() - start
        outputs = self._binding.get_outputs()
        self._binding.clear_binding_outputs()
        for each, value in zip(self.session.get_outputs(), outputs, strict=True):
            self._binding.bind_ortvalue_output(each.name, value)

    def __call__(self) -> None:
        """Run one inference."""
        self.session.run_with_iobinding(self._binding)


def _session(model: Mapping[str, Any], threads: int, profile_prefix: str | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile_prefix
    return onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])


def _check_inputs(session: Any, given: Mapping[str, NDArray[Any]]) -> None:
    wanted = {each.name: each for each in session.get_inputs()}
    if set(wanted) != set(given):
        raise RefusedError(f"the graph's inputs are {sorted(wanted)}, not {sorted(given)}")
    for name, value in given.items():
        fixed = [
            size if isinstance(size, int) else have for size, have in zip(wanted[name].shape, value.shape, strict=False)
        ]
        if len(wanted[name].shape) != value.ndim or fixed != list(value.shape):
            raise RefusedError(f"input {name!r} is {wanted[name].shape}, not {list(value.shape)}")
        if _NUMPY_TYPES.get(wanted[name].type, value.dtype.name) != value.dtype.name:
            raise RefusedError(f"input {name!r} is {wanted[name].type}, not {value.dtype.name}")


class Priority:
    """The best scheduling this process may have, held only while something is timed.

    Args:
        wanted: "auto" tries real-time FIFO, then nice -20; "normal" leaves it as it is.
        alone: whether the pinned CPUs are all there are; real-time spinning on them would stop the machine.
    """

    def __init__(self, wanted: str, alone: bool) -> None:
        tries = {"fifo": _fifo, "nice -20": _nice} if wanted == "auto" else {}
        self.names = [name for name, attempt in tries.items() if not (alone and name == "fifo") and _granted(attempt)]
        self._since = 0.0
        self._now = "normal"

    def name(self, longest_s: float = 0.0) -> str:
        """Return what is held when `longest_s` is the longest time between two calls of `breathe`."""
        usable = [each for each in self.names if each != "fifo" or longest_s <= FIFO_STRETCH_S]
        return usable[0] if usable else "normal"

    @contextmanager
    def held(self, longest_s: float) -> Iterator[str]:
        """Hold it and yield its name; `longest_s` is the longest time between two calls of `breathe`."""
        self._take(self.name(longest_s))
        try:
            yield self._now
        finally:
            _lower()

    def breathe(self) -> None:
        """Let others run if they have been kept out for long."""
        if self._now == "fifo" and time.monotonic() - self._since > FIFO_STRETCH_S:
            _lower()
            time.sleep(BREATH_S)
            self._take("fifo")

    def _take(self, name: str) -> None:
        self._now, self._since = name, time.monotonic()
        {"fifo": _fifo, "nice -20": _nice, "normal": _lower}[name]()


def _granted(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    finally:
        _lower()
    return True


def _fifo() -> None:
    to_each_thread(lambda thread: os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(FIFO_PRIORITY)))


def _nice() -> None:
    to_each_thread(lambda thread: os.setpriority(os.PRIO_PROCESS, thread, -20))


def _lower() -> None:
    to_each_thread(_lower_one)


def _lower_one(thread: int) -> None:
    if os.sched_getscheduler(thread) != os.SCHED_OTHER:
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
    if os.getpriority(os.PRIO_PROCESS, thread) < 0:
        os.setpriority(os.PRIO_PROCESS, thread, 0)


def to_each_thread(change: Callable[[int], None]) -> None:
    """Change every thread of this process; one that has ended since it was listed needs no change."""
    for each in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            change(int(each.name))


class Worker:
    """Serves requests one at a time.

    Args:
        settings: "threads", "cpus", "priority".
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.threads = int(settings["threads"])
        cpus = set(settings["cpus"])
        alone = cpus >= os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        self.priority = Priority(settings["priority"], alone)
        self._verbs = {"load": self.load, "time": self.time, "layers": self.layers}

    def answer(self, request: Mapping[str, Any], arrays: Arrays) -> tuple[Mapping[str, Any], Arrays]:
        """Return the reply to one request.

        Raises:
            RefusedError: if the runtime refuses it, or the machine ran short.
        """
        try:
            if request["do"] == "run":
                return {}, self.run(request, arrays)
            return self._verbs[request["do"]](request), {}
        except _REFUSALS as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise RefusedError(why, "machine" if lacking(error) else "compile") from error

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load a model, run it once, and return the names of its outputs."""
        return {"outputs": [each.name for each in Engine(request["model"], self.threads).session.get_outputs()]}

    def run(self, request: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the outputs for the given inputs, by name."""
        session = _session(request["model"], self.threads, None)
        _check_inputs(session, arrays)
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(arrays)), strict=True))

    def time(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the timed calls of one fresh session of candidate and reference, taken in alternating blocks."""
        engines = [Engine(request[which], self.threads) for which in ("candidate", "reference")]
        with quiet():
            warm = [self._warmed(each) for each in engines]
            blocks = [block_of(call_s, request) for call_s, *_ in warm]
            longest_s = max((dropped + kept) * each[0] for (dropped, kept), each in zip(blocks, warm, strict=True))
            with self.priority.held(longest_s) as held:
                order = random.Random(request["seed"])  # noqa: S311 the order of blocks is no secret
                session_s = request["session_ms"] / 1000
                calls = alternate(engines, blocks, session_s, order, self._sample, between=self.priority.breathe)
        return {
            "candidate": columns(calls[0]),
            "reference": columns(calls[1]),
            "priority": held,
            "warm_up": [{"calls": count, "settled": settled} for _, count, settled in warm],
        }

    def _warmed(self, engine: Engine) -> tuple[float, int, bool]:
        with self.priority.held(engine.first_s):
            return warm_up(engine, self.priority.breathe)

    def _sample(self, engine: Callable[[], None], count: int) -> list[Row]:
        return _timed(engine, resource.RUSAGE_THREAD if self.threads == 1 else resource.RUSAGE_SELF, count)

    def layers(self, request: Mapping[str, Any]) -> dict[str, float]:
        """Return the node names that the runtime reports → nanoseconds of one call."""
        with Scratch("profile") as folder:
            engine = Engine(request["model"], self.threads, f"{folder}/profile")
            with quiet():
                call_s, *_ = self._warmed(engine)
                count = round(min(max(PROFILE_S / call_s, PROFILE_CALLS[0]), PROFILE_CALLS[1]))
                with self.priority.held(call_s):
                    for _ in range(count):
                        self.priority.breathe()
                        engine()
            events = json.loads(Path(engine.session.end_profiling()).read_text())
        return _node_times(events, count)


def _timed(call: Callable[[], None], who: int, count: int) -> list[Row]:
    """Return one row for each of `count` calls."""
    rows = []
    for _ in range(count):
        before = resource.getrusage(who).ru_nivcsw
        cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
        call()
        wall, cpu = time.perf_counter_ns() - wall, time.thread_time_ns() - cpu
        rows.append((wall, cpu, resource.getrusage(who).ru_nivcsw - before))
    return rows


def _node_times(events: Sequence[Mapping[str, Any]], count: int) -> dict[str, float]:
    """Return node name → typical nanoseconds in the last `count` calls; events of the session itself are left out."""
    micros: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_DROP_SUFFIX):
            micros.setdefault(event["name"].removesuffix(_DROP_SUFFIX), []).append(event["dur"])
    return {name: band(each[-count:]) * 1000 for name, each in micros.items()}


def main(settings: Mapping[str, Any]) -> None:
    """Serve until the input ends."""
    serve(settings["parent"], lambda: _start(settings))


def _start(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], Answer]:
    worker = Worker(settings)
    hello = {"onnxruntime": onnxruntime.__version__, "priority": worker.priority.name(), "pid": os.getpid()}
    return hello, worker.answer


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
