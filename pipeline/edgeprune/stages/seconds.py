"""How long each stage took, over all processes of a run."""

import time
from contextlib import AbstractContextManager, ExitStack
from functools import partial

from edgeprune.ledger import Ledger


class Seconds:
    """Wall seconds of each stage, summed over the processes of one run."""

    def __init__(self, ledger: Ledger, run: str) -> None:
        self._ledger, self._run = ledger, run
        self._seconds: dict[str, float] = ledger.fact(run, "seconds") or {}

    def of(self, stage: str) -> AbstractContextManager[None]:
        """Return a context whose time counts for a stage, also if it fails."""
        stack = ExitStack()
        stack.callback(partial(self._add, stage, time.monotonic()))
        return stack  # type: ignore[return-value]

    def _add(self, stage: str, started: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.monotonic() - started
        self._ledger.record(self._run, "seconds", self._seconds)

    def total(self) -> dict[str, float]:
        """Return stage → seconds."""
        return dict(self._seconds)
