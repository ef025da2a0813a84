"""A method is a set of defaults of the search: what the user sets wins, and data-free leaves no image to look at."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from edgeprune.errors import ConfigError
from edgeprune.intake.config import Config, FinetuneConfig, SearchConfig, load_config
from edgeprune.methods import DEFAULT, FINETUNING, METHODS, presets

ROOT = Path(__file__).parents[1]
MODEL = '[model]\nfactory = "a:b"\n'
DATA = '[data]\narrays = "d.npz"\n'


def loaded(tmp_path: Path, text: str, **settings: Any) -> Config:
    (tmp_path / "d.npz").write_bytes(b"")
    (tmp_path / "edgeprune.toml").write_text(text)
    return load_config(tmp_path / "edgeprune.toml", {f"search.{name}": each for name, each in settings.items()})


def test_the_configuration_knows_every_method() -> None:
    assert get_args(SearchConfig.model_fields["method"].annotation) == tuple(METHODS)
    assert SearchConfig().method == DEFAULT
    assert get_args(FinetuneConfig.model_fields["method"].annotation) == tuple(FINETUNING)
    assert FinetuneConfig().method == next(iter(FINETUNING))


@pytest.mark.parametrize("data_free", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_its_presets_are_settings_of_the_search(method: str, *, data_free: bool) -> None:
    chosen = SearchConfig(method=method, data_free=data_free)
    for name, value in presets(method, data_free=data_free).items():
        seen = getattr(chosen, name)
        assert (seen.model_dump(include=set(value)) if name == "reward" else seen) == value


def test_what_the_user_sets_wins(tmp_path: Path) -> None:
    text = MODEL + DATA + '[search]\nmethod = "autodfp"\nstrategy = "random"\n[search.reward]\nentropy = 0.5\n'
    search = loaded(tmp_path, text).search
    assert (search.strategy, search.reward.entropy) == ("random", 0.5)
    assert (search.reconstruction, search.reward.accuracy) == ("local-ridge", 1.0)


def test_a_flag_changes_the_method_of_a_file(tmp_path: Path) -> None:
    search = loaded(tmp_path, MODEL + DATA, method="entropy-rl").search
    assert (search.reward.accuracy, search.reward.entropy) == (0.0, 1.0)


def test_a_method_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method"):
        loaded(tmp_path, MODEL + DATA, method="magic")


def test_data_free_needs_no_data_and_judges_by_synthetic_images(tmp_path: Path) -> None:
    config = loaded(tmp_path, MODEL, data_free=True)
    assert config.data is None
    assert config.search.judged_by == "synthetic"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("[budget]\nmax_accuracy_drop = 0.01\n", "takes labelled test images"),
        ('[search]\njudged_by = "labels"\n', "is data_free"),
        ('[finetune]\nmethod = "decay"\n', "channels decay while the model learns"),
    ],
)
def test_data_free_refuses_what_takes_images(tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, MODEL + more, data_free=True)


def test_repairs_take_a_reconstruction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is repaired"):
        loaded(tmp_path, MODEL + DATA, repairs=True)


def test_synthetic_images_are_made_for_data_free_runs_alone(tmp_path: Path) -> None:
    """Else the images of a data set would be called synthetic."""
    with pytest.raises(ConfigError, match="data_free = true"):
        loaded(tmp_path, MODEL + DATA, judged_by="synthetic")


def test_pairs_take_the_rule_that_finds_them(tmp_path: Path) -> None:
    """Refused at once: every candidate would fail."""
    with pytest.raises(ConfigError, match='importance = "paoding"'):
        loaded(tmp_path, MODEL + DATA, method="paoding", importance="l1")
    assert loaded(tmp_path, MODEL + DATA, method="paoding", importance="l1", reconstruction="none")


def test_the_command_says_what_each_needs_and_where_it_comes_from() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", "methods", "--json"], capture_output=True, text=True, check=True
    )
    data = json.loads(done.stdout)["data"]
    assert [each["name"] for each in data["methods"]] == list(METHODS)
    assert [each["name"] for each in data["methods"] if each["default"]] == [DEFAULT]
    assert [each["name"] for each in data["finetuning"] if each["default"]] == ["one-step"]
    listed = data["methods"] + data["finetuning"]
    assert all(each["source"] and each["needs"] and each["idea"] and each["optimises"] for each in listed)
    assert all((ROOT / each["page"]).is_file() for each in listed)
