"""From a trained model to a verified bundle.

                                   ┌─── misses the budget ───┐
                                   ▼                         │
    prepare ─▶ baseline ─▶ search ─▶ settle ─▶ fine-tune ─▶ check ─▶ prove ─▶ bundle ─▶ report
       │           │          │         │           │          │
       └───────────┴──────────┴── ledger.sqlite ────┴──────────┘     a killed run continues where it was

A run lives in ``<out>/<name>.run/``; its bundle is ``<out>/<name>/`` and ``<out>/<name>.tar``.
"""

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch import nn

from edgeprune import cost
from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.budget import Budget
from edgeprune.canonical import digest, file_sha256
from edgeprune.cut import GraphCutter, proven
from edgeprune.durable import storage_errors
from edgeprune.errors import BudgetError, DataError, LedgerError, NothingFits, ParityFailed
from edgeprune.evaluate import Base, Judge, write_graph
from edgeprune.export import export
from edgeprune.finetune import finetune
from edgeprune.importance import ranking, unit_importance
from edgeprune.intake.config import Config
from edgeprune.intake.data import Splits, load_data
from edgeprune.intake.images import ArraySet
from edgeprune.intake.model import LoadedModel, load_model
from edgeprune.ledger import Ledger
from edgeprune.manifest import PARITY_SAMPLES as RECORDED
from edgeprune.measurement import Measurement, Sampling
from edgeprune.metric import check_limit, unit_of
from edgeprune.outcome import ModelFacts, Outcome, WidthChange
from edgeprune.pack import BundleContents, pack, write_bundle
from edgeprune.plan import Plan
from edgeprune.profile import Profile
from edgeprune.progress import Progress, Silent
from edgeprune.provenance import code_digest, machine, versions
from edgeprune.quality import Evaluator
from edgeprune.run_lock import RunLock
from edgeprune.search.loop import Bench, Done, insist, search
from edgeprune.search.problem import Problem
from edgeprune.search.settle import settle
from edgeprune.search.strategies import make_searcher
from edgeprune.structure import Structure, build_structure
from edgeprune.target import Packager, Target, open_target
from edgeprune.trial import Quality, Trial
from edgeprune.verdict import verdict

if TYPE_CHECKING:
    from edgeprune.finetune import FinetuneResult

EVALUATION_BATCH = 250
"""Images in one batch of an accuracy pass."""

CALIBRATION_BATCH = 128
PARITY_SAMPLES = 4
SLUG = 20
"""Letters of a model's or a profile's name that stand in the name of a run."""

BARELY = 0.1
"""An unpruned model that does better than chance by less than this share of what there is to do better is warned of."""

WINNERS = 3
"""Plans that are fine-tuned before one that misses the budget is delivered as such."""

