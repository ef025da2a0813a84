"""From a model to a verified bundle on a Jetson that is a replay; a cable pulled on the way changes nothing."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_project
from loopback_sshd import INSTALL, sshd_path
from replay_board import ReplayBoard

from edgeprune.bundle import open_bundle
from edgeprune.deploy import deploy
from edgeprune.intake.config import load_config
from edgeprune.ledger import Ledger
from edgeprune.outcome import Outcome
from edgeprune.stages.prepare import Request

pytestmark = pytest.mark.skipif(sshd_path() is None, reason=f"no OpenSSH server here; {INSTALL}")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplayBoard]:
    with ReplayBoard(tmp_path_factory.mktemp("board")) as running:
        yield running


@pytest.fixture(scope="module")
def config(board: ReplayBoard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    profile = board.profile()
    options = "".join(f"{name} = {json.dumps(value)}\n" for name, value in profile.options.items())
    table = f'[targets.jetson]\nprofile = "jetson-orin-nano"\naddress = "{profile.address}"\n[targets.jetson.options]\n'
    toy = tiny_project.CONFIG.partition("[targets.toy]")[2]
    return tiny_project.write_project(
        tmp_path_factory.mktemp("project"),
        (f"[targets.toy]{toy}", table + options),
        ('latency = "0.5x"', 'latency = "0.8x"'),
        ("trials = 6", "trials = 3"),
        ("steps = 12", "steps = 4"),
        ("final_sessions = 4", "final_sessions = 2"),
    )


def run(config: Path, out: Path) -> Outcome:
    return deploy(Request(config=load_config(config), target="jetson", out=out, sleep=lambda _: None))


def command(*words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "edgeprune", *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(config, tmp_path_factory.mktemp("dist"))


def test_a_deploy_ends_with_a_bundle_in_the_precision_of_the_board(finished: Outcome) -> None:
    assert finished.budget.met
    assert finished.metric == "latency_ns"
    with open_bundle(Path(finished.bundle)) as bundle:
        names = {each.path for each in bundle.manifest.files if each.path.startswith("device/")}
        facts = json.loads((bundle.path / "device/engine.json").read_text())
    assert {"device/edge_run.py", "device/model.engine", "device/model.typed.onnx", "device/README.txt"} <= names
    assert (facts["precision"], facts["tensorrt"]) == ("fp16", "10.3.0")
    assert facts["precisions"]["fp16"] > 0


def test_the_bundle_is_verified_on_the_board(finished: Outcome, config: Path) -> None:
    words = ["--target", "jetson", "--config", config, "--baseline", f"{finished.run_dir}/baseline.onnx", "--json"]
    done = command("verify", finished.bundle, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {each["name"]: each for each in json.loads(done.stdout)["data"]["checks"]}
    assert checks["device"]["ok"]
    assert "engine built now" in checks["device"]["detail"]
    assert all(each["ok"] for each in checks.values())


def test_the_doctor_and_a_measurement_speak_of_the_board(finished: Outcome, config: Path) -> None:
    doctor = json.loads(command("doctor", "--target", "jetson", "--config", config, "--json").stdout)
    assert "TensorRT 10.3.0" in json.dumps(doctor)
    words = ["--target", "jetson", "--config", config, "--seconds", "0.2", "--json"]
    done = command("measure", f"{finished.run_dir}/baseline.onnx", f"{finished.bundle}/model.onnx", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NVIDIA Jetson Orin Nano" in done.stdout


def test_an_undisturbed_deploy_leaves_no_job_on_the_board(board: ReplayBoard, finished: Outcome) -> None:
    assert list((board.cache / "jobs").iterdir()) == []


def test_a_link_that_is_cut_on_the_way_never_becomes_a_reward(
    board: ReplayBoard, config: Path, finished: Outcome, tmp_path: Path
) -> None:
    """Cut again and again while it works; every loss is an incident, none a failed trial."""
    stop = threading.Event()

    def cut_often() -> None:
        for wait_s in (2.0, 3.0, 4.0):
            if stop.wait(wait_s):
                return
            board.sshd.cut()

    cutter = threading.Thread(target=cut_often)
    cutter.start()
    try:
        outcome = run(config, tmp_path / "dist")
    finally:
        stop.set()
        cutter.join()
    with Ledger.open(Path(outcome.run_dir) / "ledger.sqlite", read_only=True) as ledger:
        name = ledger.runs()[-1]
        incidents, trials = ledger.incidents(name), ledger.trials(name)
    assert incidents
    assert {each.kind for each in incidents} == {"DeviceLost"}
    assert all(each.failure is None for each in trials)
    assert outcome.budget.met


def test_no_process_is_left_on_the_board(board: ReplayBoard, finished: Outcome) -> None:
    """A job whose link was cut may leave its folder, which a later lease sweeps away, but never a process."""
    end = time.monotonic() + 30
    while board.processes() and time.monotonic() < end:
        time.sleep(0.1)
    assert board.processes() == []
