"""An NVIDIA GPU of this machine through PyTorch, for GPUs where TensorRT cannot be had; in a process of its own.

    # profiles/nvidia-gpu-torch.toml
    adapter = "torch_cuda"
    precision = "fp16"              # fp32 or fp16, written into the graph
    [options]
    gpu = 0                         # as CUDA counts those that CUDA_VISIBLE_DEVICES leaves
    compiler = "none"               # run node by node; "aot_inductor": compiled and packaged ahead of time
    cuda_graph = true               # capture all kernels of an inference and launch them at once
    channels_last = true            # as tensor cores want convolutions to lie in memory
    tf32 = false                    # let fp32 round to 10 bits of mantissa
    warm_up_s = 0.2                 # least time of a warm-up: a GPU raises its clocks in tens of milliseconds
    time_limit_s = 600              # of one request to the worker, beyond the sampling it is asked for
    slow_limit = 1.3                # the sentinel this much slower than before: refused as Unstable

The graph is run by the functions of PyTorch that its operators are (`_onnx_module`), so what is timed is what was cut.
The number is a ratio to the sentinel, by CUDA events around one inference of both in alternating blocks; copies to and
from the device are not in it. PyTorch's INT8 would be simulated in float, so it is not offered.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.artifact import Artifact
from edgeprune.canonical import digest
from edgeprune.errors import CompileError, CorruptArtifact, ProfileError
from edgeprune.measurement import Measurement, Sampling
from edgeprune.profile import Profile
from edgeprune.target import Finding, Target

from . import _gpu, _typed_onnx  # noqa: TID251 private parts of this adapter
from ._engine_cache import forget_old, kept_in, used, written  # noqa: TID251
from ._worker import WatchedWorker  # noqa: TID251
from ._yardstick import SLOW_LIMIT, Yardstick  # noqa: TID251

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRECISIONS = ("fp32", "fp16")


@contextmanager
def connect(profile: Profile) -> Iterator[Target]:
    """Yield the GPU; its worker process ends with the context, or with this process.

    Raises:
        ProfileError: if an option is unknown or out of range, PyTorch has no CUDA, or the GPU is of another kind.
        DeviceLost: if there is no driver or no such GPU, or the worker crashes.
    """
    with held(TorchCuda(profile)) as target:
        yield target


@contextmanager
def held(target: "TorchCuda") -> "Iterator[TorchCuda]":
    """Yield a target that was started; its worker ends with the context."""
    try:
        target.start()
        yield target
    finally:
        target.close()


class TorchCuda:
    """One GPU and the worker that holds PyTorch on it; a worker that is lost is replaced on the next call.

    Args:
        profile: as read.
        on_gpu: False runs on this machine's CPU by its own clock; for tests, no profile can ask for it.
    """

    def __init__(self, profile: Profile, *, on_gpu: bool = True) -> None:
        self._profile = profile
        self._options = _options(profile)
        self._on_gpu = on_gpu
        self._worker = _worker(self._options, on_gpu=on_gpu)
        self._yardstick = Yardstick(float(self._options["slow_limit"]))
        self._graphs: dict[str, Artifact] = {}

    @property
    def profile(self) -> Profile:
        """Return the profile it was opened with."""
        return self._profile

    @property
    def worker_pid(self) -> int | None:
        """Return the process id of the worker, None while there is none."""
        return self._worker.pid

    def start(self) -> None:
        """Start the worker if there is none, which is also the probe of driver, GPU and PyTorch."""
        if self._on_gpu:
            _check_build(self._profile)
        self._worker.start()
        _gpu.check_architecture(self._profile, self._worker.hello)

    def close(self) -> None:
        """End the worker."""
        self._worker.close()

    def compile(self, graph: Artifact) -> Artifact:
        """Return the engine of a graph: the typed graph, or a package compiled of it; it has run once.

        Raises:
            CompileError: if PyTorch refuses the graph.
            CorruptArtifact: if the file is not what it was.
        """
        model = _typed_onnx.typed(_typed_onnx.read_graph(graph), self._profile.precision)
        self.start()
        typed = self._typed(model.SerializeToString(), graph)
        engine = typed if self._options["compiler"] == "none" else self._package(typed, graph)
        self._graphs[engine.sha256] = typed
        return engine

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
        alone = sampling.layers and self._options["compiler"] != "none"
        return _gpu.measured(
            self._worker,
            self._profile,
            self._yardstick,
            engine,
            sampling,
            layers=lambda: self._layers(engine),
            notes=["layers were timed one by one, before the compiler fused them"] if alone else [],
        )

    def _layers(self, engine: Artifact) -> Mapping[str, float]:
        request = {"do": "layers", "model": _gpu.model_of(self._graphs.get(engine.sha256, engine))}
        reply, _ = self._worker.ask(request, f"profiling {engine.path.name}")
        return reply

    def _typed(self, content: bytes, graph: Artifact) -> Artifact:
        folder = kept_in("torch")
        path = written(folder / f"{sha256(content).hexdigest()[:32]}.onnx", content)
        found = Artifact.of(path, kind="onnx", inputs=graph.inputs)
        self._load(found, graph)
        forget_old(folder, "*.onnx")
        return found

    def _package(self, typed: Artifact, graph: Artifact) -> Artifact:
        key = digest({**self._worker.hello, "pid": 0, "graph": typed.sha256, "options": dict(self._options)})[:32]
        path = kept_in("torch") / f"{key}.pt2"
        if not self._usable(path, graph):
            request = {"do": "compile", "model": _gpu.model_of(typed), "package": str(path)}
            self._worker.ask(request, f"compiling {graph.path.name}")
            self._load(Artifact.of(path, kind="pt2", inputs=graph.inputs), graph)
            forget_old(path.parent, "*.pt2")
        return Artifact.of(path, kind="pt2", inputs=graph.inputs)

    def _usable(self, path: Path, graph: Artifact) -> bool:
        """Return whether a package that was kept can be loaded here; one that cannot is forgotten."""
        if not path.is_file():
            return False
        try:
            self._load(Artifact.of(path, kind="pt2", inputs=graph.inputs), graph)
        except (CompileError, CorruptArtifact):
            path.unlink(missing_ok=True)
            return False
        used(path)
        return True

    def _load(self, engine: Artifact, graph: Artifact) -> None:
        self._worker.ask({"do": "load", "model": _gpu.model_of(engine)}, f"loading {graph.path.name}")


def _check_build(profile: Profile) -> None:
    """Check that a PyTorch with CUDA is installed, as far as its version tells without loading it.

    Raises:
        ProfileError: if it is not.
    """
    try:
        found = version("torch")
    except PackageNotFoundError as error:
        raise ProfileError(f"profile {profile.name!r} needs torch", next_step="pip install torch") from error
    if found.endswith("+cpu"):
        raise ProfileError(
            f"profile {profile.name!r} needs a PyTorch with CUDA",
            why=f"PyTorch {found} was built without CUDA",
            next_step="pip install --force-reinstall torch, without +cpu: PyPI's build for Linux has CUDA",
        )


def _worker(options: Mapping[str, Any], *, on_gpu: bool) -> WatchedWorker:
    settings = {
        "gpu": options["gpu"] if on_gpu else None,
        "cuda_graph": options["cuda_graph"],
        "channels_last": options["channels_last"],
        "tf32": options["tf32"],
        "warm_up_s": options["warm_up_s"],
    }
    return WatchedWorker(
        "PyTorch",
        "_torch_cuda_worker",
        settings,
        limit_s=float(options["time_limit_s"]),
        environment={"OMP_NUM_THREADS": "1"},
    )


def _boolean(value: object) -> bool:
    return type(value) is bool


_OPTIONS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "gpu": (0, _gpu.whole(0, 255), "the number of a GPU"),
    "compiler": ("none", lambda value: value in ("none", "aot_inductor"), '"none" or "aot_inductor"'),
    "cuda_graph": (True, _boolean, "true or false"),
    "channels_last": (True, _boolean, "true or false"),
    "tf32": (False, _boolean, "true or false"),
    "warm_up_s": (_gpu.WARM_UP_S, _gpu.not_negative, "a number of seconds from 0"),
    "time_limit_s": (600.0, _gpu.positive, "a number of seconds above 0"),
    "slow_limit": (SLOW_LIMIT, lambda value: _gpu.positive(value) and value > 1, "a number above 1"),
}
"""Option → default, whether a value may be used, what is wanted."""


def _options(profile: Profile) -> dict[str, Any]:
    return _gpu.checked_options(profile, _OPTIONS, PRECISIONS)


def examine(profile: Profile) -> list[Finding]:
    """Return what is in order and what is missing, holding nothing; driver and PyTorch are tried in a child."""
    try:
        options = _options(profile)
        _check_build(profile)
    except ProfileError as error:
        return [_gpu.refused_profile(error)]
    return _gpu.probed(_worker(options, on_gpu=True), "torch")
