"""This process's side of tuning: what a search wants to know is measured on the board, against our own schedule.

worker ── engine of a batch ───▶ board: each kernel in turn, and its answer     ── costs ──▶ worker, which keeps them
       ── engines of finalists ▶ board: one against ours in alternating blocks  ── ratios ─▶ worker
       ── both whole networks ─▶ board: with all winners against ours           ── ratio ──▶ worker
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import statistics
from edgeprune.artifact import Artifact
from edgeprune.errors import DeviceLost
from edgeprune.measurement import Sampling, Session

from ._tvm.engine import Slot, read_engine  # noqa: TID251 private parts of this adapter
from ._tvm_rpc_bundle import ENGINE  # noqa: TID251

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

CONFIDENCE = 0.99
"""Of the interval that must lie below 1; two finalists of each of many kernels are compared."""

SESSIONS, BLOCK_MS = (3, 6), 4.0
SESSION_MS = {"final": 80.0, "whole": 300.0}
"""Of one kernel, and of a network."""

AGREE = {"float32": 1e-5, "float16": 1e-2}
"""Share of the largest answer by which another schedule's may be off: sums are in the same order."""

OURS = "ours"


@dataclass(frozen=True, kw_only=True)
class Tries:
    """What the search needs of a target.

    Attributes:
        ask: of the worker: request, what it does for people → reply.
        layers: of an engine: layer → what it costs in one call.
        run: an engine's outputs for inputs.
        timed: sessions of an engine against another.
        forget: of the board: engines, by their SHA-256.
    """

    ask: Callable[[Mapping[str, Any], str], tuple[Mapping[str, Any], Any]]
    layers: Callable[[Artifact], Mapping[str, float]]
    run: "Callable[[Artifact, Arrays], Arrays]"
    timed: Callable[[Artifact, Sampling], tuple[Any, Sequence[Session]]]
    forget: Callable[[Sequence[str]], object]


def tune(graph: Artifact, request: Mapping[str, Any], tries: Tries, progress: Callable[[float, str], None]) -> None:
    """Measure whatever the search of `request` wants to know, until it knows enough.

    Raises:
        CompileError: if the graph cannot be compiled.
        DeviceLost, DeviceBusy: if the board is gone; what was measured before is kept.
    """
    doing = f"tuning {graph.path.name}"
    task, _ = tries.ask(request, doing)
    while task["engines"]:
        progress(float(task["share"]), task["note"])
        engines, session_ms = [_artifact(each) for each in task["engines"]], SESSION_MS.get(task["kind"], 0.0)
        found = {"ratios": _ratios(engines, tries, session_ms)} if session_ms else _costs(engines[0], tries)
        tries.forget([each.sha256 for each in engines])
        for each in engines:
            each.path.unlink(missing_ok=True)
        task, _ = tries.ask({**request, "told": {"record": task["record"], **found}}, doing)
    progress(1.0, "")


def _artifact(engine: Mapping[str, Any]) -> Artifact:
    return Artifact(path=Path(engine["path"]), sha256=engine["sha256"], kind=ENGINE, inputs=())


def _ratios(engines: Sequence[Artifact], tries: Tries, session_ms: float) -> list[list[float]]:
    """Return p50, low and high of the time of each engine after the first over that of the first."""
    ours, *others = engines
    few, many = SESSIONS
    how = Sampling(
        reference=ours,
        threshold=1.0,
        sessions_min=few,
        sessions_max=many,
        session_ms=session_ms,
        block_ms=BLOCK_MS,
        confidence=CONFIDENCE,
    )
    found = []
    for each in others:
        _, sessions = tries.timed(each, how)
        seen = statistics.interval_over_sessions([session.log_ratio() for session in sessions], CONFIDENCE)
        found.append([seen.p50, seen.low, seen.high])
    return found


def _costs(batch: Artifact, tries: Tries) -> dict[str, Any]:
    """Return what each kernel of a batch costs, and which of them answer otherwise than ours."""
    costs, script = tries.layers(batch), read_engine(batch.path).script
    if set(costs) != {call.layer for call in script.calls} or not all(0 < each < math.inf for each in costs.values()):
        raise DeviceLost(
            "the board answers what was not asked", why=f"a kernel took {min(costs.values(), default=0)} ns"
        )
    answers = tries.run(batch, {name: _noise(script.slots[slot], slot) for name, slot in script.inputs})
    wrong = {name: why for name, answer in answers.items() if (why := _difference(answer, answers[OURS]))}
    return {"costs": costs, "wrong": wrong}


def _noise(slot: Slot, seed: int) -> "NDArray[Any]":
    """Return normal noise; zeros for whole numbers, which are places in a tensor."""
    import numpy

    if slot.dtype not in AGREE:
        return numpy.zeros(slot.shape, slot.dtype)
    return numpy.random.default_rng(seed).standard_normal(slot.shape).astype(slot.dtype)


def _difference(answer: "NDArray[Any]", wanted: "NDArray[Any]") -> str:
    """Return how an answer differs from the wanted one by more than rounding, empty if it does not."""
    import numpy

    finite = numpy.isfinite(wanted)
    if not (numpy.isfinite(answer) == finite).all():
        return "its answer is finite in other places than ours"
    scale = float(numpy.abs(wanted[finite]).max(initial=0.0))
    off = float(numpy.abs(answer[finite].astype("float64") - wanted[finite]).max(initial=0.0))
    allowed = AGREE.get(wanted.dtype.name, 0.0) * scale
    return "" if off <= allowed else f"its answer is off by {off:.2e}, {allowed:.2e} is allowed"
