"""What a run came to, in one value, and as a bundle, an archive and a page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx

from edgeprune import cost
from edgeprune.intake.config import Config
from edgeprune.measurement import Measurement
from edgeprune.outcome import ModelFacts, Outcome, WidthChange
from edgeprune.pack import BundleContents, pack, write_bundle
from edgeprune.plan import Plan
from edgeprune.provenance import versions
from edgeprune.search.loop import Bench
from edgeprune.stages.look import layer_shares
from edgeprune.stages.prepare import Prepared
from edgeprune.stages.prove import Proof
from edgeprune.structure import Structure
from edgeprune.trial import Trial
from edgeprune.verdict import verdict


def outcome_of(
    prepared: Prepared, bench: Bench, baseline: Measurement, winner: Trial, proof: Proof, seconds: Mapping[str, float]
) -> Outcome:
    """Return what a run came to; nothing of it is written yet."""
    trials = prepared.ledger.trials(prepared.run)
    result, metric = _result_facts(prepared, proof), proof.checked.timing.metric
    importance, reconstruction = chosen_by(prepared.config)
    return Outcome(
        model=prepared.model.name,
        target=prepared.request.target,
        emulated=proof.checked.timing.emulated,
        metric=metric,
        strategy=bench.strategy,
        method=prepared.config.search.method,
        judged_by=prepared.config.search.judged_by,
        tested_on=proof.tested_on,
        finetuning=finetuning(prepared.config),
        importance=importance,
        reconstruction=reconstruction,
        entropy_rank_correlation=prepared.ledger.fact(prepared.run, "entropy_rank_correlation"),
        seed=bench.seed,
        baseline=_baseline_facts(prepared, bench, proof),
        result=result,
        budget=verdict(prepared.budget, bench.judge.limit_ratio, result, proof.baseline_accuracy, metric=metric),
        measurements=_measurements(prepared, trials, winner),
        trials=sum(each.phase == "search" for each in trials),
        widths=_width_changes(prepared.structure, proof.checked.plan),
        layer_shares=layer_shares(prepared.structure, baseline),
        result_layer_shares=layer_shares(prepared.structure, proof.checked.timing),
        seconds=seconds,
        versions=versions(),
        conditions=proof.checked.timing.conditions,
        flags=proof.checked.timing.flags,
        warnings=(*(prepared.ledger.fact(prepared.run, "notes") or {}).values(), *uncounted(prepared.graph)),
        run_dir=str(prepared.folder),
    )


def finetuning(config: Config) -> str:
    """Return how the winner is trained further, in a word or three."""
    settings = config.finetune
    if config.search.data_free or settings.epochs == 0 or settings.steps == 0:
        return "none"
    return f"decay by {settings.decay.host}" if settings.method == "decay" else settings.method


def chosen_by(config: Config) -> tuple[str, str]:
    """Return what chose the channels of the delivered model, and how those that stay make up for the others.

    Where channels decay their host chooses, and the network learns to do without: the search chose widths.
    """
    if finetuning(config).startswith("decay"):
        return config.finetune.decay.host, "none"
    return config.search.importance, config.search.reconstruction


def uncounted(graph: onnx.ModelProto) -> list[str]:
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
        attacked=proof.baseline_attacked,
        attacked_images=proof.attacked_images,
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
        attacked=proof.attacked,
        attacked_images=proof.attacked_images,
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


def _preprocessing(normalisation: tuple[tuple[float, ...], tuple[float, ...]]) -> dict[str, Any] | None:
    """Return what is done to pixels before the model sees them; None if that is not known."""
    mean, std = normalisation
    if not mean:
        return None
    return {"layout": "N x C x H x W", "scale": 1 / 255, "mean": list(mean), "std": list(std)}


def deliver(prepared: Prepared, outcome: Outcome, proof: Proof) -> Outcome:
    """Write bundle, archive and report, and return the outcome with their places."""
    from edgeprune.report import render_run

    name = prepared.folder.name.removesuffix(".run")
    with prepared.progress.stage("write the bundle"):
        folder = prepared.folder.with_name(name)
        contents = BundleContents(
            name=name,
            model=proof.checked.artifact.path,
            plan=proof.checked.plan,
            profile=prepared.profile,
            budget=prepared.budget,
            outcome=outcome,
            measurement=proof.checked.timing,
            parity_inputs=proof.checked.parity_inputs,
            parity_outputs=proof.checked.parity_outputs,
            tolerances=proof.checked.tolerances,
            parent_sha256=prepared.baseline.sha256,
            versions=outcome.versions,
            preprocessing=_preprocessing(prepared.splits.normalisation),
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
