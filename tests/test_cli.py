"""The command line: exit codes, one JSON object on standard output, and what, why and next for every refusal."""

import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_bundle
import tiny_project
import torch
from safetensors.torch import load_file, save_file

from edgeprune import __version__, cli
from edgeprune.canonical import file_sha256
from edgeprune.cli import main
from edgeprune.profile import load_profile
from edgeprune.run_lock import RunLock

QUICK = (("steps = 12", "steps = 0"), ("trials = 6", "trials = 2"))
"""For deploys whose end does not matter."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def envelope(self) -> dict[str, Any]:
        """Return the one JSON object on standard output; anything else there is an error."""
        value = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert value.keys() >= {"version", "command", "status", "data", "diagnostics"}
        assert value["version"] == __version__
        return value

    def refusal(self, kind: str, code: int) -> dict[str, str]:
        """Return the diagnostic of a command that was refused, checked for form: what, why or next, blame, code."""
        assert self.code == code, self.err
        envelope = self.envelope
        assert (envelope["status"], envelope["data"]) == ("error", None)
        (diagnostic,) = envelope["diagnostics"]
        assert diagnostic["kind"] == kind
        assert diagnostic["what"]
        assert diagnostic["what"] in self.err
        assert diagnostic["why"] or diagnostic["next"]
        assert "Traceback" not in self.err
        return diagnostic


Command = Callable[..., Said]


@pytest.fixture
def edgeprune(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Return a way to call the command in this process, in a folder."""

    def call(folder: Path, *arguments: str | Path) -> Said:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["edgeprune", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        sys.stdout.flush()
        out, err = capfd.readouterr()
        return Said(code=left.value.code or 0, out=out, err=err)

    return call


def deploy(edgeprune: Command, folder: Path, *more: str | Path) -> Said:
    return edgeprune(folder, "deploy", "--target", "toy", "--json", "--quiet", *more)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project whose deploy ended, in a process of its own: ``dist`` holds run, bundle and archive."""
    folder = tmp_path_factory.mktemp("shipped")
    tiny_project.write_project(folder, *QUICK)
    subprocess.run(command(), cwd=folder, check=True, capture_output=True)
    return folder


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "edgeprune", "deploy", "--target", "toy", "--json", "--quiet", *more]


@pytest.fixture
def project(shipped: Path, tmp_path: Path) -> Path:
    """Return a copy of that project to do harm to."""
    return Path(shutil.copytree(shipped, tmp_path / "project"))


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def run_of(project: Path) -> Path:
    return only(project, "dist/*.run")


def bundle_of(project: Path) -> Path:
    return run_of(project).with_suffix("")


def tree(folder: Path) -> dict[str, str]:
    """Return path → SHA-256 of every file of a folder, or of one file."""
    files = [folder] if folder.is_file() else sorted(each for each in folder.rglob("*") if each.is_file())
    return {str(each.relative_to(folder)): file_sha256(each) for each in files}


# -- what succeeds ---------------------------------------------------------------------------------------------------


def test_several_targets_end_in_one_table_and_one_bundle_each(edgeprune: Command, tmp_path: Path) -> None:
    config = tiny_project.write_project(tmp_path, *QUICK)
    config.write_text(config.read_text() + '[targets.coarse]\nprofile = "formula"\noptions = {block = 16}\n')
    said = edgeprune(tmp_path, "deploy", "-t", "toy", "-t", "coarse", "--json", "--quiet")
    results = json.loads(said.out)["data"]["results"]
    assert said.code == 0
    assert [each["target"] for each in results] == ["toy", "coarse"]
    assert all(Path(tmp_path / each["outcome"]["bundle"]).is_dir() for each in results)
    text = edgeprune(tmp_path, "deploy", "-t", "toy", "-t", "coarse", "--quiet").out
    assert re.search(r"toy .*→.* formula units .* 0\.5x met", text)
    assert text.count("bundle: ") == 2


def test_deploy_prints_one_json_object_with_every_promised_number(edgeprune: Command, project: Path) -> None:
    """At the top and under data, as scripts that read either expect."""
    said = deploy(edgeprune, project)
    envelope = said.envelope
    assert (said.code, envelope["status"], envelope["command"]) == (0, "ok", "deploy")
    for value in (envelope, envelope["data"]):
        assert value["baseline"]["latency"].keys() == {"p50", "low", "high"}
        assert value["result"]["ratio"]["high"] <= 0.5
        assert value["budget"]["met"] is True
        assert value["measurements"] > 0
        assert (project / value["bundle"]).is_dir()
        assert (project / value["report"]).is_file()


def test_deploy_for_people_ends_with_a_table_and_a_verdict(edgeprune: Command, project: Path) -> None:
    """Numbers that no clock gave are called that."""
    said = edgeprune(project, "deploy", "--target", "toy")
    assert said.code == 0
    assert "NOT MEASURED" in said.out
    for word in ("accuracy, % of ", "budget 0.5x: met", "bundle: dist/", "report: dist/", "measurements used: "):
        assert word in said.out
    assert said.out.rstrip().endswith("PASSED")
    assert "load data and model done" in said.err


def test_a_host_without_decay_is_exit_code_2(edgeprune: Command, project: Path) -> None:
    """It would pick nothing."""
    said = deploy(edgeprune, project, "--host", "gates")
    assert "add --finetune decay" in said.refusal("ConfigError", 2)["next"]


def test_a_missed_budget_is_exit_code_1_with_everything_written(edgeprune: Command, tmp_path: Path) -> None:
    """It ran; a gate failed: here a size that no plan reaches, which only the finished file shows."""
    tiny_project.write_project(tmp_path, *QUICK, ('latency = "0.5x"', 'latency = "0.5x"\nsize_mib = 0.001'))
    said = deploy(edgeprune, tmp_path)
    assert (said.code, said.envelope["status"]) == (1, "failed")
    assert said.envelope["budget"]["missed"][0].startswith("size")
    assert (tmp_path / said.envelope["bundle"]).is_dir()


def test_a_users_module_may_print_what_it_likes(edgeprune: Command, tmp_path: Path) -> None:
    """Through Python or past it: it lands on standard error, the envelope stays alone."""
    tiny_project.write_project(tmp_path)
    with (tmp_path / "net.py").open("a") as module:
        module.write('\nimport os\nprint("hello from print")\nos.write(1, b"hello from below\\n")\n')
    said = edgeprune(tmp_path, "space", "--target", "toy", "--json", "--quiet")
    assert said.code == 0
    assert said.envelope["data"]["groups"]
    assert "hello from print" in said.err
    assert "hello from below" in said.err


def test_measure_gives_the_ratio_and_the_fields_of_a_comparison(edgeprune: Command, project: Path) -> None:
    """The pruned model against the unpruned one: what the deploy said, within its interval."""
    models = (run_of(project) / "baseline.onnx", bundle_of(project) / "model.onnx")
    said = edgeprune(project, "measure", *models, "--config", "edgeprune.toml", "--target", "toy", "--json", "--quiet")
    (row,) = said.envelope["data"]["models"]
    promised = json.loads((bundle_of(project) / "manifest.json").read_text())["measurement"]["ratio"]
    assert said.code == 0
    assert row["ratio"]["low"] <= promised["p50"] <= row["ratio"]["high"]
    assert (row["reference"], row["model"]) == (str(models[0]), str(models[1]))
    assert row.keys() >= {"latency", "reference_latency", "distinguishable", "sessions", "flags", "notes", "conditions"}
    assert row["emulated"] is True
    text = edgeprune(project, "measure", *models, "-c", "edgeprune.toml", "--target", "toy", "--quiet").out
    assert "NOT MEASURED" in text
    assert f"{row['ratio']['p50']:.4f}" in text


@pytest.mark.parametrize("arguments", [["targets"], ["doctor", "--target", "formula"], ["space", "--target", "toy"]])
def test_every_other_command_has_an_envelope_and_a_text(
    edgeprune: Command, project: Path, arguments: list[str]
) -> None:
    """The same facts for scripts and for people."""
    said = edgeprune(project, *arguments, "--json")
    assert (said.code, said.envelope["status"], said.envelope["command"]) == (0, "ok", arguments[0])
    text = edgeprune(project, *arguments)
    assert text.code == 0
    assert text.out.strip()
    assert not text.out.startswith("{")


def test_a_name_in_brackets_stands_in_a_table_as_it_is(edgeprune: Command, tmp_path: Path) -> None:
    """Names and what boards say are text: no markup that is carried out, swallowed or refused."""
    said = "[red]hot[/red] :warning: [/]"
    (tmp_path / "edgeprune.toml").write_text(f'[targets.odd]\nprofile = "formula"\ndescription = "{said}"\n')
    listed = edgeprune(tmp_path, "targets")
    assert listed.code == 0, listed.err
    assert said in listed.out


def test_report_writes_the_page_of_a_run_again(edgeprune: Command, project: Path) -> None:
    """From the ledger alone; both spellings name the same file."""
    page = run_of(project) / "report.html"
    page.unlink()
    said = edgeprune(project, "report", run_of(project), "--json")
    assert Path(said.envelope["data"]["report"]) == page
    assert page.is_file()


def test_the_version_is_said(edgeprune: Command, tmp_path: Path) -> None:
    """Nothing else, for scripts."""
    said = edgeprune(tmp_path, "--version")
    assert (said.code, said.out) == (0, f"{__version__}\n")


# -- requests that are wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["deploy", "--nope"],
        ["deploy", "--trials", "many"],
        ["nope"],
        ["verify"],
        ["measure", "--seconds", "0", "a.onnx"],
        ["measure", "--tune", "-1", "a.onnx"],
        ["deploy", "--tune", "some"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(edgeprune: Command, tmp_path: Path, arguments: list[str]) -> None:
    """With and without an envelope; the words are the same."""
    said = edgeprune(tmp_path, *arguments, "--json")
    diagnostic = said.refusal("ConfigError", 2)
    assert "--help" in diagnostic["next"]
    plain = edgeprune(tmp_path, *arguments)
    assert (plain.code, plain.out) == (2, "")
    who = "edgeprune" if arguments[0] == "nope" else f"edgeprune {arguments[0]}"
    assert plain.err == f"{who}: {diagnostic['what']}\n  next: {diagnostic['next']}\n"


@pytest.mark.parametrize(
    ("arguments", "kind", "word"),
    [
        (["deploy", "--set", "search.trials"], "ConfigError", "has no value"),
        (["deploy", "--set", "search.trails=3"], "ConfigError", "search.trials"),
        (["deploy", "--set", "search.trials=abc"], "ConfigError", "search.trials is 'abc'"),
        (["deploy", "--set", "search.strategy=bogus"], "ConfigError", "given as a flag"),
        (["deploy", "--set", "serach.trials=5"], "ConfigError", "given as a flag"),
        (["deploy", "--set", "search.seed=xyz"], "ConfigError", "search.seed"),
        (["deploy", "--set", "budget.latency=rubbish"], "ConfigError", "budget.latency"),
        (["deploy", "--set", "model.input_shape=[1, 2]"], "ConfigError", "[1, 3, 224, 224]"),
        (["deploy", "--budget", "fast"], "ConfigError", "0.5x"),
        (["deploy", "--budget", "1.5x"], "ConfigError", "below 1"),
        (["deploy", "--strategy", "guess"], "ConfigError", "ddpg"),
        (["deploy", "--finetune", "slowly"], "ConfigError", "decay"),
        (["deploy", "--finetune", "decay", "--host", "nobody"], "ConfigError", "half-space"),
        (["deploy", "--target", "jetson9"], "ProfileError", "formula, host"),
        (["measure", "a.onnx", "--target", "jetson9"], "ProfileError", "formula, host"),
        (["measure", "a.onnx"], "ModelError", "a.onnx"),
        (["verify", "nowhere"], "ConfigError", "nowhere"),
        (["report", "nowhere"], "ConfigError", "nowhere"),
        (["deploy", "--config", "nowhere.toml"], "ConfigError", "nowhere.toml"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_exit_code_2(
    edgeprune: Command, tmp_path: Path, arguments: list[str], kind: str, word: str
) -> None:
    """Said at once, before data, model or device are touched; nothing is left behind."""
    tiny_project.write_project(tmp_path)
    before = tree(tmp_path)
    diagnostic = edgeprune(tmp_path, *arguments, "--json").refusal(kind, 2)
    assert word in " ".join(diagnostic.values())
    assert tree(tmp_path) == before


def no_weights(folder: Path) -> None:
    (folder / "net.safetensors").unlink()


def wrong_shapes(folder: Path) -> None:
    changed(folder, '[model]\nfactory = "net:net"', '[model]\nfactory = "net:net"\nkwargs = {classes = 7}')


def nan_weights(folder: Path) -> None:
    state = load_file(folder / "net.safetensors")
    state["block1.conv1.weight"][3, 2, 1, 0] = torch.nan
    save_file(state, folder / "net.safetensors")


def raising_factory(folder: Path) -> None:
    changed(folder, "net:net", "net:broken")


def missing_factory(folder: Path) -> None:
    changed(folder, "net:net", "net:nett")


def labels_out_of_range(folder: Path) -> None:
    arrays = tiny_project.images()
    np.savez(folder / "images.npz", **{**arrays, "train_labels": np.where(arrays["train_labels"] == 3, 9, 1)})


def nan_images(folder: Path) -> None:
    arrays = tiny_project.images()
    train = arrays["train_images"].copy()
    train[5, 0, 2, 2] = np.nan
    np.savez(folder / "images.npz", **{**arrays, "train_images": train})


def no_data(folder: Path) -> None:
    (folder / "images.npz").unlink()


def changed(folder: Path, old: str, new: str) -> None:
    path = folder / "edgeprune.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("harm", "kind", "words"),
    [
        (no_weights, "ModelError", ["net.safetensors", "missing"]),
        (wrong_shapes, "ModelError", ["head.weight is 4x64, wanted 7x64"]),
        (nan_weights, "ModelError", ["NaN", "block1.conv1.weight"]),
        (raising_factory, "ModelError", ["net:broken", "RuntimeError", "the checkpoint server is down"]),
        (missing_factory, "ModelError", ["'nett'", "net"]),
        (labels_out_of_range, "DataError", ["label 9", "4 classes"]),
        (nan_images, "DataError", ["NaN", "image 5"]),
        (no_data, "DataError", ["images.npz", "missing"]),
    ],
)
def test_a_model_or_data_that_cannot_be_used_is_exit_code_2(
    edgeprune: Command, project: Path, harm: Callable[[Path], None], kind: str, words: list[str]
) -> None:
    """What is wrong is named, and the results of the last deploy stay as they are."""
    harm(project)
    before = tree(project / "dist")
    diagnostic = deploy(edgeprune, project).refusal(kind, 2)
    text = " ".join(diagnostic.values())
    assert not [word for word in words if word not in text], text
    assert diagnostic["next"]
    assert tree(project / "dist") == before


# -- results, devices, artifacts -------------------------------------------------------------------------------------


def test_a_budget_nothing_meets_is_exit_code_1(edgeprune: Command, project: Path) -> None:
    """With the nearest that can be had, what would make it fit, and the other results whole."""
    bundle = bundle_of(project)
    before = tree(bundle)
    diagnostic = deploy(edgeprune, project, "--budget", "0.01x").refusal("NothingFits", 1)
    assert "the narrowest plan takes 0.0" in diagnostic["what"]
    assert "ask for at least 0.0" in diagnostic["next"]
    assert tree(bundle) == before


def test_a_device_that_cannot_be_had_is_exit_code_3(edgeprune: Command, project: Path) -> None:
    """Lost, or in somebody else's hands."""
    changed(project, "block = 8", "block = 8\nlose_at = [0]")
    model = bundle_of(project) / "model.onnx"
    lost = edgeprune(project, "measure", model, "-c", "edgeprune.toml", "--target", "toy", "--json", "--quiet")
    assert lost.refusal("DeviceLost", 3)["blame"] == "lab"
    changed(project, "block = 8\nlose_at = [0]", "block = 8")
    lock = RunLock.take(run_of(project) / "ledger.sqlite.lock")
    try:
        assert deploy(edgeprune, project).refusal("DeviceBusy", 3)["next"]
    finally:
        lock.release()


def problems(said: Said) -> list[dict[str, str]]:
    assert said.envelope["status"] == "failed"
    return [each for each in said.envelope["data"]["findings"] if each["severity"] == "problem"]


def test_the_doctor_leaves_with_3_if_the_device_is_missing(edgeprune: Command, project: Path) -> None:
    """And names the mend."""
    table = '[targets.away]\nprofile = "raspberry-pi-5"\naddress = "tcp://127.0.0.1:1"\n'
    (project / "edgeprune.toml").write_text((project / "edgeprune.toml").read_text() + table)
    said = edgeprune(project, "doctor", "-c", "edgeprune.toml", "--target", "away", "--json")
    assert said.code == 3
    assert [(each["blame"], bool(each["mend"])) for each in problems(said)] == [("lab", True)]


WRONG_TARGETS = {
    "rover": ('profile = "jetson-orin-nano"', "below [targets.rover]: address = "),
    "arm": ('profile = "raspberry-pi-5"', "below [targets.arm]: address = "),
    "fast": ('profile = "jetson-orin-nano"\naddress = "ssh://me@orin.local"\noptions = {speed = 9}', "'speed'"),
    "quick": ('profile = "raspberry-pi-5"\naddress = "ssh://me@pi.local"\noptions = {speed = 9}', "'speed'"),
    "odd": ('profile = "host"\noptions = {speed = 9}', "'speed'"),
    "small": ('profile = "formula"\noptions = {block = -8}', "block"),
}
"""Target → what its table says, and what a refusal of it names."""


@pytest.mark.parametrize("target", WRONG_TARGETS)
def test_a_target_that_is_described_wrongly_is_exit_code_2_whoever_finds_it(
    edgeprune: Command, project: Path, target: str
) -> None:
    """Alone, among several, and by the doctor."""
    table, named = WRONG_TARGETS[target]
    path = project / "edgeprune.toml"
    path.write_text(f"{path.read_text()}\n[targets.{target}]\n{table}\n")
    for more in ([], ["--target", "toy"])[0 if target in ("rover", "small") else 1 :]:
        words = ["deploy", "-c", "edgeprune.toml", "--target", target, *more, "--out", "dist-wrong"]
        refused = edgeprune(project, *words, "--json", "--quiet").refusal("ProfileError", 2)
        assert named in " ".join(refused.values())
    said = edgeprune(project, "doctor", "-c", "edgeprune.toml", "--target", target, "--json")
    assert said.code == 2
    assert [each["blame"] for each in problems(said)] == ["user"]
    assert named in json.dumps(problems(said))


@pytest.mark.parametrize("name", ["jetson-orin-nano", "raspberry-pi-5"])
def test_a_board_without_an_address_is_told_where_to_put_one(edgeprune: Command, tmp_path: Path, name: str) -> None:
    (problem,) = problems(edgeprune(tmp_path, "doctor", "--target", name, "--json"))
    assert problem["found"].startswith(f"target '{name}' has no address")
    assert problem["mend"].startswith(f'put into edgeprune.toml, below [targets.{name}]: address = "ssh://me@')


def test_a_target_that_nobody_described_is_told_how_to_describe_one(edgeprune: Command, tmp_path: Path) -> None:
    refused = edgeprune(tmp_path, "doctor", "--target", "rover", "--json").refusal("ProfileError", 2)
    assert "jetson-orin-nano" in refused["why"]
    assert 'or describe it in edgeprune.toml, below [targets.rover]: profile = "ONE OF THEM"' in refused["next"]


def scribbled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000
    path.write_bytes(content)


def test_a_corrupt_ledger_is_exit_code_4_and_is_not_touched(edgeprune: Command, project: Path) -> None:
    """Neither is the bundle it once made; what to do is said."""
    ledger = run_of(project) / "ledger.sqlite"
    scribbled(ledger)
    before = (file_sha256(ledger), tree(bundle_of(project)))
    for arguments in (("deploy", "--target", "toy", "--quiet"), ("report", run_of(project))):
        diagnostic = edgeprune(project, *arguments, "--json").refusal("LedgerError", 4)
        assert diagnostic["next"]
    assert (file_sha256(ledger), tree(bundle_of(project))) == before


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_truncated_onnx_is_exit_code_4(edgeprune: Command, project: Path, size: int) -> None:
    """On the formula and on this machine alike, as the reference and as the other."""
    whole, short = run_of(project) / "baseline.onnx", project / "short.onnx"
    short.write_bytes((bundle_of(project) / "model.onnx").read_bytes()[:size])
    for models in ((whole, short), (short, whole)):
        said = edgeprune(project, "measure", *models, "--target", "formula", "--json", "--quiet")
        assert "short.onnx" in said.refusal("CorruptArtifact", 4)["what"]


# -- verify ----------------------------------------------------------------------------------------------------------


def verified(edgeprune: Command, project: Path, place: Path, *more: str, target: str = "toy") -> Said:
    return edgeprune(project, "verify", place, "-c", "edgeprune.toml", "--target", target, "--json", *more)


def test_a_whole_bundle_passes(edgeprune: Command, project: Path) -> None:
    """Folder and archive, from inside as well; the baseline beside it gives the ratio."""
    bundle = bundle_of(project)
    for place, where in ((bundle, project), (bundle.with_name(bundle.name + ".tar"), project), (Path(), bundle)):
        said = edgeprune(where, "verify", place, "-c", project / "edgeprune.toml", "--target", "toy", "--json")
        assert (said.code, said.envelope["status"]) == (0, "ok"), said.err
        latency = next(each for each in said.envelope["data"]["checks"] if each["name"] == "latency")
        assert latency["detail"].startswith("ratio ")


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "runner.py", "measurement.json", "README.txt"])
def test_one_flipped_bit_is_exit_code_4(edgeprune: Command, project: Path, name: str) -> None:
    """Wherever it is."""
    path = bundle_of(project) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    verified(edgeprune, project, bundle_of(project)).refusal("BundleError", 4)


