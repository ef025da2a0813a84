"""The process that holds PyTorch for `edgeprune.targets.torch_cuda`: it may crash, and nothing else with it.

    parent ── request frame ──▶ stdin   compile · load · time · layers · run
    parent ◀── reply frame ──── stdout  {"ok": ...} or {"refused": why, "kind": "compile" | "corrupt" | "machine" | ...}

An engine is a typed ONNX graph, run node by node and captured as one CUDA graph, or a package that AOTInductor compiled
of the same. The device is told by the settings: "cuda", and "cpu" where a test has no GPU and times the host's clock.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.statistics import band

from ._blocks import Row, alternate, block_of, columns, model_bytes, noise_like, quiet, warm_up  # noqa: TID251
from ._cuda_driver import Driver  # noqa: TID251
from ._nvml import Gpu  # noqa: TID251
from ._onnx_module import OnnxModule, UnsupportedError  # noqa: TID251
from ._serve import Answer, Arrays, RefusedError, serve  # noqa: TID251 private parts of the adapters

CAPTURE_CALLS = 3
"""Calls before a capture: libraries choose kernels and allocate in the first ones."""

WARM_LIMIT = 10
"""A warm-up that does not settle ends after this many times its least time."""

PROFILE_CALLS = 30
"""Calls of a profiling run, after as many that are dropped."""

_SHORTAGES = ("out of memory", "can't allocate memory", "bad_alloc", "cublas_status_alloc_failed")

CUDA_BUILD = "pip install --force-reinstall torch, without +cpu: PyPI's build for Linux has CUDA"


class Device:
    """Where tensors live, and its clock.

    Args:
        index: of the GPU, None: this machine's CPU.
    """

    def __init__(self, index: int | None) -> None:
        self.facts: dict[str, Any] = {}
        self.torch = torch.device("cpu")
        if index is not None:
            if torch.version.cuda is None:
                raise RefusedError(f"PyTorch {torch.__version__} was built without CUDA", "profile", CUDA_BUILD)
            self.facts = Driver(index).facts()
            self.torch = torch.device("cuda", index)
            _open(self.torch)

    @property
    def cuda(self) -> bool:
        """Return whether it is a GPU."""
        return self.torch.type == "cuda"

    def wait(self) -> None:
        """Wait until it has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.torch)

    def timed(self, call: Callable[[], Any]) -> int:
        """Return nanoseconds of one call, by the device's own clock; wait for it."""
        if not self.cuda:
            started = time.perf_counter_ns()
            call()
            return max(1, time.perf_counter_ns() - started)
        cuda: Any = torch.cuda
        before, after = (cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return max(1, round(1e6 * float(before.elapsed_time(after))))


def _open(device: torch.device) -> None:
    """Open a GPU whose kernels this build of PyTorch has.

    Raises:
        RefusedError: "lost" if the driver is too old, "profile" if PyTorch has no kernels for the GPU.
    """
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:
        why = _first_line(error)
        kind = "profile" if "no kernel image" in why else "lost"
        newer = f"update the NVIDIA driver to one for CUDA {torch.version.cuda}"
        advice = CUDA_BUILD if kind == "profile" else newer
        raise RefusedError(f"PyTorch {torch.__version__} cannot use the GPU: {why}", kind, advice) from error


class Engine:
    """A loaded engine with fixed inputs; a call is one inference, put into the current stream.

    Args:
        model: {"path", "sha256", "inputs"}; the inputs are filled with seeded noise.
        settings: "cuda_graph", "channels_last".
    """

    def __init__(self, device: Device, model: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self._device = device
        content = model_bytes(model)
        if str(model["path"]).endswith(".pt2"):
            package = torch._inductor.aoti_load_package(str(model["path"]))
            self.names = _names_beside(Path(model["path"]))
            self._run: Callable[..., Any] = package
        else:
            module = module_of(content, device, settings["channels_last"])
            self.names = module.inputs, module.outputs
            self._run = module
        noise = {each["name"]: noise_like(each) for each in model["inputs"]}
        self._specs = {name: (value.shape, value.dtype) for name, value in noise.items()}
        self.check(noise, self.names[0])
        self._inputs = [placed(noise[name], device, settings["channels_last"]) for name in self.names[0]]
        self._outputs: Sequence[Tensor] = ()
        self._graph: Any = None
        for _ in range(CAPTURE_CALLS if settings["cuda_graph"] else 1):
            self._once()
        device.wait()
        if device.cuda and settings["cuda_graph"]:
            self._capture()

    def _once(self) -> None:
        found = self._run(*self._inputs)
        self._outputs = found if isinstance(found, (tuple, list)) else (found,)

    def _capture(self) -> None:
        cuda: Any = torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            self._once()  # capture wants a stream of its own, warmed up
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            self._once()
        self._graph = graph

    def __call__(self) -> None:
        """Put one inference into the stream."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._once()

    def check(self, given: Arrays, wanted: Sequence[str]) -> None:
        """Refuse inputs that are not those of the graph."""
        if set(given) != set(wanted):
            raise RefusedError(f"the graph's inputs are {sorted(wanted)}, not {sorted(given)}")
        for name, value in given.items():
            shape, dtype = self._specs[name]
            if value.shape != shape or value.dtype != dtype:
                raise RefusedError(f"input {name!r} is {dtype} {list(shape)}, not {value.dtype} {list(value.shape)}")

    def answer(self, given: Arrays) -> dict[str, NDArray[Any]]:
        """Return the outputs for these inputs, by name."""
        self.check(given, self.names[0])
        for place, name in zip(self._inputs, self.names[0], strict=True):
            place.copy_(torch.from_numpy(np.array(given[name])))
        self()
        self._device.wait()
        return {name: each.cpu().numpy() for name, each in zip(self.names[1], self._outputs, strict=True)}


def placed(value: NDArray[Any], device: Device, channels_last: bool) -> Tensor:
    """Return an input on the device, its channels last in memory if images shall lie so.

    A compiled package takes the strides it was compiled with for granted, so there is one function for all.
    """
    there = torch.from_numpy(np.array(value)).to(device.torch)
    return there.to(memory_format=torch.channels_last) if channels_last and there.ndim == 4 else there


def module_of(content: bytes, device: Device, channels_last: bool) -> OnnxModule:
    """Return the graph as a module on the device.

    Raises:
        RefusedError: if it is no whole graph, not of these input shapes, or has an operator that PyTorch is not taught.
    """
    try:
        model = onnx.load_model_from_string(content)
        if not model.graph.output:
            raise RefusedError("it is not a whole ONNX graph")
        module = OnnxModule(model).eval().to(device.torch)
    except DecodeError as error:
        raise RefusedError(f"it is not a whole ONNX graph: {_first_line(error)}") from error
    except UnsupportedError as error:
        raise RefusedError(str(error)) from error
    for each in module.buffers() if channels_last else ():
        if each.ndim == 4:
            each.data = each.data.to(memory_format=torch.channels_last)
    return module


def declared(content: bytes) -> dict[str, list[int]]:
    """Return input → shape of a graph, of inputs that are no constants."""
    graph = onnx.load_model_from_string(content).graph
    constants = {each.name for each in graph.initializer}
    inputs = [each for each in graph.input if each.name not in constants]
    return {each.name: [size.dim_value for size in each.type.tensor_type.shape.dim] for each in inputs}


def _names_beside(package: Path) -> tuple[list[str], list[str]]:
    """Return the names of inputs and outputs that were written beside a package."""
    try:
        names = json.loads(package.with_suffix(".json").read_text())
    except (OSError, ValueError) as error:
        raise RefusedError(f"the names beside {package.name} cannot be read: {error}", "corrupt") from error
    return names["inputs"], names["outputs"]


class Worker:
    """Serves requests one at a time.

    Args:
        settings: "gpu" (None: the CPU), "cuda_graph", "channels_last", "tf32", "warm_up_s".
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self._last = bool(settings["channels_last"])
        torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bool(settings["tf32"])
        torch.backends.cudnn.benchmark = True  # shapes are fixed: let it try its kernels once
        self.device = Device(settings["gpu"])
        self.gpu = Gpu(self.device.facts["bus_id"]) if self.device.cuda else None
        self._verbs = {
            "compile": self.compile,
            "load": self.load,
            "time": self.time,
            "layers": self.layers,
            "state": self.state,
        }

    def hello(self) -> dict[str, Any]:
        """Return what an engine depends on, and what is missing."""
        return {
            "version": f"torch {torch.__version__}",
            "pid": os.getpid(),
            "unseen": self.gpu.missing if self.gpu else "",
            **self.device.facts,
        }

    def answer(self, request: Mapping[str, Any], arrays: Arrays) -> tuple[Mapping[str, Any], Arrays]:
        """Return the reply to one request.

        Raises:
            RefusedError: if PyTorch refuses it, or the machine ran short.
        """
        try:
            with torch.inference_mode():
                if request["do"] == "run":
                    return {}, self.run(request, arrays)
                return self._verbs[request["do"]](request), {}
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, MemoryError) as error:
            raise self._refusal(error) from error
        finally:
            if self.device.cuda:
                with suppress(RuntimeError):  # what spoiled the context is told by the request
                    torch.cuda.empty_cache()

    def _refusal(self, error: Exception) -> RefusedError:
        """Return whose fault it is; a fault of the GPU itself spoils the context, so it ends the process instead."""
        why = _first_line(error)
        if isinstance(error, MemoryError) or any(each in str(error).lower() for each in _SHORTAGES):
            return RefusedError(why, "machine")
        if "CUDA error" in str(error):
            raise SystemExit(why)  # the last words of this process
        return RefusedError(why)

    def compile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Compile a typed graph with AOTInductor; "package" is the .pt2 file to write."""
        started, content = time.monotonic(), model_bytes(request["model"])
        module = module_of(content, self.device, self._last)
        inputs = [placed(noise_like(each), self.device, self._last) for each in request["model"]["inputs"]]
        package, partial = Path(request["package"]), Path(request["package"]).with_suffix(f".{os.getpid()}.pt2")
        with torch.inference_mode(False), torch.no_grad():
            program = torch.export.export(module, tuple(each.clone() for each in inputs))
            torch._inductor.aoti_compile_and_package(program, package_path=str(partial))
        package.with_suffix(".json").write_text(json.dumps({"inputs": module.inputs, "outputs": module.outputs}))
        partial.replace(package)
        return {"seconds": time.monotonic() - started}

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load an engine and run it once."""
        model = request["model"]
        engine = self._engine(model)
        engine()
        self.device.wait()
        return {"outputs": list(engine.names[1])}

    def _engine(self, model: Mapping[str, Any]) -> Engine:
        if not str(model["path"]).endswith(".pt2"):
            self._check_shapes(model)
        return Engine(self.device, model, self.settings)

    def _check_shapes(self, model: Mapping[str, Any]) -> None:
        """Refuse other inputs than the graph declares: PyTorch would run on many shapes, an engine has one."""
        try:
            wanted = declared(model_bytes(model))
        except DecodeError:
            return  # said when the graph is loaded
        given = {each["name"]: list(each["shape"]) for each in model["inputs"]}
        for name in wanted.keys() & given.keys():
            fits = len(wanted[name]) == len(given[name])
            if not fits or any(size not in (0, have) for size, have in zip(wanted[name], given[name], strict=True)):
                raise RefusedError(f"input {name!r} is {wanted[name]}, not {given[name]}")

    def run(self, request: Mapping[str, Any], arrays: Arrays) -> dict[str, NDArray[Any]]:
        """Return the outputs for the given inputs, by name."""
        return self._engine(request["model"]).answer(arrays)

    def time(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the timed calls of one fresh session of candidate and reference, taken in alternating blocks."""
        engines = [self._engine(request[which]) for which in ("candidate", "reference")]
        before = self._state()
        with quiet():
            warm = [self._warmed(each) for each in engines]
            blocks = [block_of(call_s, request) for call_s, *_ in warm]
            order = random.Random(request["seed"])  # noqa: S311 the order of blocks is no secret
            session_s, started = request["session_ms"] / 1000, time.monotonic()
            calls = alternate(engines, blocks, session_s, order, self._sample, between=_nothing)
            sampled_s = time.monotonic() - started
        return {
            "candidate": columns(calls[0]),
            "reference": columns(calls[1]),
            "warm_up": [{"calls": count, "settled": settled} for _, count, settled in warm],
            "sampled_s": sampled_s,
            "before": before,
            "after": self._state(),
        }

    def _warmed(self, engine: Engine) -> tuple[float, int, bool]:
        def call() -> None:
            engine()
            self.device.wait()

        least_s = self.settings["warm_up_s"]
        return warm_up(call, _nothing, least_s=least_s, limit_s=WARM_LIMIT * least_s)

    def _sample(self, engine: Callable[[], None], count: int) -> list[Row]:
        taken = [self.device.timed(engine) for _ in range(count)]
        return [(each, each, 0) for each in taken]  # the device has one clock and is never preempted

    def layers(self, request: Mapping[str, Any]) -> dict[str, float]:
        """Return node name → nanoseconds of one call, each node timed alone."""
        model = request["model"]
        module = module_of(model_bytes(model), self.device, self._last)
        inputs = [placed(noise_like(each), self.device, self._last) for each in model["inputs"]]
        seen: dict[str, list[int]] = {}

        def around(name: str, run: Callable[[], Any]) -> Any:
            results = []
            seen.setdefault(name, []).append(self.device.timed(lambda: results.append(run())))
            return results[0]

        for _ in range(2 * PROFILE_CALLS):
            module.each(inputs, around)
        return {name: band(each[-PROFILE_CALLS:]) for name, each in seen.items()}

    def state(self, request: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 a verb takes its request
        """Return what NVML says now."""
        return self._state()

    def _state(self) -> dict[str, Any]:
        return self.gpu.read() if self.gpu else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _nothing() -> None:
    pass


def main(settings: Mapping[str, Any]) -> None:
    """Serve until the input ends."""
    serve(settings["parent"], lambda: _start(settings))


def _start(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], Answer]:
    worker = Worker(settings)
    return worker.hello(), worker.answer


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
