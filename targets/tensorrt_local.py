"""An NVIDIA GPU of this machine through TensorRT 8.6, 10 or 11, or TensorRT for RTX, in a process of its own.

    # profiles/nvidia-gpu.toml
    adapter = "tensorrt_local"
    precision = "fp16"              # fp32, fp16 or int8, written into the graph
    [options]
    gpu = 0                         # as CUDA counts those that CUDA_VISIBLE_DEVICES leaves
    runtime = "tensorrt"            # or "tensorrt_rtx"
    cuda_graph = true               # time a captured graph: what the host takes to launch every kernel is left out
    builder_level = 3               # 0 to 5: how many kernels the builder tries
    tf32 = false                    # let fp32 round to 10 bits of mantissa
    calibration = "images.npz"      # arrays [samples, ...] by input name; without it INT8 ranges are of random inputs
    warm_up_s = 0.2                 # least time of a warm-up: a GPU raises its clocks in tens of milliseconds
    time_limit_s = 600              # of one request to the worker, beyond the sampling it is asked for
    slow_limit = 1.3                # the sentinel this much slower than before: refused as Unstable

The number is a ratio to the sentinel, by CUDA events around one inference of both in alternating blocks; copies to and
from the device are not in it. Engines and timing caches are kept in the user's cache folder, keyed by graph, GPU,
TensorRT and driver, so that the same graph is built once.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.artifact import Artifact
from edgeprune.canonical import digest
from edgeprune.errors import CompileError, CorruptArtifact, ProfileError
from edgeprune.measurement import Measurement, Sampling
from edgeprune.profile import Profile
from edgeprune.target import Finding, Target

from . import _gpu, _tensorrt_names, _typed_onnx  # noqa: TID251 private parts of this adapter
from ._engine_cache import forget_old, kept_in, used, written  # noqa: TID251
from ._worker import WatchedWorker  # noqa: TID251
from ._yardstick import SLOW_LIMIT, Yardstick  # noqa: TID251

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}
"""Module of a runtime → the package that brings it."""


@contextmanager
def connect(profile: Profile) -> Iterator[Target]:
    """Yield the GPU; its worker process ends with the context, or with this process.

    Raises:
        ProfileError: if an option is unknown or out of range, TensorRT is missing, or the GPU is of another kind.
        DeviceLost: if there is no driver or no such GPU, or the worker crashes.
    """
    target = TensorRtLocal(profile)
    try:
        target.start()
        yield target
    finally:
        target.close()


class TensorRtLocal:
    """One GPU and the worker that holds TensorRT on it; a worker that is lost is replaced on the next call."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._options = _options(profile)
        self._worker = _worker(profile, self._options)
        self._yardstick = Yardstick(float(self._options["slow_limit"]))
        self._nodes: dict[str, frozenset[str]] = {}

    @property
    def profile(self) -> Profile:
        """Return the profile it was opened with."""
        return self._profile

    @property
    def worker_pid(self) -> int | None:
        """Return the process id of the worker, None while there is none."""
        return self._worker.pid

    def start(self) -> None:
        """Start the worker if there is none, which is also the probe of driver, GPU and TensorRT."""
        if importlib.util.find_spec(self._options["runtime"]) is None:
            raise _missing(self._profile, self._options["runtime"])
        self._worker.start()
        _gpu.check_architecture(self._profile, self._worker.hello)

    def close(self) -> None:
        """End the worker."""
        self._worker.close()

    def compile(self, graph: Artifact) -> Artifact:
        """Return the engine of a graph, built for this GPU unless it was built before; it has run once.

        Raises:
            CompileError: if TensorRT refuses the graph.
            CorruptArtifact: if the file is not what it was.
        """
        model = _typed_onnx.read_graph(graph)
        content = _typed_onnx.typed(model, self._profile.precision, self._calibration()).SerializeToString()
        self.start()
        path = written(kept_in("tensorrt", "graphs") / f"{os.getpid()}.onnx", content)
        typed = Artifact.of(path, kind="onnx", inputs=graph.inputs)
        engine = kept_in("tensorrt", "engines") / f"{self._key(typed.sha256)}.engine"
        if not self._usable(engine, graph):
            self._build(typed, engine, graph.path.name)
            self._load(engine, graph)
        found = Artifact.of(engine, kind="tensorrt", inputs=graph.inputs)
        self._nodes[found.sha256] = frozenset(each.name for each in model.graph.node)
        return found

    def run(self, engine: Artifact, inputs: "Mapping[str, NDArray[Any]]") -> "Mapping[str, NDArray[Any]]":
        """Return the outputs of one call, by name."""
        request = {"do": "run", "model": _gpu.model_of(engine)}
        _, outputs = self._worker.ask(request, f"running {engine.path.name}", inputs)
        return outputs

    def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
        """Return the timing of `engine` against `sampling.reference`, by the GPU's own clock.

        Raises:
            Unstable: if the GPU does not cool down, or the sentinel was slower than `slow_limit` times what it was.
        """
        guessed = self._profile.precision == "int8" and not self._options["calibration"]
        notes = ["INT8 ranges are of random inputs: this is a latency, and no accuracy"] if guessed else []
        return _gpu.measured(
            self._worker,
            self._profile,
            self._yardstick,
            engine,
            sampling,
            layers=lambda: self._layers(engine),
            notes=notes,
        )

    def _layers(self, engine: Artifact) -> Mapping[str, float]:
        request = {"do": "layers", "model": _gpu.model_of(engine)}
        reply, _ = self._worker.ask(request, f"profiling {engine.path.name}")
        return _tensorrt_names.by_graph_node(self._nodes.get(engine.sha256, frozenset()), reply)

    def _calibration(self) -> "list[Mapping[str, NDArray[Any]]] | None":
        if self._profile.precision != "int8" or not self._options["calibration"]:
            return None
        return calibration(Path(self._options["calibration"]))

    def _key(self, graph_sha256: str) -> str:
        facts = {name: value for name, value in self._worker.hello.items() if name in _DECIDING}
        options = {name: self._options[name] for name in ("builder_level", "tf32")}
        return digest({**facts, **options, "memory_mib": self._profile.memory_mib, "graph": graph_sha256})[:32]

    def _usable(self, engine: Path, graph: Artifact) -> bool:
        """Return whether an engine that was kept can be loaded here; one that cannot is forgotten."""
        if not engine.is_file():
            return False
        try:
            self._load(engine, graph)
        except (CompileError, CorruptArtifact):
            engine.unlink(missing_ok=True)
            return False
        used(engine)
        return True

    def _build(self, typed: Artifact, engine: Path, name: str) -> None:
        machine = digest({each: self._worker.hello.get(each) for each in _DECIDING})[:32]
        cache = kept_in("tensorrt", "timings") / f"{machine}.cache"
        request = {
            "do": "build",
            "model": _gpu.model_of(typed),
            "precision": self._profile.precision,
            "engine": str(engine),
            "timing_cache": str(cache),
        }
        self._worker.ask(request, f"building {name}")
        typed.path.unlink(missing_ok=True)
        forget_old(engine.parent, "*.engine")

    def _load(self, engine: Path, graph: Artifact) -> None:
        built = Artifact.of(engine, kind="tensorrt", inputs=graph.inputs)
        self._worker.ask({"do": "load", "model": _gpu.model_of(built)}, f"loading the engine of {graph.path.name}")