def test_a_missing_file_is_exit_code_4(edgeprune: Command, project: Path) -> None:
    """It is named."""
    (bundle_of(project) / "runner.py").unlink()
    diagnostic = verified(edgeprune, project, bundle_of(project)).refusal("BundleError", 4)
    assert "runner.py" in diagnostic["what"]


def test_a_device_that_cannot_be_had_does_not_hide_a_changed_file(edgeprune: Command, project: Path) -> None:
    """The bytes are looked at before the device is; a whole bundle gets as far as the device."""
    changed(project, "[targets.toy]", '[targets.gone]\nprofile = "formula"\noptions = {block = -1}\n[targets.toy]')
    bundle = bundle_of(project)
    verified(edgeprune, project, bundle, target="gone").refusal("ProfileError", 2)
    (bundle / "README.txt").write_text("improved")
    verified(edgeprune, project, bundle, target="gone").refusal("BundleError", 4)


def test_another_profile_is_refused(edgeprune: Command, project: Path) -> None:
    """A latency of one device says nothing about another; the difference is named."""
    diagnostic = verified(edgeprune, project, bundle_of(project), target="formula").refusal("BundleError", 4)
    assert "options" in diagnostic["why"]


def formula_bundle(folder: Path) -> Path:
    """Write a small bundle that says it was made for the shipped formula."""
    formula = load_profile("formula")
    seen = small_bundle.measurement(profile_digest=formula.digest, emulated=True, metric="formula_ns", conditions={})
    return small_bundle.write_small_bundle(folder, profile=formula, measurement=seen)


