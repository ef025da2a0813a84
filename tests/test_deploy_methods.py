"""Every method goes from a model to a bundle on the formula; without data nothing is loaded before the end."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_project

from edgeprune.deploy import deploy
from edgeprune.errors import ConfigError, DataError
from edgeprune.intake.config import load_config
from edgeprune.ledger import Ledger
from edgeprune.manifest import MANIFEST, read_manifest
from edgeprune.methods import METHODS
from edgeprune.outcome import Outcome
from edgeprune.progress import Silent
from edgeprune.stages.prepare import Request
from edgeprune.target import open_target
from edgeprune.verify import verify

SHAPE = f"[1, 1, {tiny_project.SIDE}, {tiny_project.SIDE}]"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny_project.write_project(tmp_path / "project")


def changed(config: Path, *pairs: tuple[str, str]) -> Path:
    text = config.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    return config


def without_data(config: Path, data: str = "") -> Path:
    """Return the configuration with other data, or none, and the shape of an image."""
    start, end = (config.read_text().index(each) for each in ("[data]", "[budget]"))
    text = config.read_text()
    config.write_text(text[:start] + data + text[end:])
    return changed(config, ('weights = "net.safetensors"', f'weights = "net.safetensors"\ninput_shape = {SHAPE}'))


def carried_out(config: Path, **search: Any) -> Outcome:
    settings = {f"search.{name}": value for name, value in search.items()}
    settings = {"finetune.steps": 4, "search.trials": 9, **settings}
    loaded = load_config(config, settings)
    return deploy(Request(config=loaded, target="toy", out=config.parent / "dist", sleep=lambda _: None))


def own(config: Path) -> Path:
    """Return the configuration without a strategy of its own, so that a method brings its own."""
    return changed(config, ('strategy = "random"\n', ""))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_ends_in_a_bundle_that_keeps_the_budget(config: Path, method: str) -> None:
    outcome = carried_out(own(config), method=method)
    assert outcome.budget.met
    assert (outcome.method, outcome.tested_on) == (method, "test images")
    assert f", {method}, searched by {outcome.strategy}, fine-tuning: one-step" in Path(outcome.report).read_text()
    assert read_manifest((Path(outcome.bundle) / MANIFEST).read_bytes()).origin.finetuning == "one-step"
    assert outcome.strategy == METHODS[method].presets.get("strategy", "sac")
    assert outcome.judged_by == METHODS[method].presets.get("judged_by", "labels")
    assert (outcome.entropy_rank_correlation is not None) == (method in ("amc", "entropy-rl"))


@pytest.mark.parametrize("method", METHODS)
def test_without_data_a_method_ends_in_a_bundle_as_well(config: Path, method: str) -> None:
    """Nothing is trained, and what is counted at the end is said to be agreement on synthetic images."""
    outcome = carried_out(own(without_data(config)), method=method, data_free=True)
    assert outcome.budget.met
    assert outcome.baseline.accuracy == 1.0
    assert "synthetic images" in outcome.tested_on
    assert outcome.result.validation["cut"] == outcome.result.validation["tuned"]


@pytest.mark.parametrize("method", METHODS)
def test_a_data_set_that_cannot_be_loaded_stops_a_data_free_run_at_its_last_evaluation(
    config: Path, method: str
) -> None:
    """By then everything else was done, so nothing else asked for an image."""
    with pytest.raises(DataError, match="checkpoint server is down"):
        carried_out(own(without_data(config, '[data]\nfactory = "net:broken"\n')), method=method, data_free=True)
    (folder,) = (config.parent / "dist").glob("*.run")
    with Ledger.open(folder / "ledger.sqlite", read_only=True) as ledger:
        run = ledger.runs()[0]
        assert ledger.fact(run, "final_measurement") is not None
        assert ledger.fact(run, "test") is None


OPENED: list[bool] = []
"""For each time that the images' file was opened: whether the final model was written by then."""


def note_opened(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str | Path) and Path(args[0]).name == "images.npz":
        OPENED.append(any(Path(args[0]).parent.glob("dist/*.run/model.onnx")))


sys.addaudithook(note_opened)


def test_a_file_of_images_is_opened_by_the_last_evaluation_alone(config: Path) -> None:
    """Not even to be hashed. One that is damaged stops the run there, and mended it is all that is left to do."""
    path = config.parent / "images.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    OPENED.clear()
    without_data(config, '[data]\narrays = "images.npz"\n')
    with pytest.raises(DataError):
        carried_out(config, data_free=True)
    path.write_bytes(whole)
    (folder,) = (config.parent / "dist").glob("*.run")
    outcome = carried_out(config, data_free=True)
    assert (Path(outcome.run_dir), outcome.tested_on) == (folder, "test images")
    assert OPENED
    assert all(OPENED)


