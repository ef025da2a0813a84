"""The winner, trained further and proven: it answers as PyTorch does, and was timed and counted as it will ship."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgeprune.artifact import Artifact
from edgeprune.errors import ParityFailed
from edgeprune.evaluate import write_graph
from edgeprune.intake.images import ArraySet
from edgeprune.measurement import Measurement
from edgeprune.outcome import counted
from edgeprune.plan import Plan
from edgeprune.search.loop import Bench
from edgeprune.stages.attacks import attacks
from edgeprune.stages.baseline import final_sampling, look_for_faster_kernels
from edgeprune.stages.prepare import Prepared
from edgeprune.target import Packager, Target
from edgeprune.tolerance import tolerances
from edgeprune.trial import Trial

if TYPE_CHECKING:
    from edgeprune.finetune import FinetuneResult

PARITY_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A tuned model on the target: it answers as PyTorch does, was timed, and what its bundle holds for the device.

    `plan` is what the model was cut by: the winner's, unless the fine-tuning chose other channels.
    """

    plan: Plan
    artifact: Artifact
    timing: Measurement
    parity_inputs: Mapping[str, np.ndarray[Any, Any]]
    parity_outputs: Mapping[str, np.ndarray[Any, Any]]
    tolerances: tuple[float, float]
    device: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the packaged model was seen to do.

    `attacked` is attack → top-1 after it, counted on some of the test images; empty where none was carried out.
    """

    checked: Checked
    baseline_accuracy: float
    accuracy: float
    test_images: int
    tested_on: str
    validation: Mapping[str, float]
    baseline_attacked: Mapping[str, float]
    attacked: Mapping[str, float]
    attacked_images: int


def check(prepared: Prepared, bench: Bench, target: Target, winner: Trial, tuned: "FinetuneResult") -> Checked:
    """Return the tuned model on the target: same answers as PyTorch, fresh latency.

    Raises:
        ParityFailed: if the engine answers otherwise than PyTorch.
    """
    plan = tuned.plan or winner.plan
    graph = bench.base.cutter.assemble(plan, tuned.module.state_dict())
    artifact = write_graph(graph, prepared.folder / "model.onnx", bench.base.inputs, lasting=True)
    look_for_faster_kernels(prepared, target, artifact)
    engine = prepared.insist(lambda: target.compile(artifact))
    images = prepared.splits.train.tensor(slice(0, PARITY_SAMPLES))  # validation may have fewer than a bundle records
    wanted = _answers(tuned.module, images)
    allowed = tolerances(prepared.profile, float(np.abs(wanted).max()))
    prepared.insist(lambda: _check_parity(target, engine, images.numpy(), wanted, allowed))
    return Checked(
        plan=plan,
        artifact=artifact,
        timing=_final_timing(prepared, bench, target, engine),
        parity_inputs={"input": images.numpy()},
        parity_outputs={"output": wanted},
        tolerances=allowed,
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
        tested_on=test["tested_on"],
        validation={
            "baseline": bench.judge.baseline.accuracy,
            **({} if tuned.plan else {"cut": winner.quality.accuracy}),  # what decayed was never cut as it was
            "tuned": bench.base.evaluator.judge(tuned.module).accuracy,
        },
        baseline_attacked=test["baseline_attacked"],
        attacked=test["result_attacked"],
        attacked_images=test["attacked_images"],
    )


def _final_timing(prepared: Prepared, bench: Bench, target: Target, engine: Artifact) -> Measurement:
    known = prepared.ledger.fact(prepared.run, "final_measurement")
    if known is not None and known["artifact_sha256"] == engine.sha256:
        return Measurement.from_json(known)
    sampling = replace(final_sampling(prepared, bench), threshold=None, layers=True, seed=1_000_003)
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
    allowed: tuple[float, float],
) -> None:
    seen = np.concatenate([target.run(engine, {"input": each[None]})["output"] for each in images])
    excess = np.abs(seen - wanted) - (allowed[0] + allowed[1] * np.abs(wanted))
    if not (np.isfinite(seen).all() and excess.max() <= 0):
        raise ParityFailed(
            "the engine answers otherwise than PyTorch",
            why=f"largest difference {np.abs(seen - wanted).max():.2e}, largest answer {np.abs(wanted).max():.2e}",
            next_step="report this model: its graph is cut or compiled wrongly",
        )


def _test_accuracy(prepared: Prepared, bench: Bench, tuned: nn.Module, sha256: str) -> Mapping[str, Any]:
    """Return accuracy on the test split of the unpruned and the final model: the one place where it is read."""
    known, key = prepared.ledger.fact(prepared.run, "test"), [sha256, prepared.config.digest_of("data", "robustness")]
    if known is not None and known["of"] == key:
        return known  # type: ignore[no-any-return]
    facts: dict[str, Any]
    test: ArraySet = prepared.splits.open_test()
    models, accuracy = {"baseline": prepared.model.module, "result": tuned}, bench.base.evaluator.accuracy
    with prepared.progress.stage(_stage_name(prepared.splits.tested_on)):
        facts = {name: accuracy(module, test.batches(test.evaluation_batch)) for name, module in models.items()}
    facts |= {"images": len(test), "tested_on": prepared.splits.tested_on, "of": key}
    facts |= _after_attacks(prepared, test, models)
    prepared.ledger.record(prepared.run, "test", facts)
    return facts


def _stage_name(tested_on: str) -> str:
    """Return what the last evaluation is called, for people who wait."""
    return f"{counted(tested_on)} on {tested_on.partition(',')[0]}"


def _after_attacks(prepared: Prepared, test: ArraySet, models: Mapping[str, nn.Module]) -> Mapping[str, Any]:
    """Return what the models still answer rightly on test images changed on purpose."""
    wanted = attacks(prepared.config, prepared.splits)
    if not wanted.chosen:
        return {"attacked_images": 0, **{f"{name}_attacked": {} for name in models}}
    part = wanted.part(test)
    with prepared.progress.stage("accuracy after attacks", total=len(models) * len(part)) as stage:
        after = {f"{name}_attacked": wanted.survived(module, part, stage) for name, module in models.items()}
    return {"attacked_images": len(part), **after}
