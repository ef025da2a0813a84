"""No device: latency is a formula with seeded noise, so that a search has a known best plan and faults come on cue.

    # profiles/formula.toml
    adapter = "formula"
    [options]
    block = 16              # channels are rounded up to it, as blocked kernels do
    macs_per_ns = 16.0      # speed of every layer
    overhead_ns = 2000.0    # of every layer
    noise = 0.002           # standard deviation of the log of one sample
    seed = 0
    drop_out = 0.0          # probability that a measurement loses the device
    lose_at = [3, 7]        # 0-based measurements of a connection, failed ones counted, that lose it

    latency = Σ over Conv, Gemm, MatMul, LSTM, GRU, RNN
              of overhead_ns + MACs(in and out rounded up to block) / macs_per_ns

A sample depends on the seed, the options, the two engines, the seed of the sampling and the session, and on nothing
else: not on time, and not on what was measured before.
"""

import importlib.util
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from time import monotonic
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from edgeprune.artifact import Artifact
from edgeprune.errors import CompileError, DeviceLost, ProfileError
from edgeprune.measurement import Calls, Measurement, Sampling, Session
from edgeprune.metric import FORMULA
from edgeprune.profile import Profile
from edgeprune.target import Finding, Target

SAMPLES = 8
"""Samples of each engine in one session."""

WEIGHT_KEPT = 1024
"""Constants of more elements hold no shapes; only their own shape matters here."""

Shape = tuple[int, ...]


@contextmanager
def connect(profile: Profile) -> Iterator[Target]:
    """Yield the formula.

    Raises:
        ProfileError: if an option is unknown or out of range.
    """
    yield Formula(profile)


def examine(profile: Profile) -> list[Finding]:
    """Return that nothing is needed, and that nothing is timed."""
    try:
        _options(profile)
    except ProfileError as error:
        return [Finding.of_error("options", error, mend="change [options] of the profile")]
    note = Finding(subject="formula", severity="note", found="no device: latencies are computed, not timed")
    return [note, _needs("onnx"), _needs("onnxruntime")]


def _needs(package: str) -> Finding:
    if importlib.util.find_spec(package) is None:
        return Finding.not_installed(package, f"pip install {package}")
    return Finding(subject=package, severity="ok", found=version(package))


