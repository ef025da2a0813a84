"""The pictures of a report: pure functions from numbers to inline SVG, without scripts, fonts or references.

Every function takes the width to draw for: a page holds a wide and a narrow drawing and shows the one that fits, since
scaling a drawing would scale its letters.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from edgeprune import quantities, statistics
from edgeprune.statistics import Interval
from edgeprune.svg import Axis, Frame, axes, drawing, framed, hint, line, path, said, tag

WIDE = 1036
NARROW = 352
PANEL = 330

# The gauge of the verdict


def gauge(result: Interval | None, limit: float, *, width: float, name: str = "result") -> Markup:
    """Return a ruler from 0 to the unpruned model with the budget on it and, once there is one, the result."""
    height, left, right, floor = 84.0, 8.0, 8.0, 50.0
    top = max(1.0, limit, result.high if result else 0.0) * 1.04
    scale = (width - left - right) / top

    def place(value: float) -> float:
        return left + value * scale

    parts = [
        tag("rect", x=place(0), y=floor - 5, width=limit * scale, height=10.0, class_="allowed", rx=5),
        tag("rect", x=place(limit), y=floor - 5, width=(top - limit) * scale, height=10.0, class_="beyond", rx=5),
        line(place(limit), floor - 16, place(limit), floor + 16, "limit"),
        said(f"budget {limit:.3g}x", place(limit), floor + 31, "limit-name", "middle"),
        line(place(1), floor - 9, place(1), floor + 9, "unpruned-line"),
        said("unpruned 1x", place(1), floor + 31, "name", "end"),
    ]
    if result:
        parts += [_whisker(place(result.low), place(result.high), floor), _result_dot(place(result.p50), floor)]
        text = f"{name} {quantities.ratio(result.p50)}"
        parts.append(said(text, min(max(place(result.p50), 70), width - 70), floor - 22, "result-name", "middle"))
    label = f"budget {limit:g}x" + (f", {name} {result.p50:.3f}x" if result else "")
    return drawing(width, height, label, *parts)


def _whisker(low: float, high: float, y: float) -> str:
    ends = line(low, y - 6, low, y + 6, "result-bar") + line(high, y - 6, high, y + 6, "result-bar")
    return line(low, y, high, y, "result-bar") + ends


def _result_dot(x: float, y: float) -> str:
    return tag("circle", cx=x, cy=y, r=6.0, class_="result-dot")


# Accuracy against latency


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One trial in the plane.

    Attributes:
        ratio: to the unpruned model, with its interval.
        accuracy: per cent.
        kind: "fits", "over" or "flagged".
        label: what the pointer is told.
    """

    ratio: Interval
    accuracy: float
    kind: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Landmark:
    """One point that has a name: the unpruned model, the chosen plan before and after fine-tuning."""

    ratio: float
    accuracy: float
    kind: str
    name: str


def pareto(spots: Iterable[Spot]) -> list[Spot]:
    """Return the spots than which none is both faster and at least as accurate, fastest first."""
    front: list[Spot] = []
    for spot in sorted(spots, key=lambda each: (each.ratio.p50, -each.accuracy)):
        if not front or spot.accuracy > front[-1].accuracy:
            front.append(spot)
    return front


def _fits_last(spot: Spot) -> bool:
    return spot.kind == "fits"


_RATIO = "latency, ratio to the unpruned model"


def _known(limit: float | None) -> list[float]:
    return [] if limit is None else [limit]


def tradeoff(
    spots: Sequence[Spot],
    landmarks: Sequence[Landmark],
    limit: float | None,
    *,
    judge: str = "validation accuracy",
    width: float,
) -> Markup:
    """Return accuracy, or what `judge` names (per cent, up), against latency ratio (right).

    With intervals, front, budget and landmarks.
    """
    ratios = [edge for each in spots for edge in (each.ratio.low, each.ratio.high)]
    x = Axis.over(
        [*_known(limit), *ratios, *(each.ratio for each in landmarks)], "latency, ratio to the unpruned model", about=6
    )
    heights = [*(each.accuracy for each in spots), *(each.accuracy for each in landmarks)]
    y = Axis.over(heights, f"{judge}, %", pad=0.07)
    frame = framed(width, 440 if width > 600 else 380, x, y, top=44)
    steady = [each for each in spots if each.kind != "flagged"]
    dots = [_spot(frame, each) for each in sorted(spots, key=_fits_last)]
    parts = [_over(frame, limit), axes(frame), *dots, _front(frame, pareto(steady)), _limit(frame, limit)]
    return drawing(width, frame.height, "accuracy against latency", *parts, _landmarks(frame, landmarks, limit))


