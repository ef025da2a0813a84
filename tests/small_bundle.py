"""A bundle small enough to write in milliseconds: a model of one matrix, and latencies made up here."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeprune.budget import Budget, Latency
from edgeprune.canonical import file_sha256
from edgeprune.measurement import Calls, Measurement, Session
from edgeprune.outcome import ModelFacts, Outcome, WidthChange
from edgeprune.pack import BundleContents, pack, write_bundle
from edgeprune.plan import Plan
from edgeprune.profile import Profile
from edgeprune.verdict import verdict

PROFILE = Profile(name="bench", adapter="onnxruntime_cpu", address="board-7", options={"threads": 1})
WEIGHT = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
INPUTS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], np.float32)
OUTPUTS = INPUTS @ WEIGHT
SIZE = 123
"""Bytes of the model that `write_model` writes unless told otherwise."""


def write_model(path: Path, *, weight: np.ndarray = WEIGHT, batch: int | str = 1) -> Path:
    """Write y = x @ weight, x: [batch, 3], y: [batch, 2]."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    return _save(graph, path)


def write_two_port_model(path: Path) -> Path:
    """Write sum = a + b and difference = a - b, all [1, 2]."""
    ports = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("a", "b", "sum", "difference")
    }
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    graph = helper.make_graph(nodes, "ports", [ports["a"], ports["b"]], [ports["sum"], ports["difference"]])
    return _save(graph, path)


def _save(graph: onnx.GraphProto, path: Path) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def measurement(*, ratio: float = 0.4, reference_ns: int = 2_000_000, sessions: int = 3, **changes: Any) -> Measurement:
    """Return made-up timings with this ratio, the same in every session."""
    session = Session(candidate=_calls(round(ratio * reference_ns)), reference=_calls(reference_ns))
    seen = Measurement(
        profile_digest=PROFILE.digest,
        artifact_sha256="a" * 64,
        reference_sha256="b" * 64,
        sessions=(session,) * sessions,
        conditions={"cpu_model": "Imaginary 9000", "onnxruntime": "1.31.1", "threads": 1},
        taken_at="2026-01-02T03:04:05+00:00",
        seconds=1.5,
    )
    return replace(seen, **changes)


def _calls(nanoseconds: int) -> Calls:
    return Calls(elapsed=(nanoseconds,) * 30, on_cpu=(nanoseconds,) * 30, preempted=(0,) * 30)


HALF = Budget(latency=Latency.parse("0.5x"))


def outcome(seen: Measurement, *, budget: Budget = HALF, size_bytes: int = SIZE) -> Outcome:
    """Return what a deploy for this budget that ended with `seen` would say, machine paths included."""
    accuracy = {"baseline": 0.9, "tuned": 0.89}
    before = ModelFacts(
        accuracy=0.91,
        test_images=100,
        validation=accuracy,
        latency=seen.reference_latency(),
        ratio=None,
        parameters=12,
        macs=12,
        size_bytes=300,
    )
    after = replace(
        before,
        accuracy=0.9,
        latency=seen.latency(),
        ratio=seen.ratio(),
        parameters=6,
        macs=6,
        size_bytes=size_bytes,
    )
    return Outcome(
        model="/home/somebody/models/net.pt2",
        target="bench",
        emulated=seen.emulated,
        metric=seen.metric,
        strategy="ddpg",
        seed=0,
        baseline=before,
        result=after,
        budget=verdict(budget, budget.limit_ratio(seen.reference_latency().high), after, before.accuracy),
        measurements=40,
        trials=50,
        widths=(WidthChange(group="conv", before=16, after=8),),
        run_dir="/home/somebody/run",
    )


def contents(model: Path, **changes: Any) -> BundleContents:
    """Return the contents of a small bundle around the model that `write_model` wrote."""
    seen, budget = changes.get("measurement", measurement()), changes.get("budget", HALF)
    size_bytes = model.stat().st_size if model.is_file() else SIZE
    base = BundleContents(
        name="small",
        model=model,
        plan=Plan(kept={"conv": tuple(range(8))}),
        profile=PROFILE,
        budget=budget,
        outcome=outcome(seen, budget=budget, size_bytes=size_bytes),
        measurement=seen,
        parity_inputs={"x": INPUTS},
        parity_outputs={"y": OUTPUTS},
        tolerances=(1e-5, 1e-5),
        parent_sha256="c" * 64,
        versions={"onnxruntime": "1.31.1"},
    )
    return replace(base, **changes)


def write_small_bundle(folder: Path, **changes: Any) -> Path:
    """Write a small bundle to ``folder/small`` and its unpruned parent to ``folder/baseline.onnx``."""
    model = write_model(folder / "tuned.onnx")
    parent = write_model(folder / "baseline.onnx", weight=np.tile(WEIGHT, 2))
    made = contents(model, **{"parent_sha256": file_sha256(parent), **changes})
    return write_bundle(folder / "small", contents=made).path


@cache
def whole_files() -> dict[str, bytes]:
    """Return path → bytes of a whole bundle, and of its archive under ``""``."""
    with TemporaryDirectory() as name:
        folder = write_small_bundle(Path(name))
        archive = pack(folder, Path(name) / "small.tar").read_bytes()
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths} | {"": archive}


def lay_out(folder: Path, **changed: bytes) -> Path:
    """Put that bundle and its archive into a folder, the bytes of some files replaced; return the bundle."""
    for path, content in (whole_files() | changed).items():
        place = folder / "small" / path if path else folder / "small.tar"
        place.parent.mkdir(exist_ok=True, parents=True)
        place.write_bytes(content)
        place.chmod(0o644)
    return folder / "small"
