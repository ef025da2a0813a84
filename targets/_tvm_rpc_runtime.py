"""Which of two runtimes a board's graphs run in: what TVM compiles of them, or the ONNX Runtime that lies on the board.

    runtime = "tvm"           kernels of ours, compiled on this machine; the default: nothing is measured to know it
    runtime = "onnxruntime"   the graph as it is
    runtime = "auto"          the first graph of a connection in both, measured against each other; then the faster

A choice is kept in the user's cache folder, by all that it depends on, so that a run that is resumed goes on in the
runtime it began with, and so do all boards of a kind.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.canonical import canonical_json, digest
from edgeprune.measurement import Measurement
from edgeprune.statistics import Interval

from ._engine_cache import forget_old, kept_in, written  # noqa: TID251 private parts of the adapters

TVM, ONNXRUNTIME, AUTO = "tvm", "onnxruntime", "auto"
OTHER = {TVM: ONNXRUNTIME, ONNXRUNTIME: TVM}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The runtime that was chosen, and what was seen of both.

    Attributes:
        graph: SHA-256 of the graph that both ran.
        times: what the other takes as a multiple of what the chosen one takes; None: the other refuses the graph.
        refused: why it does.
    """

    chosen: str
    graph: str
    times: Interval | None
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        times = self.times.to_json() if self.times else None
        facts = {"chosen": self.chosen, "other": OTHER[self.chosen], "graph": self.graph, "times": times}
        return facts | ({"refused": self.refused} if self.refused else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Choice":
        """Return the choice that `to_json` wrote.

        Raises:
            LookupError, TypeError, ValueError: if it did not write that.
        """
        times = value["times"]
        interval = Interval(**{name: float(times[name]) for name in ("p50", "low", "high")}) if times else None
        if value["chosen"] not in OTHER:
            raise ValueError(value["chosen"])
        return cls(
            chosen=value["chosen"], graph=str(value["graph"]), times=interval, refused=str(value.get("refused", ""))
        )


def choice_from(seen: Measurement, graph_sha256: str, chosen: str = "") -> Choice:
    """Return the faster runtime, or what is to be said of the one that is `chosen`.

    Args:
        seen: TVM's engine of the graph, timed against ONNX Runtime's.
        graph_sha256: of the graph.
        chosen: the runtime that is chosen already, empty: the faster one; TVM if they are equally fast.
    """
    ratio = seen.ratio()
    inverse = Interval(p50=1 / ratio.p50, low=1 / ratio.high, high=1 / ratio.low)
    chosen = chosen or (TVM if ratio.p50 <= 1 else ONNXRUNTIME)
    return Choice(chosen=chosen, graph=graph_sha256, times=inverse if chosen == TVM else ratio)


def note_of(choice: Choice) -> str:
    """Return in a sentence what the other runtime takes for a graph."""
    if choice.times is None:
        return f"{OTHER[choice.chosen]} refuses this model: {choice.refused}"
    times = choice.times
    return (
        f"in {OTHER[choice.chosen]} this model takes {times.p50:.3g} times as much as in {choice.chosen} "
        f"({times.low:.3g} to {times.high:.3g})"
    )


class Choices:
    """The choices that are kept, under one digest of all that they depend on beside the graph."""

    def __init__(self, facts: Mapping[str, object]) -> None:
        self._digest = digest(facts)

    def place(self, graph_sha256: str) -> Path:
        """Return where the choice for a graph lies, or would."""
        return kept_in("runtimes") / f"{digest([self._digest, graph_sha256])[:40]}.json"

    def known(self, graph_sha256: str) -> Choice | None:
        """Return the choice for a graph; one that cannot be read is made again."""
        try:
            found = Choice.from_json(json.loads(self.place(graph_sha256).read_bytes()))
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return found if found.graph == graph_sha256 else None

    def keep(self, choice: Choice) -> Choice:
        """Keep a choice and return it.

        Raises:
            StorageFull: if there is no room.
        """
        place = self.place(choice.graph)
        written(place, canonical_json(choice.to_json()).encode())
        forget_old(place.parent, "*.json")
        return choice

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Hold off every other process that wants to choose: boards of a kind are to agree."""
        with (kept_in("runtimes") / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