TOLERANCES = (1e-4, 1e-3)
"""(absolute, as a share of the largest answer; relative) difference of the engine's answers from PyTorch's."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": None}
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
    profile: Profile
    budget: Budget
    model: LoadedModel
    splits: Splits
    graph: onnx.ModelProto
    baseline: Artifact
    structure: Structure
    run: str
    folder: Path
    ledger: Ledger

    @property
    def config(self) -> Config:
        """Return the configuration."""
        return self.request.config

    @property
    def progress(self) -> Progress:
        """Return where to say what is being done."""
        return self.request.progress

    def insist(self, action: Callable[[], Done]) -> Done:
        """Return what `action` returns, tried again while the device fails."""
        return insist(action, self.ledger, self.run, sleep=self.request.sleep)


def deploy(request: Request) -> Outcome:
    """Return the outcome of a deploy; its bundle and report are written, whether the budget is met or not.

    Raises:
        EdgepruneError: any of them; the ledger keeps what was done, the same request continues.
    """
    with ExitStack() as stack:
        prepared = prepare(request, stack)
        target = stack.enter_context(open_target(prepared.profile))
        return _carry_out(prepared, target)


def _carry_out(prepared: Prepared, target: Target) -> Outcome:
    bench, timing = start_bench(prepared, target)
    _announce(prepared, bench, timing)
    _say_what_is_known(prepared)
    problem = pose(prepared, bench, timing)
    seconds = _Seconds(prepared.ledger, prepared.run)
    with seconds.of("search"):
        trials = look(prepared, bench, problem)
    winner, tuned, checked = _checked_winner(prepared, bench, target, problem, trials, seconds)
    with seconds.of("prove"), prepared.progress.stage("accuracy on test"):
        proof = prove(prepared, bench, winner, tuned, checked)
    outcome = _outcome(prepared, bench, timing, winner, proof, seconds.total())
    return _deliver(prepared, outcome, winner, proof)


def _checked_winner(
    prepared: Prepared, bench: Bench, target: Target, problem: Problem, trials: Sequence[Trial], seconds: "_Seconds"
) -> tuple[Trial, "FinetuneResult", "Checked"]:
    """Return the plan that is delivered, fine-tuned and checked: one that misses the budget now gives way to another.

    After `WINNERS` of them the last is delivered all the same, and said to miss.
    """
    known: dict[str, float] = prepared.ledger.fact(prepared.run, "missed_once_tuned") or {}
    refused: dict[str, tuple[Trial, float]] = {}
    while True:
        with seconds.of("settle"), prepared.progress.stage("settle the winner"):
            winner, last = _next_winner(bench, problem, trials, _final_sampling(prepared, bench), refused)
        if last or winner.plan.digest not in known:
            with seconds.of("finetune"):
                tuned = tune(prepared, bench, winner)
            with seconds.of("prove"), prepared.progress.stage("measure and check"):
                checked = check(prepared, bench, target, winner, tuned)
            high = _highest(prepared.budget, bench, checked.timing)
            if last or high <= bench.judge.limit_ratio or len(refused) + 1 == WINNERS:
                return winner, tuned, checked
            known[winner.plan.digest] = high
            prepared.ledger.record(prepared.run, "missed_once_tuned", known)
        refused[winner.plan.digest] = (winner, known[winner.plan.digest])


def _next_winner(
    bench: Bench,
    problem: Problem,
    trials: Sequence[Trial],
    sampling: Sampling,
    refused: Mapping[str, tuple[Trial, float]],
) -> tuple[Trial, bool]:
    """Return the next winner; and True if nothing else is left, then it is the refused one that missed by least."""
    try:
        highs = {name: high for name, (_, high) in refused.items()}
        return settle(bench, problem, trials, sampling, highs), False
    except NothingFits:
        if not refused:
            raise
        return min(refused.values(), key=lambda each: each[1])[0], True


def _highest(budget: Budget, bench: Bench, timing: Measurement) -> float:
    """Return the upper end of a result's ratio; of its milliseconds, in the unit of the limit, if those are higher."""
    ratio = bench.judge.ratio(timing).high
    if budget.latency.unit == "x":
        return ratio
    takes = timing.latency(budget.confidence, budget.quantile)
    return max(ratio, takes.high / budget.latency.value * bench.judge.limit_ratio)


def _say_what_is_known(prepared: Prepared) -> None:
    """Say that a run continues, and where; its stages look the same, but pass quickly."""
    known = sum(trial.phase == "search" for trial in prepared.ledger.trials(prepared.run))
    if prepared.ledger.fact(prepared.run, "outcome") is not None:
        prepared.progress.note(f"{prepared.folder.name} is finished already and is only checked; --fresh starts over")
    elif known:
        of = prepared.config.search.trials
        prepared.progress.note(f"continuing {prepared.folder.name}: {known} of {of} candidates are known")


def _announce(prepared: Prepared, bench: Bench, timing: Measurement) -> None:
    """Write down what the report of an unfinished run needs to know."""
    facts = {
        "model": prepared.model.name,
        "target": prepared.request.target,
        "strategy": bench.strategy,
        "seed": bench.seed,
        "trials": prepared.config.search.trials,
        "requested": str(prepared.budget.latency),
        "limit_ratio": bench.judge.limit_ratio,
        "emulated": timing.emulated,
        "metric": timing.metric,
        "confidence": prepared.budget.confidence,
        "quantile": prepared.budget.quantile,
    }
    prepared.ledger.record(prepared.run, "setup", facts)


# -- prepare --------------------------------------------------------------------------------------------------------


