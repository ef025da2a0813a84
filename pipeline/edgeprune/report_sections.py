"""The parts of a report: values and trials in, numbers with names and pictures out."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from edgeprune import charts, quantities
from edgeprune.charts import Dot, Landmark, Row, Spot
from edgeprune.measurement import Measurement
from edgeprune.metric import PER_UNIT, limit_of
from edgeprune.outcome import ModelFacts, Outcome, counted, without_data
from edgeprune.report_subject import About, Seen
from edgeprune.statistics import Interval
from edgeprune.svg import clean
from edgeprune.trial import JUDGES

_ARROW = " \u2192 "
_STAGES = {"cut": "after cutting", "calibrated": "after calibration", "tuned": "after fine-tuning"}


def number(name: str, value: float, text: str) -> Markup:
    """Return `text` as an element that carries the number's name and full precision."""
    return Markup('<data data-value="{}" value="{!r}">{}</data>').format(clean(name), value, clean(text))


def listed(seen: Seen) -> dict[str, Any]:
    """Return one row of the table of all candidates."""
    name, ratio, accuracy = f"trials.{seen.phase}.{seen.number}", seen.ratio, seen.accuracy
    spread = f"({quantities.span(ratio, 3)})" if ratio else ""
    return {
        "seen": seen,
        "ratio": number(f"{name}.ratio", ratio.p50, quantities.ratio(ratio.p50)) if ratio else "",
        "spread": spread,
        "accuracy": "" if accuracy is None else number(f"{name}.accuracy", accuracy, _accuracy(accuracy)),
        "reward": number(f"{name}.reward", seen.reward, quantities.fixed(seen.reward, 4)),
    }


def _accuracy(value: float) -> str:
    return quantities.percent(value)


# The verdict


def verdict(outcome: Outcome | None, seen: Sequence[Seen], about: About) -> dict[str, Any]:
    """Return whether the budget is met, in a title, a sentence, a ruler and four numbers."""
    if outcome is None:
        return _progress_verdict(seen, about)
    return {
        "tone": "met" if outcome.budget.met else "missed",
        "title": _title(outcome),
        "sentence": _promise(outcome, about),
        "missed": outcome.budget.missed,
        "gauge": _both(lambda width: charts.gauge(outcome.result.ratio, outcome.budget.limit_ratio, width=width)),
        "keys": _keys(outcome, about),
    }


def _title(outcome: Outcome) -> str:
    broken = " and ".join(outcome.budget.broken)
    title = "Budget met" if outcome.budget.met else f"Budget missed in {broken}" if broken else "Budget missed"
    return f"{title}, in emulation" if outcome.emulated else title


def _promise(outcome: Outcome, about: About) -> Markup:
    ratio, limit = outcome.result.ratio, outcome.budget.limit_ratio
    if ratio is None:
        return Markup("{} was asked for; the result was not timed.").format(_asked(outcome))
    if not outcome.budget.requested.endswith("x"):
        return _promise_in_ms(outcome, about)
    where = "lies under" if ratio.high <= limit else "lies over" if ratio.low > limit else "reaches over"
    parts = [
        Markup("{} was asked for.").format(_asked(outcome)),
        Markup("The result takes {} of the unpruned latency,").format(_ratio("result.ratio.p50", ratio.p50)),
        Markup("and its {} of {} {} the limit.").format(about.sure, _ends(ratio), where),
        Markup("{} of the budget is used.").format(_used(outcome)),
    ]
    return Markup(" ").join(parts)


def _promise_in_ms(outcome: Outcome, about: About) -> Markup:
    takes, ratio = outcome.result.latency, outcome.result.ratio
    assert ratio is not None
    p50, low, high = (number(f"result.latency.{end}", value, f"{value:.4g}") for end, value in takes.to_json().items())
    share = _ratio("result.ratio.p50", ratio.p50)
    parts = [
        Markup("{} was asked for.").format(_asked(outcome)),
        Markup("The result takes {} {}, {} of the unpruned latency;").format(p50, about.unit, share),
        Markup("the {} is {}\u2013{} {}.").format(about.sure, low, high, about.unit),
        Markup("{} of the budget is used.").format(_used(outcome)),
    ]
    return Markup(" ").join(parts)


def _asked(outcome: Outcome) -> Markup:
    requested, limit = clean(limit_of(outcome.budget.requested, outcome.metric)), outcome.budget.limit_ratio
    if requested.endswith("x"):
        return Markup("<strong>{}</strong>").format(number("budget.limit_ratio", limit, requested))
    share = number("budget.limit_ratio", limit, f"{limit:.4g}x")
    return Markup("<strong>{}</strong>, {} of the unpruned latency,").format(requested, share)


