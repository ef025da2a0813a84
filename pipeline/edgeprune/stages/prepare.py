"""What a run works on: the data, the model, its graph and its channel groups, checked before any device is asked."""

import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.budget import Budget
from edgeprune.canonical import digest, file_sha256
from edgeprune.cut import proven
from edgeprune.durable import storage_errors
from edgeprune.errors import ConfigError, DataError, LedgerError, NothingFits
from edgeprune.evaluate import write_graph
from edgeprune.export import export
from edgeprune.finetune import check_decaying
from edgeprune.importance import check_at_hand, check_needs
from edgeprune.intake.config import Config, SearchConfig
from edgeprune.intake.data import Splits, load_data
from edgeprune.intake.data_free import DataFree
from edgeprune.intake.model import LoadedModel, load_model
from edgeprune.ledger import Ledger
from edgeprune.manifest import PARITY_SAMPLES as RECORDED
from edgeprune.paoding.intervals import Bounds
from edgeprune.paoding.network import read
from edgeprune.paoding.walk import Settings, Walk, walk
from edgeprune.profile import Profile
from edgeprune.progress import Progress, Silent
from edgeprune.provenance import code_digest, machine, versions
from edgeprune.run_lock import RunLock
from edgeprune.search.loop import Done, insist
from edgeprune.stages.attacks import attacks
from edgeprune.stages.synthetic_images import synthetic_images
from edgeprune.structure import Structure, build_structure
from edgeprune.tolerance import tolerances

SLUG = 20
"""Letters of a model's or a profile's name that stand in the name of a run."""

SYNTHETIC, UNSEEN = 128, 64
"""Images that a data-free run makes to judge by, and others for its last evaluation if there is no data."""

UNSEEN_SEED = 1_000_003
"""Added to the seed of the search for those others."""

LEDGER, LOCK = "ledger.sqlite", "ledger.sqlite.lock"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One deploy, as asked for.

    Attributes:
        config: everything but where to.
        target: name of the target, a shipped profile or a table of the configuration.
        out: folder of runs and bundles.
        command: what the user typed, for the report.
        stop: raises `Interrupted` when the user asked to stop.
        fresh: forget what an earlier run of the same request did.
        sleep: waits between two tries of a device that failed.
    """

    config: Config
    target: str
    out: Path
    command: str = ""
    progress: Progress = Silent()  # noqa: RUF009 - it has no state
    stop: Callable[[], None] = lambda: None
    fresh: bool = False
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run works on: nothing in it was measured yet."""

    request: Request
    boards: tuple[Profile, ...]
    budget: Budget
    model: LoadedModel
    splits: Splits | DataFree
    graph: onnx.ModelProto
    baseline: Artifact
    structure: Structure
    run: str
    folder: Path
    ledger: Ledger

    @property
    def profile(self) -> Profile:
        """Return what the target's boards have in common, and the address of the first."""
        return self.boards[0]

    @property
    def config(self) -> Config:
        """Return the configuration."""
        return self.request.config

    @property
    def progress(self) -> Progress:
        """Return where to say what is being done."""
        return self.request.progress

    @cached_property
    def walk(self) -> Walk:
        """Return PAODING's walk through the model: made from weights alone, the same every time."""
        known = self.config.search.paoding
        settings = Settings(**known.model_dump(exclude_none=True), seed=self.config.search.seed)
        return walk(read(self.model.module, self.structure, self.graph, box=self._pixels()), settings)

    def _pixels(self) -> Bounds | None:
        """Return what valid pixels become when they are normalised, low and high of each channel; None: not known."""
        mean, std = (np.array(each) for each in self.splits.normalisation)
        return Bounds(low=-mean / std, high=(1 - mean) / std) if len(mean) else None

    def insist(self, action: Callable[[], Done]) -> Done:
        """Return what `action` returns, tried again while the device fails."""
        return insist(action, self.ledger, self.run, sleep=self.request.sleep)


