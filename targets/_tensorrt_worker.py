"""The process that holds TensorRT for `edgeprune.targets.tensorrt_local`: it may crash, and nothing else with it.

    parent ── request frame ──▶ stdin   build · load · time · layers · run
    parent ◀── reply frame ──── stdout  {"ok": ...} or {"refused": why, "kind": "compile" | "corrupt" | "machine" | ...}

TensorRT crashes without a driver as soon as its runtime is used, so the driver is opened first. What differs between
TensorRT 8.6, 10, 11 and TensorRT for RTX is asked of the module, not of a version number, in the functions at the end.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.statistics import band

from ._blocks import alternate, block_of, columns, model_bytes, noise_like, quiet, warm_up  # noqa: TID251
from ._cuda_driver import Driver  # noqa: TID251
from ._nvml import Gpu  # noqa: TID251
from ._serve import Answer, Arrays, RefusedError, serve  # noqa: TID251 private parts of the adapters

WARM_LIMIT = 10
"""A warm-up that does not settle ends after this many times its least time."""

PROFILE_CALLS = 30
"""Calls of a profiling run, after as many that are dropped."""

ERRORS_KEPT = 3
"""Last errors of TensorRT's log that are worth telling."""

_SHORTAGES = ("out of memory", "outofmemory", "insufficient memory", "cannot allocate", "bad_alloc")

_PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}
"""Module → the package that brings it."""


class Engine:
    """A loaded engine, its tensors bound to device memory; a call is one inference and waits for it.

    Args:
        api: TensorRT, as the worker holds it.
        content: the serialized engine.
        model: {"inputs": ...}; they are filled with seeded noise.
    """

    def __init__(self, api: "Api", driver: Driver, content: bytes, model: Mapping[str, Any]) -> None:
        self._driver = driver
        engine = api.runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise api.refusal("it cannot be loaded", "corrupt")
        self._engine = engine
        self.context: Any = engine.create_execution_context()
        if self.context is None:
            raise api.refusal("no execution context", "machine")
        names = [engine.get_tensor_name(each) for each in range(engine.num_io_tensors)]
        inputs = {name for name in names if engine.get_tensor_mode(name) == api.module.TensorIOMode.INPUT}
        self.shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        self.dtypes = {name: np.dtype(api.module.nptype(engine.get_tensor_dtype(name))) for name in names}
        self.inputs = [each for each in names if each in inputs]
        self.outputs = [each for each in names if each not in inputs]
        self._memory: dict[str, int] = {}
        given = {each["name"]: noise_like(each) for each in model["inputs"]}
        self.check(given)
        for name in names:
            self._memory[name] = driver.allocate(int(np.prod(self.shapes[name])) * self.dtypes[name].itemsize)
            self.context.set_tensor_address(name, self._memory[name])
        self.fill(given)

    def close(self) -> None:
        """Give back what it holds on the device."""
        self.context = self._engine = None
        for address in self._memory.values():
            self._driver.free(address)
        self._memory = {}

    def check(self, given: Arrays) -> None:
        """Refuse inputs that are not those of the engine."""
        if set(given) != set(self.inputs):
            raise RefusedError(f"the engine's inputs are {sorted(self.inputs)}, not {sorted(given)}")
        for name, value in given.items():
            if value.shape != self.shapes[name] or value.dtype != self.dtypes[name]:
                wanted = f"{self.dtypes[name]} {list(self.shapes[name])}"
                raise RefusedError(f"input {name!r} is {wanted}, not {value.dtype} {list(value.shape)}")

    def fill(self, given: Arrays) -> None:
        """Copy the inputs to the device."""
        for name, value in given.items():
            self._driver.copy_in(self._memory[name], np.ascontiguousarray(value))

    def read(self) -> dict[str, NDArray[Any]]:
        """Return the outputs."""
        found = {name: np.empty(self.shapes[name], self.dtypes[name]) for name in self.outputs}
        for name, value in found.items():
            self._driver.copy_out(value, self._memory[name])
        return found

    def enqueue(self) -> None:
        """Put one inference into the stream."""
        if not self.context.execute_async_v3(stream_handle=self._driver.stream):
            raise RefusedError("TensorRT could not run the engine")

    def __call__(self) -> None:
        """Run one inference."""
        self.enqueue()
        self._driver.synchronize()


class Api:
    """A TensorRT module with its one logger: the first of a process is the only one that is heard.

    Args:
        name: "tensorrt" or "tensorrt_rtx".

    Raises:
        RefusedError: "profile" if it is not installed or cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        if find_spec(name) is None:
            raise RefusedError(f"{name} is not installed", "profile", f"pip install {_PACKAGES[name]}")
        try:
            self.module = import_module(name)
        except (ImportError, OSError) as error:
            again = f"pip install --force-reinstall {_PACKAGES[name]}, or set LD_LIBRARY_PATH to TensorRT's libraries"
            raise RefusedError(f"{name} cannot be loaded: {error}", "profile", again) from error
        self.errors: list[str] = []
        self.logger = _logger(self.module, self.errors)
        self._runtime: Any = None

    @property
    def runtime(self) -> Any:
        """Return the runtime; only a process with a driver may ask for it."""
        if self._runtime is None:
            self._runtime = self.module.Runtime(self.logger)
        return self._runtime

    def refusal(self, what: str, kind: str = "compile") -> RefusedError:
        """Return why TensorRT did not do something, by the end of its log; a lack of memory is nobody's fault."""
        said = "; ".join(self.errors[-ERRORS_KEPT:])
        self.errors.clear()
        if any(each in said.lower() for each in _SHORTAGES):
            kind = "machine"
        return RefusedError(f"{what}: {said}" if said else what, kind)


