"""What trtexec says: its log, the times of every call, the times of every layer, the formats of an engine, its outputs.

    [11/21/2026-20:01:02] [I] GPU Compute Time: min = 0.3759 ms, max = 0.4036 ms, mean = ..., percentile(99%) = ...
    [11/21/2026-20:01:02] [W] [TRT] ...                     lines of the library itself carry one field more
    &&&& PASSED TensorRT.trtexec [TensorRT v100300] # ...   without this line nothing counts

Formats are those of TensorRT 8.4 to 11.1, read loosely: older lines differ in case and in the words for a unit. Names
of layers are written into JSON unescaped and floats may be ``nan``, so nothing here insists on strict JSON.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ._trtexec import Version, version_from_banner  # noqa: TID251 private part of this adapter

if TYPE_CHECKING:
    from numpy.typing import NDArray

CALLS_CAP = 2_000_000
"""Times of more calls are not believed."""

ELEMENTS_CAP = 1 << 26
"""Outputs of more elements are not taken."""

TIME_CAP_MS = 1e12
"""Times beyond three decades are no times."""

SAID_CAP = 20
"""Errors and warnings of one log that are kept."""

_LINE = re.compile(r"^\[\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d\] \[([IWEVF])\] ?(\[TRT\] )?(.*)$")
_NUMBER = r"([-+]?(?:\d{1,18}\.?\d{0,18}(?:[eE][-+]?\d{1,3})?|nan|inf))"
_STATISTIC = re.compile(rf"(min|max|mean|median|percentile\(\d+(?:\.\d+)?%\)) = {_NUMBER} ms", re.IGNORECASE)
_SUMMARY = re.compile(r"^(Latency|Enqueue Time|H2D Latency|GPU Compute Time|D2H Latency): (.*)$", re.IGNORECASE)
_QUERIES = re.compile(rf"Timing trace has (\d{{1,12}}) queries over {_NUMBER} s", re.IGNORECASE)
_BUILT = re.compile(rf"Engine built in {_NUMBER} sec", re.IGNORECASE)
_FACT = re.compile(r"^(Selected Device|Compute Capability|SMs): (.{1,80})$")
_PROFILED = re.compile(
    rf'"name"\s*:\s*"(.*)"\s*,\s*"timeMs"\s*:\s*{_NUMBER}\s*,\s*"averageMs"\s*:\s*{_NUMBER}'
    rf'(?:\s*,\s*"medianMs"\s*:\s*{_NUMBER})?'
)
_FORMAT = re.compile(r'"Format/Datatype"\s*:\s*"([^"]*)"')
_TYPES = {
    "fp16": r"\bFP16\b|\bHalf\b",
    "bf16": r"\bBF16\b|\bBFloat16\b",
    "int8": r"\bINT8\b",
    "fp8": r"\bFP8\b",
    "fp32": r"\bFP32\b|\bFloat\b",
}
_RAW_NAME = re.compile(r"(.*)\.output\.((?:\d{1,10}\.){0,8})([A-Za-z0-9]+)\.raw")
_RAW_TYPES = {
    "Float": "<f4",
    "Half": "<f2",
    "Int32": "<i4",
    "Int64": "<i8",
    "Int8": "i1",
    "UInt8": "u1",
    "Bool": "?",
}


class Unreadable(ValueError):
    """What trtexec wrote is not what any known version writes."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """One run of trtexec.

    Attributes:
        passed: it says so itself.
        version: from its first line.
        summary: "gpu compute time", "latency" ... → statistic → milliseconds.
        queries: timed calls.
        built_s: seconds the builder took.
        device: "selected device", "compute capability", "sms" as far as it says.
        errors, warnings: lines of those levels, in order, the first of each kind only.
    """

    passed: bool
    version: Version | None
    summary: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    queries: int | None = None
    built_s: float | None = None
    device: Mapping[str, str] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def log_from_text(text: str) -> Log:
    """Return what a log says, whatever else stands between its lines."""
    said = [(found[1], found[3]) for line in text.splitlines() if (found := _LINE.match(line.strip()))]
    lines = [body for _, body in said]
    queries, built = _first(_QUERIES, lines), _first(_BUILT, lines)
    return Log(
        passed=any(line.strip().startswith("&&&& PASSED TensorRT.trtexec") for line in text.splitlines()),
        version=version_from_banner(text),
        summary={found[1].lower(): _statistics(found[2]) for line in lines if (found := _SUMMARY.match(line))},
        queries=int(queries) if queries else None,
        built_s=float(built) if built and math.isfinite(float(built)) else None,
        device={found[1].lower(): found[2].strip() for line in lines if (found := _FACT.match(line))},
        errors=_of_level("EF", said),
        warnings=_of_level("W", said),
    )


def _first(pattern: re.Pattern[str], lines: Sequence[str]) -> str | None:
    return next((found[1] for line in lines if (found := pattern.search(line))), None)


def _statistics(text: str) -> dict[str, float]:
    return {name.lower(): float(value) for name, value in _STATISTIC.findall(text)}


def _of_level(levels: str, said: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    lines = (body.strip()[:300] for level, body in said if level in levels and body.strip())
    return tuple(dict.fromkeys(lines))[:SAID_CAP]


# -- why it failed --------------------------------------------------------------------------------------------------

_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|bad_alloc|MemoryAllocation|NvMapMemAlloc", re.I)
_DEVICE = re.compile(r"no CUDA-capable device|CUDA initialization|Cuda failure|cudaError|NvRm|cuInit|device lost", re.I)
_STALE = re.compile(
    r"engine plan file is not compatible|incompatible device|Unsupported SM|Version tag does not match|magicTag|"
    r"Serialization assertion|deserialization failed|Error opening engine file|Failed to create engine from",
    re.I,
)
_CACHE = re.compile(r"timing ?cache", re.I)
_FULL = re.compile(r"No space left|ENOSPC|Saving engine to file failed|could not be written", re.I)
_OPTION = re.compile(r"Unknown option: (--\S{1,60})")
_DROPPED = re.compile(r"setting .{1,40} mode is not allowed if graph is strongly typed", re.I)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why trtexec failed.

    Attributes:
        kind: "graph" (the candidate's doing), "memory", "device", "disk", "stale" (an engine that must be built anew),
            "cache" (a timing cache that must go), "option" (a flag it does not take) or "ended" (from outside).
        why: in its own words.
    """

    kind: str
    why: str


