"""What a run is asked to do: ``edgeprune.toml``, flags on top of it, defaults under it.

    [model]                                  [data]
    factory = "model:fashion_net"            arrays = "fashion.npz"
    weights = "fashion.safetensors"          mean = [0.286]
                                             std = [0.353]
    [budget]
    latency = "0.5x"

Relative paths are relative to the file; those given as flags, to the current folder.
"""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from edgeprune.budget import Budget, Latency
from edgeprune.canonical import digest, file_sha256
from edgeprune.errors import BudgetError, ConfigError, ProfileError
from edgeprune.intake.complaint import config_error
from edgeprune.intake.factory import Factory
from edgeprune.methods import DEFAULT, presets
from edgeprune.profile import Profile, load_profile
from edgeprune.reward import RewardWeights

PATHS = ("model.weights", "model.program", "data.arrays", "data.folder")
"""Settings that are paths."""


def _folder(info: ValidationInfo) -> Path:
    context = info.context or {}
    return Path(context.get("folder", Path.cwd()))


def _factory(value: object, info: ValidationInfo) -> object:
    return Factory.parse(value, _folder(info)) if isinstance(value, str) else value


def _resolved(value: object, info: ValidationInfo) -> object:
    return _folder(info) / _at_home(value) if isinstance(value, str) and value else value