def _used(outcome: Outcome) -> Markup:
    return number("budget.used", outcome.budget.used, quantities.percent(outcome.budget.used, 1))


def _ratio(name: str, value: float) -> Markup:
    return Markup("<strong>{}</strong>").format(number(name, value, quantities.ratio(value)))


def _ends(ratio: Interval) -> Markup:
    low = number("result.ratio.low", ratio.low, quantities.fixed(ratio.low, 3))
    high = number("result.ratio.high", ratio.high, quantities.ratio(ratio.high))
    return Markup("{}\u2013{}").format(low, high)


def _keys(outcome: Outcome, about: About) -> list[dict[str, Any]]:
    before, after = outcome.baseline, outcome.result
    times = _ARROW.join(about.latencies([each.latency.p50])[0] for each in (before, after))
    exact = _ARROW.join(_accuracy(each.accuracy) for each in (before, after))
    sizes = _ARROW.join(quantities.count(each.parameters) for each in (before, after))
    speed = f"{quantities.fixed(1 / after.ratio.p50, 2)}x" if after.ratio else "not timed"
    return [
        {"value": speed, "name": "faster", "note": f"{times}{quantities.NBSP}{about.unit}"},
        {"value": quantities.points(after.accuracy - before.accuracy), "name": _tested(outcome), "note": exact},
        {"value": _change(before.parameters, after.parameters), "name": "parameters", "note": sizes},
        {
            "value": f"{outcome.measurements}",
            "name": "measurements",
            "note": f"{outcome.trials} candidates; the rest to settle and prove",
        },
    ]


def _change(before: float, after: float) -> str:
    return quantities.percent(after / before - 1, 0) if before else ""


def _progress_verdict(seen: Sequence[Seen], about: About) -> dict[str, Any]:
    tried = [each for each in seen if each.phase != "baseline"]
    fitting = [each for each in tried if each.kind == "fits" and each.ratio and each.accuracy is not None]
    best = max(fitting, key=lambda each: each.accuracy or 0.0, default=None)
    so_far = f"{len(tried)} of {about.planned} candidates tried" if about.planned else f"{len(tried)} candidates tried"
    return {
        "tone": "search",
        "title": "Search in progress",
        "sentence": f"{so_far}. {_best_so_far(best)}",
        "missed": (),
        "gauge": _both(lambda width: _gauge_so_far(best, about, width)) if about.limit else "",
        "keys": [],
    }


def _best_so_far(best: Seen | None) -> str:
    if best is None or best.ratio is None or best.accuracy is None:
        return "None fits the budget yet."
    found = f"{_accuracy(best.accuracy)} at {quantities.ratio(best.ratio.p50)}"
    return f"The most accurate that fits the budget so far: {found} ({best.phase} {best.number}), before fine-tuning."


def _gauge_so_far(best: Seen | None, about: About, width: float) -> Markup:
    assert about.limit is not None
    return charts.gauge(best.ratio if best else None, about.limit, width=width, name="best so far")


