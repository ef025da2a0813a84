"""Pictures put every value where it belongs; checked on the coordinates that they draw."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune import charts
from edgeprune.charts import Dot, Landmark, Row, Spot, bulk, pareto
from edgeprune.statistics import Interval


def spot(ratio: float, accuracy: float, kind: str = "fits") -> Spot:
    return Spot(ratio=Interval(p50=ratio, low=ratio * 0.99, high=ratio * 1.01), accuracy=accuracy, kind=kind, label="s")


def drawn(picture: str) -> ElementTree.Element:
    """Return the picture as a tree; it must be well-formed."""
    return ElementTree.fromstring(picture)


def classed(root: ElementTree.Element, style: str) -> list[ElementTree.Element]:
    return [each for each in root.iter() if each.get("class") == style]


_spots = st.lists(st.builds(spot, st.floats(0.1, 2), st.floats(0, 100)), max_size=20)


@given(_spots)
def test_the_pareto_front_is_what_nothing_dominates(spots: list[Spot]) -> None:
    front = pareto(spots)
    for each in spots:
        better = [s for s in spots if s.ratio.p50 <= each.ratio.p50 and s.accuracy >= each.accuracy]
        dominated = any((s.ratio.p50, s.accuracy) != (each.ratio.p50, each.accuracy) for s in better)
        assert dominated or any((f.ratio, f.accuracy) == (each.ratio, each.accuracy) for f in front)
        assert not dominated or each not in front
    assert front == sorted(front, key=lambda each: each.ratio.p50)


def test_the_budget_stands_between_what_fits_and_what_does_not() -> None:
    root = drawn(charts.tradeoff([spot(0.4, 80), spot(0.6, 90, "over")], [], 0.5, width=charts.WIDE))
    (limit,) = classed(root, "limit")
    (fits,), (over,) = classed(root, "spot fits"), classed(root, "spot over")
    places = [float(each.find("circle").get("cx")) for each in (fits, over)]
    assert places[0] < float(limit.get("x1")) < places[1]
    assert float(limit.get("x1")) == pytest.approx(sum(places) / 2, abs=0.02)
    heights = [float(each.find("circle").get("cy")) for each in (fits, over)]
    assert heights[0] > heights[1], "more accurate is higher up"


def test_the_chosen_plan_is_joined_to_what_fine_tuning_made_of_it() -> None:
    marks = [
        Landmark(ratio=1, accuracy=93, kind="unpruned", name="unpruned"),
        Landmark(ratio=0.48, accuracy=80, kind="chosen", name="chosen, as cut"),
        Landmark(ratio=0.48, accuracy=92, kind="tuned", name="fine-tuned"),
    ]
    root = drawn(charts.tradeoff([], marks, None, width=charts.NARROW))
    (rise,) = classed(root, "rise")
    (x0, y0), (x1, y1) = (map(float, each.split()) for each in rise.get("d")[1:].split("L"))
    assert x0 == x1
    assert y0 > y1
    assert not classed(root, "limit")


def test_labels_left_of_the_budget_do_not_cross_its_line() -> None:
    mark = Landmark(ratio=0.49, accuracy=80, kind="chosen", name="chosen, as cut")
    root = drawn(charts.tradeoff([spot(0.2, 50), spot(0.8, 90, "over")], [mark], 0.5, width=charts.WIDE))
    (label,) = classed(root, "halo")
    assert label.get("text-anchor") == "end"


def test_the_best_so_far_never_falls_and_ends_at_the_highest() -> None:
    values = [0.1, 0.5, 0.3, 0.7, 0.2]
    dots = [Dot(number=k, value=value, kind="fits", label="") for k, value in enumerate(values)]
    root = drawn(charts.progress(dots, "reward", width=charts.WIDE, best=True))
    (stair,) = classed(root, "front")
    heights = [float(each.split()[1]) for each in stair.get("d")[1:].split("L")]
    assert heights == sorted(heights, reverse=True)
    highest = min(float(each.find("circle").get("cy")) for each in classed(root, "spot fits"))
    assert heights[-1] == pytest.approx(highest, abs=0.06)


def test_a_value_far_outside_the_bulk_is_an_arrow_at_the_edge() -> None:
    dots = [Dot(number=k, value=0.5 + 0.01 * (k % 5), kind="fits", label="") for k in range(30)]
    dots.append(Dot(number=30, value=-40.0, kind="fits", label="far"))
    root = drawn(charts.progress(dots, "reward", width=charts.WIDE, best=True))
    (far,) = [each for each in classed(root, "spot fits") if each.findtext("title") == "far"]
    assert far.find("path") is not None
    near = [each for each in classed(root, "spot fits") if each is not far]
    heights = [float(each.find("circle").get("cy")) for each in near]
    assert max(heights) - min(heights) > 20, "the bulk is not flattened"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_the_bulk_holds_the_middle_eight_tenths(values: list[float]) -> None:
    low, high = bulk(values)
    inside = sum(low <= each <= high for each in values)
    assert inside >= 0.8 * len(values) - 2
    assert low <= high


def test_rows_are_as_long_as_their_values() -> None:
    pairs = [Row(name=name, before=a, after=b, text="", label="") for name, a, b in (("a", 64, 32), ("b", 16, 0))]
    for width in (charts.WIDE, charts.NARROW):
        root = drawn(charts.rows(pairs, "widths", width=width))
        before = [float(each.get("width")) for each in classed(root, "before")]
        after = [float(each.get("width")) for each in classed(root, "after")]
        assert before[0] / after[0] == pytest.approx(2, rel=1e-3)
        assert before[0] / before[1] == pytest.approx(4, rel=1e-3)
        assert after[1] == 0


def test_a_long_name_keeps_its_head_and_tail() -> None:
    name = "backbone." + "stage." * 20 + "conv1"
    picture = charts.rows([Row(name=name, before=1, after=1, text="", label=name)], "widths", width=charts.WIDE)
    text = classed(drawn(picture), "row-name")[0].text
    assert re.fullmatch(r"backbone.*\u2026.*conv1", text)
    assert len(text) <= 29


def test_histograms_lie_where_their_calls_do() -> None:
    before, after = [2.0 + 0.001 * k for k in range(100)], [1.0 + 0.001 * k for k in range(100)]
    marks = [("unpruned", "before", 2.05), ("result", "after", 1.05)]
    root = drawn(charts.distributions(before, after, marks, unit="ms", width=charts.WIDE))
    lines = {style: float(classed(root, f"mark {style}")[0].get("x1")) for style in ("before", "after")}
    for style in ("before", "after"):
        (area,) = classed(root, f"area {style}")
        corners = [tuple(map(float, each.split())) for each in area.get("d")[1:].split("L")]
        floor = corners[0][1]
        raised = [x for x, y in corners if y < floor - 1]
        assert min(raised) - 12 < lines[style] < max(raised) + 12
        assert max(raised) - min(raised) < 120


def test_the_gauge_shows_the_result_left_of_a_budget_that_is_met() -> None:
    result = Interval(p50=0.47, low=0.46, high=0.48)
    root = drawn(charts.gauge(result, 0.5, width=charts.WIDE))
    (dot,), (limit,) = classed(root, "result-dot"), classed(root, "limit")
    ends = [float(each.get("x1")) for each in classed(root, "result-bar")[1:]]
    assert ends[0] < float(dot.get("cx")) < ends[1] < float(limit.get("x1"))


def test_the_gauge_makes_room_for_a_result_slower_than_the_unpruned_model() -> None:
    root = drawn(charts.gauge(Interval(p50=1.5, low=1.4, high=1.6), 0.5, width=charts.NARROW))
    assert float(classed(root, "result-bar")[2].get("x1")) <= charts.NARROW


def test_the_interval_over_sessions_is_a_band_around_its_middle() -> None:
    total = Interval(p50=0.48, low=0.476, high=0.484)
    root = drawn(charts.sessions([0.478, 0.482, 0.480], total, 0.5, width=charts.WIDE))
    (band,) = classed(root, "band")
    left, right = float(band.get("x")), float(band.get("x")) + float(band.get("width"))
    dots = [float(each.find("circle").get("cx")) for each in classed(root, "spot fits")]
    assert len(dots) == 3
    assert all(left < each < right for each in dots)


def test_unsteady_and_failed_candidates_are_told_apart_by_form() -> None:
    dots = [Dot(number=0, value=0.5, kind="fits", label=""), Dot(number=1, value=0.9, kind="flagged", label="")]
    root = drawn(charts.steadiness(dots, [2], width=charts.WIDE))
    assert len(classed(root, "stick fits")) == 1
    assert classed(root, "stick flagged")[0].findtext("text") == "!"
    assert classed(root, "spot failed")[0].find("path") is not None


def test_the_signs_of_a_legend_differ() -> None:
    kinds = ("fits", "over", "flagged", "failed", "front", "limit", "before", "after", "unpruned", "chosen", "tuned")
    assert len({charts.swatch(each) for each in kinds}) == len(kinds)