def failure_of(rc: int, log: Log) -> Failure | None:
    """Return why a run failed, None if it did not: it must end well and say so."""
    if rc == 0 and log.passed and not any(_DROPPED.search(line) for line in (*log.errors, *log.warnings)):
        return None
    said = "\n".join((*log.errors, *log.warnings))
    why = log.errors[0] if log.errors else f"trtexec ended with exit status {rc} and without the line PASSED"
    if rc in (128 + 9, 128 + 7):  # SIGKILL, SIGBUS
        return Failure(kind="memory", why="it was killed, as a board without free memory does")
    if rc == 128 + 13:  # SIGPIPE: nobody reads on
        return Failure(kind="ended", why="it said more than is read")
    if rc in (128 + 1, 128 + 2, 128 + 15):
        return Failure(kind="ended", why="it was ended by a signal")
    if dropped := _DROPPED.search(said):
        return Failure(kind="option", why=dropped[0])
    if option := _OPTION.search(said):
        return Failure(kind="option", why=option[0])
    for kind, pattern in (("memory", _MEMORY), ("disk", _FULL), ("device", _DEVICE), ("stale", _STALE)):
        if any(pattern.search(line) for line in log.errors):
            return Failure(kind=kind, why=why)
    if any(_CACHE.search(line) for line in log.errors):
        return Failure(kind="cache", why=why)
    if rc > 128:
        return Failure(kind="graph", why=f"TensorRT crashed (signal {rc - 128}); {why}")
    return Failure(kind="graph", why=why)


# -- files it writes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CallTimes:
    """Every timed call, in order; milliseconds.

    Attributes:
        compute_ms: on the GPU, between two CUDA events.
        latency_ms: with the transfers, which are switched off.
        enqueue_ms: of the host, for the launch.
        span_s: from the first call to the last.
    """

    compute_ms: tuple[float, ...]
    latency_ms: tuple[float, ...]
    enqueue_ms: tuple[float, ...]
    span_s: float

    @property
    def step_ms(self) -> float:
        """Return the smallest difference between two different times: the resolution of a long run coarsens."""
        ordered = sorted(set(self.compute_ms))
        return min((after - before for before, after in pairwise(ordered)), default=0.0)


