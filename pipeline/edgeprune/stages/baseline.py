"""The unpruned model on the target: how fast, how accurate, and what the budget means as a ratio of it."""

from dataclasses import asdict, replace

import numpy as np
import torch

from edgeprune.artifact import Artifact
from edgeprune.budget import Budget
from edgeprune.cut import GraphCutter
from edgeprune.errors import BudgetError
from edgeprune.evaluate import Base, Judge
from edgeprune.intake.config import Config, SearchConfig
from edgeprune.measurement import Measurement, Sampling
from edgeprune.metric import check_limit, unit_of
from edgeprune.quality import Evaluator, Statistics
from edgeprune.quantities import three_digits
from edgeprune.reward import RewardWeights
from edgeprune.search.loop import Bench
from edgeprune.stages.prepare import Prepared, has_maps
from edgeprune.stages.units import CALIBRATION_BATCH, repairer
from edgeprune.target import Target, Tuner
from edgeprune.trial import Quality

ENTROPY_WATCHED, ENTROPY_ALONE = 8, 64
"""Images that the entropy of a candidate is taken over, beside its accuracy and where it decides alone."""

BARELY = 0.1
"""An unpruned model that does better than chance by less than this share of what there is to do better is warned of."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": None}


def start_bench(prepared: Prepared, target: Target) -> tuple[Bench, Measurement]:
    """Return the bench, and the timing of the unpruned model: measured once per run.

    Raises:
        BudgetError: if the unpruned model meets the budget already, or milliseconds are asked of an emulator.
    """
    look_for_faster_kernels(prepared, target, prepared.baseline)
    reference = prepared.insist(lambda: target.compile(prepared.baseline))
    timing = _baseline_timing(prepared, target, reference)
    evaluator, quality = _baseline_quality(prepared)
    judge = Judge(
        baseline=quality,
        limit_ratio=_limit_ratio(prepared.budget, timing),
        confidence=prepared.budget.confidence,
        quantile=prepared.budget.quantile,
        weights=_weights(prepared),
    )
    return _bench(prepared, target, evaluator, judge, reference), timing


def _weights(prepared: Prepared) -> RewardWeights:
    """Return the weights of the reward; entropy has none where there are no maps to read it from."""
    weights = prepared.config.search.reward.to_weights()
    return weights if has_maps(prepared.structure) else replace(weights, entropy=0.0)


def look_for_faster_kernels(prepared: Prepared, target: Target, graph: Artifact) -> None:
    """Let the target tune its kernels for `graph`, if its profile has the option ``tune``; a resumed run goes on."""
    if not isinstance(target, Tuner) or not prepared.profile.options.get("tune"):
        return
    with prepared.progress.stage("tune the kernels", total=1.0) as stage:
        done = 0.0

        def told(share: float, note: str) -> None:
            nonlocal done
            stage.advance(max(0.0, share - done), note=note)
            done = max(done, share)
            prepared.request.stop()

        prepared.insist(lambda: target.tune(graph, told))


def _baseline_timing(prepared: Prepared, target: Target, reference: Artifact) -> Measurement:
    known = prepared.ledger.fact(prepared.run, "baseline")
    if known is not None:
        return Measurement.from_json(known["measurement"])
    sampling = _sampling_of(prepared.config, prepared.budget, reference)
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
    if prepared.config.search.judged_by != "labels" or not prepared.splits.labelled:
        return
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
            next_step=f"ask for less than {three_digits(takes.low)}ms, or ship it as it is",
        )
    return budget.limit_ratio(takes.high)


def _evaluator(prepared: Prepared, precision: str) -> Evaluator:
    validation = prepared.splits.validation.first(prepared.config.search.validation_images)
    calibration = [images for images, _ in prepared.splits.calibration.batches(CALIBRATION_BATCH)]
    return Evaluator(
        prepared.model.module,
        prepared.structure,
        prepared.graph,
        validation=list(validation.batches(validation.evaluation_batch)),
        calibration=calibration,
        statistics=_statistics(prepared.config.search),
        dtype=PRECISIONS[precision],
        judged_by=prepared.config.search.judged_by,
        repair=repairer(prepared),
        entropy_images=ENTROPY_WATCHED if prepared.config.search.reward.accuracy > 0 else ENTROPY_ALONE,
    )


def _statistics(search: SearchConfig) -> Statistics:
    if not search.recalibrate:
        return "kept"
    return "regressed" if search.data_free else "averaged"


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


def final_sampling(prepared: Prepared, bench: Bench) -> Sampling:
    sampling = _sampling_of(prepared.config, prepared.budget, bench.sampling.reference)
    return replace(sampling, threshold=bench.judge.limit_ratio)


def _sampling_of(config: Config, budget: Budget, reference: Artifact) -> Sampling:
    sessions = config.measure.final_sessions
    return Sampling(
        reference=reference,
        sessions_min=min(4, sessions),
        sessions_max=sessions,
        session_ms=config.measure.session_ms,
        confidence=budget.confidence,
    )
