"""The configuration says precisely what is wrong, and its digest covers what changes a result and nothing else."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import ConfigError, ProfileError
from edgeprune.intake.config import Config, FinetuneConfig, load_config, load_devices
from edgeprune.profile import load_profile
from edgeprune.reward import RewardWeights

MINIMAL = """
[model]
factory = "model:net"
[data]
arrays = "data.npz"
"""


def written(folder: Path, text: str) -> Path:
    """Return the path of a configuration file with this text."""
    path = folder / "edgeprune.toml"
    path.write_text(text)
    return path


def complaint(folder: Path, text: str, **overrides: object) -> str:
    """Return what the user is told about a configuration that cannot be used."""
    with pytest.raises(ConfigError) as caught:
        load_config(written(folder, text), overrides)
    return str(caught.value)


def test_model_and_data_are_enough(tmp_path: Path) -> None:
    """Every other section has defaults, and the defaults of the reward are the reward's own."""
    config = load_config(written(tmp_path, MINIMAL))
    assert config.budget.to_budget().latency.value == 0.5
    assert config.search.reward.to_weights() == RewardWeights()
    assert str(config.model) == "model:net"


def test_paths_start_at_the_file_and_flags_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path in the file is relative to the file, one on the command line to where it is typed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(written(tmp_path, MINIMAL), {"model.weights": "w.safetensors"})
    assert config.data.arrays == tmp_path / "data.npz"
    assert config.model.weights == elsewhere / "w.safetensors"
    assert config.model.factory is not None
    assert config.model.factory.folder == tmp_path


def test_flags_win_over_the_file_and_none_is_no_flag(tmp_path: Path) -> None:
    """Overrides are text as typed; None means that the flag was not given."""
    path = written(tmp_path, MINIMAL + '[budget]\nlatency = "0.5x"\n[search]\ntrials = 7\n')
    config = load_config(path, {"budget.latency": "8ms", "search.trials": None, "space.exclude": "a, b.*"})
    assert (config.budget.latency, config.search.trials, config.space.exclude) == ("8ms", 7, ("a", "b.*"))


def test_a_run_needs_no_file() -> None:
    """Model and data may be named with flags alone."""
    config = load_config(
        None, {"model.name": "timm:resnet18", "data.folder": "photos", "model.input_shape": "1,3,64,64"}
    )
    assert config.model.input_shape == (1, 3, 64, 64)
    assert config.data.folder == Path.cwd() / "photos"


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    """One error lists each setting, what was given and what is wanted."""
    text = complaint(
        tmp_path,
        MINIMAL + '[search]\ntrials = 0\nstrategy = "magic"\n[finetune]\nlearning_rate = -1.0\nmomentum = true\n',
    )
    assert "4 settings" in text
    assert "search.trials is 0, should be greater than or equal to 1" in text
    assert "search.strategy is 'magic', should be 'ddpg', 'sac', 'uniform', 'random' or 'walk'" in text
    assert "finetune.learning_rate is -1.0, should be greater than 0" in text
    assert "finetune.momentum is True, should be a number" in text


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("[search]\ntrails = 3\n", "search.trails is unknown; did you mean search.trials?"),
        ("[search.reward]\nacuracy = 1\n", "did you mean search.reward.accuracy?"),
        ("[search]\nmethod = 'autodpf'\n", "did you mean autodfp?"),
        ("[budgets]\nlatency = '1ms'\n", "budgets is unknown; did you mean budget?"),
        ("[budget]\ntrials = 3\n", "budget.trials is unknown; it belongs in [search]"),
        ("[targets.pi]\nadress = 'x'\n", "targets.pi.adress is unknown; did you mean targets.pi.address?"),
        ("[targets.pi]\nqqq = 'x'\n", "known are profile, adapter"),
        ("[budget]\nlatency = 'fast'\n", "budget.latency is 'fast', write 8ms, 800us or 0.5x"),
        ("[finetune]\nepochs = 1\nsteps = 3\n", "finetune has epochs and steps; keep one of them"),
        ('[finetune]\nmethod = "decay"\nsteps = 0\n', 'finetune has method "decay" and no step to decay in'),
        ('[finetune.decay]\nhost = "lottery"\n', "should be 'group-norm', 'gates' or 'half-space'"),
        ("[finetune.decay]\nshare = 1.5\n", "finetune.decay.share is 1.5, should be less than or equal to 1"),
        ("[finetune.decay]\ncooldown = 19\n", "finetune.decay has cooldown 19; a released channel rests"),
        ("[finetune.decay]\nt_lens = 1\n", "did you mean finetune.decay.t_len?"),
        ("[measure]\nsessions_min = 9\n", "measure has sessions_min 9 above sessions_max 6"),
    ],
)
def test_a_mistake_comes_with_its_cure(tmp_path: Path, table: str, told: str) -> None:
    """Unknown keys come with the nearest known one or the section they belong to."""
    assert told in complaint(tmp_path, MINIMAL + table)


