"""The page says what the ledger says, to anybody, from nowhere else, and looks like a page."""

import json
import math
import os
import random
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from small_bundle import lay_out

from edgeprune.errors import ConfigError, LedgerError
from edgeprune.ledger import Ledger
from edgeprune.measurement import Calls, Measurement, Session
from edgeprune.outcome import BudgetVerdict, ModelFacts, Outcome, WidthChange
from edgeprune.plan import Plan
from edgeprune.report import render, render_run
from edgeprune.trial import Failure, Quality, Score, Trial

CHROMIUM = Path("/usr/bin/chromium")
FULL = {f"layer{stage}.{block}.conv1": 16 * 2 ** (stage - 1) for stage in (1, 2, 3) for block in range(9)}
BASELINE_NS = 1_842_000.0
LIMIT = 0.5


def calls(rng: random.Random, typical_ns: float, count: int) -> Calls:
    wall = [int(typical_ns * math.exp(abs(rng.gauss(0, 0.018)) + 0.004 * rng.expovariate(1))) for _ in range(count)]
    stalled = [rng.random() < 0.04 for _ in wall]
    slow = [
        each + int(rng.uniform(0.2, 2.5) * 1e6) if stall else each for each, stall in zip(wall, stalled, strict=True)
    ]
    return Calls(elapsed=tuple(slow), on_cpu=tuple(wall), preempted=tuple(int(each) for each in stalled))


def measured(rng: random.Random, ratio: float, *, sessions: int = 3, count: int = 60, **more: object) -> Measurement:
    seen = []
    for _ in range(sessions):
        drift, truth = rng.uniform(0.95, 1.2), ratio * math.exp(rng.gauss(0, 0.003))
        candidate, reference = calls(rng, BASELINE_NS * drift * truth, count), calls(rng, BASELINE_NS * drift, count)
        seen.append(Session(candidate=candidate, reference=reference))
    facts = {
        "profile_digest": "p" * 64,
        "artifact_sha256": f"{rng.getrandbits(256):064x}",
        "reference_sha256": "0" * 64,
        "sessions": tuple(seen),
        "conditions": {},
        "taken_at": "2026-03-01T12:00:00+00:00",
        "seconds": 1.9,
    }
    return Measurement(**facts | more)


def plan_of(rng: random.Random, keep: float) -> Plan:
    widths = {
        name: max(8, min(full, 8 * round(full * keep * rng.uniform(0.6, 1.4) / 8))) for name, full in FULL.items()
    }
    return Plan(kept={name: tuple(range(width)) for name, width in widths.items()})


def searched(rng: random.Random, number: int, count: int, **more: object) -> Trial:
    """Return one candidate of a search that learns: it starts all over and gathers just under the limit."""
    heat = math.exp(-3 * number / count)
    keep = min(0.97, max(0.12, rng.gauss(0.46, 0.03 + 0.22 * heat)))
    plan = plan_of(rng, keep)
    flags = ("reference 14 % slower than at the start",) if rng.random() < 0.05 else ()
    timing = measured(rng, 0.08 + 0.9 * keep, flags=flags, **more)
    accuracy = max(0.1, 0.936 - 0.55 * (1 - keep) ** 2.6 - abs(rng.gauss(0, 0.02 + 0.1 * heat)))
    return judged(number, plan, timing, accuracy)


def judged(number: int, plan: Plan, timing: Measurement, accuracy: float, phase: str = "search") -> Trial:
    ratio = timing.ratio()
    overrun = max(0.0, ratio.high / LIMIT - 1)
    parts = {"reward_accuracy": accuracy / 0.936, "reward_latency": -5 * overrun, "reward_entropy": -0.02 * accuracy**2}
    facts = {"latency_ratio": ratio.p50, "latency_limit": LIMIT, "overrun": overrun, "accuracy": accuracy}
    return Trial(
        number=number,
        phase=phase,
        strategy="ddpg",
        plan=plan,
        graph_sha256="a" * 64,
        measurement=timing,
        failure=None,
        quality=Quality(accuracy=accuracy, entropy=2.1, images=2048),
        score=Score(reward=sum(parts.values()), feasible=ratio.high <= LIMIT, terms={**facts, **parts}),
        seconds={"cut": 0.01, "measure": 1.9},
    )