def times_from_json(text: str) -> CallTimes:
    """Return the times that ``--exportTimes`` wrote.

    Raises:
        Unreadable: if they are not there, not numbers, or not positive.
    """
    rows = _json(text, "the times of calls")
    if (
        not isinstance(rows, list)
        or not 1 <= len(rows) <= CALLS_CAP
        or not all(isinstance(each, dict) for each in rows)
    ):
        raise Unreadable("the times of calls are no list of calls")
    compute, latency = _column(rows, "computeMs"), _column(rows, "latencyMs")
    if min(compute) <= 0 or min(latency) <= 0:
        raise Unreadable("a call took no time")
    begin, end = _column(rows, "startEnqMs"), _column(rows, "endEnqMs")
    done = _column(rows, "endD2hMs")
    return CallTimes(
        compute_ms=compute,
        latency_ms=latency,
        enqueue_ms=tuple(b - a for a, b in zip(begin, end, strict=True)),
        span_s=(max(done) - min(begin)) / 1000,
    )


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{what} are not JSON: {str(error)[:120]}") from error


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, ...]:
    values: list[Any] = [each.get(name) for each in rows]
    numbers = tuple(float(each) for each in values if type(each) in (int, float) and abs(each) < TIME_CAP_MS)
    if len(numbers) != len(rows):
        raise Unreadable(f"{name} is not a number in every call")
    return numbers


def layer_times_from_json(text: str) -> dict[str, float]:
    """Return layer name → milliseconds of one call, from what ``--exportProfile`` wrote.

    Raises:
        Unreadable: if it names no layer.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        if match := _PROFILED.search(line):
            value = float(match[4] if match[4] is not None else match[3])
            if math.isfinite(value) and value >= 0:
                found[match[1]] = found.get(match[1], 0.0) + value
    if not found:
        raise Unreadable("the times of layers name no layer")
    return found


def precisions_from_layer_info(text: str) -> dict[str, int]:
    """Return "fp32", "fp16", "int8" ... → tensors of the engine in that type; empty if the engine does not tell."""
    count: dict[str, int] = {}
    for spelled in _FORMAT.findall(text):
        for name, pattern in _TYPES.items():
            if re.search(pattern, spelled, re.IGNORECASE):
                count[name] = count.get(name, 0) + 1
                break
    return count


def layers_by_graph_node(layers: Mapping[str, float], nodes: Sequence[str]) -> dict[str, float]:
    """Return time by node of the graph, from time by layer of the engine.

    A fused layer is named after its nodes, ``conv1 + relu1``, and its time goes to the first of them, which is the one
    that does the work. A copy between formats, or a region that was compiled as a whole, keeps the engine's name.
    """
    known, found = set(nodes), dict[str, float]()
    for name, spent in layers.items():
        parts = [_bare(each) for each in name.split(" + ")]
        node = next((each for each in parts if each in known), name)
        found[node] = found.get(node, 0.0) + spent
    return found


def _bare(part: str) -> str:
    """Return the node's name in one part of a layer's: ``PWN(relu1)`` is relu1, ``conv1 [profile 0]`` is conv1."""
    stripped = re.sub(r"\s*\[[^\]]*\]$", "", part.strip())
    inner = re.fullmatch(r"PWN\((.*)\)", stripped)
    return inner[1] if inner else stripped


def outputs_from_json(text: str) -> "dict[str, NDArray[Any]]":
    """Return outputs by name, float32, from what ``--exportOutput`` wrote (six digits).

    Raises:
        Unreadable: if they are not there or not numbers.
    """
    import numpy as np

    spelled = re.sub(r"(?<=[\s,\[])(-?)(nan|inf)(?=[\s,\]])", lambda m: f"{m[1]}{_WORDS[m[2]]}", text)
    rows = _json(spelled, "the outputs")
    found = {}
    for each in rows if isinstance(rows, list) else ():
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            raise Unreadable("an output without a name")
        try:
            shape = tuple(int(size) for size in re.findall(r"\d+", str(each.get("dimensions", ""))))
            found[each["name"]] = np.array(each["values"], np.float32).reshape(shape)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise Unreadable(f"output {each['name'][:80]!r} has no values of its shape") from error
    return found


_WORDS = {"nan": "NaN", "inf": "Infinity"}


def safe_file_name(name: str) -> str:
    """Return a tensor's name as it stands in the name of a raw file."""
    return "".join(each if each.isascii() and (each.isalnum() or each in "._-,") else "_" for each in name)


def output_from_raw_name(file: str) -> tuple[str, str, tuple[int, ...]]:
    """Return tensor, NumPy dtype and shape from a name like ``y.output.1.10.Float.raw``.

    Raises:
        Unreadable: if it is no such name or its array would be too large.
    """
    found = _RAW_NAME.fullmatch(file)
    if found is None or found[3] not in _RAW_TYPES:
        raise Unreadable(f"{file[:80]!r} is not the name of an output")
    shape = tuple(int(each) for each in found[2].split(".") if each)
    if math.prod(shape) > ELEMENTS_CAP:
        raise Unreadable(f"{file[:80]!r} would have {math.prod(shape)} elements")
    return found[1], _RAW_TYPES[found[3]], shape
