"""How a worker times two engines: warmed up until they settle, then in alternating blocks whose order is drawn.

Nothing here knows a runtime: an engine is a function that runs one inference and waits for it.
"""

import gc
import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._serve import RefusedError  # noqa: TID251 a private part of the adapters

WARM_CALLS, WARM_S, WARM_LIMIT_S = 3, 0.015, 0.1
"""Least calls, least seconds and most seconds of a warm-up; a first call costs up to twice the later ones."""

WARM_WINDOW_S, WARM_AGREE = 0.005, 0.03
"""A warm-up is over when the fastest calls of two successive windows of this length differ by less than this share."""

WARM_WINDOW_CALLS = 8
"""Most calls of such a window."""

FEWEST_ROUNDS = 2
"""Rounds of blocks in a session, whatever its length; with one alone nothing would alternate."""

KEPT_CALLS = (4, 14)
"""Fewest and most calls kept of one block."""

LONG_CALL_S = 0.01
"""Refilling the caches after a switch costs about 0.15 ms: from this length on, one dropped call is enough."""

Row = tuple[int, int, int]
"""Wall ns, CPU ns of the calling thread, involuntary context switches: of one call."""


def warm_up(
    call: Callable[[], None],
    between: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
    *,
    least_s: float = WARM_S,
    limit_s: float = WARM_LIMIT_S,
) -> tuple[float, int, bool]:
    """Call until successive windows agree or the limit is reached; return (seconds of one call, calls, agreed)."""
    start, took = clock(), list[float]()
    while True:
        between()
        before = clock()
        call()
        now = clock()
        took.append(now - before)
        window = max(1, min(WARM_WINDOW_CALLS, round(WARM_WINDOW_S / took[-1])))
        recent, earlier = took[-window:], took[-2 * window : -window]
        agreed = len(took) >= 2 * window and abs(min(recent) / min(earlier) - 1) <= WARM_AGREE
        enough = len(took) >= WARM_CALLS and now - start >= least_s
        if enough and (agreed or now - start >= max(limit_s, 2 * WARM_CALLS * min(took))):
            return min(recent), len(took), agreed


def alternate(
    engines: Sequence[Callable[[], None]],
    blocks: Sequence[tuple[int, int]],
    session_s: float,
    order: random.Random,
    sample: Callable[[Callable[[], None], int], list[Row]],
    *,
    between: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Row], ...]:
    """Return the kept rows of each engine, sampled in blocks whose order is drawn anew in every round.

    Args:
        engines: what to call.
        blocks: calls to drop and to keep of one block of each.
        session_s: seconds after which no further round begins; there are at least two.
        order: draws which engine goes first.
        sample: times that many calls of an engine.
        between: called before every block.
        clock: seconds.
    """
    rows: tuple[list[Row], ...] = tuple([] for _ in engines)
    end, rounds = clock() + session_s, 0
    while rounds < FEWEST_ROUNDS or clock() < end:
        for which in order.sample(range(len(engines)), len(engines)):
            between()
            dropped, kept = blocks[which]
            rows[which].extend(sample(engines[which], dropped + kept)[dropped:])
        rounds += 1
    return rows


def block_of(call_s: float, request: Mapping[str, Any]) -> tuple[int, int]:
    """Return the calls to drop and to keep of one block of an engine that takes `call_s` seconds."""
    fewest, most = KEPT_CALLS
    kept = min(max(round(request["block_ms"] / 1000 / call_s), fewest), most)
    dropped = request["dropped_calls"]
    return (min(dropped, 1) if call_s >= LONG_CALL_S else dropped), kept


def columns(calls: Sequence[Row]) -> dict[str, list[int]]:
    return {name: [row[place] for row in calls] for place, name in enumerate(("elapsed", "on_cpu", "preempted"))}


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def model_bytes(model: Mapping[str, Any]) -> bytes:
    """Return the file of a model {"path", "sha256"}.

    Raises:
        RefusedError: if it is missing or no longer what it was.
    """
    try:
        content = Path(model["path"]).read_bytes()
    except OSError as error:
        raise RefusedError(f"{model['path']}: {error.strerror}", "corrupt") from error
    if hashlib.sha256(content).hexdigest() != model["sha256"]:
        raise RefusedError(f"{model['path']} changed on disk: its SHA-256 is not the recorded one", "corrupt")
    return content


def noise_like(spec: Mapping[str, Any]) -> NDArray[Any]:
    """Return seeded standard-normal input; zeros where the type is not a float, because an index must stay in range."""
    dtype = np.dtype(spec["dtype"])
    if dtype.kind != "f":
        return np.zeros(spec["shape"], dtype)
    noise: NDArray[Any] = np.random.default_rng(0).standard_normal(spec["shape"]).astype(dtype)
    return noise
