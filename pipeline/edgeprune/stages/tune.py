"""The winner, trained further with the unpruned model as its teacher: cut before, or while its channels decay."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeprune.canonical import digest
from edgeprune.decay.pick import pick_widths
from edgeprune.finetune import finetune, finetune_decaying
from edgeprune.latency_model import LatencyModel
from edgeprune.plan import Plan
from edgeprune.progress import Stage
from edgeprune.search.loop import Bench
from edgeprune.search.problem import Problem, measured_ratio
from edgeprune.search.worth import group_worths
from edgeprune.stages.prepare import Prepared
from edgeprune.trial import Trial

if TYPE_CHECKING:
    from edgeprune.finetune import FinetuneResult


def tune(
    prepared: Prepared,
    bench: Bench,
    winner: Trial,
    problem: Problem,
    trials: Sequence[Trial],
    missed: Iterable[float] = (),
) -> "FinetuneResult":
    """Return the winner, trained further; resumes from its checkpoint. A data-free run takes no step.

    Args:
        winner: the trial whose plan is to be carried out.
        problem, trials: the search it came from.
        missed: highest ratios of plans that were tuned before and missed the budget.

    Raises:
        NothingFits: if widths are to be picked anew and none are predicted to fit.
        ConfigError, CorruptArtifact, StorageFull, Interrupted: as `edgeprune.finetune.finetune`.
    """
    settings, splits = prepared.config.finetune, prepared.splits
    if prepared.config.search.data_free:
        settings = settings.model_copy(update={"steps": 0, "epochs": None, "precision": "fp32"})
    anew = settings.method == "decay" and settings.decay.widths == "latency"
    plan = plan_by_latency(problem, trials, missed) if anew else winner.plan
    checkpoint = prepared.folder / f"finetune-{digest([winner.plan.digest, plan.widths])[:16]}"
    trains = settings.total_steps(len(splits.train)) > 0
    with prepared.progress.stage("fine-tune" if trains else "keep as cut: nothing is fine-tuned", total=1.0) as stage:
        told = _teller(prepared, stage)
        if settings.method == "one-step":
            return finetune(
                bench.base.evaluator.candidate(winner.plan),
                prepared.model.module,
                splits.train,
                splits.validation,
                settings,
                checkpoint=checkpoint,
                origin=digest([prepared.run, winner.plan.digest]),
                progress=told,
            )
        return finetune_decaying(
            prepared.model.module,
            prepared.structure,
            plan,
            splits.train,
            splits.validation,
            settings,
            checkpoint=checkpoint,
            origin=digest([prepared.run, winner.plan.digest]),
            progress=told,
        )


def plan_by_latency(problem: Problem, trials: Sequence[Trial], missed: Iterable[float] = ()) -> Plan:
    """Return the plan of most importance per predicted millisecond, after all that the search measured.

    The importance of a group's units is what the search saw that the group's accuracy hangs on it; the limit is
    lowered by what earlier plans missed it by.

    Raises:
        NothingFits: if none is predicted to fit.
    """
    model = LatencyModel(problem)
    for trial in trials:
        ratio = measured_ratio(trial)
        if ratio is not None:
            model.observe(trial.plan.widths, ratio.p50, ratio.high)
    worst = max((high / problem.limit_ratio for high in missed), default=1.0)
    limit = problem.limit_ratio * (1 - model.margin) / max(1.0, worst)
    return problem.plan(pick_widths(problem.space.groups, _importance(problem, trials), model, limit))


def _importance(problem: Problem, trials: Sequence[Trial]) -> Mapping[str, list[float]]:
    """Return group → what each rank of its units adds to the importance kept, times what the group is worth."""
    worths = group_worths(problem, trials)
    return {
        group.name: [
            worths[group.name]
            * (problem.kept_importance(group.name, width + 1) - problem.kept_importance(group.name, width))
            for width in range(group.width)
        ]
        for group in problem.space.groups
    }


def _teller(prepared: Prepared, stage: Stage) -> Callable[[Any], None]:
    done, begins = 0.0, True

    def told(state: Any) -> None:
        nonlocal done, begins
        if begins and state.step > 0:
            prepared.progress.note(f"fine-tuning continues at step {state.step} of {state.steps}")
        begins = False
        stage.advance(state.fraction - done, note=getattr(state, "note", ""))
        done = state.fraction
        prepared.request.stop()

    return told
