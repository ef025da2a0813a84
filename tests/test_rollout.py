"""Several targets: each gets what it would have got alone, and what fails on one stays there."""

from pathlib import Path

import pytest
import tiny_project

from edgeprune.deploy import deploy
from edgeprune.errors import ConfigError, DeviceLost, Interrupted, NothingFits, ProfileError
from edgeprune.intake.config import load_config
from edgeprune.rollout import Result, exit_code, roll_out
from edgeprune.stages.prepare import Request

QUICK = (("steps = 12", "steps = 0"), ("trials = 6", "trials = 2"))
MORE = """
[targets.coarse]
profile = "formula"
options = {block = 16}
[targets.gone]
profile = "formula"
options = {drop_out = 1.0}
[targets.wrong]
profile = "formula"
options = {block = -1}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_project.write_project(tmp_path_factory.mktemp("project"), *QUICK)
    path.write_text(path.read_text() + MORE)
    return path


def requests(config: Path, out: Path, *targets: str, stop=lambda: None) -> list[Request]:
    loaded = load_config(config)
    return [Request(config=loaded, target=each, out=out, stop=stop, sleep=lambda _: None) for each in targets]


def test_each_target_gets_the_bundle_it_would_have_got_alone(config: Path, tmp_path: Path) -> None:
    results = roll_out(requests(config, tmp_path / "together", "toy", "coarse"))
    assert [each.target for each in results] == ["toy", "coarse"]
    assert exit_code(results) == 0
    (alone,) = requests(config, tmp_path / "alone", "coarse")
    assert results[1].outcome.widths == deploy(alone).widths
    assert len(list((tmp_path / "together").glob("*.tar"))) == 2


def test_a_target_that_is_lost_takes_nothing_from_the_next(config: Path, tmp_path: Path) -> None:
    told = list[Result]()
    gone, toy = roll_out(requests(config, tmp_path, "gone", "toy"), told.append)
    assert isinstance(gone.error, DeviceLost)
    assert gone.to_json()["error"]["kind"] == "DeviceLost"
    assert toy.outcome.budget.met
    assert exit_code((gone, toy)) == DeviceLost.exit_code
    assert [each.target for each in told] == ["gone", "toy"]


def test_a_target_that_is_not_ready_stops_everything_before_it_starts(config: Path, tmp_path: Path) -> None:
    with pytest.raises((ProfileError, DeviceLost), match=r"wrong|block"):
        roll_out(requests(config, tmp_path, "toy", "wrong"))
    assert not list(tmp_path.iterdir())


def test_a_target_named_twice_is_the_users_mistake(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="twice"):
        roll_out(requests(config, tmp_path, "toy", "toy"))


def test_stopping_stops_all_targets(config: Path, tmp_path: Path) -> None:
    def stop() -> None:
        raise Interrupted("stopped as asked")

    with pytest.raises(Interrupted):
        roll_out(requests(config, tmp_path, "toy", "coarse", stop=stop))
    assert not [each for each in tmp_path.iterdir() if "coarse" in each.name]


def test_the_exit_code_is_that_of_the_first_target_that_failed() -> None:
    lost, missed = (Result(target="t", error=each) for each in (DeviceLost("gone"), NothingFits("out of reach")))
    assert exit_code((lost, missed)) == 3
    assert exit_code((missed, lost)) == 1
    assert exit_code(()) == 0
