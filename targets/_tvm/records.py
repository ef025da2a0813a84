"""What searches for faster kernels saw, kept on disk: a file of plain data for each kernel.

    FOLDER/k3f2a….json      {"sha256": of the record's JSON, "record": {"trials": [...], "verdicts": {...}}}
    FOLDER/graph-7b….json   the same without trials: whether a network is faster with all winners among its kernels

A record names choices and never holds code: the schedule of a choice is made anew. A file that is cut off, altered, or
holds what no search could have tried counts as none.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.canonical import digest
from edgeprune.errors import StorageFull

from .cache import write_whole
from .schedule import Choice
from .tiles import Tile


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One schedule that was tried.

    Attributes:
        ratio: its time over ours in the same calls; None: it failed, `failed` says how.
    """

    choice: Choice
    ratio: float | None = None
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a search among the first so many trials ended with.

    Attributes:
        trial: place of the one that is faster than ours; None: none is.
        ratio: p50, low and high of each comparison with ours, by the place of the trial.
    """

    trial: int | None
    ratio: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything that was tried of one kernel on one kind of board, oldest first; verdicts by number of trials.

    Attributes:
        damaged: there was a file that could not be used. That is not written.
    """

    trials: tuple[Trial, ...] = ()
    verdicts: Mapping[int, Verdict] = field(default_factory=dict)
    damaged: bool = False


@dataclass(frozen=True, kw_only=True)
class Records:
    """Records in a folder, one file a kernel.

    Attributes:
        folder: of one kind of board: what is fast on one need not be on another. Made on first use.
    """

    folder: Path

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def read(self, name: str, space: Collection[Choice] = ()) -> Record:
        """Return what is known of a kernel; its name stands for all that its code depends on.

        Args:
            space: what may have been tried of it. Empty: it is a network, whose one trial has all winners.
        """
        try:
            whole = json.loads(self._path(name).read_bytes())
            facts = whole["record"]
            return _record(facts, space) if whole["sha256"] == digest(facts) else Record(damaged=True)
        except FileNotFoundError:
            return Record()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return Record(damaged=True)

    def write(self, name: str, record: Record) -> None:
        """Keep a record in place of the one before.

        Raises:
            StorageFull: if it cannot be written.
        """
        facts = _facts(record)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(name), json.dumps({"sha256": digest(facts), "record": facts}).encode())
        except OSError as error:
            raise StorageFull(
                f"the tuning records {str(self.folder)!r} cannot be written",
                why=str(error),
                next_step="free some space",
            ) from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _facts(record: Record) -> dict[str, Any]:
    verdicts = {
        str(trials): {"trial": each.trial, "ratio": {str(place): list(seen) for place, seen in each.ratio.items()}}
        for trials, each in record.verdicts.items()
    }
    return {"trials": [asdict(each) for each in record.trials], "verdicts": verdicts}


def _record(facts: Mapping[str, Any], space: Collection[Choice]) -> Record:
    """Return a record that a search of this space may have written.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: if it is none.
    """
    known = {each: each for each in space}
    trials = tuple(_trial(each, known) for each in facts["trials"])
    places = range(len(trials) if known else 1)
    return Record(
        trials=trials,
        verdicts={int(amount): _verdict(each, places) for amount, each in facts["verdicts"].items()},
    )


def _trial(facts: Mapping[str, Any], space: Mapping[Choice, Choice]) -> Trial:
    choice, ratio = facts["choice"], facts["ratio"]
    own = space[Choice(tile=Tile(**choice["tile"]), order=choice["order"], unrolled=choice["unrolled"])]
    return Trial(choice=own, ratio=None if ratio is None else _positive(ratio), failed=str(facts["failed"]))


def _verdict(facts: Mapping[str, Any], places: range) -> Verdict:
    ratio = {places.index(int(place)): _interval(*seen) for place, seen in facts["ratio"].items()}
    trial = facts["trial"]
    if trial is not None and (type(trial) is not int or trial not in ratio or ratio[trial][2] >= 1):
        raise ValueError("the winner was not seen to win")
    return Verdict(trial=trial, ratio=ratio)


def _interval(p50: Any, low: Any, high: Any) -> tuple[float, float, float]:
    return _positive(p50), _positive(low), _positive(high)


def _positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no ratio")
    return float(value)