@pytest.mark.parametrize(
    ("model", "data", "told"),
    [
        ("", 'arrays = "d.npz"', "model needs exactly one of factory, program, name; none given"),
        ('factory = "a:b"\nname = "timm:x"', 'arrays = "d.npz"', "factory and name given"),
        ('factory = "a.b"', 'arrays = "d.npz"', 'should be written "package.module:function"'),
        ('program = "a.pt2"\nweights = "w.pt"', 'arrays = "d.npz"', "holds its own weights"),
        ('name = "hub:x"', 'arrays = "d.npz"', "should match pattern"),
        ('factory = "a:b"\ninput_shape = [2, 3, 8, 8]', 'arrays = "d.npz"', "1 x channels x height x width"),
        ('factory = "a:b"', "", "data needs exactly one of factory, arrays, folder; none given"),
        ('factory = "a:b"', 'arrays = "d.npz"\nmean = [0.5]', "needs mean and std together"),
        ('factory = "a:b"', 'arrays = "d.npz"\nmean = [0.5]\nstd = [0.5, 0.5]', "has 1 means and 2 stds"),
        ('factory = "a:b"', 'arrays = "d.npz"\nvalidation = 1.5', "a share between 0 and 1 or a whole number"),
        ('factory = "a:b"', 'folder = "d"\nimage_size = 64\nresize = 32', "resize 32 below image_size 64"),
        ('factory = "a:b"', 'folder = "d"\nresize = 32', "data has resize without image_size"),
        ('factory = "a:b"', 'arrays = "d.npz"\nimage_size = 32', "has image_size, which is for a folder's images"),
        ('factory = "a:b"', 'factory = "c:d"\ngrayscale = true', "has grayscale, which is for a folder's images"),
        ('factory = "a:b"', 'arrays = "d.npz"\nkwargs = {n = 3}', "has kwargs, which are a factory's"),
        ('factory = "a:b"\nweights = "~nosuchuser/w.pt"', 'arrays = "d.npz"', "'~nosuchuser/w.pt', should be a path"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, model: str, data: str, told: str) -> None:
    """A model and data come from exactly one place each."""
    assert told in complaint(tmp_path, f"[model]\n{model}\n[data]\n{data}\n")


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    """Model and data are the only sections without defaults."""
    said = complaint(tmp_path, '[model]\nfactory = "a:b"\n')
    assert "data is missing" in said
    assert "--data-free" in said


def test_a_file_that_is_absent_or_not_toml_is_named(tmp_path: Path) -> None:
    """The error names the file."""
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(written(tmp_path, "model = "))
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(path)


def test_a_flag_with_a_home_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A ~ of somebody unknown is a mistake in the flag, not in the program."""
    text = complaint(tmp_path, MINIMAL, **{"model.weights": "~nosuchuser/w.pt"})
    assert "model.weights" in text
    assert "~nosuchuser/w.pt" in text


def test_an_override_cannot_go_through_a_value(tmp_path: Path) -> None:
    """A dotted name that treats a value as a table is refused."""
    with pytest.raises(ConfigError, match="latency is not a table"):
        load_config(written(tmp_path, MINIMAL + '[budget]\nlatency = "1ms"\n'), {"budget.latency.value": "1"})


def test_the_digest_follows_content_not_place(tmp_path: Path) -> None:
    """The same file elsewhere has the same digest; other weights, another seed and another budget do not."""
    digests = []
    for place, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "w.pt").write_bytes(content)
        digests.append(
            load_config(written(tmp_path / place, MINIMAL.replace("[data]", 'weights = "w.pt"\n[data]'))).digest
        )
    assert digests[0] == digests[1] != digests[2]


@given(
    st.sampled_from(
        [
            ("search.seed", "5"),
            ("budget.latency", "0.4x"),
            ("data.validation", "0.2"),
            ("finetune.steps", "3"),
            ("finetune.method", "decay"),
            ("finetune.decay.host", "gates"),
            ("space.exclude", "stem"),
            ("measure.session_ms", "100"),
            ("model.kwargs", {"width": 3}),
            ("search.reward.entropy", "0.5"),
        ]
    )
)
def test_every_setting_changes_the_digest(setting: tuple[str, object]) -> None:
    """Whatever changes the result changes the digest."""
    base = {"model.factory": "model:net", "data.arrays": "data.npz"}
    assert load_config(None, base).digest != load_config(None, base | dict([setting])).digest


def test_a_target_does_not_change_the_digest() -> None:
    """The target has a digest of its own, so that one search may be compared across devices."""
    base: dict[str, object] = {"model.factory": "model:net", "data.arrays": "data.npz"}
    assert load_config(None, base).digest == load_config(None, base | {"targets.pi.profile": "host"}).digest


def test_a_section_digest_ignores_the_others() -> None:
    """A longer fine-tuning leaves the search's digest alone."""
    base: dict[str, object] = {"model.factory": "model:net", "data.arrays": "data.npz"}
    one, two = load_config(None, base), load_config(None, base | {"finetune.epochs": "9"})
    assert one.digest_of("model", "search") == two.digest_of("model", "search")
    assert one.digest != two.digest


def test_a_target_table_overrides_a_profile(tmp_path: Path) -> None:
    """Fields of a target's table win, options are merged, and the name is the table's."""
    config = load_config(
        written(tmp_path, MINIMAL + '[targets.box]\nprofile = "host"\naddress = "10.0.0.7"\noptions = {threads = 2}\n')
    )
    profile = config.profile("box")
    assert (profile.name, profile.adapter, profile.address) == ("box", "onnxruntime_cpu", "10.0.0.7")
    assert profile.options["threads"] == 2
    assert config.profile("host").options["threads"] == 1


def test_options_given_for_a_target_win_over_its_table_and_reach_no_other(tmp_path: Path) -> None:
    text = MINIMAL + '[targets.box]\nprofile = "host"\noptions = {threads = 2, priority = "normal"}\n'
    config = load_config(written(tmp_path, text), options={"box": {"threads": 1}, "arm-emulated": {"time_limit_s": 7}})
    assert config.profile("box").options["threads"] == 1
    assert config.profile("box").options["priority"] == "normal"
    assert config.profile("arm-emulated").options["time_limit_s"] == 7
    assert "time_limit_s" not in config.profile("host").options


def test_an_option_that_is_given_as_none_is_as_if_it_were_not_in_the_table(tmp_path: Path) -> None:
    text = MINIMAL + '[targets.box]\nprofile = "raspberry-pi-5"\noptions = {tune = 8}\n'
    path = written(tmp_path, text)
    assert load_config(path).profile("box").options["tune"] == 8
    without = load_config(path, options={"box": {"tune": None}}).profile("box")
    assert "tune" not in without.options
    assert load_config(path, options={"host": {"tune": None}}).profile("host") == load_config(path).profile("host")


@pytest.mark.parametrize("table", ["targets = 3", "[targets]\nbox = 3", "[targets.box]\noptions = 3"])
def test_options_for_a_table_that_is_none_are_refused_in_words(tmp_path: Path, table: str) -> None:
    path = tmp_path / "edgeprune.toml"
    path.write_text(f"{table}\n")
    with pytest.raises(ConfigError, match="targets"):
        load_config(path, {"model.factory": "model:net", "data.arrays": "data.npz"}, {"box": {"tune": 3}})


def test_a_target_with_several_addresses_is_several_boards_of_one_kind(tmp_path: Path) -> None:
    table = '[targets.shelf]\nprofile = "host"\naddress = ["ssh://a.local", "ssh://b.local"]\n'
    config = load_config(written(tmp_path, MINIMAL + table))
    one, other = config.boards("shelf")
    assert (one.address, other.address) == ("ssh://a.local", "ssh://b.local")
    assert one.digest == other.digest == config.profile("shelf").digest
    assert config.boards("host") == (config.profile("host"),)


@pytest.mark.parametrize("addresses", ['["ssh://a", "ssh://a"]', "[]"])
def test_a_board_is_listed_once(tmp_path: Path, addresses: str) -> None:
    config = load_config(written(tmp_path, MINIMAL + f'[targets.shelf]\nprofile = "host"\naddress = {addresses}\n'))
    with pytest.raises(ProfileError, match="address"):
        config.boards("shelf")


@pytest.mark.parametrize("address", ["5", '["ssh://a", 5]', "{a = 1}"])
def test_an_address_that_is_no_text_is_named_once_in_plain_words(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(written(tmp_path, MINIMAL + f'[targets.shelf]\nprofile = "rock-5b"\naddress = {address}\n'))
    assert "targets.shelf.address" in raised.value.why
    assert "should be text or a list of texts" in raised.value.why
    assert "_" not in raised.value.why


def test_a_target_may_name_a_profile_file_beside_the_configuration(tmp_path: Path) -> None:
    """A profile's path is relative to the file that names it."""
    (tmp_path / "mine.toml").write_text('adapter = "formula"\n')
    config = load_config(
        written(tmp_path, MINIMAL + '[targets.box]\nprofile = "mine.toml"\n[space]\nchannel_multiple = 4\n')
    )
    assert (config.profile("box").adapter, config.profile("box").channel_multiple) == ("formula", 4)
    with pytest.raises(ProfileError, match="unknown target 'moon'"):
        config.profile("moon")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("options = {block = nan}", "option 'block' is nan"),
        ("options = {deep = [1, {x = inf}]}", "option 'deep' is"),
        ("options = {since = 2024-01-01}", "option 'since' is"),
        ("options = {at = 12:00:00}", "option 'at' is"),
    ],
)
def test_options_that_json_cannot_say_are_refused(tmp_path: Path, table: str, told: str) -> None:
    """A profile is hashed and sent as JSON, so a date or a NaN is an error of the profile, before any adapter."""
    config = load_config(written(tmp_path, MINIMAL + f'[targets.box]\nprofile = "formula"\n{table}\n'))
    with pytest.raises(ProfileError, match="profile 'box'") as caught:
        config.profile("box")
    assert told in str(caught.value)
    assert config.profile("formula").digest


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'adapter = "\xff"', "is not TOML"),
        (b'adapter = "formula"\ncooldown_c = nan', "cooldown_c is nan"),
        (b'adapter = "formula"\noptions = 3', "options is 3"),
        (b'adapter = "formula"\noptions = "ab"', "options is 'ab'"),
        (b'adapter = "formula"\nchannel_multiple = 0', "is below 1"),
    ],
)
def test_a_profile_that_cannot_be_used_is_explained(tmp_path: Path, content: bytes, told: str) -> None:
    """Bytes that are not UTF-8, a NaN, options that are no table."""
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ProfileError) as caught:
        load_profile(str(path))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "steps"), [({}, 21), ({"epochs": 0.5}, 4), ({"steps": 5}, 5), ({"epochs": 0}, 0), ({"epochs": 1}, 7)]
)
def test_steps_are_counted_from_epochs(settings: dict[str, float], steps: int) -> None:
    """1,000 images in batches of 128 are 7 whole steps an epoch; three epochs if nothing is said."""
    assert FinetuneConfig.model_validate(settings).total_steps(1000) == steps


