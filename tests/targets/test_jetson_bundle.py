"""What a bundle's runner reports from a board: believed in one form only, shown as plain text."""

import json
from typing import Any

import pytest

from edgeprune.errors import DeviceLost
from edgeprune.targets._jetson_bundle import _said
from edgeprune.targets._ssh import Done

DATA: dict[str, Any] = {"files": 13, "samples": 4, "worst_of_tolerance": 0.5, "made": "built now", "key": "trt10"}


def reported(value: object, rc: int = 0) -> Done:
    return Done(rc=rc, stdout=json.dumps(value), stderr="")


def test_a_good_report_passes() -> None:
    said = _said(reported({"status": "ok", "data": DATA}), "b")
    assert said.ok
    assert "13 files, 4 samples" in said.detail


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), 1.01])
def test_answers_that_are_off_do_not_pass_whatever_the_exit_status(worst: float) -> None:
    assert not _said(reported({"status": "ok", "data": {**DATA, "worst_of_tolerance": worst}}), "b").ok


@pytest.mark.parametrize(
    "value",
    [
        {"status": "ok", "data": {**DATA, "files": float("inf")}},
        {"status": "ok", "data": {**DATA, "worst_of_tolerance": 10**400}},
        {"status": "ok", "data": []},
        {"status": "no", "diagnostics": ["x"]},
        {"status": "no", "diagnostics": []},
        [],
    ],
    ids=range(6),
)
def test_a_report_in_another_form_is_none(value: object) -> None:
    with pytest.raises(DeviceLost, match="gave no report"):
        _said(reported(value), "b")


def test_escape_codes_that_json_spells_do_not_reach_a_terminal() -> None:
    assert "\x1b" not in _said(reported({"status": "ok", "data": {**DATA, "made": "\x1b[31mred"}}), "b").detail
    first = {"what": "\x1b[31mred", "why": "\x9b2J", "next": "\x1b]0;title\x07 run it"}
    with pytest.raises(DeviceLost) as caught:
        _said(reported({"status": "no", "diagnostics": [first]}, rc=3), "b")
    assert str(caught.value).isprintable() or set(filter(lambda each: not each.isprintable(), str(caught.value))) <= {
        "\n"
    }