def test_a_bundle_is_verified_with_the_profile_it_names(edgeprune: Command, tmp_path: Path) -> None:
    """No --target is needed, and what no clock gave is said not to be measured."""
    bundle = formula_bundle(tmp_path)
    said = edgeprune(tmp_path, "verify", bundle)
    assert said.code == 0, said.err + said.out
    assert "NOT MEASURED" in said.out
    assert "profile: formula" in said.out
    assert not re.search(r"\bms\b", said.out)


def test_a_target_that_is_named_is_insisted_on_and_the_way_out_is_a_command(edgeprune: Command, tmp_path: Path) -> None:
    """The profile of another machine is caught; the printed command then works."""
    bundle = formula_bundle(tmp_path)
    diagnostic = edgeprune(tmp_path, "verify", bundle, "--target", "host", "--json").refusal("BundleError", 4)
    assert diagnostic["next"] == f"edgeprune verify {bundle} --target formula"
    assert edgeprune(tmp_path, *diagnostic["next"].split()[1:]).code == 0


def test_a_profile_of_a_configuration_is_found_where_that_lies_and_asked_for_elsewhere(
    edgeprune: Command, project: Path, tmp_path: Path
) -> None:
    """As deploy finds its edgeprune.toml; a broken one that merely lies there is passed over unless it was named."""
    bundle = bundle_of(project)
    assert edgeprune(project, "verify", bundle, "--json").code == 0
    assert edgeprune(tmp_path, "verify", bundle, "-c", project / "edgeprune.toml", "--json").code == 0
    diagnostic = edgeprune(tmp_path, "verify", bundle, "--json").refusal("BundleError", 4)
    assert "profile 'toy', which is not known here" in diagnostic["what"]
    assert diagnostic["next"].endswith(f"edgeprune verify {bundle} --target toy --config edgeprune.toml")
    (project / "edgeprune.toml").write_text("[nonsense]")
    edgeprune(project, "verify", bundle, "--json").refusal("BundleError", 4)
    edgeprune(project, "verify", bundle, "-c", "edgeprune.toml", "--json").refusal("ConfigError", 2)