def test_a_configuration_is_frozen() -> None:
    """Nothing changes a setting after it was checked."""
    config: Config = load_config(None, {"model.factory": "model:net", "data.arrays": "data.npz"})
    with pytest.raises(ValueError, match="frozen"):
        config.search.seed = 3  # type: ignore[misc]


def test_devices_are_read_without_a_model_but_not_with_a_misspelt_table(tmp_path: Path) -> None:
    table = '[targets.box]\nprofile = "host"\naddress = "10.0.0.7"\n'
    devices = load_devices(written(tmp_path, table + "[search]\nno_such_setting = 1\n"))
    assert [each.address for each in devices.boards("box")] == ["10.0.0.7"]
    assert load_devices(None).boards("host") == (load_profile("host"),)
    with pytest.raises(ConfigError, match="target"):
        load_devices(written(tmp_path, table.replace("targets", "target")))
    with pytest.raises(ConfigError, match="adress"):
        load_devices(written(tmp_path, table.replace("address", "adress")))


def test_a_flag_takes_the_place_of_what_it_stands_for(tmp_path: Path) -> None:
    """Steps on the command line in place of epochs in the file, and the other way round; both as flags are refused."""
    path = tmp_path / "edgeprune.toml"
    path.write_text('[model]\nfactory = "a:b"\n[data]\narrays = "x.npz"\n[finetune]\nepochs = 2.0\n')
    found = load_config(path, {"finetune.steps": 40}).finetune
    assert (found.steps, found.epochs) == (40, None)
    assert load_config(path, {"finetune.epochs": 1, "finetune.steps": None}).finetune.epochs == 1
    with pytest.raises(ConfigError, match="epochs and steps"):
        load_config(path, {"finetune.epochs": 1, "finetune.steps": 40})


def test_a_reward_of_nothing_is_refused(tmp_path: Path) -> None:
    """Latency alone would choose."""
    path = tmp_path / "edgeprune.toml"
    path.write_text('[model]\nfactory = "a:b"\n[data]\narrays = "x.npz"\n[search]\nmethod = "entropy-rl"\n')
    with pytest.raises(ConfigError, match="neither right answers nor entropy"):
        load_config(path, {"search.reward.entropy": 0})