def prepare(request: Request, stack: ExitStack) -> Prepared:
    """Return the model, the data, the graph and the structure, checked; opens the ledger on `stack`."""
    config, progress = request.config, request.progress
    profile, budget = config.profile(request.target), config.budget.to_budget()
    with progress.stage("load data and model"):
        splits = load_data(config.data)
        model = load_model(config.model, input_shape=splits.input_shape)
        splits.check_fit(model)
        _check_enough(splits)
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
    return Prepared(
        request=request,
        profile=profile,
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


# -- baseline -------------------------------------------------------------------------------------------------------


def start_bench(prepared: Prepared, target: Target) -> tuple[Bench, Measurement]:
    """Return the bench, and the timing of the unpruned model: measured once per run.

    Raises:
        BudgetError: if the unpruned model meets the budget already, or milliseconds are asked of an emulator.
    """
    reference = prepared.insist(lambda: target.compile(prepared.baseline))
    timing = _baseline_timing(prepared, target, reference)
    evaluator, quality = _baseline_quality(prepared)
    judge = Judge(
        baseline=quality,
        limit_ratio=_limit_ratio(prepared.budget, timing),
        confidence=prepared.budget.confidence,
        quantile=prepared.budget.quantile,
        weights=prepared.config.search.reward.to_weights(),
    )
    return _bench(prepared, target, evaluator, judge, reference), timing


def _baseline_timing(prepared: Prepared, target: Target, reference: Artifact) -> Measurement:
    known = prepared.ledger.fact(prepared.run, "baseline")
    if known is not None:
        return Measurement.from_json(known["measurement"])
    sampling = _final_sampling_of(prepared.config, prepared.budget, reference)
    with prepared.progress.stage("measure the baseline"):
        timing = prepared.insist(lambda: target.measure(reference, replace(sampling, threshold=None, layers=True)))
    prepared.ledger.record(prepared.run, "baseline", {"measurement": timing.to_json()})
    return timing


def _baseline_quality(prepared: Prepared) -> tuple[Evaluator, Quality]:
    """Return what judges candidates and what it says of the unpruned model, in the arithmetic the run began with."""
    known = prepared.ledger.fact(prepared.run, "baseline_quality")
    if known is not None:
        return _evaluator(prepared, known["precision"]), Quality(**known["quality"])
    with prepared.progress.stage("accuracy of the baseline"):
        evaluator = _evaluator(prepared, prepared.config.search.precision)
        quality = evaluator.quality(prepared.structure.space.full())
    _warn_of_chance(prepared, quality.accuracy)
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == evaluator.dtype)
    prepared.ledger.record(prepared.run, "baseline_quality", {"quality": asdict(quality), "precision": precision})
    return evaluator, quality


def _warn_of_chance(prepared: Prepared, accuracy: float) -> None:
    """Say that the unpruned model is hardly better than chance: then the images are not what it was trained on.

    Chance is to answer always what is most frequent, or anything at all.
    """
    (answer,) = prepared.graph.graph.output
    classes = answer.type.tensor_type.shape.dim[-1].dim_value
    frequencies = np.bincount(prepared.splits.validation.labels) / len(prepared.splits.validation)
    chance = max(float(frequencies.max()), 1 / max(classes, 1))
    if accuracy < chance + BARELY * (1 - chance):
        text = (
            f"the unpruned model is right about {accuracy:.1%} of the validation images, chance is {chance:.1%}: "
            "are weights, class order and preprocessing (data.mean, data.std) those of its training?"
        )
        prepared.progress.note(f"warning: {text}")
        prepared.ledger.record(prepared.run, "notes", {"warning": text})


def _limit_ratio(budget: Budget, baseline: Measurement) -> float:
    """Return the budget as a ratio of the unpruned model.

    Milliseconds are compared with the upper end of what the unpruned model takes: the result's will spread as much.

    Raises:
        BudgetError: if the unpruned model meets the budget already, or milliseconds are asked of an emulator.
    """
    check_limit(str(budget.latency), budget.latency.unit, baseline.metric)
    takes = baseline.reference_latency(budget.confidence, budget.quantile)
    if budget.limit_ratio(takes.p50) >= 1:
        raise BudgetError(
            f"the unpruned model meets {budget.latency} already",
            why=f"it takes {takes.p50:.4g} {unit_of(baseline.metric)} here",
            next_step=f"ask for less than {_three_digits(takes.low)}ms, or ship it as it is",
        )
    return budget.limit_ratio(takes.high)