def _logger(trt: Any, errors: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                errors.append(msg.strip().splitlines()[0] if msg.strip() else "an error without text")

    return Logger()


class Worker:
    """Serves requests one at a time.

    Args:
        settings: "api", "gpu" (None: build only), "cuda_graph", "level", "workspace_mib", "tf32", "warm_up_s".
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.driver = None if settings["gpu"] is None else Driver(settings["gpu"])
        self.api = Api(settings["api"])
        self.facts = self.driver.facts() if self.driver else {}
        self.gpu = Gpu(self.facts.get("bus_id", "")) if self.driver else None
        self._verbs = {
            "build": self.build,
            "load": self.load,
            "time": self.time,
            "layers": self.layers,
            "state": self.state,
        }

    def hello(self) -> dict[str, Any]:
        """Return what an engine depends on, and what is missing."""
        return {
            "version": f"{self.api.module.__name__} {self.api.module.__version__}",
            "pid": os.getpid(),
            "unseen": self.gpu.missing if self.gpu else "",
            **self.facts,
        }

    def answer(self, request: Mapping[str, Any], arrays: Arrays) -> tuple[Mapping[str, Any], Arrays]:
        """Return the reply to one request.

        Raises:
            RefusedError: if TensorRT refuses it, or the machine ran short.
        """
        try:
            if request["do"] == "run":
                return {}, self.run(request, arrays)
            return self._verbs[request["do"]](request), {}
        except MemoryError as error:
            raise RefusedError("this machine has no memory left", "machine") from error

    def build(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Build an engine from a typed graph.

        Args:
            request: "model" {"path", "sha256"}, "precision", "engine" and "timing_cache": paths to write, or None.
        """
        started, trt = time.monotonic(), self.api.module
        self.api.errors.clear()
        builder = trt.Builder(self.api.logger)
        network = builder.create_network(network_flags(trt))
        self._parse(network, model_bytes(request["model"]))
        config = configured(trt, builder, self.settings)
        permit(trt, config, request["precision"])
        cache = _with_timing_cache(config, request.get("timing_cache"))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self.api.refusal("it cannot be built")
        content = bytes(plan)
        if request.get("engine"):
            _write(Path(request["engine"]), content)
        if cache is not None:
            _write(Path(request["timing_cache"]), bytes(config.get_timing_cache().serialize()))
        return {
            "bytes": len(content),
            "layers": network.num_layers,
            "operations": _count(network, lambda layer: [str(layer.type)]),
            "types": _count(network, _output_types),
            "ends": [str(each.dtype) for each in _ends(network)],
            "seconds": time.monotonic() - started,
        }

    def _parse(self, network: Any, content: bytes) -> None:
        parser = self.api.module.OnnxParser(network, self.api.logger)
        if parser.parse(content):
            return
        said = "; ".join(_parser_error(parser.get_error(each)) for each in range(min(parser.num_errors, ERRORS_KEPT)))
        raise RefusedError(f"its parser refuses the graph: {said}" if said else "its parser refuses the graph")

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load an engine and run it once."""
        with self._engine(request["model"]) as engine:
            engine()
            return {"outputs": engine.outputs}

    def run(self, request: Mapping[str, Any], arrays: Arrays) -> dict[str, NDArray[Any]]:
        """Return the outputs for the given inputs, by name."""
        with self._engine(request["model"]) as engine:
            engine.check(arrays)
            engine.fill(arrays)
            engine()
            return engine.read()

    def time(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the timed calls of one fresh session of candidate and reference, taken in alternating blocks."""
        with ExitStack() as stack:
            engines = [stack.enter_context(self._engine(request[which])) for which in ("candidate", "reference")]
            launches = [self._launch(each, stack) for each in engines]
            before = self._state()
            with quiet():
                warm = [self._warmed(each) for each in launches]
                blocks = [block_of(call_s, request) for call_s, *_ in warm]
                order = random.Random(request["seed"])  # noqa: S311 the order of blocks is no secret
                session_s, started = request["session_ms"] / 1000, time.monotonic()
                calls = alternate(launches, blocks, session_s, order, self._sample, between=_nothing)
                sampled_s = time.monotonic() - started
            after = self._state()
        return {
            "candidate": columns(calls[0]),
            "reference": columns(calls[1]),
            "warm_up": [{"calls": count, "settled": settled} for _, count, settled in warm],
            "sampled_s": sampled_s,
            "before": before,
            "after": after,
        }

    def _launch(self, engine: Engine, stack: ExitStack) -> Callable[[], None]:
        """Return what puts one inference into the stream: a CUDA graph if one is wanted, else the engine."""
        engine()  # what a first call allocates may not be captured
        if not self.settings["cuda_graph"]:
            return engine.enqueue
        return stack.enter_context(self._opened().captured(engine.enqueue))

    def _warmed(self, launch: Callable[[], None]) -> tuple[float, int, bool]:
        least_s = self.settings["warm_up_s"]
        return warm_up(_waiting(launch, self._opened()), _nothing, least_s=least_s, limit_s=WARM_LIMIT * least_s)

    def _sample(self, launch: Callable[[], None], count: int) -> list[tuple[int, int, int]]:
        driver = self._opened()
        taken = [driver.timed(launch) for _ in range(count)]
        return [(each, each, 0) for each in taken]  # the device has one clock and is never preempted

    def layers(self, request: Mapping[str, Any]) -> dict[str, float]:
        """Return the layer names that TensorRT reports → nanoseconds of one call."""
        seen: dict[str, list[float]] = {}
        with self._engine(request["model"]) as engine:
            engine()
            engine.context.profiler = _profiler(self.api.module, seen)
            for _ in range(2 * PROFILE_CALLS):
                engine()
            engine.context.profiler = None
        return {name: max(1.0, 1e6 * band(each[-PROFILE_CALLS:])) for name, each in seen.items()}

    def state(self, request: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 a verb takes its request
        """Return what NVML says now."""
        return self._state()

    def _state(self) -> dict[str, Any]:
        return self.gpu.read() if self.gpu else {}

    def _opened(self) -> Driver:
        if self.driver is None:
            raise RefusedError("no GPU is opened", "lost")
        return self.driver

    @contextmanager
    def _engine(self, model: Mapping[str, Any]) -> Iterator[Engine]:
        driver = self._opened()
        self.api.errors.clear()
        engine = Engine(self.api, driver, model_bytes(model), model)
        try:
            yield engine
        finally:
            driver.synchronize()
            engine.close()


def _waiting(launch: Callable[[], None], driver: Driver) -> Callable[[], None]:
    def call() -> None:
        launch()
        driver.synchronize()

    return call


def _nothing() -> None:
    pass


def _parser_error(error: Any) -> str:
    name = error.node_name() if hasattr(error, "node_name") else f"node {error.node()}"
    return f"{name}: {' '.join(error.desc().split())}"


def _ends(network: Any) -> list[Any]:
    inputs = [network.get_input(each) for each in range(network.num_inputs)]
    return inputs + [network.get_output(each) for each in range(network.num_outputs)]


def _count(network: Any, of: Callable[[Any], list[str]]) -> dict[str, int]:
    """Return how often something occurs in the layers; enumerations are called by the last part of their name."""
    found: dict[str, int] = {}
    for each in range(network.num_layers):
        for name in of(network.get_layer(each)):
            short = name.rpartition(".")[2]
            found[short] = found.get(short, 0) + 1
    return found


def _output_types(layer: Any) -> list[str]:
    return [str(layer.get_output(each).dtype) for each in range(layer.num_outputs)]


def _write(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RefusedError(f"{path} cannot be written: {error.strerror}", "machine") from error


# -- what differs between versions -----------------------------------------------------------------------------------


def network_flags(trt: Any) -> int:
    """Return the flags of a network that takes its precision from the graph, as far as this TensorRT can."""
    flags = trt.NetworkDefinitionCreationFlag
    found = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    return found | (1 << int(flags.EXPLICIT_BATCH) if hasattr(flags, "EXPLICIT_BATCH") else 0)  # before 11


def configured(trt: Any, builder: Any, settings: Mapping[str, Any]) -> Any:
    """Return a builder configuration; an option that this TensorRT does not have stays at its default."""
    config = builder.create_builder_config()
    if settings["workspace_mib"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_mib"] << 20)
    if hasattr(config, "builder_optimization_level"):  # since 8.6
        config.builder_optimization_level = settings["level"]
    if not settings["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    return config


def permit(trt: Any, config: Any, precision: str) -> None:
    """Allow what the graph asks for where types are weak: TensorRT 8 needs a flag, later ones read the graph."""
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return
    if precision in ("fp16", "int8"):
        config.set_flag(trt.BuilderFlag.FP16)
    if precision == "int8":
        config.set_flag(trt.BuilderFlag.INT8)


def _with_timing_cache(config: Any, path: str | None) -> Any:
    """Return the timing cache that the build fills, None if there is none to keep; one that does not fit is dropped."""
    if path is None or not hasattr(config, "create_timing_cache"):
        return None
    known = Path(path).read_bytes() if Path(path).is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _profiler(trt: Any, seen: dict[str, list[float]]) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            seen.setdefault(layer_name, []).append(ms)

    return Profiler()


def main(settings: Mapping[str, Any]) -> None:
    """Serve until the input ends."""
    serve(settings["parent"], lambda: _start(settings))


def _start(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], Answer]:
    worker = Worker(settings)
    return worker.hello(), worker.answer


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
