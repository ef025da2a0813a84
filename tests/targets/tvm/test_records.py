"""Records of trials: kept whole, and believed only where a search could have written them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'edgeprune[tvm]'")

from edgeprune.canonical import digest
from edgeprune.targets._tvm.records import Record, Records, Trial, Verdict
from edgeprune.targets._tvm.schedule import Choice
from edgeprune.targets._tvm.tiles import Tile

CHOICE = Choice(tile=Tile(blocks=2, pixels=4), order="yox")
TRIAL = Trial(choice=CHOICE, ratio=0.75)
FAST = Verdict(trial=0, ratio={0: (0.8, 0.7, 0.9)})


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = Record(
        trials=(TRIAL, replace(TRIAL, ratio=None, failed="refused")), verdicts={8: Verdict(trial=None), 16: FAST}
    )
    records = Records(folder=tmp_path / "new")
    records.write("k1", record)
    assert records.read("k1", [CHOICE]) == record
    assert records.read("k2", [CHOICE]) == Record()
    assert "k1" in records
    assert "k2" not in records


def test_the_verdict_on_a_network_needs_no_trials(tmp_path: Path) -> None:
    records = Records(folder=tmp_path)
    records.write("graph-1", Record(verdicts={8: FAST}))
    assert records.read("graph-1") == Record(verdicts={8: FAST})


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, None])
def test_a_damaged_record_is_none_and_the_next_one_takes_its_place(tmp_path: Path, damage: bytes | None) -> None:
    records = Records(folder=tmp_path)
    records.write("k1", Record(trials=(TRIAL,)))
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0.75", b"0.25") if damage is None else damage)
    found = records.read("k1", [CHOICE])
    assert found == Record(damaged=True)
    records.write("k1", replace(found, trials=(TRIAL,)))
    assert records.read("k1", [CHOICE]) == Record(trials=(TRIAL,))


def test_a_record_that_was_cut_off_anywhere_is_none(tmp_path: Path) -> None:
    records = Records(folder=tmp_path)
    records.write("k1", Record(trials=(TRIAL,), verdicts={1: FAST}))
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert records.read("k1", [CHOICE]) == Record(damaged=True)


def altered(*path: str | int, value: Any = None) -> Any:
    """Return the facts of a good record, with another value at one place."""
    facts: Any = {
        "trials": [
            {"choice": {"tile": {"blocks": 2, "rows": 1, "pixels": 4}, "order": "yox", "unrolled": False}}
            | {"ratio": 0.75, "failed": ""}
        ],
        "verdicts": {"1": {"trial": 0, "ratio": {"0": [0.8, 0.7, 0.9]}}},
    }
    inner = facts
    for each in path[:-1]:
        inner = inner[each]
    if path:
        inner[path[-1]] = value
    return facts


HOSTILE = {
    "a tile outside the space": altered("trials", 0, "choice", "tile", "blocks", value=3),
    "a tile that is code": altered("trials", 0, "choice", "tile", "blocks", value="__import__('os')"),
    "a tile that is a list": altered("trials", 0, "choice", "tile", "blocks", value=[2]),
    "a tile with another field": altered("trials", 0, "choice", "tile", "trace", value="[]"),
    "an unknown order": altered("trials", 0, "choice", "order", value="xyo"),
    "no choice": altered("trials", 0, "choice", value=None),
    "a negative ratio": altered("trials", 0, "ratio", value=-1.0),
    "an infinite ratio": altered("trials", 0, "ratio", value=1e999),
    "a ratio that is text": altered("trials", 0, "ratio", value="0.5"),
    "trials that are none": altered("trials", value={"0": 1}),
    "a winner that was not tried": altered("verdicts", "1", "trial", value=7),
    "a winner that was not compared": altered("verdicts", "1", "ratio", value={}),
    "a winner that was not faster": altered("verdicts", "1", "ratio", "0", value=[0.8, 0.7, 1.0]),
    "a comparison of nothing": altered("verdicts", "1", "ratio", "5", value=[0.8, 0.7, 0.9]),
    "an interval of two": altered("verdicts", "1", "ratio", "0", value=[0.8, 0.7]),
    "a number of trials in words": altered("verdicts", "many", value={"trial": None, "ratio": {}}),
}


@pytest.mark.parametrize("facts", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_record_that_no_search_could_have_written_is_none(tmp_path: Path, facts: Any) -> None:
    """Though its checksum is right."""
    (tmp_path / "k1.json").write_text(json.dumps({"sha256": checksum(altered()), "record": altered()}))
    assert Records(folder=tmp_path).read("k1", [CHOICE]) == Record(trials=(TRIAL,), verdicts={1: FAST})
    (tmp_path / "k1.json").write_text(json.dumps({"sha256": checksum(facts), "record": facts}))
    assert Records(folder=tmp_path).read("k1", [CHOICE]) == Record(damaged=True)


def checksum(facts: Any) -> str:
    try:
        return digest(facts)
    except ValueError:  # infinity has none
        return ""