def test_the_command_in_a_bundles_read_me_works(edgeprune: Command, project: Path, tmp_path: Path) -> None:
    """Inside the bundle: as it stands for a shipped profile, beside its configuration for another."""
    for bundle, more in ((formula_bundle(tmp_path), ""), (bundle_of(project), " --config edgeprune.toml")):
        (line,) = [
            each.strip() for each in (bundle / "README.txt").read_text().splitlines() if "edgeprune verify" in each
        ]
        assert line.endswith(more)
        given = line.replace("edgeprune.toml", str(project / "edgeprune.toml"))
        assert edgeprune(bundle, *given.split()[1:]).code == 0


def test_a_baseline_beside_the_bundle_is_used_only_if_it_is_the_parent(edgeprune: Command, project: Path) -> None:
    """Another graph that happens to lie there is passed over; named by the user it is refused."""
    bundle, other = bundle_of(project), run_of(project) / "baseline.onnx"
    other.write_bytes((bundle / "model.onnx").read_bytes())
    said = verified(edgeprune, project, bundle)
    latency = next(each for each in said.envelope["data"]["checks"] if each["name"] == "latency")
    assert said.code == 0
    assert "--baseline gives the ratio" in latency["detail"]
    verified(edgeprune, project, bundle, "--baseline", str(other)).refusal("ConfigError", 2)