class Formula:
    """Computes what it pretends to time, and runs with ONNX Runtime what it is asked to run."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._options = _options(profile)
        self._layers: dict[str, dict[str, float]] = {}
        self._measured = 0

    @property
    def profile(self) -> Profile:
        """Return the profile it was opened with."""
        return self._profile

    def compile(self, graph: Artifact) -> Artifact:
        """Return the graph itself, once its cost is known."""
        self._cost(graph)
        return graph

    def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
        """Return computed samples of `engine` and `sampling.reference`, marked as emulated.

        Raises:
            CompileError: if the graph cannot be read.
            DeviceLost: if the profile says so.
        """
        started = monotonic()
        self._fail_on_cue()
        layers = self._cost(engine)
        reference = self._cost(sampling.reference)
        sessions: list[Session] = []
        while not sampling.enough(sessions):
            draw = self._noise(engine, sampling, len(sessions))
            candidate_ns, reference_ns = (_samples(math.fsum(each.values()), draw) for each in (layers, reference))
            sessions.append(Session(candidate=candidate_ns, reference=reference_ns))
        return Measurement(
            profile_digest=self._profile.digest,
            artifact_sha256=engine.sha256,
            reference_sha256=sampling.reference.sha256,
            sessions=tuple(sessions),
            conditions={"formula": dict(self._profile.options)},
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=monotonic() - started,
            metric=FORMULA,
            emulated=True,
            layers=dict(layers) if sampling.layers else {},
        )

    def run(self, engine: Artifact, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Return the outputs that ONNX Runtime computes in this process, by name."""
        engine.check()
        import onnxruntime  # a search on the formula never runs anything

        state = import_module("onnxruntime.capi.onnxruntime_pybind11_state")  # a compiled module without types

        own = (each for each in vars(state).values() if isinstance(each, type) and issubclass(each, Exception))
        refusals: tuple[type[Exception], ...] = (*own, RuntimeError, ValueError, TypeError)
        try:
            session = onnxruntime.InferenceSession(str(engine.path), providers=["CPUExecutionProvider"])
            names = [each.name for each in session.get_outputs()]
            answers = (np.asarray(each) for each in session.run(names, dict(inputs)))
            return dict(zip(names, answers, strict=True))
        except refusals as error:
            raise CompileError(
                f"ONNX Runtime refused: running {engine.path.name}", why=str(error).splitlines()[0]
            ) from error

    def _fail_on_cue(self) -> None:
        number, self._measured = self._measured, self._measured + 1
        dropped = random.Random(f"{self._options['seed']} drop {number}").random() < self._options["drop_out"]  # noqa: S311
        if dropped or number in self._options["lose_at"]:
            raise DeviceLost(
                f"the formula device was lost in measurement {number}",
                why="its profile asks for that (drop_out, lose_at)",
                next_step="measure again",
            )

    def _noise(self, engine: Artifact, sampling: Sampling, session: int) -> Callable[[], float]:
        own = f"{self._options['seed']} {engine.sha256} {sampling.reference.sha256} {sampling.seed} {session}"
        generator, sd = random.Random(own), float(self._options["noise"])  # noqa: S311
        return lambda: math.exp(generator.gauss(0.0, sd))

    def _cost(self, graph: Artifact) -> Mapping[str, float]:
        """Return node name → nanoseconds."""
        if graph.sha256 not in self._layers:
            work = _work(graph)
            self._layers[graph.sha256] = {each.name: each.nanoseconds(self._options) for each in work}
        return self._layers[graph.sha256]


def _samples(nanoseconds: float, draw: Callable[[], float]) -> Calls:
    drawn = tuple(max(1, round(nanoseconds * draw())) for _ in range(SAMPLES))
    return Calls(elapsed=drawn, on_cpu=drawn, preempted=(0,) * SAMPLES)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one convolution, matrix product or recurrent node does.

    Attributes:
        name: of the node.
        in_channels, out_channels: of the whole node, all convolution groups together.
        pairs: multiply-accumulates for one input and one output channel, over all positions.
        groups: convolution groups.
    """

    name: str
    in_channels: int
    out_channels: int
    pairs: int
    groups: int = 1

    def nanoseconds(self, options: Mapping[str, Any]) -> float:
        """Return the node's latency under the formula."""
        block = int(options["block"])
        into, out = (math.ceil(each / block) * block for each in (self.in_channels, self.out_channels))
        macs = into * out * self.pairs / self.groups
        return float(options["overhead_ns"]) + macs / float(options["macs_per_ns"])


