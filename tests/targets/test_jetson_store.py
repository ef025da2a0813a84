"""What is noted beside an engine on a board may be anybody's: it is read whole and sane, or not at all."""

import json
from typing import Any

import pytest

from edgeprune.targets._jetson_store import _engine

SHA = "a" * 64
FACTS: dict[str, Any] = {
    "sha256": SHA,
    "graph_sha256": "b" * 64,
    "level": 3,
    "precisions": {"fp16": 12},
    "built_s": 4.5,
    "warnings": ["slow"],
    "command": ["trtexec"],
}


def test_a_note_is_read_back_as_it_was_written() -> None:
    found = _engine("/a/b.engine", SHA, json.dumps(FACTS))
    assert found is not None
    assert {name: found.to_json()[name] for name in FACTS} == FACTS


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({**FACTS, "level": float("inf")}),
        json.dumps({**FACTS, "precisions": {"fp16": float("inf")}}),
        json.dumps({**FACTS, "built_s": float("nan")}),
        json.dumps(FACTS).replace("4.5", "9" * 400),
        json.dumps(FACTS).replace("4.5", "9" * 5000),
        json.dumps({**FACTS, "warnings": 3}),
        json.dumps({**FACTS, "sha256": "c" * 64}),
        json.dumps([FACTS]),
        "[" * 60_000,
        "",
    ],
    ids=range(10),
)
def test_a_note_that_makes_no_sense_is_no_engine(text: str) -> None:
    assert _engine("/a/b.engine", SHA, text) is None


def test_escape_codes_that_json_spells_do_not_reach_a_terminal() -> None:
    found = _engine(
        "/a/b.engine", SHA, json.dumps({**FACTS, "warnings": ["\x1b[31mred\x07"], "command": ["\x1b]0;t\x07x"]})
    )
    assert found is not None
    assert (found.warnings, found.command) == (("red",), ("x",))