def _at_home(text: str | Path) -> Path:
    """Return the path with its ~ resolved, or raise the ValueError that becomes a `ConfigError`."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # what pathlib raises for a user that does not exist
        raise ValueError("should be a path whose ~ names a home folder") from error


def _not_a_claim(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _listed(value: object) -> object:
    return [each.strip() for each in value.split(",")] if isinstance(value, str) else value


def _text_or_texts(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)):
        return value
    raise ValueError("should be text or a list of texts")


def _count_or_share(value: float) -> float:
    if value <= 0 or (value >= 1 and not value.is_integer()):
        raise ValueError("should be a share between 0 and 1 or a whole number of images")
    return value


FactoryName = Annotated[InstanceOf[Factory], BeforeValidator(_factory)]
FilePath = Annotated[Path, BeforeValidator(_resolved)]
Number = Annotated[float, BeforeValidator(_not_a_claim), Field(allow_inf_nan=False)]
Integer = Annotated[int, BeforeValidator(_not_a_claim)]
Count = Annotated[int, BeforeValidator(_not_a_claim), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_not_a_claim), Field(ge=0, lt=2**31)]
Positive = Annotated[float, BeforeValidator(_not_a_claim), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(_not_a_claim), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_not_a_claim), Field(gt=0, lt=1)]
CountOrShare = Annotated[float, BeforeValidator(_not_a_claim), AfterValidator(_count_or_share)]
Integers = Annotated[tuple[Integer, ...], BeforeValidator(_listed)]
Numbers = Annotated[tuple[Number, ...], BeforeValidator(_listed)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Addresses = Annotated[str | tuple[str, ...], BeforeValidator(_text_or_texts)]


class Section(BaseModel):
    """A table of the file: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """Which model; exactly one of `factory`, `program` and `name`.

    Attributes:
        factory: ``package.module:function`` that returns an `nn.Module`.
        kwargs: keyword arguments of the factory, or of timm's or torchvision's constructor.
        weights: a state dict, ``.safetensors`` or written by `torch.save`; None: as the factory returns it.
        program: a ``.pt2`` file written by `torch.export.save`.
        name: ``timm:resnet18`` or ``torchvision:mobilenet_v2``; pretrained there unless `weights` are given.
        input_shape: of one call, batch 1: 1 x C x H x W; None: the data says.
    """

    factory: FactoryName | None = None
    kwargs: dict[str, Any] = {}
    weights: FilePath | None = None
    program: FilePath | None = None
    name: Annotated[str, Field(pattern=r"^(timm|torchvision):[\w.\-/]+$")] | None = None
    input_shape: Integers | None = None

    @field_validator("input_shape")
    @classmethod
    def _is_one_image(cls, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if shape is not None and (len(shape) != 4 or shape[0] != 1 or min(shape) < 1):
            raise ValueError("should be 1 x channels x height x width, for example [1, 3, 224, 224]")
        return shape

    @model_validator(mode="after")
    def _has_one_source(self) -> "ModelConfig":
        _exactly_one(self, "factory", "program", "name")
        if self.program and (self.weights or self.kwargs):
            raise ValueError("has a program, which holds its own weights; remove weights and kwargs")
        return self

    def __str__(self) -> str:
        return self.name or (self.program.name if self.program else str(self.factory))


class DataConfig(Section):
    """Which images; exactly one of `factory`, `arrays` and `folder`.

    Attributes:
        factory: ``package.module:function`` that returns (images, labels), a map-style data set, or a mapping of
            "train", "validation" and "test" to either.
        kwargs: keyword arguments of the factory.
        arrays: an ``.npz`` with images and labels, or train_images, train_labels, test_images, ...
        folder: one folder of images for each class, or train/, validation/ and test/ of such folders.
        mean, std: of each channel, for pixels scaled to [0, 1]; needed where pixels are bytes, refused where they are
            floats.
        image_size: of a folder's images: short side scaled to `resize`, then the centre square of this many pixels.
        resize: pixels of the short side before the centre is cut out; None: `image_size`.
        grayscale: read a folder's images with one channel.
        validation: share or number of training images set aside for the search; a share sets aside at most 5,000.
        test: share or number of images set aside for the last evaluation when the data has no test set of its own.
        calibration: number of training images for batch-norm statistics, importance and entropy.
        limit: at most so many images of each set; None: all.
        seed: of every random choice of images.
    """

    factory: FactoryName | None = None
    kwargs: dict[str, Any] = {}
    arrays: FilePath | None = None
    folder: FilePath | None = None
    mean: Numbers | None = None
    std: Annotated[tuple[Positive, ...], BeforeValidator(_listed)] | None = None
    image_size: Count | None = None
    resize: Count | None = None
    grayscale: bool = False
    validation: CountOrShare = 0.1
    test: CountOrShare = 0.2
    calibration: Count = 512
    limit: Count | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits_together(self) -> "DataConfig":
        _exactly_one(self, "factory", "arrays", "folder")
        if (self.mean is None) != (self.std is None):
            raise ValueError("needs mean and std together")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(
                f"has {len(self.mean)} means and {len(self.std)} stds; one of each for a channel is wanted"
            )
        if self.resize and not self.image_size:
            raise ValueError("has resize without image_size, the side of the square that is cut out; set it as well")
        if self.resize and self.image_size and self.resize < self.image_size:
            raise ValueError(f"has resize {self.resize} below image_size {self.image_size}")
        return self

    @model_validator(mode="after")
    def _ignores_nothing(self) -> "DataConfig":
        for name in ("image_size", "grayscale"):
            if getattr(self, name) and self.folder is None:
                raise ValueError(f"has {name}, which is for a folder's images; remove it")
        if self.kwargs and self.factory is None:
            raise ValueError("has kwargs, which are a factory's; remove them")
        return self

    def __str__(self) -> str:
        path = self.arrays or self.folder
        return path.name if path else str(self.factory)


class BudgetConfig(Section):
    """The promise; see `edgeprune.budget.Budget`."""

    latency: str = "0.5x"
    quantile: Share = 0.5
    confidence: Annotated[float, BeforeValidator(_not_a_claim), Field(ge=0.5, lt=1)] = 0.95
    max_accuracy_drop: Annotated[float, BeforeValidator(_not_a_claim), Field(ge=0, le=1)] | None = None
    size_mib: Positive | None = None

    @field_validator("latency")
    @classmethod
    def _is_a_latency(cls, text: str) -> str:
        try:
            Latency.parse(text)
        except BudgetError as error:
            raise ValueError(error.next_step) from error
        return text

    def to_budget(self) -> Budget:
        """Return the budget as the noun the pipeline passes on."""
        return Budget(**self.model_dump(exclude={"latency"}), latency=Latency.parse(self.latency))


class RewardConfig(Section):
    """Weights of the reward's terms; see `edgeprune.reward.RewardWeights`."""

    accuracy: NotNegative = RewardWeights.accuracy
    overrun: NotNegative = RewardWeights.overrun
    unused: NotNegative = RewardWeights.unused
    entropy: NotNegative = RewardWeights.entropy
    speed: NotNegative = RewardWeights.speed

    def to_weights(self) -> RewardWeights:
        """Return the weights as the noun the reward takes."""
        return RewardWeights(**self.model_dump())


class PaodingConfig(Section):
    """How PAODING walks; see `edgeprune.paoding.walk.Settings`.

    Attributes:
        mode: how dense units leave; "auto": by impact where they can be merged in pairs, else by magnitude.
        step: share of each layer that a step takes.
        alpha: weight of the output's spread against its entropy; None: 0.75 for ReLU, else 0.05.
        squash: what brings spread and entropy to one scale.
    """

    mode: Literal["auto", "saliency", "impact", "stochastic", "scale"] = "auto"
    step: Share = 0.025
    alpha: Annotated[float, BeforeValidator(_not_a_claim), Field(ge=0, le=1)] | None = None
    squash: Literal["log1p", "sigmoid", "rank"] = "log1p"


class SearchConfig(Section):
    """How to look for a plan; what is not given is as `method` says, see `edgeprune.methods`.

    Attributes:
        method: how widths and channels are chosen.
        strategy: the searcher.
        importance: the rule that says which channels of a group go first, see `edgeprune.importance`.
        reconstruction: how kept channels make up for those that go, see `edgeprune.reconstruction`.
        repairs: the searcher decides, for each group, on the coefficient of the reconstruction as well.
        judged_by: labels of validation images, the unpruned model's answers to them, or its answers to synthetic ones.
        data_free: look at no image before the last evaluation; there is no fine-tuning.
        recalibrate: re-estimate the batch norms of candidates: averages over training images, or, if data_free,
            carried over by regression on synthetic ones.
        trials: candidates to measure.
        seed: of every random choice of the searcher.
        time_limit_s: seconds after which the best plan so far is taken; None: all trials.
        validation_images: number of validation images a candidate is judged on; None: all.
        precision: of the accuracy passes of the search; "auto" times both once and takes the faster.
        paoding: of importance "paoding".
    """

    method: Literal["amc", "entropy-rl", "autodfp", "paoding"] = "amc"
    strategy: Literal["ddpg", "sac", "uniform", "random", "walk"] = "sac"
    importance: str = "taylor"
    reconstruction: Literal["none", "merge", "ridge", "local-ridge", "pairs"] = "none"
    repairs: bool = False
    judged_by: Literal["labels", "teacher", "synthetic"] = "labels"
    data_free: bool = False
    recalibrate: bool = True
    trials: Count = 100
    seed: Seed = 0
    time_limit_s: Positive | None = None
    validation_images: Count | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    reward: RewardConfig = RewardConfig()
    paoding: PaodingConfig = PaodingConfig()

    @model_validator(mode="before")
    @classmethod
    def _as_the_method_says(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        known = presets(str(given.get("method", DEFAULT)), data_free=given.get("data_free") in (True, "true"))
        reward = given.get("reward", {})
        if isinstance(reward, Mapping) and "reward" in known:
            known["reward"] = {**known["reward"], **reward}
            given = {name: value for name, value in given.items() if name != "reward"}
        return {**known, **given}

    @model_validator(mode="after")
    def _fits_together(self) -> "SearchConfig":
        if self.data_free and self.judged_by != "synthetic":
            raise ValueError('is data_free: keep judged_by = "synthetic"')
        if self.judged_by == "synthetic" and not self.data_free:
            raise ValueError("is judged by synthetic images, which are made with data_free = true alone")
        if self.reconstruction == "pairs" and self.importance != "paoding":
            raise ValueError('merges pairs, which importance = "paoding" alone finds; set reconstruction = "none"')
        if self.reward.accuracy == self.reward.entropy == 0:
            raise ValueError("rewards neither right answers nor entropy: give search.reward one of them")
        if self.repairs and self.reconstruction in ("none", "pairs"):
            raise ValueError(
                "decides on repairs, and nothing is repaired; set repairs = false, or reconstruction to "
                '"merge", "ridge" or "local-ridge"'
            )
        return self


class SpaceConfig(Section):
    """What may be cut.

    Attributes:
        exclude: names or globs of layers that must stay whole, for example "stages.stage1.*".
        minimum_ratio: the smallest share of a channel group that a plan may keep.
        channel_multiple: kept channels are multiples of it; None: as the target's profile says.
    """

    exclude: Names = ()
    minimum_ratio: Annotated[float, BeforeValidator(_not_a_claim), Field(ge=0, le=1)] = 0.1
    channel_multiple: Count | None = None


class DecayConfig(Section):
    """How channels decay under ``finetune.method = "decay"``; see `edgeprune.decay`.

    Attributes:
        host: who says which channels go: by group norm, by gates, or by leaving their half-space.
        steps: optimiser steps in which one channel decays, N of the paper.
        share: of all fine-tuning steps, the first part, in which the unpruned model is trained and channels decay.
        lead: share of that part before the first channel begins, in which the host looks on.
        rounds: in how many parts, one after the other, the channels begin.
        rectify: release channels whose gradients resist, and take others instead.
        t_rate, t_len: thresholds of resistance and of the gradient's length beside the other channels of its group.
        rate: what `t_rate` is compared with: the measured growth, that over the learning rate, or a cosine.
        releases: how often one channel may be released.
        cooldown: steps after its release in which a channel is not taken again, at least `steps`; None: `steps`.
        sparsity: strength of the host's own penalty; None: 0 for group-norm, 0.001 for the others.
        widths: "plan": those of the search's winner; "latency": picked anew by importance per millisecond saved.
    """

    host: Literal["group-norm", "gates", "half-space"] = "group-norm"
    steps: Count = 20
    share: Annotated[float, BeforeValidator(_not_a_claim), Field(gt=0, le=1)] = 0.4
    lead: Annotated[float, BeforeValidator(_not_a_claim), Field(ge=0, lt=1)] = 0.1
    rounds: Count = 4
    rectify: bool = True
    t_rate: Number = 0.0
    t_len: NotNegative = 1.0
    rate: Literal["measured", "per-rate", "cosine"] = "measured"
    releases: Annotated[int, BeforeValidator(_not_a_claim), Field(ge=0)] = 2
    cooldown: Annotated[int, BeforeValidator(_not_a_claim), Field(ge=0)] | None = None
    sparsity: NotNegative | None = None
    widths: Literal["plan", "latency"] = "plan"

    @model_validator(mode="after")
    def _rests_long_enough(self) -> "DecayConfig":
        if self.cooldown is not None and self.cooldown < self.steps:
            raise ValueError(
                f"has cooldown {self.cooldown}; a released channel rests for its {self.steps} steps at least"
            )
        return self


class FinetuneConfig(Section):
    """How the winner is trained further; the defaults are measured, see `edgeprune.finetune`.

    Attributes:
        method: "one-step" trains the cut model; "decay" lets the channels that must go decay first, then cuts.
        decay: how.
        epochs: passes over the training images, a fraction is allowed; 0: do not fine-tune.
        steps: optimiser steps instead of epochs.
        learning_rate: peak of the cosine schedule.
        distill: weight of the unpruned model's answers in the loss, 0: labels only, 1: answers only.
        temperature: of the softmax in the distillation.
        precision: "auto" times three steps of each kind and takes the faster.
        augment: "flip" mirrors images left to right, "flip-crop" shifts them as well.
        seed: of the order of images and of the augmentation.
        checkpoint_s: seconds between checkpoints.
    """

    method: Literal["one-step", "decay"] = "one-step"
    decay: DecayConfig = DecayConfig()
    epochs: NotNegative | None = None
    steps: Annotated[int, BeforeValidator(_not_a_claim), Field(ge=0)] | None = None
    learning_rate: Positive = 0.02
    batch_size: Count = 128
    weight_decay: NotNegative = 5e-4
    momentum: Annotated[float, BeforeValidator(_not_a_claim), Field(ge=0, lt=1)] = 0.9
    distill: Annotated[float, BeforeValidator(_not_a_claim), Field(ge=0, le=1)] = 0.7
    temperature: Positive = 2.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    augment: Literal["none", "flip", "flip-crop"] = "flip"
    seed: Seed = 0
    checkpoint_s: Positive = 30.0

    @model_validator(mode="after")
    def _has_one_length(self) -> "FinetuneConfig":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("has epochs and steps; keep one of them")
        if self.method == "decay" and (self.epochs == 0 or self.steps == 0):
            raise ValueError('has method "decay" and no step to decay in; raise epochs or steps')
        return self

    def total_steps(self, images: int) -> int:
        """Return how many optimiser steps to take on a training set of so many images; 3 epochs if nothing is said.

        An epoch leaves out the last, incomplete batch.
        """
        if self.steps is not None:
            return self.steps
        epochs = 3.0 if self.epochs is None else self.epochs
        return math.ceil(epochs * max(1, images // self.batch_size))


class RobustnessConfig(Section):
    """What the last evaluation does to test images beside counting right answers; see `edgeprune.robustness`.

    Attributes:
        attacks: "fgsm", "pgd", or both; None: both where `search.method` is "paoding", which promises robustness.
        epsilon: how far a pixel in [0, 1] may be moved.
        steps: of PGD.
        images: at most so many test images, the classes in proportion.
    """

    attacks: Annotated[tuple[Literal["fgsm", "pgd"], ...], BeforeValidator(_listed)] | None = None
    epsilon: Annotated[float, BeforeValidator(_not_a_claim), Field(ge=0, le=1)] = 0.01
    steps: Count = 10
    images: Count = 500


class MeasureConfig(Section):
    """How long to time; see `edgeprune.measurement.Sampling`.

    Attributes:
        sessions_min, sessions_max: fresh runtime sessions of one candidate.
        session_ms: milliseconds of sampling in one session.
        final_sessions: fresh sessions of the winner's re-measurement.
    """

    sessions_min: Count = 2
    sessions_max: Count = 6
    session_ms: Positive = 500.0
    final_sessions: Count = 8

    @model_validator(mode="after")
    def _ascends(self) -> "MeasureConfig":
        if self.sessions_min > self.sessions_max:
            raise ValueError(f"has sessions_min {self.sessions_min} above sessions_max {self.sessions_max}")
        return self


class TargetConfig(Section):
    """One device: a profile and what differs from it; see `edgeprune.profile.Profile`.

    Attributes:
        profile: a shipped profile or the path of a TOML file; None: the shipped profile of the table's name.
        address: where the device is, or a list: several boards of one kind, among which measurements are spread.
    """

    profile: str | None = None
    adapter: str | None = None
    address: Addresses | None = None
    arch: str | None = None
    precision: str | None = None
    channel_multiple: Count | None = None
    memory_mib: Count | None = None
    power_mode: str | None = None
    cooldown_c: Number | None = None
    options: dict[str, Any] = {}
    description: str | None = None


class Config(Section):
    """Everything a run is asked to do."""

    model: ModelConfig
    search: SearchConfig = SearchConfig()
    data: Annotated[DataConfig | None, Field(validate_default=True)] = None
    budget: BudgetConfig = BudgetConfig()
    space: SpaceConfig = SpaceConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    measure: MeasureConfig = MeasureConfig()
    robustness: RobustnessConfig = RobustnessConfig()
    targets: dict[str, TargetConfig] = {}

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    def model_post_init(self, context: Any) -> None:
        """Remember the folder that relative paths start from."""
        if context:
            self._folder = Path(context["folder"])

    @field_validator("data")
    @classmethod
    def _is_there_unless_data_free(cls, data: DataConfig | None, info: ValidationInfo) -> DataConfig | None:
        search = info.data.get("search")
        if data is None and search is not None and not search.data_free:
            raise ValueError("is missing; name images, or do without them: search.data_free, --data-free")
        return data

    @model_validator(mode="after")
    def _promises_no_accuracy_without_data(self) -> "Config":
        if self.search.data_free and self.finetune.method == "decay":
            raise ValueError("is data_free, and channels decay while the model learns; remove one of them")
        if self.data is None and self.budget.max_accuracy_drop is not None:
            raise ValueError("has budget.max_accuracy_drop, which takes labelled test images; name them in [data]")
        return self

    @property
    def folder(self) -> Path:
        """Return the folder of the file, or the current folder at the time when there is no file."""
        return self._folder

    @property
    def digest(self) -> str:
        """Return the SHA-256 of every setting that decides what is delivered; see `digest_of`.

        The data of a data-free run decides nothing, and is not even hashed before its last evaluation.
        """
        sections = ("model", "data", "budget", "search", "space", "finetune", "measure")
        return self.digest_of(*(each for each in sections if each != "data" or not self.search.data_free))

    def digest_of(self, *sections: str) -> str:
        """Return the SHA-256 of some sections, files by their content and wherever they lie.

        A folder of images counts by its name and a factory by its name: their content has digests of its own,
        `Splits.digest` and `LoadedModel.digest`. So has the target, `Profile.digest`.
        """
        return digest({name: _facts(getattr(self, name)) for name in sections})

    def profile(self, name: str) -> Profile:
        """Return the profile of target `name` with the overrides of its table.

        Raises:
            ProfileError: if it is unknown or malformed.
        """
        return self.boards(name)[0]

    def boards(self, name: str) -> tuple[Profile, ...]:
        """Return the profile of target `name` once for each of its addresses: the boards it may be measured on.

        Raises:
            ProfileError: if it is unknown or malformed, or an address is given twice.
        """
        return _boards(name, self.targets.get(name, TargetConfig()), self.folder, self.space.channel_multiple)


class Devices(Section):
    """The devices that a file names, whatever else it says or lacks: to examine a board takes no model.

    Attributes:
        targets: as in `Config`.
        space: as in `Config`; its channel multiple is part of every profile.
    """

    targets: dict[str, TargetConfig] = {}
    space: SpaceConfig = SpaceConfig()

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    def model_post_init(self, context: Any) -> None:
        """Remember the folder that relative paths start from."""
        if context:
            self._folder = Path(context["folder"])

    def boards(self, name: str) -> tuple[Profile, ...]:
        """Return the profile of target `name` once for each of its addresses.

        Raises:
            ProfileError: if it is unknown or malformed, or an address is given twice.
        """
        return _boards(name, self.targets.get(name, TargetConfig()), self._folder, self.space.channel_multiple)


def _boards(name: str, settings: TargetConfig, folder: Path, channel_multiple: int | None) -> tuple[Profile, ...]:
    given = settings.address
    addresses = (given,) if given is None or isinstance(given, str) else given
    if not addresses or len(set(addresses)) < len(addresses):
        raise ProfileError(
            f"target {name!r}: address is {list(addresses)!r}",
            why="one or more addresses are wanted, each of another board",
        )
    return tuple(_profile(name, settings, folder, channel_multiple, each) for each in addresses)


def _profile(
    name: str, settings: TargetConfig, folder: Path, channel_multiple: int | None, address: str | None
) -> Profile:
    source = settings.profile or name
    if source.endswith(".toml"):
        source = str(folder / source)
    overrides = settings.model_dump(exclude_unset=True, exclude={"profile", "address"}) | {"name": Path(name).stem}
    overrides |= {"address": address} if address is not None else {}
    overrides |= {"channel_multiple": channel_multiple} if channel_multiple is not None else {}
    return load_profile(source, overrides)


def load_devices(path: Path | None) -> Devices:
    """Return the devices that the file at `path` names, or those of no file: the shipped profiles alone.

    Raises:
        ConfigError: naming every setting of them that is unknown or out of range.
    """
    passed_over = set(Config.model_fields) - set(Devices.model_fields)
    tree = {name: each for name, each in (_read(path) if path else {}).items() if name not in passed_over}
    folder = (path.parent if path else Path.cwd()).resolve()
    try:
        return Devices.model_validate(tree, context={"folder": folder})
    except ValidationError as error:
        raise config_error(error, Config, path.name if path else "the command line") from error


def load_config(
    path: Path | None,
    overrides: Mapping[str, object] | None = None,
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> Config:
    """Return the configuration in the file at `path`, if one is given, under `overrides`.

    Args:
        path: of a TOML file.
        overrides: dotted name → value, for example {"budget.latency": "8ms"}; text is read as the setting wants it,
            None is passed over.
        options: name of a target → options of its adapter, on top of those in the file; None takes one away.

    Raises:
        ConfigError: naming every setting that is missing, unknown or out of range.
    """
    tree = _read(path) if path else {}
    for name, value in (overrides or {}).items():
        if value is not None:
            _put(tree, name, value)
            _displace(tree, name, overrides or {})
    for target, given_options in (options or {}).items():
        _put_options(tree, target, given_options)
    folder = (path.parent if path else Path.cwd()).resolve()
    try:
        return Config.model_validate(tree, context={"folder": folder})
    except ValidationError as error:
        given = {name for name, value in (overrides or {}).items() if value is not None}
        raise config_error(error, Config, path.name if path else "the command line", given) from error


_INSTEAD = {"finetune.steps": "epochs", "finetune.epochs": "steps"}


def _displace(tree: dict[str, Any], name: str, overrides: Mapping[str, object]) -> None:
    """Take away what a flag is given instead of, unless that is a flag as well."""
    other = _INSTEAD.get(name)
    if other and overrides.get(f"finetune.{other}") is None:
        tree["finetune"].pop(other, None)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}",
            why=error.strerror or str(error),
            next_step="give the path of an edgeprune.toml, or name model and data with flags",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML", why=str(error), next_step="mend the line it names") from error


def _put(tree: dict[str, Any], name: str, value: object) -> None:
    """Set the dotted `name` in nested tables."""
    *above, key = name.split(".")
    for part in above:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"cannot set {name}", why=f"{part} is not a table in the file")
    if name in PATHS and isinstance(value, str | Path):
        try:
            value = str(Path.cwd() / _at_home(value))
        except ValueError as error:
            raise ConfigError(f"{name} is {str(value)!r}", why=str(error), next_step="write the path out") from error
    tree[key] = value


def _put_options(tree: dict[str, Any], target: str, options: Mapping[str, object]) -> None:
    """Set options of a target, whose name may hold dots, and take away those that are None.

    A table that is none is complained of later.
    """
    table: object = tree
    for name in ("targets", target, "options"):
        if not isinstance(table, dict):
            return
        table = table.setdefault(name, {})
    if isinstance(table, dict):
        table |= options
        for name in [each for each, value in table.items() if value is None]:
            del table[name]


def _exactly_one(section: Section, *names: str) -> None:
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        found = "and ".join(f"{name} " for name in given) if given else "none "
        raise ValueError(f"needs exactly one of {', '.join(names)}; {found}given")


def _facts(value: object) -> object:
    if isinstance(value, Section):
        return {name: _facts(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {str(key): _facts(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_facts(each) for each in value]
    if isinstance(value, Path):
        return file_sha256(value) if value.is_file() else value.name
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