def _evaluator(prepared: Prepared, precision: str) -> Evaluator:
    validation = prepared.splits.validation.first(prepared.config.search.validation_images)
    calibration = [images for images, _ in prepared.splits.calibration.batches(CALIBRATION_BATCH)]
    return Evaluator(
        prepared.model.module,
        prepared.structure,
        prepared.graph,
        validation=list(validation.batches(EVALUATION_BATCH)),
        calibration=calibration,
        dtype=PRECISIONS[precision],
    )


def _bench(prepared: Prepared, target: Target, evaluator: Evaluator, judge: Judge, reference: Artifact) -> Bench:
    config = prepared.config
    return Bench(
        base=Base(
            cutter=GraphCutter(prepared.graph, prepared.structure),
            evaluator=evaluator,
            inputs=prepared.baseline.inputs,
            folder=prepared.folder,
        ),
        target=target,
        judge=judge,
        sampling=Sampling(
            reference=reference,
            threshold=judge.limit_ratio,
            sessions_min=config.measure.sessions_min,
            sessions_max=config.measure.sessions_max,
            session_ms=config.measure.session_ms,
            confidence=prepared.budget.confidence,
        ),
        ledger=prepared.ledger,
        run=prepared.run,
        strategy=config.search.strategy,
        seed=config.search.seed,
        sleep=prepared.request.sleep,
        stop=prepared.request.stop,
    )


def _final_sampling(prepared: Prepared, bench: Bench) -> Sampling:
    sampling = _final_sampling_of(prepared.config, prepared.budget, bench.sampling.reference)
    return replace(sampling, threshold=bench.judge.limit_ratio)


def _final_sampling_of(config: Config, budget: Budget, reference: Artifact) -> Sampling:
    sessions = config.measure.final_sessions
    return Sampling(
        reference=reference,
        sessions_min=min(4, sessions),
        sessions_max=sessions,
        session_ms=config.measure.session_ms,
        confidence=budget.confidence,
    )


# -- search ---------------------------------------------------------------------------------------------------------


def pose(prepared: Prepared, bench: Bench, timing: Measurement) -> Problem:
    """Return the search problem: the space, how important every unit is, where the time goes, and the budget."""
    importance = _importance(prepared)
    return Problem(
        space=prepared.structure.space,
        layers=prepared.structure.layers,
        ranking=ranking(importance),
        importance=importance,
        shares=layer_shares(prepared.structure, timing),
        limit_ratio=bench.judge.limit_ratio,
        multiple=prepared.profile.channel_multiple,
        trials=prepared.config.search.trials,
        seed=prepared.config.search.seed,
    )


def _importance(prepared: Prepared) -> Mapping[str, tuple[float, ...]]:
    """Return group → importance of its units: computed once a run, for another number of threads rounds otherwise."""
    known = prepared.ledger.fact(prepared.run, "importance")
    if known is None:
        batches = prepared.splits.calibration.batches(CALIBRATION_BATCH)
        seen = unit_importance(prepared.model.module, prepared.structure, "taylor", batches)
        known = {name: [float(each) for each in units] for name, units in seen.items()}
        prepared.ledger.record(prepared.run, "importance", known)
    return {name: tuple(units) for name, units in known.items()}


def layer_shares(structure: Structure, timing: Measurement) -> dict[str, float]:
    """Return layer name → share of the time of one call; what is missing to 1 is spent elsewhere."""
    total = sum(timing.layers.values())
    if not total:
        return {}
    return {each.name: timing.layers[each.node] / total for each in structure.layers if each.node in timing.layers}


def look(prepared: Prepared, bench: Bench, problem: Problem) -> list[Trial]:
    """Return the trials of the search, the narrowest plan first: if even that misses the budget, nothing fits.

    Raises:
        NothingFits: saying what can be reached and what would make the budget fit.
    """
    narrowest = problem.plan({group.name: group.choices[0] for group in problem.space.groups})
    probe = bench.try_plan(narrowest, "probe", 0)
    if probe.measurement is not None and bench.judge.ratio(probe.measurement).low > problem.limit_ratio:
        raise _nothing_fits(prepared, bench, probe)
    config = prepared.config.search
    searcher = make_searcher(config.strategy, problem)
    with prepared.progress.stage(f"search ({config.strategy})", total=problem.trials) as stage:
        trials = search(bench, searcher, problem.trials, stage, time_limit_s=config.time_limit_s)
    return [probe, *trials]


def _three_digits(milliseconds: float) -> str:
    """Return three significant digits, without the exponent that ``.3g`` gives a thousand."""
    return f"{float(f'{milliseconds:.3g}'):.15g}"


