"""The worker's side of tuning: one task of a search after another, as messages."""

from collections.abc import Mapping
from typing import Any

from edgeprune.canonical import file_sha256

from ._serve import RefusedError  # noqa: TID251 private parts of this adapter
from ._tvm.tuning import Search, Task  # noqa: TID251


class Tuning:
    """A search, and the task of it that is on the board."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._task: Task | None = None

    def next(self, told: Mapping[str, Any] | None) -> dict[str, Any]:
        """Keep what was told of the task before, and return the next: {"engines": []} if there is none.

        Args:
            told: "record", and either "costs" and "wrong", or "ratios"; None: nothing was measured yet.
        """
        if told is not None:
            self._keep(told)
        self._task = task = self._search.next_task()
        if task is None:
            return {"engines": []}
        engines = [{"path": str(each), "sha256": file_sha256(each)} for each in task.engines]
        kind = "whole" if task.whole else "final" if task.finalists else "batch"
        return {"record": task.record, "engines": engines, "kind": kind, "share": task.share, "note": _note(task)}

    def _keep(self, told: Mapping[str, Any]) -> None:
        task = self._task
        if task is None or task.record != told["record"]:
            raise RefusedError("the search does not know what it was told of", "lost")
        if task.finalists:
            self._search.judged(task, [(p50, low, high) for p50, low, high in told["ratios"]])
        else:
            self._search.tried(task, told["costs"], told["wrong"])


def _note(task: Task) -> str:
    what = "all kernels together" if task.whole else f"kernel {task.record[:8]}"
    return f"{what}: its record is damaged, so once more" if task.again else what