def _spot(frame: Frame, spot: Spot) -> str:
    x, y = frame.px(spot.ratio.p50), frame.py(spot.accuracy)
    bar = line(frame.px(spot.ratio.low), y, frame.px(spot.ratio.high), y, "error")
    return tag("g", hint(spot.label), bar, _shape(spot.kind, x, y), class_=f"spot {spot.kind}")


def _shape(kind: str, x: float, y: float) -> str:
    """Return the sign of a kind of trial, told apart by its form as well as by its colour."""
    if kind == "failed":
        return tag("path", d=f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6")
    if kind == "flagged":
        return tag("path", d=f"M{x:.1f} {y - 4.5:.1f}l4.5 8h-9Z")
    return tag("circle", cx=x, cy=y, r=3.3)


def _front(frame: Frame, front: Sequence[Spot]) -> str:
    corners: list[tuple[float, float]] = []
    for spot in front:
        x, y = frame.px(spot.ratio.p50), frame.py(spot.accuracy)
        corners += [(x, corners[-1][1]), (x, y)] if corners else [(x, y)]
    return path(corners, "front")


def _over(frame: Frame, limit: float | None) -> str:
    if limit is None:
        return ""
    left, tall = frame.px(limit), frame.floor - frame.top
    return tag("rect", x=left, y=frame.top, width=frame.edge - left, height=tall, class_="over-area")


def _limit(frame: Frame, limit: float | None) -> str:
    if limit is None:
        return ""
    x = frame.px(limit)
    anchor = "end" if x > frame.width - 50 else "middle"
    name = said(f"budget {limit:.3g}x", x, frame.top - 6, "limit-name", anchor)
    return line(x, frame.top, x, frame.floor, "limit") + name


def _landmarks(frame: Frame, landmarks: Sequence[Landmark], limit: float | None) -> str:
    places = [(frame.px(each.ratio), frame.py(each.accuracy)) for each in landmarks]
    chosen = [place for each, place in zip(landmarks, places, strict=True) if each.kind in ("chosen", "tuned")]
    rise = path(chosen, "rise") if len(chosen) > 1 else ""
    named = zip(landmarks, places, strict=True)
    return rise + "".join(_landmark(each, x, y, flip=_flips(frame, limit, x, each.name)) for each, (x, y) in named)


def _flips(frame: Frame, limit: float | None, x: float, name: str) -> bool:
    """Return whether a label goes to the left: no room on the right, or the budget's line would cross it."""
    room = 12 + 7 * len(name)
    if x + room > frame.edge:
        return True
    crossed = limit is not None and 0 <= frame.px(limit) - x < room
    return crossed and x - frame.left > room


def _landmark(landmark: Landmark, x: float, y: float, *, flip: bool) -> str:
    size = 7
    diamond = f"M{x:.1f} {y - size:.1f}L{x + size:.1f} {y:.1f}L{x:.1f} {y + size:.1f}L{x - size:.1f} {y:.1f}Z"
    square = f"M{x - 5:.1f} {y - 5:.1f}h10v10h-10Z"
    shape = tag("path", d=square if landmark.kind == "unpruned" else diamond, class_=f"landmark {landmark.kind}")
    label = said(landmark.name, x - 12 if flip else x + 12, y + 4, "halo", "end" if flip else "start")
    told = hint(f"{landmark.name}: {landmark.accuracy:.2f} %, {landmark.ratio:.3f}x")
    return tag("g", told, shape, label)


# One number a trial


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One trial's value of something; `kind` as of `Spot`, or "failed"."""

    number: int
    value: float
    kind: str
    label: str


def progress(dots: Sequence[Dot], title: str, *, width: float, height: float = 170, best: bool = False) -> Markup:
    """Return values over trial numbers; with `best`, also the highest so far as a stair.

    Values far outside the bulk are drawn as arrows at the edge, so that they do not flatten the rest.
    """
    x = _whole(Axis.over((each.number for each in dots), "trial", about=6 if width > 600 else 4, pad=0.02))
    low, high = bulk([each.value for each in dots])
    highest = max(each.value for each in dots)
    shown = [min(max(each.value, low), high) for each in dots]
    y = Axis.over([*shown, *([highest] if best else [])], title, about=4, pad=0.08)
    frame = framed(width, height, x, y)
    stair = _stair(frame, dots) if best else ""
    return drawing(width, height, f"{title} over trials", axes(frame), stair, *(_dot(frame, each) for each in dots))


def bulk(values: Sequence[float]) -> tuple[float, float]:
    """Return the range outside which a value would flatten the others: 10 and 90 % quantiles and 1.5 times between."""
    low, high = (statistics.quantile(values, q) for q in (0.1, 0.9))
    return low - 1.5 * (high - low), high + 1.5 * (high - low)


def _whole(axis: Axis) -> Axis:
    ticks = tuple(tick for tick in axis.ticks if tick == int(tick) and tick >= 0)
    return Axis(low=axis.low, high=axis.high, ticks=ticks, title=axis.title)


def _dot(frame: Frame, dot: Dot) -> str:
    x, y = frame.px(dot.number), frame.py(min(max(dot.value, frame.y.low), frame.y.high))
    shape = _shape(dot.kind, x, y)
    if dot.value < frame.y.low:
        shape = tag("path", d=f"M{x:.1f} {y - 2:.1f}l-3.5 -6h7Z")
    if dot.value > frame.y.high:
        shape = tag("path", d=f"M{x:.1f} {y + 2:.1f}l-3.5 6h7Z")
    return tag("g", hint(dot.label), shape, class_=f"spot {dot.kind}")


def _stair(frame: Frame, dots: Sequence[Dot]) -> str:
    corners: list[tuple[float, float]] = []
    highest = -math.inf
    for dot in dots:
        if dot.value > highest:
            highest, before = dot.value, highest
            start = [] if before == -math.inf else [(frame.px(dot.number), frame.py(before))]
            corners += [*start, (frame.px(dot.number), frame.py(highest))]
    return path([*corners, (frame.edge, frame.py(highest))] if corners else [], "front")


def steadiness(dots: Sequence[Dot], failed: Sequence[int], *, width: float) -> Markup:
    """Return the half-width of every trial's interval (`Dot.value`, per cent) as bars; failures as crosses below."""
    numbers = [*(each.number for each in dots), *failed]
    x = _whole(Axis.over(numbers, "trial", about=8 if width > 600 else 4, pad=0.02))
    y = Axis.from_zero((each.value for each in dots), "half-width of the interval, %", about=3)
    frame = framed(width, 150, x, y)
    thick = max(1.0, min(8.0, 0.7 * (frame.edge - frame.left) / max(1, len(numbers))))
    bars = [_stick(frame, each, thick) for each in dots]
    crosses = [_dot(frame, Dot(number=n, value=0, kind="failed", label=f"trial {n}: failed")) for n in failed]
    return drawing(width, 150, "width of the interval of every trial", axes(frame), *bars, *crosses)


def _stick(frame: Frame, dot: Dot, thick: float) -> str:
    top = frame.py(dot.value)
    left = frame.px(dot.number) - thick / 2
    bar = tag("rect", x=left, y=top, width=thick, height=frame.floor - top)
    warning = said("!", frame.px(dot.number), top - 3, "warning", "middle") if dot.kind == "flagged" else ""
    return tag("g", hint(dot.label), bar, warning, class_=f"stick {dot.kind}")


# Before and after, one row each


@dataclass(frozen=True, kw_only=True)
class Row:
    """One named thing before and after, in the same unit; `text` is printed at its end."""

    name: str
    before: float
    after: float
    text: str
    label: str


def rows(pairs: Sequence[Row], title: str, *, width: float) -> Markup:
    """Return one row a pair: the length before as an outline, the length after filled."""
    wide = width > 600
    pitch, left, right = (24.0, 236.0, 130.0) if wide else (38.0, 0.0, 96.0)
    longest = max((max(each.before, each.after) for each in pairs), default=1.0) or 1.0
    scale = (width - left - right) / longest
    drawn = [_row(each, k * pitch, left, scale, wide=wide) for k, each in enumerate(pairs)]
    return drawing(width, pitch * len(pairs) + 4, title, *drawn)


def _row(row: Row, y: float, left: float, scale: float, *, wide: bool) -> str:
    bar_top, room = (y + 4, 29) if wide else (y + 18, 40)
    name_x, name_y, anchor = (left - 12, y + 17, "end") if wide else (0.0, y + 12, "start")
    end = left + max(row.before, row.after) * scale
    parts = [
        hint(row.label),
        said(_shortened(row.name, room), name_x, name_y, "row-name", anchor),
        tag("rect", x=left, y=bar_top, width=max(1.0, row.before * scale), height=16.0, class_="before", rx=2),
        tag("rect", x=left, y=bar_top, width=row.after * scale, height=16.0, class_="after", rx=2),
        said(row.text, end + 8, bar_top + 12, "row-value"),
    ]
    return tag("g", *parts)


def _shortened(name: str, room: int) -> str:
    half = (room - 1) // 2
    return name if len(name) <= room else f"{name[:half]}\u2026{name[-half:]}"


# Raw timings


def distributions(
    before: Sequence[float], after: Sequence[float], marks: Sequence[tuple[str, str, float]], *, unit: str, width: float
) -> Markup:
    """Return two histograms on one axis, in `unit`, with named vertical marks (name, "before" or "after", place).

    The slowest half per cent is off the page; the caption says how many calls that is.
    """
    everything = [*before, *after]
    edge = cut_off(everything)
    shown = [each for each in everything if each <= edge]
    x = Axis.over([*shown, *(place for *_, place in marks)], f"one call, {unit}", about=8 if width > 600 else 4)
    bins = 110 if width > 600 else 55
    shares = {name: _shares(values, x, bins) for name, values in (("before", before), ("after", after))}
    y = Axis.from_zero([*shares["before"], *shares["after"]], "share of calls, %")
    frame = framed(width, 260, x, y, top=52)
    areas = [_area(frame, shares[name], name) for name in ("before", "after")]
    return drawing(width, 260, "distribution of raw timings", axes(frame), *areas, _marks(frame, marks))


def cut_off(values: Sequence[float]) -> float:
    """Return the largest value that `distributions` draws."""
    return statistics.quantile(values, 0.995)


def _shares(values: Sequence[float], axis: Axis, bins: int) -> list[float]:
    counts = [0] * bins
    for value in values:
        place = int((value - axis.low) / (axis.high - axis.low) * bins)
        if 0 <= place < bins:
            counts[place] += 1
    return [100 * each / len(values) for each in counts]


def _area(frame: Frame, shares: Sequence[float], style: str) -> str:
    width = (frame.x.high - frame.x.low) / len(shares)
    corners = [(frame.left, frame.floor)]
    for k, share in enumerate(shares):
        near, far = frame.px(frame.x.low + k * width), frame.px(frame.x.low + (k + 1) * width)
        corners += [(near, frame.py(share)), (far, frame.py(share))]
    return path([*corners, (frame.edge, frame.floor)], f"area {style}")


def _marks(frame: Frame, marks: Sequence[tuple[str, str, float]]) -> str:
    parts = []
    for k, (name, style, place) in enumerate(marks):
        x = frame.px(place)
        anchor = "start" if x < frame.width * 0.3 else "end" if x > frame.width * 0.7 else "middle"
        y = frame.top - 6 - 15 * (k % 2)
        parts += [line(x, y + 3, x, frame.floor, f"mark {style}"), said(name, x, y, f"halo {style}", anchor)]
    return "".join(parts)


def sessions(ratios: Sequence[float], total: Interval, limit: float | None, *, width: float) -> Markup:
    """Return each session's ratio as a dot, the interval over sessions as a band, and the budget."""
    edges = [*ratios, total.low, total.high, *_known(limit)]
    x = Axis.over(edges, _RATIO, about=8 if width > 600 else 4)
    y = Axis(low=0, high=len(ratios) + 1, ticks=(), title="each fresh session, and the interval over them")
    frame = Frame(width=width, height=78 + 14 * len(ratios), left=14, right=14, top=34, bottom=44, x=x, y=y)
    wide = frame.px(total.high) - frame.px(total.low)
    band = tag("rect", x=frame.px(total.low), y=frame.top, width=wide, height=frame.floor - frame.top, class_="band")
    middle = line(frame.px(total.p50), frame.top, frame.px(total.p50), frame.floor, "mark after")
    dots = [
        tag(
            "g",
            hint(f"session {k}: {value:.4f}x"),
            tag("circle", cx=frame.px(value), cy=frame.py(k), r=4.0),
            class_="spot fits",
        )
        for k, value in enumerate(ratios, start=1)
    ]
    return drawing(
        width, frame.height, "ratio of every session", axes(frame), band, middle, _limit(frame, limit), *dots
    )


def swatch(kind: str) -> Markup:
    """Return the small sign that explains `kind` in a legend."""
    shapes = {
        "front": line(0, 7, 22, 7, "front"),
        "limit": line(11, 0, 11, 14, "limit"),
        "before": tag("rect", x=1, y=1, width=20, height=12, class_="before", rx=2),
        "after": tag("rect", x=1, y=1, width=20, height=12, class_="after", rx=2),
        "failed": tag("g", _shape("failed", 11, 7), class_="spot failed"),
        "unpruned": tag("path", d="M6 2h10v10h-10Z", class_="landmark unpruned"),
        "chosen": tag("path", d="M11 0l7 7l-7 7l-7 -7Z", class_="landmark chosen"),
        "tuned": tag("path", d="M11 0l7 7l-7 7l-7 -7Z", class_="landmark tuned"),
    }
    error = line(1, 7, 21, 7, "error")
    dot = tag("g", error, _shape(kind, 11, 7), class_=f"spot {kind}")
    return Markup(tag("svg", shapes.get(kind, dot), width=22, height=14, aria_hidden="true"))  # noqa: S704  escaped above