def _nothing_fits(prepared: Prepared, bench: Bench, probe: Trial) -> NothingFits:
    assert probe.measurement is not None
    reach, confidence = bench.judge.ratio(probe.measurement), prepared.budget.confidence
    reachable = probe.measurement.latency(confidence, prepared.budget.quantile)
    stays = "; ".join(f"{each.layer}: {each.reason}" for each in prepared.structure.unprunable[:2])
    in_ms = prepared.budget.latency.unit == "ms"
    enough = f"{_three_digits(reachable.high * 1.02)}ms" if in_ms else f"{reach.high * 1.02:.3f}x"
    takes = f"{reach.p50:.3f}x ({_three_digits(reachable.p50)} {unit_of(probe.measurement.metric)})"
    return NothingFits(
        f"{prepared.budget.latency} is out of reach: the narrowest plan takes {takes}",
        why=f"what must stay costs that much; {stays}",
        next_step=f"ask for at least {enough}, exclude less, or try another space.minimum_ratio or channel_multiple",
    )


# -- fine-tune and prove --------------------------------------------------------------------------------------------


def tune(prepared: Prepared, bench: Bench, winner: Trial) -> "FinetuneResult":
    """Return the winner, trained further with the unpruned model as its teacher; resumes from its checkpoint."""
    student = bench.base.evaluator.candidate(winner.plan)
    checkpoint = prepared.folder / f"finetune-{winner.plan.digest[:16]}"
    with prepared.progress.stage("fine-tune", total=1.0) as stage:
        done = 0.0

        def told(state: Any) -> None:
            nonlocal done
            stage.advance(state.fraction - done, note=getattr(state, "note", ""))
            done = state.fraction
            prepared.request.stop()

        return finetune(
            student,
            prepared.model.module,
            prepared.splits.train,
            prepared.splits.validation,
            prepared.config.finetune,
            checkpoint=checkpoint,
            origin=digest([prepared.run, winner.plan.digest]),
            progress=told,
        )


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A tuned model on the target: it answers as PyTorch does, was timed, and what its bundle holds for the device."""

    artifact: Artifact
    timing: Measurement
    parity_inputs: Mapping[str, np.ndarray[Any, Any]]
    parity_outputs: Mapping[str, np.ndarray[Any, Any]]
    tolerances: tuple[float, float]
    device: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the packaged model was seen to do."""

    checked: Checked
    baseline_accuracy: float
    accuracy: float
    test_images: int
    validation: Mapping[str, float]


def check(prepared: Prepared, bench: Bench, target: Target, winner: Trial, tuned: "FinetuneResult") -> Checked:
    """Return the tuned model on the target: same answers as PyTorch, fresh latency.

    Raises:
        ParityFailed: if the engine answers otherwise than PyTorch.
    """
    graph = bench.base.cutter.assemble(winner.plan, tuned.module.state_dict())
    artifact = write_graph(graph, prepared.folder / "model.onnx", bench.base.inputs, lasting=True)
    engine = prepared.insist(lambda: target.compile(artifact))
    images = prepared.splits.train.tensor(slice(0, PARITY_SAMPLES))  # validation may have fewer than a bundle records
    wanted = _answers(tuned.module, images)
    tolerances = (TOLERANCES[0] * float(np.abs(wanted).max()), TOLERANCES[1])
    prepared.insist(lambda: _check_parity(target, engine, images.numpy(), wanted, tolerances))
    return Checked(
        artifact=artifact,
        timing=_final_timing(prepared, bench, target, engine),
        parity_inputs={"input": images.numpy()},
        parity_outputs={"output": wanted},
        tolerances=tolerances,
        device=prepared.insist(partial(target.package, engine)) if isinstance(target, Packager) else {},
    )


def prove(prepared: Prepared, bench: Bench, winner: Trial, tuned: "FinetuneResult", checked: Checked) -> Proof:
    """Return what is delivered with its accuracy: on validation at every step, on test before and after."""
    test = _test_accuracy(prepared, bench, tuned.module, checked.artifact.sha256)
    assert winner.quality is not None
    return Proof(
        checked=checked,
        baseline_accuracy=test["baseline"],
        accuracy=test["result"],
        test_images=test["images"],
        validation={
            "baseline": bench.judge.baseline.accuracy,
            "cut": winner.quality.accuracy,
            "tuned": bench.base.evaluator.judge(tuned.module).accuracy,
        },
    )