_DECIDING = ("version", "gpu", "compute_capability", "multiprocessors", "cuda_of_driver")
"""What of the worker's greeting an engine or a timing cache belongs to."""


def calibration(path: Path) -> "list[Mapping[str, NDArray[Any]]]":
    """Return the samples of an ``.npz`` file: arrays [samples, ...] by input name, each sample as a batch of one.

    Raises:
        ProfileError: if it cannot be read, or its arrays differ in length.
    """
    advice = "numpy.savez(path, input=images), images float32 [samples, channels, height, width]"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError) as error:  # a bare .npy is an array without .files
        raise ProfileError(f"calibration {path} cannot be read", why=str(error), next_step=advice) from error
    lengths = {len(each) if each.ndim else 0 for each in arrays.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ProfileError(f"calibration {path} has arrays of {sorted(lengths)} samples", next_step=advice)
    return [{name: each[at : at + 1] for name, each in arrays.items()} for at in range(lengths.pop())]


def _worker(profile: Profile, options: Mapping[str, Any]) -> WatchedWorker:
    settings = {
        "api": options["runtime"],
        "gpu": options["gpu"],
        "cuda_graph": options["cuda_graph"],
        "level": options["builder_level"],
        "tf32": options["tf32"],
        "warm_up_s": options["warm_up_s"],
        "workspace_mib": profile.memory_mib or 0,
    }
    return WatchedWorker("TensorRT", "_tensorrt_worker", settings, limit_s=float(options["time_limit_s"]))


def _missing(profile: Profile, runtime: str) -> ProfileError:
    return ProfileError(
        f"profile {profile.name!r} needs {runtime}",
        why="it is not installed for this Python",
        next_step=f"pip install {PACKAGES[runtime]}",
    )


_OPTIONS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "gpu": (0, _gpu.whole(0, 255), "the number of a GPU"),
    "runtime": ("tensorrt", lambda value: value in PACKAGES, '"tensorrt" or "tensorrt_rtx"'),
    "cuda_graph": (True, lambda value: type(value) is bool, "true or false"),
    "builder_level": (3, _gpu.whole(0, 5), "a whole number from 0 to 5"),
    "tf32": (False, lambda value: type(value) is bool, "true or false"),
    "calibration": ("", lambda value: type(value) is str, "the path of an .npz file"),
    "warm_up_s": (_gpu.WARM_UP_S, _gpu.not_negative, "a number of seconds from 0"),
    "time_limit_s": (600.0, _gpu.positive, "a number of seconds above 0"),
    "slow_limit": (SLOW_LIMIT, lambda value: _gpu.positive(value) and value > 1, "a number above 1"),
}
"""Option → default, whether a value may be used, what is wanted."""


def _options(profile: Profile) -> dict[str, Any]:
    return _gpu.checked_options(profile, _OPTIONS, _typed_onnx.PRECISIONS)


def examine(profile: Profile) -> list[Finding]:
    """Return what is in order and what is missing, holding nothing; driver and TensorRT are tried in a child."""
    try:
        options = _options(profile)
        if importlib.util.find_spec(options["runtime"]) is None:
            raise _missing(profile, options["runtime"])
        if options["calibration"]:
            calibration(Path(options["calibration"]))
    except ProfileError as error:
        return [_gpu.refused_profile(error)]
    return _gpu.probed(_worker(profile, options), "tensorrt")