def prepare(request: Request, stack: ExitStack) -> Prepared:
    """Return the model, the data, the graph and the structure, checked; opens the ledger on `stack`."""
    config, progress = request.config, request.progress
    boards, budget = config.boards(request.target), config.budget.to_budget()
    profile = boards[0]
    tolerances(profile, 1.0)  # a precision that cannot be proven is refused before anything is loaded
    looks, rule = not config.search.data_free, config.search.importance
    if rule != "paoding":
        check_at_hand(rule, images=looks, labels=looks)
    model, splits = _dreamt(request) if config.search.data_free else _loaded(config, progress)
    chosen = attacks(config, splits).chosen  # what cannot be carried out is refused here as well
    if config.search.method == "paoding" and config.robustness.attacks is None and not chosen:
        progress.note("no attacks: what a pixel is is not known, as the data came normalised or is not there")
    code = [code_digest(model.module), versions(), machine()]
    run = digest([config.digest, profile.digest, model.digest, splits.digest, *code])
    folder = request.out / f"{run_name(model.name, profile.name, budget, run)}.run"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if request.fresh:
        _forget(folder)
    ledger = stack.enter_context(Ledger.open(folder / LEDGER))
    example = splits.calibration.tensor(slice(0, 2))
    with progress.stage("export to ONNX"):
        graph, baseline = _exported(model.module, example[:1], folder, ledger, run)
    with progress.stage("find channel groups"):
        structure = find_structure(config, profile, model.module, example, graph)
        if rule != "paoding":
            check_needs(rule, model.module, structure, images=looks, labels=looks)
    _check_entropy(config.search, structure, progress)
    if config.finetune.method == "decay":  # what cannot be carried out is refused before anything is measured
        check_decaying(model.module, structure, config.finetune, len(splits.train))
    prepared = Prepared(
        request=request,
        boards=boards,
        budget=budget,
        model=model,
        splits=splits,
        graph=graph,
        baseline=baseline,
        structure=structure,
        run=run,
        folder=folder,
        ledger=ledger,
    )
    if rule == "paoding":
        _walk_ahead(prepared)
    return prepared


def _walk_ahead(prepared: Prepared) -> None:
    """Make the walk now: a mode that does not apply is refused before anything is measured."""
    with prepared.progress.stage("walk through the layers"):
        taken = prepared.walk.taken
    search = prepared.config.search
    if search.paoding.mode == "auto" and set(taken.values()) == {"scale"}:
        prepared.progress.note("paoding: no dense layers to merge in pairs, so all goes by magnitude (mode scale)")
    if search.reconstruction != "pairs" and "scale" not in set(taken.values()):
        prepared.progress.note(
            f"paoding: no pairs are merged, as search.reconstruction is {search.reconstruction}; its order alone counts"
        )


def _check_entropy(search: SearchConfig, structure: Structure, progress: Progress) -> None:
    """Refuse a reward of entropy alone where no map has neighbours; say so where entropy is only left out.

    Raises:
        ConfigError: if there is nothing to choose by.
    """
    if search.reward.entropy == 0 or has_maps(structure):
        return
    if search.reward.accuracy == 0:
        raise ConfigError(
            "there is no entropy to choose by",
            why="no convolution of the model has maps of more than one pixel, and accuracy has no weight",
            next_step="choose --method amc, or paoding for dense layers; or set search.reward.accuracy = 1",
        )
    progress.note("spatial entropy is left out of the reward: no convolution has maps of more than one pixel")


def has_maps(structure: Structure) -> bool:
    """Return whether a convolution has maps of more than one pixel each way, which spatial entropy reads."""
    return any(
        each.kind not in ("linear", "transposed") and min(each.height, each.width) > 1 for each in structure.layers
    )


def _loaded(config: Config, progress: Progress) -> tuple[LoadedModel, Splits]:
    assert config.data is not None
    with progress.stage("load data and model"):
        splits = load_data(config.data)
        model = load_model(config.model, input_shape=splits.input_shape)
        splits.check_fit(model)
        _check_enough(splits)
        if not splits.labelled:
            _check_unlabelled(splits, config.search)
            splits.answered_by(model)
    return model, splits