def _final_timing(prepared: Prepared, bench: Bench, target: Target, engine: Artifact) -> Measurement:
    known = prepared.ledger.fact(prepared.run, "final_measurement")
    if known is not None and known["artifact_sha256"] == engine.sha256:
        return Measurement.from_json(known)
    sampling = replace(_final_sampling(prepared, bench), threshold=None, layers=True, seed=1_000_003)
    timing = prepared.insist(lambda: target.measure(engine, sampling))
    prepared.ledger.record(prepared.run, "final_measurement", timing.to_json())
    return timing


def _answers(module: nn.Module, images: torch.Tensor) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        return np.concatenate([module.eval()(each[None]).numpy() for each in images])


def _check_parity(
    target: Target,
    engine: Artifact,
    images: np.ndarray[Any, Any],
    wanted: np.ndarray[Any, Any],
    tolerances: tuple[float, float],
) -> None:
    seen = np.concatenate([target.run(engine, {"input": each[None]})["output"] for each in images])
    excess = np.abs(seen - wanted) - (tolerances[0] + tolerances[1] * np.abs(wanted))
    if not (np.isfinite(seen).all() and excess.max() <= 0):
        raise ParityFailed(
            "the engine answers otherwise than PyTorch",
            why=f"largest difference {np.abs(seen - wanted).max():.2e}, largest answer {np.abs(wanted).max():.2e}",
            next_step="report this model: its graph is cut or compiled wrongly",
        )


def _test_accuracy(prepared: Prepared, bench: Bench, tuned: nn.Module, sha256: str) -> Mapping[str, Any]:
    """Return accuracy on the test split of the unpruned and the final model: the one place where it is read."""
    known = prepared.ledger.fact(prepared.run, "test")
    if known is not None and known["model"] == sha256:
        return known  # type: ignore[no-any-return]
    test: ArraySet = prepared.splits.open_test()
    accuracy = bench.base.evaluator.accuracy
    facts = {
        "baseline": accuracy(prepared.model.module, test.batches(EVALUATION_BATCH)),
        "result": accuracy(tuned, test.batches(EVALUATION_BATCH)),
        "images": len(test),
        "model": sha256,
    }
    prepared.ledger.record(prepared.run, "test", facts)
    return facts


# -- outcome --------------------------------------------------------------------------------------------------------