# Before and after


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One line of the table; `minor` lines are printed softly."""

    name: str
    before: str
    after: str
    change: str = ""
    minor: bool = False


def comparison(outcome: Outcome, about: About) -> list[Compared]:
    """Return the table of the unpruned model beside the result."""
    return [
        _test_accuracy(outcome),
        *_attacked(outcome),
        *_validation(outcome),
        _latencies(outcome, about),
        _ratios(outcome),
        *(_size(field, name, write, outcome) for field, name, write in _SIZES),
    ]


def _tested(outcome: Outcome) -> str:
    words = {"accuracy": "test accuracy", "agreement": "agreement with the unpruned model"}
    return words[counted(outcome.tested_on)] + (" on synthetic images" if without_data(outcome.tested_on) else "")


def last_look(outcome: Outcome) -> str:
    """Return what the closing numbers are of, in a sentence."""
    if without_data(outcome.tested_on):
        return (
            "No data set was read: agreement is on synthetic images that nothing else had looked at. "
            "It is no accuracy, and on real images usually much lower."
        )
    return "The test split was read once, at the end."


def _test_accuracy(outcome: Outcome) -> Compared:
    before, after = outcome.baseline, outcome.result
    return Compared(
        name=f"{counted(outcome.tested_on).capitalize()}, {after.test_images:,} {outcome.tested_on}",
        before=_accuracy_spread("baseline", before),
        after=_accuracy_spread("result", after),
        change=quantities.points(after.accuracy - before.accuracy),
    )


def _accuracy_spread(which: str, facts: ModelFacts) -> Markup:
    ends = [(end, getattr(facts.accuracy_interval, end)) for end in ("low", "high")]
    low, high = (
        number(f"{which}.accuracy_interval.{end}", value, quantities.fixed(100 * value, 2)) for end, value in ends
    )
    middle = number(f"{which}.accuracy", facts.accuracy, _accuracy(facts.accuracy))
    return Markup('{} <span class="ends">{}\u2013{}</span>').format(middle, low, high)


def _attacked(outcome: Outcome) -> list[Compared]:
    before, after = outcome.baseline.attacked, outcome.result.attacked
    return [
        Compared(
            name=f"Accuracy after {attack}, {outcome.result.attacked_images:,} of them",
            before=number(f"baseline.attacked.{attack}", before[attack], _accuracy(before[attack])),
            after=number(f"result.attacked.{attack}", share, _accuracy(share)),
            change=quantities.points(share - before[attack]),
            minor=True,
        )
        for attack, share in after.items()
    ]


_SIZES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("parameters", "Parameters", quantities.count),
    ("macs", "Multiply-accumulates", quantities.count),
    ("size_bytes", "ONNX file", quantities.mebibytes),
)


def _size(field: str, name: str, write: Callable[[float], str], outcome: Outcome) -> Compared:
    before, after = getattr(outcome.baseline, field), getattr(outcome.result, field)
    start, end = _pair(field, before, after, write)
    return Compared(name=name, before=start, after=end, change=_change(before, after))


def _pair(field: str, before: float, after: float, write: Callable[[float], str]) -> tuple[Markup, Markup]:
    return number(f"baseline.{field}", before, write(before)), number(f"result.{field}", after, write(after))


def _validation(outcome: Outcome) -> list[Compared]:
    start = outcome.baseline.validation.get("baseline")
    stages = {stage: value for stage, value in outcome.result.validation.items() if stage != "baseline"}
    judge = "Accuracy, validation" if outcome.judged_by == "labels" else JUDGES[outcome.judged_by].capitalize()
    return [_stage(f"{judge}, {_STAGES.get(stage, stage)}", stage, value, start) for stage, value in stages.items()]


def _stage(name: str, stage: str, value: float, start: float | None) -> Compared:
    after = number(f"result.validation.{stage}", value, _accuracy(value))
    if start is None:
        return Compared(name=name, before="", after=after, minor=True)
    before = number("baseline.validation.baseline", start, _accuracy(start))
    return Compared(name=name, before=before, after=after, change=quantities.points(value - start), minor=True)


def _latencies(outcome: Outcome, about: About) -> Compared:
    before, after = outcome.baseline.latency, outcome.result.latency
    return Compared(
        name=f"Latency, {about.unit}" + (" (emulated)" if about.emulated else ""),
        before=_timed("baseline.latency", before, about),
        after=_timed("result.latency", after, about),
        change=_change(before.p50, after.p50),
    )


def _timed(name: str, interval: Interval, about: About) -> Markup:
    return _spread(name, interval, about.latencies([interval.p50, interval.low, interval.high]))


def _spread(name: str, interval: Interval, texts: Sequence[str]) -> Markup:
    values = zip(("p50", "low", "high"), (interval.p50, interval.low, interval.high), texts, strict=True)
    parts = [number(f"{name}.{end}", value, text) for end, value, text in values]
    return Markup('{} <span class="ends">{}\u2013{}</span>').format(*parts)


def _ratio_said(name: str, ratio: Interval) -> Markup:
    ends = [(end, getattr(ratio, end)) for end in ("low", "high")]
    low, high = (number(f"{name}.{end}", value, quantities.fixed(value, 3)) for end, value in ends)
    middle = number(f"{name}.p50", ratio.p50, quantities.ratio(ratio.p50))
    return Markup("{} ({}\u2013{})").format(middle, low, high)


def _ratio_spread(name: str, ratio: Interval) -> Markup:
    ends = (quantities.fixed(each, 3) for each in (ratio.low, ratio.high))
    return _spread(name, ratio, [quantities.ratio(ratio.p50), *ends])


def _ratios(outcome: Outcome) -> Compared:
    ratio = outcome.result.ratio
    after = _ratio_spread("result.ratio", ratio) if ratio else "not timed"
    return Compared(name="Ratio, timed side by side", before="1x", after=after)


# Figures


def _both(draw: Callable[[float], Markup]) -> Markup:
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
        draw(charts.WIDE), draw(charts.NARROW)
    )


def figures(outcome: Outcome | None, seen: Sequence[Seen], about: About) -> dict[str, Any]:
    """Return the pictures of the search and of what was cut."""
    landmarks = _landmarks(outcome, seen)
    tried = [each for each in seen if each.phase != "baseline"]
    return {
        "tradeoff": _tradeoff(tried, landmarks, about),
        "landmarks": [each.kind for each in landmarks],
        "counts": {kind: sum(each.kind == kind for each in tried) for kind in ("fits", "over", "flagged", "failed")},
        "tried": _by_phase(tried),
        "reward": _reward(tried),
        "terms": _terms(tried),
        "constants": _constants(tried),
        "steadiness": _steadiness(tried),
        "widths": _widths(outcome) if outcome else None,
        "layers": _layers(outcome) if outcome else None,
    }


def _by_phase(tried: Sequence[Seen]) -> str:
    """Return how many candidates there are, and of which phase if there are several."""
    counts = Counter(each.phase for each in tried)
    parts = ", ".join(f"{phase} {count}" for phase, count in counts.items())
    noun = "candidate" if len(tried) == 1 else "candidates"
    return f"{len(tried)} {noun} ({parts})" if len(counts) > 1 else f"{len(tried)} {noun}"


def _tradeoff(tried: Sequence[Seen], landmarks: Sequence[Landmark], about: About) -> Markup | str:
    spots = [
        Spot(ratio=each.ratio, accuracy=each.accuracy * 100, kind=each.kind, label=each.name)
        for each in tried
        if each.ratio and each.accuracy is not None
    ]
    if not spots and not landmarks:
        return ""
    return _both(lambda width: charts.tradeoff(spots, landmarks, about.limit, judge=about.judge, width=width))


def _landmarks(outcome: Outcome | None, seen: Sequence[Seen]) -> list[Landmark]:
    """Return the unpruned model and, at the end of a run, the chosen plan before and after fine-tuning."""
    unpruned = next((each.accuracy for each in seen if each.phase == "baseline"), None)
    if outcome is None:
        return _known(1.0, unpruned, "unpruned", "unpruned")
    ratio, stages = outcome.result.ratio, outcome.result.validation
    found = _known(1.0, outcome.baseline.validation.get("baseline", unpruned), "unpruned", "unpruned")
    if ratio:
        found += _known(ratio.p50, stages.get("calibrated", stages.get("cut")), "chosen", "chosen, as cut")
        found += _known(ratio.p50, stages.get("tuned"), "tuned", "fine-tuned")
    return found


def _known(ratio: float, accuracy: float | None, kind: str, name: str) -> list[Landmark]:
    return [] if accuracy is None else [Landmark(ratio=ratio, accuracy=accuracy * 100, kind=kind, name=name)]


def _dots(tried: Sequence[Seen], value: Callable[[Seen], float | None]) -> list[Dot]:
    places = enumerate((each, value(each)) for each in tried)
    return [
        Dot(number=place, value=seen, kind=each.kind, label=f"{each.name}: {seen:.5g}")
        for place, (each, seen) in places
        if seen is not None
    ]


def _reward(tried: Sequence[Seen]) -> Markup | str:
    dots = _dots(tried, lambda each: each.reward)
    if not dots:
        return ""
    return _both(lambda width: charts.progress(dots, "reward", width=width, height=250, best=True))


def _term_values(tried: Sequence[Seen]) -> dict[str, list[Dot]]:
    """Return term → its dots, the reward's addends first, terms that never change left out."""
    names = sorted(dict.fromkeys(name for each in tried for name in each.terms), key=_addends_first)
    return {name: _dots(tried, partial(_term, name)) for name in names}


