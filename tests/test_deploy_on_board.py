"""A whole deploy to an emulated ARM board: counted, never timed; packaged for it; and none the worse for its deaths."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import board_programs
import numpy as np
import pytest
import tiny_project

from edgeprune.bundle import open_bundle
from edgeprune.deploy import deploy
from edgeprune.errors import BudgetError
from edgeprune.intake.config import load_config
from edgeprune.metric import EMULATED_INSTRUCTIONS
from edgeprune.outcome import Outcome
from edgeprune.stages.prepare import Request
from edgeprune.target import open_target
from edgeprune.verify import verify

BOARD = '[targets.board]\nprofile = "arm-emulated"\n[targets.toy]'


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    board_programs.programs("aarch64")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = (("[targets.toy]", BOARD), ("channel_multiple = 8\n", ""))
    return tiny_project.write_project(tmp_path_factory.mktemp("project"), *changes)


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return deploy(Request(config=load_config(config), target="board", out=tmp_path_factory.mktemp("undisturbed")))


def plan_of(outcome: Outcome) -> str:
    with open_bundle(Path(outcome.bundle)) as bundle:
        return bundle.manifest.plan_digest


def test_instructions_are_counted_and_never_called_a_time(undisturbed: Outcome) -> None:
    assert undisturbed.budget.met
    assert (undisturbed.metric, undisturbed.emulated) == (EMULATED_INSTRUCTIONS, True)
    assert undisturbed.to_json()["unit"] == "M emulated instr."
    report = Path(undisturbed.report).read_text()
    assert "M emulated instr." in report
    assert " ms<" not in report


def test_the_bundle_is_verified_on_the_board_by_a_runner_that_needs_no_python(undisturbed: Outcome) -> None:
    bundle = Path(undisturbed.bundle)
    assert {each.name for each in (bundle / "device" / "bin").iterdir()}
    profile = load_config(None, {"model.factory": "a:b", "data.factory": "a:b"}).profile("arm-emulated")
    with open_bundle(bundle) as whole:
        profile = type(profile).from_json(whole.manifest.profile)
    with open_target(profile) as target:
        report = verify(bundle, profile=profile, target=target)
    assert report.ok, report.checks
    assert {"device", "parity", "selftest", "latency"} <= {each.name for each in report.checks}


def test_milliseconds_are_refused_before_the_search(config: Path, tmp_path: Path) -> None:
    loaded = load_config(config, {"budget.latency": "8ms"})
    with pytest.raises(BudgetError, match="counts no time"):
        deploy(Request(config=loaded, target="board", out=tmp_path))


# -- killed ----------------------------------------------------------------------------------------------------------


def rows(out: Path, query: str) -> int:
    """Return how many rows the ledger of the run in `out` has for a query, 0 while there is none."""
    run = next(iter(out.glob("*.run")), out / "none.run")
    try:
        with closing(sqlite3.connect(f"file:{run}/ledger.sqlite?mode=ro", uri=True)) as connection:
            return len(connection.execute(query).fetchall())
    except sqlite3.OperationalError:
        return 0


KILLED_WHEN = {
    "the unpruned model is being counted": ("SELECT 1 FROM facts WHERE name = 'baseline.onnx'", 1),
    "candidates are being counted": ("SELECT 1 FROM trials WHERE phase = 'search'", 2),
    "the result is being proven": ("SELECT 1 FROM trials WHERE phase = 'search'", 6),
}
"""What is going on → the rows that show it in the ledger."""


def boards(pid: int) -> Iterator[int]:
    """Yield the emulated boards below a process."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            if b"edgeprune-board" in Path(f"/proc/{child}/cmdline").read_bytes():
                yield int(child)
            yield from boards(int(child))


def struck(process: "subprocess.Popen[bytes]", out: Path, query: str, count: int, by: int = signal.SIGKILL) -> bool:
    """Signal every emulated board below a process once a query finds so many rows; return whether there was one."""
    while process.poll() is None:
        if rows(out, query) >= count and (found := list(boards(process.pid))):
            for each in found:
                os.kill(each, by)
            return True
        time.sleep(0.01)
    return False


def started(config: Path, out: Path) -> "subprocess.Popen[bytes]":
    """Return a deploy to the board that is going on."""
    command = [sys.executable, "-m", "edgeprune", "deploy", "--target", "board", "--json", "--quiet", "--out", str(out)]
    return subprocess.Popen(command, cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_frozen_board_is_given_up_and_replaced(undisturbed: Outcome, tmp_path: Path) -> None:
    """It does not answer within its time: lost, started again, and the plan is that of the undisturbed run."""
    limited = BOARD.replace('arm-emulated"', 'arm-emulated"\noptions = {time_limit_s = 20}')
    changes = (("[targets.toy]", limited), ("channel_multiple = 8\n", ""))
    config = tiny_project.write_project(tmp_path / "project", *changes)
    with started(config, tmp_path) as process:
        assert struck(process, tmp_path, *KILLED_WHEN["candidates are being counted"], by=signal.SIGSTOP)
        said, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    outcome = Outcome.from_json(json.loads(said)["data"])
    assert plan_of(outcome) == plan_of(undisturbed)
    assert not list(boards(process.pid) if Path(f"/proc/{process.pid}").exists() else [])


def test_a_board_killed_at_three_points_changes_nothing_about_the_result(
    config: Path, undisturbed: Outcome, tmp_path: Path
) -> None:
    """The deploy starts the board again each time, and ends in the plan and the counts of the undisturbed run."""
    with started(config, tmp_path) as process:
        deaths = [struck(process, tmp_path, *reached) for reached in KILLED_WHEN.values()]
        said, errors = process.communicate()
    assert deaths == [True] * 3, errors.decode()
    assert process.returncode == 0, errors.decode()
    outcome = Outcome.from_json(json.loads(said)["data"])
    assert plan_of(outcome) == plan_of(undisturbed)
    assert outcome.result.latency == undisturbed.result.latency


def test_the_runner_prints_what_pytorch_answers(undisturbed: Outcome) -> None:
    """Under the emulator, without TVM and without Python: --input on the recorded inputs."""
    bundle = Path(undisturbed.bundle)
    (runner,) = (bundle / "device" / "bin").iterdir()
    answers = bundle.parent / "answers.npy"
    done = subprocess.run(
        [
            *board_programs.qemu("aarch64", count=False),
            runner,
            "--input",
            bundle / "parity/input_0.npy",
            "--output",
            answers,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wanted = np.load(bundle / "parity/output_0.npy")
    np.testing.assert_allclose(np.load(answers), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
