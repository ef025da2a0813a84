"""The search: the problem as a searcher sees it, the narrowest plan first, then as many trials as there may be."""

from collections.abc import Sequence

from scipy.stats import spearmanr

from edgeprune.errors import NothingFits
from edgeprune.importance import ranking
from edgeprune.measurement import Measurement
from edgeprune.metric import unit_of
from edgeprune.quantities import three_digits
from edgeprune.search.loop import Bench, search
from edgeprune.search.problem import Problem
from edgeprune.search.strategies import make_searcher
from edgeprune.stages import units
from edgeprune.stages.prepare import Prepared
from edgeprune.structure import Structure
from edgeprune.trial import JUDGES, Trial

FEWEST = 8
"""Candidates under which a rank correlation is not spoken of."""

POOR = 0.3
"""A rank correlation below this is warned of: choosing by entropy is then hardly better than by chance."""


def pose(prepared: Prepared, bench: Bench, timing: Measurement) -> Problem:
    """Return the search problem: the space, how important every unit is, where the time goes, and the budget."""
    importance, repairs = units.importance(prepared), prepared.config.search.repairs
    if said := units.left_out(prepared):
        prepared.progress.note(said)
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
        repairs=repairs,
        repair=units.own_coefficients(prepared) if repairs else {},
        similarity=units.likeness(prepared) if repairs else {},
        step=prepared.config.search.paoding.step,
    )


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
    _say_how_entropy_went(prepared, [probe, *trials])
    return [probe, *trials]


def _say_how_entropy_went(prepared: Prepared, trials: Sequence[Trial]) -> None:
    """Say whether orderly activations went with right answers among the candidates, where the reward looks at them."""
    weights, seen = prepared.config.search.reward, entropy_agrees(trials)
    if weights.entropy <= 0 or seen is None:
        return
    prepared.ledger.record(prepared.run, "entropy_rank_correlation", seen)
    judge = JUDGES[prepared.config.search.judged_by]
    text = f"rank correlation of low entropy with {judge} among {len(trials)} candidates: {seen:+.2f}"
    prepared.progress.note(f"{text} (1: orderly is right, 0: says nothing; entropy weighs {weights.entropy:g})")
    if seen < POOR and weights.entropy >= weights.accuracy:
        notes = prepared.ledger.fact(prepared.run, "notes") or {}
        warning = f"{text}; entropy says little here: {_instead(prepared)}"
        prepared.ledger.record(prepared.run, "notes", {**notes, "entropy": warning})


def _instead(prepared: Prepared) -> str:
    """Return what to judge by where entropy is no good."""
    if prepared.config.search.data_free:
        return "take --method autodfp --data-free"
    if prepared.splits.labelled:
        return "take --method amc"
    return 'take --method amc with search.judged_by = "teacher", agreement with the unpruned model'


def entropy_agrees(trials: Sequence[Trial]) -> float | None:
    """Return Spearman's correlation of − entropy with accuracy, −1 to 1; None if too few differ to say.

    The authors of entropy-driven pruning (arXiv 2312.04918) count on a high one.
    """
    seen = {each.plan.digest: each.quality for each in trials if each.quality and each.quality.entropy is not None}
    pairs = [(-each.entropy, each.accuracy) for each in seen.values() if each.entropy is not None]
    low, accuracy = ([pair[side] for pair in pairs] for side in (0, 1))
    if len(pairs) < FEWEST or len(set(low)) == 1 or len(set(accuracy)) == 1:
        return None
    return float(spearmanr(low, accuracy).statistic)  # pyright: ignore[reportAttributeAccessIssue] - scipy has no types


def _nothing_fits(prepared: Prepared, bench: Bench, probe: Trial) -> NothingFits:
    assert probe.measurement is not None
    reach, confidence = bench.judge.ratio(probe.measurement), prepared.budget.confidence
    reachable = probe.measurement.latency(confidence, prepared.budget.quantile)
    stays = "; ".join(f"{each.layer}: {each.reason}" for each in prepared.structure.unprunable[:2])
    in_ms = prepared.budget.latency.unit == "ms"
    enough = f"{three_digits(reachable.high * 1.02)}ms" if in_ms else f"{reach.high * 1.02:.3f}x"
    takes = f"{reach.p50:.3f}x ({three_digits(reachable.p50)} {unit_of(probe.measurement.metric)})"
    return NothingFits(
        f"{prepared.budget.latency} is out of reach: the narrowest plan takes {takes}",
        why=f"what must stay costs that much; {stays}",
        next_step=f"ask for at least {enough}, exclude less, or try another space.minimum_ratio or channel_multiple",
    )
