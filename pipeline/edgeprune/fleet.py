"""Several boards of one kind as one target: each measurement goes to a board that is free, and says which it was.

    profiles ── same but for the address ──▶ Fleet ── lease ──▶ board 1   its own engines, its own history
                                                                board 2
                                                                board 3   set aside: lost, or its sentinel drifted

A ratio is taken against the sentinel on the same board, so boards that differ in silicon and cooling are never mixed.
The board in use is held until its turn is over, then given back, so that other processes get theirs.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from edgeprune.artifact import Artifact
from edgeprune.errors import DeviceBusy, DeviceLost, LabError, ProfileError, Unstable
from edgeprune.lease import POLL_S, Lease
from edgeprune.measurement import Measurement, Sampling
from edgeprune.profile import Profile, at_address
from edgeprune.target import Finding, Packager, Selftest, Target, Tuner, examine_target, open_target

if TYPE_CHECKING:
    from numpy.typing import NDArray

Open = Callable[[Profile], AbstractContextManager[Target]]
Result = TypeVar("Result")

TURN_S = 60.0
"""Seconds after which a board is given back at the end of a measurement, though nobody may be waiting for it."""

WAIT_S = 600.0
"""Longest wait for a free board."""

LOST_S = 300.0
"""Seconds after which a board that was lost is tried again; it may have rebooted."""

HISTORY_NEEDED = 5
"""Times of a sentinel on a board before another can be said to have drifted."""

HISTORY_KEPT = 50

DRIFT_LIMIT = 6.0
"""How many robust standard deviations from its own median a sentinel may be; six never come by chance."""

LEAST_SPREAD = 0.01
"""Standard deviation that is assumed at least: a handful of times that agree by chance bind nobody."""

PER_MAD = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""

UNSTABLE_LIMIT = 3
"""Refusals as unstable in a row after which a board is put in quarantine."""


@dataclass
class Board:
    """What is known of one board.

    Attributes:
        profile: with its address.
        histories: SHA-256 of a sentinel's graph → its latencies on this board, in the metric's unit, oldest first.
        engines: SHA-256 of a graph → its engine, while the board is open.
        lost: why it cannot be had at the moment.
        lost_at: when, on the fleet's clock.
        quarantined: why it is not trusted any more.
        unstable: refusals as unstable in a row.
    """

    profile: Profile
    histories: dict[str, list[float]] = field(default_factory=dict)
    engines: dict[str, Artifact] = field(default_factory=dict)
    lost: str = ""
    lost_at: float = 0.0
    quarantined: str = ""
    unstable: int = 0

    @property
    def name(self) -> str:
        """Return its address."""
        return str(self.profile.address)

    @property
    def trouble(self) -> str:
        """Return why it is set aside, empty if it is not."""
        return self.quarantined or self.lost


def open_boards(profiles: Sequence[Profile]) -> AbstractContextManager[Target]:
    """Return a target as a context manager: its one board, or all its boards as one.

    Raises:
        ProfileError: if the adapter is unknown, or several boards are not of one kind.
        DeviceLost, DeviceBusy: on entering, if the one board cannot be had.
    """
    return open_target(profiles[0]) if len(profiles) == 1 else open_fleet(profiles)


@contextmanager
def open_fleet(
    profiles: Sequence[Profile],
    open_target: Open = open_target,
    *,
    turn_s: float = TURN_S,
    wait_s: float = WAIT_S,
    leases: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> "Iterator[Fleet]":
    """Yield the boards as one target; whichever is held is given back when the context is left.

    Args:
        profiles: of one kind of board, an address each.
        open_target: opens one board.
        turn_s: seconds after which a board is given back at the end of a measurement; 0: after every one.
        wait_s: seconds to wait for a board that others hold.
        leases: folder of the leases, None: this host's.
        clock, sleep: monotonic seconds, and waiting.

    Raises:
        ProfileError: if the profiles are not of one kind, or two have one address.
    """
    fleet = Fleet(profiles, open_target, turn_s=turn_s, wait_s=wait_s, leases=leases, clock=clock, sleep=sleep)
    try:
        yield fleet
    finally:
        fleet.close()


class Fleet:
    """Boards of one kind as one target, for one thread; see `open_fleet`."""

    def __init__(
        self,
        profiles: Sequence[Profile],
        open_target: Open,
        *,
        turn_s: float,
        wait_s: float,
        leases: Path | None,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        _check(profiles)
        self.boards = [Board(profile=each) for each in profiles]
        self._profile = at_address(profiles[0], None)
        self._open_target, self._turn_s, self._wait_s, self._leases = open_target, turn_s, wait_s, leases
        self._clock, self._sleep = clock, sleep
        self._held: tuple[Board, Target, ExitStack, float] | None = None
        self._next = 0

    @property
    def profile(self) -> Profile:
        """Return what the boards have in common."""
        return self._profile

    @property
    def board(self) -> str | None:
        """Return the address of the board that is held, None if there is none."""
        return self._held[0].name if self._held else None

    def close(self) -> None:
        """Give back the board that is held."""
        if self._held is not None:
            board, _, stack, _ = self._held
            self._held = None
            board.engines.clear()
            stack.close()

    def compile(self, graph: Artifact) -> Artifact:
        """Return the graph itself, once a board has compiled it; others compile it when they measure it.

        Raises:
            CompileError: if the board refuses it.
            DeviceLost: if no board is left, naming each and why.
            DeviceBusy: if others held all of them for too long.
        """
        self._on_some_board(lambda board, target: _engine(board, target, graph))
        return graph

    def run(self, engine: Artifact, inputs: "Mapping[str, NDArray[Any]]") -> "Mapping[str, NDArray[Any]]":
        """Return the outputs of one call on some board, by name."""
        return self._on_some_board(lambda board, target: target.run(_engine(board, target, engine), inputs))

    def tune(self, graph: Artifact, progress: Callable[[float, str], None]) -> None:
        """Look for faster kernels of a graph on one of the boards; those of its kind share what was found."""

        def searched(_board: Board, target: Target) -> None:
            if isinstance(target, Tuner):
                target.tune(graph, progress)

        self._on_some_board(searched)

    def package(self, engine: Artifact) -> Mapping[str, Path]:
        """Return what a bundle holds for such a board, from one of them; nothing if they hold nothing."""

        def packaged(board: Board, target: Target) -> Mapping[str, Path]:
            return target.package(_engine(board, target, engine)) if isinstance(target, Packager) else {}

        return self._on_some_board(packaged)

    def selftest(self, bundle: Path, model: Artifact, *, trusted: bool) -> Selftest:
        """Return what the runner of a bundle says on one of the boards."""

        def tested(board: Board, target: Target) -> Selftest:
            if isinstance(target, Packager):
                return target.selftest(bundle, model, trusted=trusted)
            return Selftest(ok=False, detail=f"{board.name} runs no programs of bundles")

        return self._on_some_board(tested)

    def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
        """Return the timing of a graph against the sentinel, both on one board, which `conditions["board"]` names.

        Raises:
            Unstable: if the board ran too unevenly; the next measurement goes to another.
            DeviceLost, DeviceBusy: as `compile`.
        """
        seen = self._on_some_board(lambda board, target: self._measured(board, target, engine, sampling))
        if self._held and self._clock() - self._held[3] >= self._turn_s:
            self.close()
        return seen

    def _measured(self, board: Board, target: Target, engine: Artifact, sampling: Sampling) -> Measurement:
        reference = _engine(board, target, sampling.reference)
        try:
            seen = target.measure(_engine(board, target, engine), replace(sampling, reference=reference))
        except Unstable as error:
            self._unsteady(board, error)
            raise
        board.unstable = 0
        drifted = _drift(board.histories.setdefault(sampling.reference.sha256, []), seen.reference_latency().p50)
        if drifted:
            board.quarantined = f"its sentinel {drifted}"
            self.close()
        return self._signed(seen, board, engine, sampling, bool(drifted))

    def _signed(
        self, seen: Measurement, board: Board, engine: Artifact, sampling: Sampling, drifted: bool
    ) -> Measurement:
        """Return the measurement with the board it was taken on, and those that were set aside."""
        aside = {each.name: each.trouble for each in self.boards if each.trouble}
        notes = [f"board {name} is set aside: {why}" for name, why in aside.items()]
        flags = [f"board {board.name} is put in quarantine: {board.quarantined}"] if drifted else []
        conditions = {
            **seen.conditions,
            "board": board.name,
            "engine_sha256": seen.artifact_sha256,
            "notes": [*seen.notes, *notes],
        }
        return replace(
            seen,
            profile_digest=self._profile.digest,
            artifact_sha256=engine.sha256,
            reference_sha256=sampling.reference.sha256,
            conditions=conditions,
            flags=(*seen.flags, *flags),
        )

    def _unsteady(self, board: Board, error: Unstable) -> None:
        board.unstable += 1
        if board.unstable >= UNSTABLE_LIMIT:
            board.quarantined = f"unstable {board.unstable} times in a row, at last: {error.what}"
        self.close()

    def _on_some_board(self, work: Callable[[Board, Target], Result]) -> Result:
        """Return what `work` gives on the board that is held, else on the next that is free; lost ones are set aside.

        Raises:
            DeviceLost: if none is left.
            DeviceBusy: if others hold all that are left.
        """
        while True:
            board, target, _, _ = self._held or self._take()
            try:
                return work(board, target)
            except DeviceLost as error:
                self._set_aside(board, error)

    def _take(self) -> tuple[Board, Target, ExitStack, float]:
        """Return the next board that is free, opened and held."""
        deadline = self._clock() + self._wait_s
        while True:
            busy: LabError | None = None
            for board in self._candidates():
                try:
                    return self._open(board)
                except DeviceBusy as error:
                    busy = error
                except DeviceLost as error:
                    self._set_aside(board, error)
            if busy is None:
                raise self._none_left()
            left = deadline - self._clock()
            if left <= 0:
                raise busy
            self._sleep(min(POLL_S, left))

    def _candidates(self) -> list[Board]:
        """Return the boards that are not set aside, the one after the last used first."""
        for each in self.boards:
            if each.lost and self._clock() - each.lost_at >= LOST_S:
                each.lost = ""
        return [each for each in self.boards[self._next :] + self.boards[: self._next] if not each.trouble]

    def _open(self, board: Board) -> tuple[Board, Target, ExitStack, float]:
        with ExitStack() as stack:
            stack.enter_context(Lease.take(board.name, folder=self._leases))
            target = stack.enter_context(self._open_target(board.profile))
            self._held = (board, target, stack.pop_all(), self._clock())
        self._next = (self.boards.index(board) + 1) % len(self.boards)
        return self._held

    def _set_aside(self, board: Board, error: DeviceLost) -> None:
        board.lost, board.lost_at = f"{error.what}: {error.why}" if error.why else error.what, self._clock()
        if self._held is not None and self._held[0] is board:
            self.close()

    def _none_left(self) -> DeviceLost:
        """Return why no board is left; those that were lost are tried again by whoever asks again."""
        told = "; ".join(f"{each.name}: {each.trouble}" for each in self.boards)
        for each in self.boards:
            each.lost = ""
        return DeviceLost(
            f"none of {len(self.boards)} boards is left",
            why=told,
            next_step="see that they are on and reachable (edgeprune doctor), then run the command again",
        )


def _check(profiles: Sequence[Profile]) -> None:
    if not profiles:
        raise ProfileError("no board is named", next_step="give at least one address")
    first = profiles[0]
    if any(each.digest != first.digest for each in profiles):
        raise ProfileError(
            f"the boards of {first.name!r} are not of one kind",
            why="their profiles differ in more than the address",
            next_step="give them one profile, or make two targets of them",
        )
    addresses = [each.address for each in profiles]
    if None in addresses or len(set(addresses)) != len(addresses):
        raise ProfileError(
            f"the boards of {first.name!r} are not told apart",
            why=f"their addresses are {', '.join(map(str, addresses))}",
            next_step="give each board an address of its own",
        )


def _engine(board: Board, target: Target, graph: Artifact) -> Artifact:
    """Return the engine of a graph on this board."""
    if graph.sha256 not in board.engines:
        board.engines[graph.sha256] = target.compile(graph)
    return board.engines[graph.sha256]


def _drift(history: list[float], took: float) -> str:
    """Return how far a sentinel is from what it was on this board, empty if it is not; else it joins the history.

    Compared are logarithms, by the median and the median absolute deviation of the history: neither is moved by a few
    odd times.
    """
    logs = [math.log(each) for each in history]
    if len(logs) >= HISTORY_NEEDED:
        centre = median(logs)
        spread = max(LEAST_SPREAD, PER_MAD * median(abs(each - centre) for each in logs))
        if abs(math.log(took) - centre) > DRIFT_LIMIT * spread:
            times = took / math.exp(centre)
            return f"takes {times:.2f} times as long as the median of its last {len(logs)} measurements"
    history.append(took)
    del history[:-HISTORY_KEPT]
    return ""


def examine_fleet(profiles: Sequence[Profile]) -> list[Finding]:
    """Return what is in order and what is missing, board by board, holding none.

    Raises:
        ProfileError: if the profiles are not of one kind, or two have one address.
    """
    _check(profiles)
    return [
        replace(each, subject=f"{profile.address}: {each.subject}")
        for profile in profiles
        for each in examine_target(profile)
    ]