def _dreamt(request: Request) -> tuple[LoadedModel, DataFree]:
    """Return the model and images made from it alone: no data set is opened."""
    config, progress = request.config, request.progress
    with progress.stage("load the model"):
        model = load_model(config.model)
    made = partial(synthetic_images, model, folder=request.out, progress=progress, fresh=request.fresh)
    images = made(SYNTHETIC, seed=config.search.seed)
    if config.data:
        return model, DataFree(model, images, config.data)
    others = made(UNSEEN, seed=config.search.seed + UNSEEN_SEED, what="synthetic images for the last evaluation")
    return model, DataFree(model, images, others)


def _check_unlabelled(splits: Splits, search: SearchConfig) -> None:
    if search.judged_by == "labels" and search.reward.accuracy > 0:
        raise DataError(
            f"{splits.name} has no labels",
            why=f"method {search.method} rewards right answers",
            next_step='add them, or set search.judged_by = "teacher": agreement with the unpruned model',
        )


def _check_enough(splits: Splits) -> None:
    fewest, found = RECORDED[0], len(splits.train)
    if found < fewest:
        raise DataError(
            f"{splits.name}: only {found} training images",
            why=f"a bundle records what the model answers to at least {fewest}",
            next_step="give more images, or lower data.validation or data.test",
        )


def run_name(model: str, profile: str, budget: Budget, run: str) -> str:
    """Return what a run's folder and its bundle are called: a name that the manifest accepts, however long the others.

    Two slugs that are cut to the same are told apart by the run's digest.
    """
    latency = str(budget.latency).replace("+", "")  # of an exponent
    return f"{_slug(model)}-{_slug(profile)}-{latency}-{run[:8]}"


def _slug(name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "_", name.rpartition(":")[2].lower()).strip("_")
    return slug[:SLUG].rstrip("_") or "model"


def _forget(folder: Path) -> None:
    """Remove what an earlier run left in its folder, unless it is still running.

    Raises:
        DeviceBusy: if it is.
    """
    lock = RunLock.take(folder / LOCK)
    try:
        with storage_errors(folder):
            for each in folder.iterdir():
                if each.name != LOCK:
                    shutil.rmtree(each) if each.is_dir() else each.unlink()
    finally:
        lock.release()


def find_structure(
    config: Config, profile: Profile, module: nn.Module, example: torch.Tensor, graph: onnx.ModelProto
) -> Structure:
    """Return the prunable structure of a module, every group proven by a trial cut.

    Raises:
        NothingFits: if no layer can be pruned.
    """
    structure = build_structure(
        module,
        example[:1],
        graph,
        multiple=profile.channel_multiple,
        minimum_ratio=config.space.minimum_ratio,
        exclude=config.space.exclude,
    )
    structure = proven(module, example, structure)
    if not structure.space.groups:
        reasons = "; ".join(f"{each.layer}: {each.reason}" for each in structure.unprunable[:3])
        raise NothingFits(
            "no layer of the model can be pruned", why=reasons, next_step="edgeprune space lists every layer and why"
        )
    return structure


def _exported(
    module: nn.Module, example: torch.Tensor, folder: Path, ledger: Ledger, run: str
) -> tuple[onnx.ModelProto, Artifact]:
    """Return the unpruned graph, exported once per run: a resumed run reads the file the first one wrote.

    Raises:
        LedgerError: if the file is damaged and this PyTorch exports another graph than the one the run started with.
    """
    path, inputs = folder / "baseline.onnx", (TensorSpec(name="input", shape=tuple(example.shape)),)
    known = ledger.fact(run, "baseline.onnx")
    if known is not None and path.is_file() and file_sha256(path) == known:
        return onnx.load(path, load_external_data=False), Artifact.of(path, kind="onnx", inputs=inputs)
    graph = export(module, example)
    artifact = write_graph(graph, path, inputs, lasting=True)
    if known not in (None, artifact.sha256):
        raise LedgerError(
            f"{path} was changed, and exporting the model again gives another graph",
            why="the run was started with another PyTorch",
            next_step="start over with --fresh",
        )
    ledger.record(run, "baseline.onnx", artifact.sha256)
    return graph, artifact
