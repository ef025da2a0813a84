"""`space`, `doctor` and `targets` hide nothing: every layer is listed, every problem comes with its mend."""

from pathlib import Path

import pytest
import tiny_project

from edgeprune.inspection import describe_space, examine, list_targets
from edgeprune.intake.config import load_config, load_devices
from edgeprune.profile import Profile, load_profile
from edgeprune.progress import Silent


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict:
    config = load_config(
        tiny_project.write_project(tmp_path_factory.mktemp("tiny"), ("[space]", '[space]\nexclude = ["stem.0"]'))
    )
    return describe_space(config, config.profile("toy"), Silent())


def test_every_output_channel_is_in_a_group_or_has_a_reason(described: dict) -> None:
    """Layer by layer, the channels of groups and of what stays add up to the layer's."""
    widths = {"stem.0": 16, "block1.conv1": 32, "block1.conv2": 32, "block1.shortcut": 32}
    widths |= {"block2.conv1": 64, "block2.conv2": 64, "block2.shortcut": 64, "head": 4}
    widths["stem.1"] = 16  # a layer that is no producer is listed where the channels it scales stay
    found = dict.fromkeys(widths, 0)
    for group in described["groups"]:
        for layer in [each.removesuffix(" out") for each in group["members"] if each.endswith(" out")]:
            if layer in found:
                found[layer] += group["channels"]
    for stays in described["unprunable"]:
        assert stays["reason"]
        found[stays["layer"]] += stays["channels"]
    assert found == widths


def test_the_reason_is_the_users_own_where_he_excluded_a_layer(described: dict) -> None:
    """The pattern is named."""
    reasons = {each["layer"]: each["reason"] for each in described["unprunable"]}
    assert "stem.0" in reasons["stem.0"]
    assert "excluded" in reasons["stem.0"]
    assert "head" in reasons


def test_choices_are_channels_on_the_profiles_multiple(described: dict) -> None:
    """And the inside of a residual branch may go altogether."""
    inner = next(each for each in described["groups"] if each["name"] == "block2.conv1")
    assert inner["choices"] == [*([0] if inner["removable"] else []), 8, 16, 24, 32, 40, 48, 56, 64]
    outer = next(each for each in described["groups"] if each["name"] == "block2.conv2")
    assert {"block2.conv2 out", "block2.shortcut out", "head in"} <= set(outer["members"])


def test_the_doctor_looks_at_this_machine_and_at_the_target() -> None:
    """Python and PyTorch first; a healthy machine has no problem, every problem has a mend."""
    findings = examine([load_profile("formula")])
    assert [each["subject"] for each in findings[:2]] == ["Python", "PyTorch"]
    assert not [each for each in findings if each["severity"] == "problem"]
    sick = examine([Profile(name="sick", adapter="formula", options={"block": -1})])
    problems = [each for each in sick if each["severity"] == "problem"]
    assert problems
    assert all(each["mend"] for each in problems)


def test_targets_are_the_shipped_profiles_and_the_configurations_own(tmp_path: Path) -> None:
    """With whether each is reachable now; one that cannot be is listed with the reason."""
    assert {"formula", "host"} <= {each["name"] for each in list_targets(load_devices(None))}
    text = '[targets.sick]\nprofile = "formula"\n[targets.sick.options]\nblock = -1\n[targets.toy]'
    config = tiny_project.write_project(tmp_path, ("[targets.toy]", text))
    listed = {each["name"]: each["reachable"] for each in list_targets(load_devices(config))}
    assert listed["toy"] == "yes"
    assert listed["sick"].startswith("no: ")


def test_every_board_of_a_target_is_examined_under_its_address() -> None:
    boards = [Profile(name="shelf", adapter="formula", address=each) for each in ("ssh://a", "ssh://b")]
    subjects = [each["subject"] for each in examine(boards)]
    assert {each.partition(": ")[0] for each in subjects} >= {"ssh://a", "ssh://b"}


def test_every_board_of_a_target_is_listed_though_no_model_is_named_yet(tmp_path: Path) -> None:
    config = tmp_path / "edgeprune.toml"
    config.write_text('[targets.shelf]\nprofile = "formula"\naddress = ["ssh://a", "ssh://b"]\n')
    listed = [each for each in list_targets(load_devices(config)) if each["name"] == "shelf"]
    assert [each["address"] for each in listed] == ["ssh://a", "ssh://b"]
    assert all(each["reachable"] == "yes" for each in listed)


@pytest.mark.parametrize("table", ['profile = "nothing"', 'profile = "formula"\naddress = []'])
def test_a_table_that_cannot_be_used_is_listed_with_the_reason_and_hides_no_other(tmp_path: Path, table: str) -> None:
    config = tmp_path / "edgeprune.toml"
    config.write_text(f'[targets.bad]\n{table}\n[targets.good]\nprofile = "formula"\n')
    listed = {each["name"]: each["reachable"] for each in list_targets(load_devices(config))}
    assert listed["bad"].startswith("no: ")
    assert {"formula", "good"} <= listed.keys()