def _term(name: str, seen: Seen) -> float | None:
    return seen.terms.get(name)


def _addends_first(name: str) -> bool:
    return not name.startswith("reward")


def _terms(tried: Sequence[Seen]) -> list[Markup]:
    moving = {name: dots for name, dots in _term_values(tried).items() if len({each.value for each in dots}) > 1}
    return [charts.progress(dots, name, width=charts.PANEL) for name, dots in moving.items()]


def _constants(tried: Sequence[Seen]) -> dict[str, str]:
    still = {name: dots[0].value for name, dots in _term_values(tried).items() if len({d.value for d in dots}) == 1}
    return {name: quantities.significant(value, 4) for name, value in still.items()}


def _steadiness(tried: Sequence[Seen]) -> Markup | str:
    dots = _dots(tried, _half_width)
    failed = [place for place, each in enumerate(tried) if each.kind == "failed"]
    return _both(lambda width: charts.steadiness(dots, failed, width=width)) if dots else ""


def _half_width(seen: Seen) -> float | None:
    return None if seen.ratio is None else (seen.ratio.high - seen.ratio.low) / 2 / seen.ratio.p50 * 100


def _widths(outcome: Outcome) -> dict[str, Any]:
    pairs = [
        Row(
            name=each.group,
            before=each.before,
            after=each.after,
            text=f"{each.before}{_ARROW}{each.after or 'removed'}",
            label=f"{each.group}: {each.before} channels before, {each.after} after",
        )
        for each in outcome.widths
    ]
    table = [
        (
            each.group,
            number(f"widths.{k}.before", each.before, f"{each.before}"),
            number(f"widths.{k}.after", each.after, f"{each.after}"),
        )
        for k, each in enumerate(outcome.widths)
    ]
    cut = sum(each.after < each.before for each in outcome.widths)
    picture = _both(lambda width: charts.rows(pairs, "channels before and after", width=width))
    return {"picture": picture, "table": table, "groups": len(pairs), "cut": cut}