def _work(graph: Artifact) -> list[Work]:
    graph.check()
    try:
        model = onnx.load(str(graph.path), load_external_data=False)
        shapes = _shapes(model)
        return [_layer(number, node, shapes) for number, node in enumerate(model.graph.node) if node.op_type in _LAYERS]
    except (DecodeError, onnx.shape_inference.InferenceError, RuntimeError, ValueError, LookupError, OSError) as error:
        raise CompileError(
            f"the formula cannot read {graph.path.name}",
            why=(str(error) or type(error).__name__).splitlines()[0],
            next_step="export the graph again, all of it in one file",
        ) from error


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return tensor name → shape, inferred from a copy without weights; sizes computed from shapes are followed."""
    if not model.graph.output:
        raise ValueError("no graph was found in the file")
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.CopyFrom(_weightless(model.graph))
    inferred = onnx.shape_inference.infer_shapes(light, strict_mode=True, data_prop=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    shapes = {each.name: tuple(size.dim_value for size in each.type.tensor_type.shape.dim) for each in values}
    return {each.name: tuple(each.dims) for each in model.graph.initializer} | shapes


def _weightless(graph: onnx.GraphProto) -> onnx.GraphProto:
    declared = {each.name for each in graph.input}
    large = [each for each in graph.initializer if math.prod(each.dims) > WEIGHT_KEPT]
    small = [each for each in graph.initializer if math.prod(each.dims) <= WEIGHT_KEPT]
    stand_ins = [
        onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims)
        for each in large
        if each.name not in declared
    ]
    light = onnx.GraphProto(name=graph.name, node=graph.node, output=graph.output, value_info=graph.value_info)
    light.input.extend([*graph.input, *stand_ins])
    light.initializer.extend(small)
    return light


def _layer(number: int, node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Work:
    name = node.name or f"{node.op_type}_{number}"
    known = [shapes.get(each, ()) for each in (node.input[0], node.input[1], node.output[0] or node.input[0])]
    if any(not shape or 0 in shape for shape in known):
        raise CompileError(
            f"the formula cannot tell the cost of node {name}",
            why="it has no static shape",
            next_step="let no size depend on values, or choose a target that measures, e.g. host",
        )
    return _LAYERS[node.op_type](name, node, *known)


def _conv(name: str, node: onnx.NodeProto, x: Shape, w: Shape, y: Shape) -> Work:
    groups = next((each.i for each in node.attribute if each.name == "group"), 1)
    pairs = math.prod(w[2:]) * math.prod(y[2:]) * y[0]
    return Work(name=name, in_channels=x[1], out_channels=y[1], pairs=pairs, groups=groups)


def _gemm(name: str, node: onnx.NodeProto, _: Shape, w: Shape, y: Shape) -> Work:
    transposed = next((each.i for each in node.attribute if each.name == "transB"), 0)
    return Work(name=name, in_channels=w[1 if transposed else 0], out_channels=y[-1], pairs=y[0])


def _matmul(name: str, _node: onnx.NodeProto, x: Shape, _: Shape, y: Shape) -> Work:
    return Work(name=name, in_channels=x[-1], out_channels=y[-1], pairs=math.prod(y[:-1]))


def _recurrent(name: str, node: onnx.NodeProto, x: Shape, w: Shape, _: Shape) -> Work:
    """Every step of every sequence multiplies the weights of all gates, in every direction, with input and state."""
    directions, rows, inputs = w
    state = rows // _GATES[node.op_type]
    return Work(name=name, in_channels=inputs + state, out_channels=directions * rows, pairs=x[0] * x[1])


_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


_LAYERS: dict[str, Callable[..., Work]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    **dict.fromkeys(_GATES, _recurrent),
}


def _number(low: float, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


_OPTIONS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "block": (16, lambda value: type(value) is int and value >= 1, "a whole number from 1"),
    "macs_per_ns": (16.0, _number(1e-9), "a number above 0"),
    "overhead_ns": (2000.0, _number(0.0), "a number from 0"),
    "noise": (0.0, _number(0.0, 1.0), "a number from 0 to 1"),
    "seed": (0, lambda value: type(value) is int, "a whole number"),
    "drop_out": (0.0, _number(0.0, 1.0), "a number from 0 to 1"),
    "lose_at": (
        (),
        lambda value: isinstance(value, list) and all(type(each) is int for each in value),
        "a list of numbers",
    ),
}
"""Option → default, test, what is wanted."""


def _options(profile: Profile) -> dict[str, Any]:
    for name, value in profile.options.items():
        if name not in _OPTIONS:
            raise ProfileError(
                f"profile {profile.name!r}: unknown option {name!r}", next_step=f"one of {', '.join(_OPTIONS)}"
            )
        _, valid, wanted = _OPTIONS[name]
        if not valid(value):
            raise ProfileError(f"profile {profile.name!r}: option {name} is {value!r}", why=f"{wanted} is wanted")
    return {name: default for name, (default, *_) in _OPTIONS.items()} | dict(profile.options)
