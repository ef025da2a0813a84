"""Progress for people: a bar with time left on a terminal, a line now and then elsewhere; always on standard error."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

QUIET_INTERVAL_S = 30.0
"""Seconds between two lines where there is no terminal to draw a bar on."""


class Stage(Protocol):
    """One step of a run that is under way."""

    def advance(self, steps: float = 1, *, note: str = "") -> None:
        """Move on by so many of the stage's total steps; `note` is the newest thing worth saying."""
        ...


class Progress(Protocol):
    """Where a run says what it is doing."""

    def stage(self, name: str, total: float | None = None) -> AbstractContextManager[Stage]:
        """Return a context in which stage `name` runs; total None: length unknown."""
        ...

    def note(self, text: str) -> None:
        """Say one line."""
        ...


class Silent:
    """Says nothing."""

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:
        """Yield a stage that nobody watches."""
        del name, total
        yield _Unwatched()

    def note(self, text: str) -> None:
        """Say nothing."""


class _Unwatched:
    def advance(self, steps: float = 1, *, note: str = "") -> None:
        del steps, note


class Lines:
    """One line when a stage starts, ends, and every half a minute between, with time left: for logs and pipes."""

    def __init__(
        self, write: Callable[[str], object] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write or (lambda line: sys.stderr.write(line + "\n"))
        self._clock = clock

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:
        """Yield a stage that writes lines."""
        started = self._clock()
        self._write(f"{name} ...")
        yield _LineStage(name, total, self._write, self._clock)
        self._write(f"{name} done in {_duration(self._clock() - started)}")

    def note(self, text: str) -> None:
        """Write one line."""
        self._write(text)


class _LineStage:
    def __init__(
        self, name: str, total: float | None, write: Callable[[str], object], clock: Callable[[], float]
    ) -> None:
        self._name, self._total, self._write, self._clock = name, total, write, clock
        self._done, self._started, self._said = 0.0, clock(), clock()

    def advance(self, steps: float = 1, *, note: str = "") -> None:
        self._done += steps
        now = self._clock()
        if now - self._said < QUIET_INTERVAL_S:
            return
        self._said = now
        left = ""
        if self._total and self._done:
            remaining = (now - self._started) * (self._total - self._done) / self._done
            left = f" {100 * self._done / self._total:.0f} %, {_duration(remaining)} left"
        self._write(f"{self._name}{left}{'  ' + note if note else ''}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


class Bars:
    """Bars with time left, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:
        """Yield a stage drawn as a bar."""
        from rich import progress as bars

        columns = (
            bars.TextColumn("{task.description:<22}"),
            bars.BarColumn(bar_width=30),
            bars.TaskProgressColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[note]}"),
        )
        with bars.Progress(*columns, console=self._console) as drawing:
            task = drawing.add_task(name, total=total, note="")
            yield _BarStage(drawing, task)
            drawing.update(task, total=total or 1, completed=total or 1)

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        self._console.print(text, highlight=False)


class _BarStage:
    def __init__(self, drawing: object, task: object) -> None:
        self._drawing, self._task = drawing, task

    def advance(self, steps: float = 1, *, note: str = "") -> None:
        self._drawing.update(self._task, advance=steps, **({"note": note} if note else {}))  # type: ignore[attr-defined]


def watch(*, quiet: bool) -> Progress:
    """Return progress for where standard error goes: nothing, bars on a terminal, lines elsewhere."""
    if quiet:
        return Silent()
    return Bars() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else Lines()