def broken(number: int, message: str) -> Trial:
    return Trial(
        number=number,
        phase="search",
        strategy="ddpg",
        plan=Plan(kept={name: tuple(range(8)) for name in FULL}),
        graph_sha256=None,
        measurement=None,
        failure=Failure(kind="CompileError", message=message),
        quality=None,
        score=Score(reward=-1.0, feasible=False, terms={}),
    )


def a_search(count: int = 120, seed: int = 4, **more: object) -> list[Trial]:
    rng = random.Random(seed)
    trials = [searched(rng, number, count, **more) for number in range(count)]
    for number in {count // 7, count // 2}:
        trials[number] = broken(number, "Conv_14: the runtime refuses 13 input channels in a group of 4")
    return trials


def facts_of(
    timing: Measurement, which: str, accuracy: float, size: float, validation: Mapping[str, float]
) -> ModelFacts:
    return ModelFacts(
        accuracy=accuracy,
        test_images=10_000,
        validation=validation,
        latency=timing.reference_latency() if which == "baseline" else timing.latency(),
        ratio=None if which == "baseline" else timing.ratio(),
        parameters=int(853_018 * size),
        macs=int(125_485_696 * size),
        size_bytes=int(3_437_721 * size),
    )


def an_outcome(trials: Sequence[Trial], final: Measurement, **more: object) -> Outcome:
    fitting = [each for each in trials if each.score.feasible]
    best = max(fitting, key=lambda each: each.quality.accuracy)
    rng, ratio = random.Random(1), final.ratio()
    weights = [rng.uniform(0.6, 1.6) for _ in FULL]
    shares = {name: 0.94 * weight / sum(weights) for name, weight in zip(FULL, weights, strict=True)}
    kept = [share * best.plan.widths[name] / FULL[name] for name, share in shares.items()]
    after = {name: 0.9 * each / sum(kept) for name, each in zip(FULL, kept, strict=True)}
    stages = {"cut": best.quality.accuracy, "calibrated": best.quality.accuracy + 0.021, "tuned": 0.931}
    facts = {
        "model": "resnet56_cifar10",
        "target": "host",
        "emulated": False,
        "metric": "latency_ns",
        "strategy": "ddpg",
        "seed": 0,
        "baseline": facts_of(final, "baseline", 0.9312, 1.0, {"baseline": 0.936}),
        "result": facts_of(final, "result", 0.9268, 0.4127, stages),
        "budget": BudgetVerdict(requested="0.5x", limit_ratio=LIMIT, met=ratio.high <= LIMIT, used=ratio.p50 / LIMIT),
        "measurements": len(trials) + 4,
        "trials": len(trials),
        "widths": tuple(WidthChange(group=name, before=FULL[name], after=best.plan.widths[name]) for name in FULL),
        "layer_shares": shares,
        "result_layer_shares": after,
        "seconds": {"export": 6.2, "search": 311.4, "fine-tune": 184.0, "final": 12.1},
        "versions": {"edgeprune": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.31.1", "python": "3.11.7"},
        "conditions": {"threads": 1, "priority": "nice -20", "before": {"load": [0.8, 0.6]}, "governor": None},
    }
    return Outcome(**facts | more)


def finished(run_dir: Path, *, ratio: float = 0.478, count: int = 120, **more: object) -> None:
    """Fill the ledger of a run that came to its end."""
    emulated = bool(more.get("emulated"))
    trials = a_search(count, emulated=emulated)
    final = measured(random.Random(8), ratio, sessions=6, count=300, emulated=emulated)
    itself = measured(random.Random(9), 1.0, sessions=4, artifact_sha256="0" * 64)
    outcome = an_outcome(trials, final, **more)
    command = "edgeprune deploy --config edgeprune.toml --target host --budget 0.5x --out dist/ --seed 0"
    with Ledger.open(run_dir / "ledger.sqlite") as ledger:
        for each in trials:
            ledger.append("run-1", each, seed=0)
        ledger.note_incident(
            "run-1", kind="DeviceLost", message="the worker was killed by signal 9", plan=trials[3].plan
        )
        ledger.record("run-1", "outcome", outcome.to_json())
        ledger.record("run-1", "final_measurement", final.to_json())
        ledger.record("run-1", "baseline", {"measurement": itself.to_json()})
        ledger.record("run-1", "command", command)
        ledger.record("run-1", "notes", {"parity, cut ONNX against engine": "3.1e-6 (tolerance 1e-4)"})


# Reading a page


class Page(HTMLParser):
    """What a reader of the markup sees: named numbers, tags, attributes, text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.numbers: dict[str, set[tuple[float, str]]] = {}
        self._number: tuple[str, float] | None = None
        self._styled = False
        self.feed(html)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = {name: value or "" for name, value in attrs}
        self.attributes += found.items()
        self._styled = tag in ("style", "script")
        if tag == "data":
            self._number = found["data-value"], float(found["value"])

    def handle_endtag(self, tag: str) -> None:
        self._styled = False
        if tag == "data":
            self._number = None

    def handle_data(self, data: str) -> None:
        if self._styled:
            return
        self.words.append(data)
        if self._number:
            name, value = self._number
            self.numbers.setdefault(name, set()).add((value, data))


class Truth:
    """The numbers of a ledger by the names that they have on a page."""

    def __init__(self, run_dir: Path) -> None:
        with Ledger.open(run_dir / "ledger.sqlite", read_only=True) as ledger:
            self.outcome = ledger.fact("run-1", "outcome")
            self.trials = {f"{each.phase}.{each.number}": each for each in ledger.trials("run-1")}
            self.final = Measurement.from_json(ledger.fact("run-1", "final_measurement")).ratio()
            self.itself = Measurement.from_json(ledger.fact("run-1", "baseline")["measurement"]).ratio()

    def __getitem__(self, name: str) -> float:
        first, *rest = name.split(".")
        if first == "trials":
            return self._of_trial(self.trials[".".join(rest[:2])], rest[2])
        if first == "final":
            return getattr(self.final, rest[1])
        if name.startswith("baseline.self_ratio"):
            return getattr(self.itself, rest[1])
        value = self.outcome[first]
        for step in rest:
            ordered = list(value.values()) if isinstance(value, dict) else value
            value = ordered[int(step)] if step.isdigit() else value[step]
        return value

    @staticmethod
    def _of_trial(trial: Trial, field: str) -> float:
        if field == "reward":
            return trial.score.reward
        return trial.measurement.ratio().p50 if field == "ratio" else trial.quality.accuracy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report; read by several tests, changed by none."""
    run_dir = tmp_path_factory.mktemp("dist") / "resnet56.run"
    run_dir.mkdir()
    finished(run_dir)
    assert render_run(run_dir) == run_dir / "report.html"
    return run_dir


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text("utf-8")


MODELS = ("baseline", "result")
ENDS = ("p50", "low", "high")
HEADLINES = {
    "budget.limit_ratio",
    "budget.used",
    *(f"{model}.{field}" for model in MODELS for field in ("accuracy", "parameters", "macs", "size_bytes")),
    *(f"{model}.latency.{end}" for model in MODELS for end in ENDS),
    *(f"{model}.accuracy_interval.{end}" for model in MODELS for end in ("low", "high")),
    *(f"{ratio}.{end}" for ratio in ("result.ratio", "final.ratio", "baseline.self_ratio") for end in ENDS),
    "baseline.validation.baseline",
    *(f"result.validation.{stage}" for stage in ("cut", "calibrated", "tuned")),
    *(f"widths.{k}.{when}" for k in range(len(FULL)) for when in ("before", "after")),
    *(f"{shares}.{k}" for shares in ("layer_shares", "result_layer_shares") for k in range(len(FULL))),
}


def test_every_number_with_a_name_equals_the_ledgers_to_the_last_digit(run: Path, html: str) -> None:
    numbers, truth = Page(html).numbers, Truth(run)
    assert set(numbers) >= HEADLINES | {f"trials.{trial}.reward" for trial in truth.trials}
    assert not {name for name, seen in numbers.items() if {value for value, _ in seen} != {truth[name]}}


def test_what_is_printed_is_the_number_rounded(html: str) -> None:
    numbers = Page(html).numbers
    ((ratio, shown),) = numbers["final.ratio.p50"]
    assert shown == f"{ratio:.3f}x"
    ((accuracy, shown),) = numbers["result.accuracy"]
    assert shown == f"{accuracy * 100:.2f}\u00a0%"
    ((latency, shown),) = numbers["result.latency.p50"]
    assert float(shown) == pytest.approx(latency, rel=0.005)


def test_a_met_budget_is_the_headline(html: str) -> None:
    text = Page(html).text
    assert "Budget met 0.5x was asked for." in text
    assert "lies under the limit" in text
    assert "Budget missed" not in text
    assert "Not measured" not in text


def test_a_missed_budget_is_the_headline_with_every_reason(tmp_path: Path) -> None:
    trials, final = a_search(20), measured(random.Random(8), 0.52)
    broken_promises = ("latency: the interval ends above the limit", "size: 3.1 MiB, more than 3")
    outcome = an_outcome(trials, final)
    outcome = replace(outcome, budget=replace(outcome.budget, met=False, missed=broken_promises))
    text = Page(render(outcome, trials, final_measurement=final)).text
    assert "Budget missed in latency and size" in text
    assert "lies over the limit" in text
    for each in broken_promises:
        assert each in text


def test_a_budget_in_milliseconds_also_states_its_ratio() -> None:
    trials, final = a_search(20), measured(random.Random(8), 0.47)
    outcome = an_outcome(trials, final)
    outcome = replace(outcome, budget=replace(outcome.budget, requested="0.92ms"))
    assert "0.92ms , 0.5x of the unpruned latency, was asked for." in Page(render(outcome, trials)).text


def test_failures_incidents_conditions_and_the_command_are_on_the_page(html: str) -> None:
    text = Page(html).text
    for words in (
        "2 candidates failed.",
        "Conv_14: the runtime refuses 13 input channels in a group of 4",
        "the worker was killed by signal 9",
        "DeviceLost",
        "onnxruntime 1.31.1",
        "before.load 0.8, 0.6",
        "governor not known",
        "edgeprune deploy --config edgeprune.toml --target host --budget 0.5x",
        "parity, cut ONNX against engine",
        "The same in every candidate: latency_limit 0.5",
    ):
        assert words in text


def test_a_removed_layer_is_gone_and_a_result_has_no_stage_called_baseline() -> None:
    trials, final = a_search(20), measured(random.Random(8), 0.47)
    outcome = an_outcome(trials, final, layer_shares={"a": 0.6, "b": 0.4}, result_layer_shares={"a": 1.0})
    stages = {"baseline": 0.936, "tuned": 0.93}
    html = render(replace(outcome, result=replace(outcome.result, validation=stages)), trials)
    assert "40.0\u00a0% \u2192 gone" in html
    assert "validation, after fine-tuning" in html
    assert "validation, baseline" not in html


def test_candidates_are_counted_by_phase() -> None:
    rng = random.Random(0)
    last = judged(0, plan_of(rng, 0.5), measured(rng, 0.48), 0.8, phase="final")
    assert "21 candidates (search 20, final 1)" in Page(render(None, [*a_search(20), last])).text


def test_every_picture_is_there_in_a_wide_and_a_narrow_drawing(html: str) -> None:
    for label in (
        "budget 0.5x, result",
        "accuracy against latency",
        "reward over trials",
        "channels before and after",
        "time of every layer before and after",
        "distribution of raw timings",
        "ratio of every session",
        "width of the interval of every trial",
    ):
        assert html.count(f'role="img" aria-label="{label}') == 2, label
    assert html.count('aria-label="reward_accuracy over trials"') == 1


def test_the_page_refers_to_nothing_outside_itself(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base", "audio", "video"} & set(page.tags)
    assert not {"src", "href", "srcset", "action", "xlink:href", "ping"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import|//[a-z]", html)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


HOSTILE = "<script>alert(1)</script>\"'&\x1b[31mred\x07\x00\u202egnp.exe\ud800 {{ 7*7 }} </svg>"
TAME = "<script>alert(1)</script>\"'&redgnp.exe\ufffd {{ 7*7 }} </svg>"


def test_hostile_names_are_text_everywhere(tmp_path: Path) -> None:
    """Groups, layers, models, messages, flags, conditions, versions and the command carry markup and control codes."""
    trials = a_search(20)
    flagged = measured(random.Random(0), 0.4, flags=(HOSTILE,))
    trials[5] = judged(5, trials[5].plan, flagged, 0.7)
    trials[4] = broken(4, HOSTILE)
    final = measured(random.Random(8), 0.47, flags=(HOSTILE,))
    outcome = an_outcome(
        trials,
        final,
        model=HOSTILE,
        target=HOSTILE,
        strategy=HOSTILE,
        widths=(WidthChange(group=HOSTILE, before=16, after=0),),
        layer_shares={HOSTILE: 0.7},
        result_layer_shares={HOSTILE: 0.6},
        seconds={HOSTILE: 1.0},
        versions={HOSTILE: HOSTILE},
        conditions={HOSTILE: [HOSTILE, {HOSTILE: 1}]},
    )
    budget = replace(outcome.budget, requested=HOSTILE, met=False, missed=(HOSTILE,))
    html = render(
        replace(outcome, budget=budget), trials, final_measurement=final, extra={"command": HOSTILE, HOSTILE: HOSTILE}
    )
    page = Page(html)
    assert "script" not in page.tags
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", html)
    assert html.encode()
    assert page.text.count(TAME) > 10
    assert "49" not in re.findall(r"gnp\.exe\ufffd (\S+)", page.text)
    assert page.tags.count("main") == 1


def test_emulated_numbers_are_never_milliseconds(tmp_path: Path) -> None:
    finished(tmp_path, count=24, emulated=True, metric="formula_ns")
    page = Page(render_run(tmp_path).read_text("utf-8"))
    assert "Not measured" in page.text
    assert "formula or an emulator" in page.text
    assert "in emulation" in page.text
    assert "Latency, formula units (emulated)" in page.text
    assert "formula_ns" not in page.text
    assert not re.search(r"\bms\b", page.text)


def test_an_emulated_budget_in_milliseconds_is_one_of_formula_units() -> None:
    trials, final = a_search(20, emulated=True), measured(random.Random(8), 0.47, emulated=True)
    outcome = an_outcome(trials, final, emulated=True, metric="formula_ns")
    outcome = replace(outcome, budget=replace(outcome.budget, requested="0.92ms"))
    text = Page(render(outcome, trials, final_measurement=final)).text
    assert "0.92 formula units , 0.5x of the unpruned latency, was asked for." in text
    assert re.search(r"The result takes [\d.]+ formula units,", text)
    assert not re.search(r"ms\b|millisec", text)


@pytest.mark.parametrize("made", ["small", "small.tar", "small.gone"])
def test_what_is_no_run_is_refused_and_the_run_beside_it_is_named(tmp_path: Path, made: str) -> None:
    """A bundle and its archive lie beside the run that made them."""
    Ledger.open(tmp_path / "small.run" / "ledger.sqlite").close()
    lay_out(tmp_path)
    with pytest.raises(ConfigError, match="is not the folder of a run") as caught:
        render_run(tmp_path / made)
    beside = str(tmp_path / "small.run")
    assert caught.value.next_step == (f"edgeprune report {beside}" if made != "small.gone" else NAME_A_RUN)
    reason = {"small": "no ledger in it", "small.tar": "it is a file", "small.gone": "it does not exist"}
    assert reason[made] in caught.value.why


NAME_A_RUN = "name the folder of a run, dist/<name>.run"


def test_a_run_without_outcome_is_a_search_in_progress(tmp_path: Path) -> None:
    trials = a_search(30)
    setup = {"model": "resnet20", "target": "host", "trials": 120, "requested": "0.5x", "limit_ratio": LIMIT}
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        ledger.record("r", "setup", setup)
        for each in trials:
            ledger.append("r", each, seed=0)
        page = Page(render_run(tmp_path).read_text("utf-8"))
    fitting = [each for each in trials if each.score.feasible and not each.measurement.flags]
    best = max(fitting, key=lambda each: each.quality.accuracy)
    assert "Search in progress 30 of 120 candidates tried." in page.text
    assert f"{best.quality.accuracy * 100:.2f} %" in page.text
    assert f"(search {best.number})" in page.text
    assert "Before and after" not in page.text
    assert "Budget met" not in page.text


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path, count: int) -> None:
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        ledger.record("r", "seconds", {})
        for number in range(count):
            ledger.append("r", broken(number, "no"), seed=0)
    page = Page(render_run(tmp_path).read_text("utf-8"))
    assert f"{count} candidates tried. None fits the budget yet." in page.text
    assert "No candidate has been measured yet." in page.text
    assert tmp_path.name in page.text


def test_a_target_without_noise_has_a_page() -> None:
    """Every sample equal, every session equal: no axis of zero length."""
    same = Session(
        candidate=Calls(elapsed=(500,) * 8, on_cpu=(500,) * 8, preempted=(0,) * 8),
        reference=Calls(elapsed=(1000,) * 8, on_cpu=(1000,) * 8, preempted=(0,) * 8),
    )
    still = replace(measured(random.Random(0), 0.5), sessions=(same, same))
    trials = [judged(number, plan_of(random.Random(0), 0.5), still, 0.5) for number in range(3)]
    html = render(None, trials, final_measurement=still)
    assert "nan" not in html
    assert Page(html).numbers["final.ratio.p50"] == {(0.5, "0.500x")}


def test_the_newest_run_of_a_ledger_is_shown(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        ledger.record("old", "setup", {"model": "the old one"})
        ledger.record("new", "setup", {"model": "the new one"})
    text = Page(render_run(tmp_path).read_text("utf-8")).text
    assert "the new one" in text
    assert "the old one" not in text


def test_a_folder_without_a_run_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no ledger"):
        render_run(tmp_path)
    Ledger.open(tmp_path / "ledger.sqlite").close()
    with pytest.raises(ConfigError, match="no run has started"):
        render_run(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_outcome_is_refused_and_the_earlier_report_stays(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        ledger.record("r", "setup", {"model": "m"})
        before = render_run(tmp_path).read_bytes()
        ledger.record("r", "outcome", {"model": "m"})
    with pytest.raises(LedgerError, match="cannot be read"):
        render_run(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["ledger.sqlite", "ledger.sqlite.lock", "report.html"]


# In a browser


@pytest.fixture(scope="module")
def chromium() -> Path:
    if not CHROMIUM.exists():
        command = "tests/install-chromium (it runs apt-get install chromium)"
        if os.geteuid() == 0:
            pytest.fail(f"the screenshot tests need Debian's Chromium: {command}")
        pytest.skip(f"NOT RUN: the screenshot tests need Debian's Chromium; as root: {command}")
    return CHROMIUM


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
).split()


def browse(chromium: Path, page: Path, folder: Path, *flags: str) -> str:
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(chromium), *FLAGS, profile, *flags, page.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, timeout=120, text=True, encoding="utf-8")
    return done.stdout


PROBE = """<!doctype html><body><script>
const box = each => each.getBoundingClientRect();
for (const [name, width, source] of {frames}) {{
  const frame = document.createElement("iframe"), seen = document.createElement("output");
  frame.style = `border: 0; width: ${{width}}px; height: 900px`;
  frame.onload = () => {{
    const root = frame.contentDocument.documentElement, drawings = [...root.querySelectorAll("svg[role=img]")];
    const shown = drawings.filter(each => box(each).width > 0);
    const letters = shown.flatMap(each => [...each.querySelectorAll("text")]).map(each => box(each).height);
    const overflow = root.scrollWidth - root.clientWidth, inner = frame.contentWindow.innerWidth;
    const found = {{name, width: inner, overflow, height: root.scrollHeight, shown: shown.length,
      drawn: drawings.length, letters: Math.min(...letters)}};
    seen.append(JSON.stringify(found));
    frame.remove();
  }};
  frame.srcdoc = source;
  document.body.append(frame, seen);
}}
</script>"""


@pytest.fixture(scope="module")
def layouts(chromium: Path, html: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """What a browser makes of pages in frames of a width; its own windows are never under 500 pixels."""
    frames = [("phone", 390, html), ("desk", 1280, html), ("long words", 390, full_of_long_words())]
    folder = tmp_path_factory.mktemp("probe")
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(frames=json.dumps(frames).replace("</", "<\\/")), "utf-8")
    dom = browse(chromium, probe, folder, "--window-size=1400,1000", "--dump-dom")
    seen = [json.loads(each) for each in re.findall("<output>({.*?})</output>", dom)]
    return {each["name"]: each for each in seen}


def full_of_long_words() -> str:
    trials, final, word = a_search(20), measured(random.Random(8), 0.47), "x" * 300
    trials[4] = broken(4, word)
    widths = tuple(WidthChange(group=f"{word}.{k}.conv", before=2048, after=64 * k) for k in range(30))
    outcome = an_outcome(trials, final, model=word, target=word, widths=widths, versions={word: word})
    outcome = replace(outcome, budget=replace(outcome.budget, met=False, missed=(word,)))
    return render(outcome, trials, final_measurement=final, extra={"command": word, word: word})


@pytest.mark.parametrize(("name", "width"), [("phone", 390), ("desk", 1280)])
def test_in_a_browser_the_page_fits_its_window_and_its_letters_can_be_read(
    layouts: dict[str, dict[str, float]], name: str, width: int
) -> None:
    seen = layouts[name]
    assert seen["width"] == width
    assert seen["overflow"] == 0
    assert seen["height"] > 3000
    assert seen["shown"] == seen["drawn"] - 8, "of the two drawings of eight pictures one is hidden"
    assert seen["letters"] >= 10


def test_in_a_browser_long_words_do_not_widen_the_page(layouts: dict[str, dict[str, float]]) -> None:
    assert layouts["long words"]["width"] == 390
    assert layouts["long words"]["overflow"] == 0


def test_in_a_browser_the_numbers_of_the_page_are_the_ledgers(chromium: Path, run: Path, tmp_path: Path) -> None:
    numbers, truth = Page(browse(chromium, run / "report.html", tmp_path, "--dump-dom")).numbers, Truth(run)
    assert set(numbers) >= HEADLINES
    assert not {name for name, seen in numbers.items() if {value for value, _ in seen} != {truth[name]}}


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_the_page_is_a_picture_and_not_blank(
    chromium: Path, run: Path, tmp_path: Path, width: int
) -> None:
    """The budget's green card fills the place where the verdict stands, and the picture has the size asked for."""
    shot = tmp_path / "report.png"
    browse(chromium, run / "report.html", tmp_path, f"--window-size={width},1600", f"--screenshot={shot}")
    with Image.open(shot) as picture:
        assert picture.size == (width, 1600)
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
    shares = {colour: count / (width * 1600) for count, colour in colours}
    assert len(shares) > 100
    assert 0.3 < shares[(255, 255, 255)] < 0.95
    assert shares[(0xE9, 0xF5, 0xF0)] > 0.05