class _Seconds:
    """Wall seconds of each stage, summed over the processes of one run."""

    def __init__(self, ledger: Ledger, run: str) -> None:
        self._ledger, self._run = ledger, run
        self._seconds: dict[str, float] = ledger.fact(run, "seconds") or {}

    def of(self, stage: str) -> AbstractContextManager[None]:
        """Return a context whose time counts for a stage, also if it fails."""
        stack = ExitStack()
        stack.callback(partial(self._add, stage, time.monotonic()))
        return stack  # type: ignore[return-value]

    def _add(self, stage: str, started: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.monotonic() - started
        self._ledger.record(self._run, "seconds", self._seconds)

    def total(self) -> dict[str, float]:
        """Return stage → seconds."""
        return dict(self._seconds)


def _outcome(
    prepared: Prepared, bench: Bench, baseline: Measurement, winner: Trial, proof: Proof, seconds: Mapping[str, float]
) -> Outcome:
    trials = prepared.ledger.trials(prepared.run)
    result, metric = _result_facts(prepared, proof), proof.checked.timing.metric
    return Outcome(
        model=prepared.model.name,
        target=prepared.request.target,
        emulated=proof.checked.timing.emulated,
        metric=metric,
        strategy=bench.strategy,
        seed=bench.seed,
        baseline=_baseline_facts(prepared, bench, proof),
        result=result,
        budget=verdict(prepared.budget, bench.judge.limit_ratio, result, proof.baseline_accuracy, metric=metric),
        measurements=_measurements(prepared, trials, winner),
        trials=sum(each.phase == "search" for each in trials),
        widths=_width_changes(prepared.structure, winner.plan),
        layer_shares=layer_shares(prepared.structure, baseline),
        result_layer_shares=layer_shares(prepared.structure, proof.checked.timing),
        seconds=seconds,
        versions=versions(),
        conditions=proof.checked.timing.conditions,
        flags=proof.checked.timing.flags,
        warnings=(*(prepared.ledger.fact(prepared.run, "notes") or {}).values(), *_uncounted(prepared.graph)),
        run_dir=str(prepared.folder),
    )


def _uncounted(graph: onnx.ModelProto) -> list[str]:
    """Return a warning if some of the work has no known cost: the counts are lower bounds then."""
    names = cost.uncounted(graph)
    return [f"the MACs are at least so many: {', '.join(names)} could not be counted"] if names else []


def _measurements(prepared: Prepared, trials: Sequence[Trial], winner: Trial) -> int:
    """Return all that were spent: on the unpruned model, on trials, on every fine-tuned winner, and on failures."""
    missed = prepared.ledger.fact(prepared.run, "missed_once_tuned") or {}
    tuned = len({*missed, winner.plan.digest})
    return 1 + tuned + sum(_measured(each) for each in trials) + len(prepared.ledger.incidents(prepared.run))


def _measured(trial: Trial) -> bool:
    return trial.measurement is not None and not trial.cached


def _baseline_facts(prepared: Prepared, bench: Bench, proof: Proof) -> ModelFacts:
    confidence, quantile = prepared.budget.confidence, prepared.budget.quantile
    return ModelFacts(
        accuracy=proof.baseline_accuracy,
        test_images=proof.test_images,
        validation={"baseline": bench.judge.baseline.accuracy},
        latency=proof.checked.timing.reference_latency(confidence, quantile),
        ratio=None,
        parameters=cost.parameters(prepared.graph),
        macs=cost.macs(prepared.graph),
        size_bytes=prepared.baseline.path.stat().st_size,
    )


def _result_facts(prepared: Prepared, proof: Proof) -> ModelFacts:
    confidence, quantile = prepared.budget.confidence, prepared.budget.quantile
    graph = onnx.load(proof.checked.artifact.path, load_external_data=False)
    return ModelFacts(
        accuracy=proof.accuracy,
        test_images=proof.test_images,
        validation=proof.validation,
        latency=proof.checked.timing.latency(confidence, quantile),
        ratio=proof.checked.timing.ratio(confidence, quantile),
        parameters=cost.parameters(graph),
        macs=cost.macs(graph),
        size_bytes=proof.checked.artifact.path.stat().st_size,
    )


def _width_changes(structure: Structure, plan: Plan) -> tuple[WidthChange, ...]:
    return tuple(
        WidthChange(
            group=group.name,
            before=group.width * group.unit_channels,
            after=len(plan.kept[group.name]) * group.unit_channels,
        )
        for group in structure.space.groups
    )


def _preprocessing(images: ArraySet) -> dict[str, Any] | None:
    """Return what was done to pixels before the model saw them; None if the data came normalised."""
    if not images.mean:
        return None
    return {"layout": "N x C x H x W", "scale": 1 / 255, "mean": list(images.mean), "std": list(images.std)}


def _deliver(prepared: Prepared, outcome: Outcome, winner: Trial, proof: Proof) -> Outcome:
    """Write bundle, archive and report, and return the outcome with their places."""
    from edgeprune.report import render_run

    name = prepared.folder.name.removesuffix(".run")
    with prepared.progress.stage("write the bundle"):
        folder = prepared.folder.with_name(name)
        contents = BundleContents(
            name=name,
            model=proof.checked.artifact.path,
            plan=winner.plan,
            profile=prepared.profile,
            budget=prepared.budget,
            outcome=outcome,
            measurement=proof.checked.timing,
            parity_inputs=proof.checked.parity_inputs,
            parity_outputs=proof.checked.parity_outputs,
            tolerances=proof.checked.tolerances,
            parent_sha256=prepared.baseline.sha256,
            versions=outcome.versions,
            preprocessing=_preprocessing(prepared.splits.train),
            device=proof.checked.device,
        )
        write_bundle(folder, contents=contents)
        archive = pack(folder, folder.with_name(f"{name}.tar"))
    report = prepared.folder / "report.html"
    outcome = replace(outcome, bundle=str(folder), archive=str(archive), report=str(report))
    prepared.ledger.record(prepared.run, "command", prepared.request.command)
    prepared.ledger.record(prepared.run, "outcome", outcome.to_json())
    with prepared.progress.stage("write the report"):
        render_run(prepared.folder)
    return outcome