def test_a_data_free_bundle_is_verified_like_any_other(config: Path) -> None:
    outcome = carried_out(without_data(config), method="autodfp", data_free=True)
    loaded = load_config(config, {"search.data_free": True})
    with open_target(loaded.profile("toy")) as target:
        seen = verify(Path(outcome.bundle), profile=loaded.profile("toy"), target=target)
    assert seen.ok, seen


def unlabelled(config: Path) -> Path:
    arrays = np.load(config.parent / "images.npz")
    np.savez(config.parent / "images.npz", **{name: arrays[name] for name in arrays if not name.endswith("labels")})
    return config


def test_images_without_labels_are_no_ground_for_a_reward_of_accuracy(config: Path) -> None:
    with pytest.raises(DataError, match="has no labels"):
        carried_out(unlabelled(config))


def test_images_without_labels_will_do_for_agreement(config: Path) -> None:
    outcome = carried_out(unlabelled(config), judged_by="teacher")
    assert outcome.baseline.accuracy == 1.0
    assert "what the unpruned model answers" in outcome.tested_on
    assert 0 < outcome.result.accuracy <= 1


def test_pairs_are_refused_where_no_dense_layer_has_any(config: Path) -> None:
    with pytest.raises(ConfigError, match="no dense layer"):
        carried_out(config, method="paoding", **{"paoding.mode": "impact"})
    assert not measured(config)


def in_bytes(config: Path) -> Path:
    """Return the configuration with the same images as bytes, and how they become the numbers they were."""
    path = config.parent / "images.npz"
    arrays = dict(np.load(path))
    pixels = [each for each in arrays.values() if each.ndim > 1]
    low, high = min(each.min() for each in pixels), max(each.max() for each in pixels)
    for name in (each for each in arrays if arrays[each].ndim > 1):
        arrays[name] = np.round(255 * (arrays[name] - low) / (high - low)).astype(np.uint8)
    np.savez(path, **arrays)
    normalised = f"mean = [{-low / (high - low)}]\nstd = [{1 / (high - low)}]"
    return changed(config, ('arrays = "images.npz"', f'arrays = "images.npz"\n{normalised}'))


def test_paoding_says_what_is_still_right_after_attacks(config: Path) -> None:
    """Of both models, in the bundle and in the report as well; the others say it where they are asked to."""
    outcome = carried_out(own(in_bytes(config)), method="paoding")
    for facts in (outcome.baseline, outcome.result):
        assert list(facts.attacked) == ["fgsm 0.01", "pgd-10 0.01"]
        assert facts.attacked_images == facts.test_images
        assert all(0 <= share <= facts.accuracy for share in facts.attacked.values())
    shares = outcome.result.attacked
    assert read_manifest((Path(outcome.bundle) / MANIFEST).read_bytes()).result.attacked == shares
    page = Path(outcome.report).read_text()
    for name, share in shares.items():
        assert f'data-value="result.attacked.{name}" value="{share!r}"' in page
    assert Outcome.from_json(outcome.to_json()) == outcome


def test_other_methods_attack_where_they_are_asked_to(config: Path) -> None:
    """Pixels that may go anywhere leave little; a run that is known but for its attacks repeats nothing else."""
    quiet = carried_out(in_bytes(config))
    assert (dict(quiet.result.attacked), quiet.result.attacked_images) == ({}, 0)
    settings = {"finetune.steps": 4, "search.trials": 9, "robustness.attacks": "pgd", "robustness.epsilon": 0.5}
    loaded = load_config(config, {**settings, "robustness.images": 20, "robustness.steps": 3})
    hard = deploy(Request(config=loaded, target="toy", out=config.parent / "dist", sleep=lambda _: None))
    assert hard.run_dir == quiet.run_dir
    assert (hard.result.accuracy, hard.result.attacked_images) == (quiet.result.accuracy, 20)
    assert hard.result.attacked["pgd-3 0.5"] < 0.5 < hard.result.accuracy


DENSE = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(144, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 4)]
    return nn.Sequential(*layers)
