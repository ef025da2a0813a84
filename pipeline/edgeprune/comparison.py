"""Compare the latency of ONNX models on one device: the verb behind `edgeprune measure a.onnx b.onnx`.

The first model is the reference; every other one is timed in alternating blocks with it. A single model is timed
against itself, which gives its absolute latency and, as the width of the interval around 1, what this machine can tell
apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.errors import CorruptArtifact, ModelError
from edgeprune.fleet import open_boards
from edgeprune.measurement import Measurement, Sampling
from edgeprune.metric import unit_of
from edgeprune.profile import Profile
from edgeprune.statistics import Interval
from edgeprune.target import Target, Tuner

Progress = Callable[[str, int, int], None]
"""Called with what is being measured, how many are done, and how many there are."""

SESSION_MS = 200.0
SESSIONS_FEWEST = 3


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One model against the reference.

    Attributes:
        path, reference: the two files.
        ratio: latency of the model as a ratio of the reference's.
        latency, reference_latency: of each, of the same sessions, in the unit of the measurement's metric.
        measurement: the raw samples and conditions behind them.
    """

    path: Path
    reference: Path
    ratio: Interval
    latency: Interval
    reference_latency: Interval
    measurement: Measurement

    @property
    def distinguishable(self) -> bool:
        """Return whether the interval of the ratio excludes 1."""
        return not self.ratio.low <= 1 <= self.ratio.high

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values, without the raw samples."""
        seen = self.measurement
        return {
            "model": str(self.path),
            "reference": str(self.reference),
            "ratio": self.ratio.to_json(),
            "latency": self.latency.to_json(),
            "reference_latency": self.reference_latency.to_json(),
            "distinguishable": self.distinguishable,
            "sessions": len(seen.sessions),
            "seconds": seen.seconds,
            "unit": unit_of(seen.metric),
            "metric": seen.metric,
            "emulated": seen.emulated,
            "flags": list(seen.flags),
            "notes": list(seen.notes),
            "conditions": dict(seen.conditions),
        }


def compare(
    paths: Sequence[Path],
    boards: Sequence[Profile],
    *,
    seconds: float = 2.0,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Comparison]:
    """Return every model of `paths` after the first compared with the first; a single one with itself.

    Args:
        paths: ONNX files, at least one.
        boards: the profile of the device, or of each board of one kind.
        seconds: time to spend on each comparison, about; loading and warming up take a quarter to a third of it.
        confidence: of every interval.
        seed: of the order of blocks.
        progress: told before each comparison and after the last.

    Raises:
        ModelError: if a file is missing or cannot be fed (see `read_graph`).
        CorruptArtifact: if a file is not ONNX.
        CompileError: if the device refuses a model.
        LabError: if the device is lost, busy or too uneven.
    """
    assert paths, "there is a model to compare"
    report = progress or _silent
    graphs = [read_graph(path) for path in paths]
    with open_boards(boards) as target:
        reference, *others = [_engine(target, each, report) for each in graphs]
        candidates = others or [reference]
        sampling = _sampling(reference, seconds, confidence, seed)
        results = []
        for done, candidate in enumerate(candidates):
            report(candidate.path.name, done, len(candidates))
            seen = target.measure(candidate, sampling)
            results.append(_comparison(paths[0], (paths[1:] or paths)[done], seen, confidence))
        report("", len(candidates), len(candidates))
    return results


def _engine(target: Target, graph: Artifact, report: Progress) -> Artifact:
    if isinstance(target, Tuner):
        target.tune(graph, lambda share, note: report(f"{graph.path.name}, tuning {share:.0%}, {note}", 0, 1))
    return target.compile(graph)


_ONNX = "give the path of an ONNX file, such as model.onnx of a bundle or baseline.onnx of a run"


def read_graph(path: Path) -> Artifact:
    """Return the ONNX file at `path` with its inputs; a first axis of unknown size is a batch of 1.

    Raises:
        ModelError: if it is missing or keeps weights elsewhere, or an input is no tensor of a fixed shape.
        CorruptArtifact: if it is not ONNX.
    """
    if not path.is_file():
        raise ModelError(f"there is no model {path}", next_step=_ONNX)
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (DecodeError, OSError) as error:
        why = "it is cut short, or something else"
        raise CorruptArtifact(f"{path} is not an ONNX file", why=why, next_step=_ONNX) from error
    if not graph.node:
        raise CorruptArtifact(f"{path} is not an ONNX file", why="it holds no graph", next_step=_ONNX)
    if any(each.data_location == onnx.TensorProto.EXTERNAL for each in graph.initializer):
        raise ModelError(
            f"{path} keeps weights in other files",
            why="its SHA-256 would not tell what was timed",
            next_step="save it as one file, for example with onnx.save(model, path, save_as_external_data=False)",
        )
    constants = {each.name for each in graph.initializer}
    return Artifact.of(
        path, kind="onnx", inputs=[_spec(path, each) for each in graph.input if each.name not in constants]
    )


def _spec(path: Path, value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    if tensor.elem_type == onnx.TensorProto.UNDEFINED:
        raise ModelError(f"{path}: input {value.name!r} is not a tensor")
    sizes = [axis.dim_value for axis in tensor.shape.dim]
    shape = tuple(1 if place == 0 and size < 1 else size for place, size in enumerate(sizes))
    if any(size < 1 for size in shape):
        raise ModelError(
            f"{path}: input {value.name!r} has no fixed shape",
            why=f"it is {[axis.dim_value or axis.dim_param or '?' for axis in tensor.shape.dim]}",
            next_step="export the model for one input shape",
        )
    return TensorSpec(name=value.name, shape=shape, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name)


def _sampling(reference: Artifact, seconds: float, confidence: float, seed: int) -> Sampling:
    """Return as many sessions as `seconds` holds: more sessions tell more than longer ones."""
    sessions = max(SESSIONS_FEWEST, round(0.6 * seconds * 1000 / SESSION_MS))
    return Sampling(
        reference=reference,
        sessions_min=sessions,
        sessions_max=sessions,
        session_ms=SESSION_MS,
        confidence=confidence,
        seed=seed,
    )


def _comparison(reference: Path, path: Path, seen: Measurement, confidence: float) -> Comparison:
    return Comparison(
        path=path,
        reference=reference,
        ratio=seen.ratio(confidence),
        latency=seen.latency(confidence),
        reference_latency=seen.reference_latency(confidence),
        measurement=seen,
    )


def _silent(_what: str, _done: int, _total: int) -> None:
    """Tell nobody."""