def _layers(outcome: Outcome) -> dict[str, Any] | None:
    before, after = outcome.layer_shares, outcome.result_layer_shares
    if not before:
        return None
    size = outcome.result.ratio.p50 if outcome.result.ratio else 1.0
    pairs = [_layer(name, share, after.get(name), size) for name, share in before.items()]
    rest, rest_after = 1 - sum(before.values()), 1 - sum(after.values())
    if rest > 0.005:
        pairs.append(_layer("everything else", rest, rest_after if after else 0.0, size))
    table = [
        (
            name,
            number(f"layer_shares.{k}", share, quantities.percent(share)),
            number(f"result_layer_shares.{k}", after.get(name, 0.0), quantities.percent(after.get(name, 0.0))),
        )
        for k, (name, share) in enumerate(before.items())
    ]
    picture = _both(lambda width: charts.rows(pairs, "time of every layer before and after", width=width))
    return {"picture": picture, "table": table, "layers": len(before)}


def _layer(name: str, share: float, after: float | None, size: float) -> Row:
    """Return a layer's time before and after, both in per cent of the unpruned model's time; None: it is gone."""
    now = (after or 0.0) * size * 100
    own = "gone from the result" if after is None else f"{after:.1%} of the result's time after"
    end = "gone" if after is None else f"{now:.1f}{quantities.NBSP}%"
    text = f"{share * 100:.1f}{'' if after is not None else quantities.NBSP + '%'}{_ARROW}{end}"
    label = f"{name}: {share:.1%} of the unpruned model's time before, {own}"
    return Row(name=name, before=share * 100, after=now, text=text, label=label)


# Raw timings


def timing(final: Measurement | None, baseline: Measurement | None, about: About) -> dict[str, Any] | None:
    """Return the pictures of the raw samples of the final measurement, None without one."""
    if final is None or not final.sessions:
        return None
    before, after = _clocked(final, 1), _clocked(final, 0)
    marks = [
        _mark("unpruned", "before", final.reference_latency(about.confidence, about.quantile), about),
        _mark("result", "after", final.latency(about.confidence, about.quantile), about),
    ]
    total = final.ratio(about.confidence, about.quantile)
    logs = [math.exp(each.log_ratio(about.quantile)) for each in final.sessions]
    edge = charts.cut_off([*before, *after])
    return {
        "picture": _both(lambda width: charts.distributions(before, after, marks, unit=about.unit, width=width)),
        "sessions": _both(lambda width: charts.sessions(logs, total, about.limit, width=width)),
        "calls": (len(before), len(after)),
        "count": len(final.sessions),
        "hidden": sum(each > edge for each in (*before, *after)),
        "total": _ratio_said("final.ratio", total),
        "flags": (*final.flags, *final.notes),
        "clocks": sorted({each.clock for each in final.sessions}),
        "self": _against_itself(baseline, about),
    }


def _mark(name: str, style: str, latency: Interval, about: About) -> tuple[str, str, float]:
    return f"{name} {about.latency(latency.p50)}", style, latency.p50


def _clocked(measurement: Measurement, which: int) -> list[float]:
    return [each / PER_UNIT for session in measurement.sessions for each in session.clocks()[which]]


def _against_itself(baseline: Measurement | None, about: About) -> Markup | None:
    if baseline is None or not baseline.sessions or baseline.artifact_sha256 != baseline.reference_sha256:
        return None
    return _ratio_said("baseline.self_ratio", baseline.ratio(about.confidence, about.quantile))