"""


@pytest.fixture
def dense(config: Path) -> Path:
    """Return the configuration with a perceptron of random weights in place of the network."""
    (config.parent / "dense.py").write_text(DENSE)
    return changed(own(config), ("net:net", "dense:net"), ('weights = "net.safetensors"\n', ""))


def test_entropy_alone_is_refused_where_no_map_has_neighbours(dense: Path) -> None:
    """Before anything is measured."""
    with pytest.raises(ConfigError, match="no entropy to choose by"):
        carried_out(dense, method="entropy-rl")
    assert not measured(dense)


def test_entropy_is_left_out_where_no_map_has_neighbours(dense: Path) -> None:
    """The default method weighs it a little; a perceptron is pruned all the same."""
    outcome = carried_out(dense, method="amc")
    assert outcome.budget.met
    assert outcome.entropy_rank_correlation is None
    assert outcome.finetuning == "one-step"


GATED = """
import torch
from torch import nn


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.gate, self.second = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.last(torch.relu(self.second(x)).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Gated()
"""


class Heard(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def heard(config: Path, **search: Any) -> list[str]:
    settings = {"finetune.steps": 4, "search.trials": 9, **{f"search.{name}": value for name, value in search.items()}}
    progress, loaded = Heard(), load_config(config, settings)
    deploy(Request(config=loaded, target="toy", out=config.parent / "dist", sleep=lambda _: None, progress=progress))
    return progress.notes


def test_what_a_reconstruction_cannot_make_up_for_is_said(config: Path) -> None:
    """What reads a gated map keeps its weights: the group is pruned plainly, and the user hears of it."""
    (config.parent / "gated.py").write_text(GATED)
    changed(own(config), ("net:net", "gated:net"), ('weights = "net.safetensors"\n', ""), ('"0.5x"', '"0.8x"'))
    (said,) = (each for each in heard(config, method="autodfp") if "made up for" in each)
    assert said.startswith("local-ridge: what goes is not made up for in second of first (")


def test_a_bound_behind_an_assumed_box_is_said_to_be_no_proof(dense: Path) -> None:
    """The images came normalised, so what a pixel can be is not known."""
    assert any("bounds are no proof behind 1" in each for each in heard(dense, method="paoding"))


def measured(config: Path) -> bool:
    """Return whether the unpruned model was timed in the one run there is."""
    (folder,) = (config.parent / "dist").glob("*.run")
    with Ledger.open(folder / "ledger.sqlite", read_only=True) as ledger:
        return any(ledger.fact(run, "baseline") for run in ledger.runs())


def test_attacks_on_pixels_that_nobody_knows_are_refused_before_anything_is_measured(config: Path) -> None:
    loaded = load_config(config, {"robustness.attacks": ["fgsm"]})
    with pytest.raises(ConfigError, match=r"robustness\.attacks"):
        deploy(Request(config=loaded, target="toy", out=config.parent / "dist", sleep=lambda _: None))
    assert not (config.parent / "dist").exists()


def test_a_rule_that_reads_images_is_refused_before_synthetic_ones_are_made(config: Path) -> None:
    with pytest.raises(ConfigError, match="taylor"):
        carried_out(without_data(config), data_free=True, importance="taylor")
    assert not (config.parent / "dist").exists()


def test_a_data_set_for_the_end_leaves_the_synthetic_images_as_they_are(config: Path) -> None:
    """Those that a search looks at are made once, whether the last evaluation sees data or more of them."""
    carried_out(without_data(config, '[data]\narrays = "images.npz"\n'), method="autodfp", data_free=True)
    (made,) = (config.parent / "dist").glob("synthetic-*")
    outcome = carried_out(changed(config, ('[data]\narrays = "images.npz"\n', "")), method="autodfp", data_free=True)
    assert {made}.issubset(found := set((config.parent / "dist").glob("synthetic-*")))
    assert len(found) == 2
    assert "no accuracy" in Path(outcome.report).read_text()
    assert "agreement" in (Path(outcome.bundle) / "README.txt").read_text()


def test_an_unknown_rule_is_refused_before_anything_is_loaded(config: Path) -> None:
    with pytest.raises(ConfigError, match="'magnitude' is unknown"):
        carried_out(without_data(config, '[data]\nfactory = "net:broken"\n'), importance="magnitude")


def test_a_reward_of_entropy_alone_chooses_by_entropy(config: Path) -> None:
    """Merit is order at the latency of the budget, accuracy is not asked for; the narrowest plan is not the winner."""
    outcome = carried_out(config, method="entropy-rl")
    with Ledger.open(Path(outcome.run_dir) / "ledger.sqlite", read_only=True) as ledger:
        trials = ledger.trials(ledger.runs()[0])
    for terms in (each.score.terms for each in trials if each.quality):
        assert terms["merit"] == -terms["entropy_relative"] + terms["reward_unused"]
    assert all(each.score.terms["reward_accuracy"] == 0 for each in trials)
    assert outcome.result.ratio is not None
    narrowest = next(each.score.terms["latency_ratio"] for each in trials if each.phase == "probe")
    assert outcome.result.ratio.p50 > narrowest + 0.05