def test_a_bundle_that_missed_its_budget_fails(edgeprune: Command, tmp_path: Path) -> None:
    """Exit code 1, and PASSED is not said; it is whole all the same."""
    tiny_project.write_project(tmp_path, *QUICK, ('latency = "0.5x"', 'latency = "0.5x"\nsize_mib = 0.001'))
    assert deploy(edgeprune, tmp_path).code == 1
    said = verified(edgeprune, tmp_path, bundle_of(tmp_path))
    assert (said.code, said.envelope["status"]) == (1, "failed")
    text = edgeprune(tmp_path, "verify", bundle_of(tmp_path), "-c", "edgeprune.toml", "--target", "toy")
    assert text.code == 1
    assert text.out.rstrip().endswith("FAILED")


# -- a full disk -----------------------------------------------------------------------------------------------------


def limited(most: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def starved(folder: Path, most: int) -> Said:
    """Run the deploy where no file may grow beyond so many bytes."""
    done = subprocess.run(command(), cwd=folder, capture_output=True, text=True, preexec_fn=limited(most), check=False)
    return Said(code=done.returncode, out=done.stdout, err=done.stderr)


def test_a_disk_that_fills_up_under_the_ledger_loses_nothing(edgeprune: Command, tmp_path: Path) -> None:
    """Exit code 3; the rows before it are whole, and with room again the same command ends as if nothing was."""
    tiny_project.write_project(tmp_path, *QUICK, ("trials = 2", "trials = 60"))
    said = starved(tmp_path, 330_000)
    diagnostic = said.refusal("StorageFull", 3)
    assert "ledger.sqlite" in diagnostic["what"]
    assert "same command again" in diagnostic["next"]
    with closing(sqlite3.connect(run_of(tmp_path) / "ledger.sqlite")) as ledger:
        kept = ledger.execute("SELECT phase, number, sha256 FROM trials ORDER BY seq").fetchall()
    assert len(kept) > 2
    assert deploy(edgeprune, tmp_path).code == 0
    with closing(sqlite3.connect(run_of(tmp_path) / "ledger.sqlite")) as ledger:
        assert ledger.execute("SELECT phase, number, sha256 FROM trials ORDER BY seq").fetchall()[: len(kept)] == kept


def test_a_disk_that_fills_up_under_the_bundle_leaves_the_earlier_one(edgeprune: Command, project: Path) -> None:
    """The archive is the largest file of a finished run: it fails, the folder and the archive before stay whole."""
    archive = only(project, "dist/*.tar")
    before = (tree(bundle_of(project)), tree(archive))
    room = (bundle_of(project) / "model.onnx").stat().st_size + 2000
    assert archive.stat().st_size > room
    assert starved(project, room).refusal("StorageFull", 3)["next"]
    assert (tree(bundle_of(project)), tree(archive)) == before
    assert verified(edgeprune, project, bundle_of(project)).code == 0
    assert not list((project / "dist").glob(".*"))


# -- stopping and bugs -----------------------------------------------------------------------------------------------


def interrupted_when(folder: Path, reached: Callable[[], bool], *more: str) -> Said:
    with subprocess.Popen(
        [*command(), *more], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not reached():
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    return Said(code=process.returncode, out=out, err=err)


def trials_in(folder: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{run_of(folder)}/ledger.sqlite?mode=ro", uri=True)) as ledger:
            return ledger.execute("SELECT count(*) FROM trials WHERE phase = 'search'").fetchone()[0]
    except (sqlite3.OperationalError, ValueError):
        return 0


def test_a_doubtful_final_timing_is_said_beside_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that throttled while it was timed: met, perhaps."""
    outcome = replace(small_bundle.outcome(small_bundle.measurement()), flags=("machine slow",), bundle="dist/small")
    cli._print_outcome(outcome.to_json())
    said = capsys.readouterr().out
    assert "doubtful: machine slow; measure again with edgeprune verify dist/small" in said


def test_the_faster_runtime_of_a_board_is_named_with_how_much_faster_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    choice = {"chosen": "tvm", "other": "onnxruntime", "graph": "g", "times": {"p50": 1.24, "low": 1.23, "high": 1.25}}
    outcome = replace(small_bundle.outcome(small_bundle.measurement()), conditions={"runtimes": choice}, emulated=False)
    cli._print_outcome(outcome.to_json())
    assert "\nruntime: tvm, 1.24x faster than onnxruntime\n" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["searching", "fine-tuning"])
def test_one_ctrl_c_finishes_the_step_and_says_how_to_continue(edgeprune: Command, tmp_path: Path, when: str) -> None:
    """Exit code 5, the line that resumes, one envelope; and that line then ends the deploy."""
    tiny_project.write_project(
        tmp_path, ("trials = 6", "trials = 40"), ("steps = 12", "steps = 400\ncheckpoint_s = 0.01")
    )
    reached = {
        "searching": lambda: trials_in(tmp_path) >= 2,
        "fine-tuning": lambda: any(tmp_path.glob("dist/*.run/finetune-*")),
    }
    diagnostic = interrupted_when(tmp_path, reached[when], "--fresh").refusal("Interrupted", 5)
    assert "edgeprune deploy --target toy --json --quiet" in diagnostic["next"]
    assert "--fresh" not in diagnostic["next"].replace("without --fresh", "")  # it would delete what is to be continued
    made = trials_in(tmp_path)
    assert 2 <= made < 40 if when == "searching" else made == 40
    if when == "searching":
        said = deploy(edgeprune, tmp_path)
        assert (said.code, said.envelope["trials"]) == (0, 40)


def test_what_nobody_foresaw_is_called_our_bug(
    edgeprune: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 70, a traceback on standard error, the envelope as ever; here another package's adapter is to blame."""
    site = project / "site"
    (site / "elsewhere-1.0.dist-info").mkdir(parents=True)
    (site / "elsewhere-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (site / "elsewhere-1.0.dist-info" / "entry_points.txt").write_text("[edgeprune.targets]\nodd = odd_adapter\n")
    (site / "odd_adapter.py").write_text("def connect(profile):\n    raise ZeroDivisionError('odd')\n")
    (project / "odd.toml").write_text('adapter = "odd"\n')
    monkeypatch.syspath_prepend(str(site))
    said = edgeprune(project, "measure", bundle_of(project) / "model.onnx", "--target", "odd.toml", "--json", "--quiet")
    assert said.code == 70
    assert "ZeroDivisionError: odd" in said.envelope["diagnostics"][0]["why"]
    assert "Traceback" in said.err


def test_python_m_is_the_same_command() -> None:
    """For machines where the script is not on the path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-m", "edgeprune", "--version"], capture_output=True, text=True, check=True, env=environment
    )
    assert said.stdout == f"{__version__}\n"
