"""From a trained model to a verified bundle.

                                   ┌─── misses the budget ───┐
                                   ▼                         │
    prepare ─▶ baseline ─▶ search ─▶ settle ─▶ fine-tune ─▶ check ─▶ prove ─▶ bundle ─▶ report
       │           │          │         │           │          │
       └───────────┴──────────┴── ledger.sqlite ────┴──────────┘     a killed run continues where it was

A run lives in ``<out>/<name>.run/``; its bundle is ``<out>/<name>/`` and ``<out>/<name>.tar``.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from edgeprune.budget import Budget
from edgeprune.errors import NothingFits
from edgeprune.fleet import open_boards
from edgeprune.measurement import Measurement, Sampling
from edgeprune.outcome import Outcome
from edgeprune.progress import Stage
from edgeprune.search.loop import Bench
from edgeprune.search.problem import Problem
from edgeprune.search.settle import settle
from edgeprune.stages.baseline import final_sampling, start_bench
from edgeprune.stages.deliver import deliver, outcome_of
from edgeprune.stages.look import look, pose
from edgeprune.stages.prepare import Prepared, Request, prepare
from edgeprune.stages.prove import Checked, check, prove
from edgeprune.stages.seconds import Seconds
from edgeprune.stages.tune import tune
from edgeprune.target import Target
from edgeprune.trial import Trial

if TYPE_CHECKING:
    from edgeprune.finetune import FinetuneResult

WINNERS = 3
"""Plans that are fine-tuned before one that misses the budget is delivered as such."""


def deploy(request: Request) -> Outcome:
    """Return the outcome of a deploy; its bundle and report are written, whether the budget is met or not.

    Raises:
        EdgepruneError: any of them; the ledger keeps what was done, the same request continues.
    """
    with ExitStack() as stack:
        prepared = prepare(request, stack)
        target = prepared.insist(lambda: stack.enter_context(open_boards(prepared.boards)))
        return _carry_out(prepared, target)


def _carry_out(prepared: Prepared, target: Target) -> Outcome:
    bench, timing = start_bench(prepared, target)
    _announce(prepared, bench, timing)
    _say_what_is_known(prepared)
    problem = pose(prepared, bench, timing)
    seconds = Seconds(prepared.ledger, prepared.run)
    with seconds.of("search"):
        trials = look(prepared, bench, problem)
    winner, tuned, checked = _checked_winner(prepared, bench, target, problem, trials, seconds)
    with seconds.of("prove"):
        proof = prove(prepared, bench, winner, tuned, checked)
    outcome = outcome_of(prepared, bench, timing, winner, proof, seconds.total())
    return deliver(prepared, outcome, proof)


def _checked_winner(
    prepared: Prepared, bench: Bench, target: Target, problem: Problem, trials: Sequence[Trial], seconds: Seconds
) -> tuple[Trial, "FinetuneResult", Checked]:
    """Return the plan that is delivered, fine-tuned and checked: one that misses the budget now gives way to another.

    After `WINNERS` of them the last is delivered all the same, and said to miss.
    """
    known: dict[str, float] = prepared.ledger.fact(prepared.run, "missed_once_tuned") or {}
    refused: dict[str, tuple[Trial, float]] = {}
    while True:
        with seconds.of("settle"), prepared.progress.stage("settle the winner") as stage:
            sampling, tell = final_sampling(prepared, bench), partial(_tell, stage)
            winner, last = _next_winner(bench, problem, trials, sampling, refused, tell)
        if last or winner.plan.digest not in known:
            with seconds.of("finetune"):
                tuned = tune(prepared, bench, winner, problem, trials, (high for _, high in refused.values()))
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
    tell: Callable[[str], None],
) -> tuple[Trial, bool]:
    """Return the next winner; and True if nothing else is left, then it is the refused one that missed by least."""
    try:
        highs = {name: high for name, (_, high) in refused.items()}
        return settle(bench, problem, trials, sampling, highs, tell), False
    except NothingFits:
        if not refused:
            raise
        return min(refused.values(), key=lambda each: each[1])[0], True


def _tell(stage: Stage, seen: str) -> None:
    stage.advance(note=seen)


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
        "method": prepared.config.search.method,
        "judged_by": prepared.config.search.judged_by,
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
