"""One self-contained HTML page about one run: is the budget met, at what price, and how it was measured.

    ledger.sqlite ──render_run──▶ report.html        no script, no font, no picture and no address from elsewhere

Every number that the page states carries its full precision and its name: ``<data data-value="result.ratio.p50"
value="0.48712">0.487x</data>``, so that a test can hold the page against the ledger.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from edgeprune import charts, quantities
from edgeprune.durable import replacing, storage_errors
from edgeprune.errors import ConfigError, LedgerError
from edgeprune.ledger import Incident, Ledger
from edgeprune.measurement import Measurement
from edgeprune.outcome import Outcome, runtime_line
from edgeprune.report_sections import comparison, figures, last_look, listed, timing, verdict
from edgeprune.report_subject import about, seen
from edgeprune.svg import clean
from edgeprune.trial import Trial


def render_run(run_dir: Path) -> Path:
    """Write ``report.html`` into the folder of a run, from its ledger alone, and return its path.

    The newest run of the ledger is shown, also while it is still searching. Facts that are read, all optional:

        outcome             Outcome
        final_measurement   Measurement of the result, fresh samples
        baseline            mapping whose "measurement" times the unpruned model against itself
        setup               mapping with any of model, target, strategy, seed, trials, requested, limit_ratio, emulated,
                            metric, confidence, quantile
        command             text that repeats the run
        notes               text → text, listed as it is

    Raises:
        ConfigError: if there is no run in this folder, or it cannot be written.
        LedgerError: if the ledger is damaged.
        StorageFull: if the disk is full; an earlier report is left whole.
    """
    _check_is_run(Path(run_dir))
    run_dir = Path(run_dir).absolute()
    with Ledger.open(run_dir / "ledger.sqlite", read_only=True) as ledger:
        page = _page_of(ledger, run_dir)
    path = run_dir / "report.html"
    with storage_errors(path), replacing(path) as stream:
        stream.write(page.encode())
    return path


def _check_is_run(place: Path) -> None:
    """Refuse what is not a run, and name the run if it lies beside, as it does for a bundle and its archive."""
    if (place / "ledger.sqlite").is_file():
        return
    there = "there is no ledger in it" if place.is_dir() else "it is a file" if place.exists() else "it does not exist"
    run = _run_beside(place)
    next_step = shlex.join(["edgeprune", "report", str(run)]) if run else "name the folder of a run, dist/<name>.run"
    raise ConfigError(f"{place} is not the folder of a run", why=there, next_step=next_step)


def _run_beside(place: Path) -> Path | None:
    whole = place.resolve()
    run = whole.with_name(whole.name.removesuffix(".tar") + ".run")
    if not (run / "ledger.sqlite").is_file():
        return None
    return run if place.name in ("", "..") else place.with_name(run.name)


def _page_of(ledger: Ledger, run_dir: Path) -> str:
    runs = ledger.runs()
    if not runs:
        raise ConfigError(f"no run has started in {run_dir}", next_step="edgeprune deploy starts one")
    fact = {name: ledger.fact(runs[-1], name) for name in _FACTS}
    try:
        outcome = Outcome.from_json(fact["outcome"]) if fact["outcome"] else None
        final = _measurement(fact["final_measurement"])
        baseline = _measurement((fact["baseline"] or {}).get("measurement"))
    except (KeyError, TypeError) as error:
        what = f"the results in {ledger.path} cannot be read"
        raise LedgerError(what, why=f"{error} is missing or unknown", next_step="run the same command again") from error
    return render(
        outcome,
        ledger.each_trial(runs[-1]),
        final_measurement=final,
        baseline_measurement=baseline,
        incidents=ledger.incidents(runs[-1]),
        setup={"model": run_dir.name} | (fact["setup"] or {}),
        extra={"command": fact["command"] or "", **(fact["notes"] or {})},
    )


_FACTS = ("outcome", "final_measurement", "baseline", "setup", "command", "notes")


def _measurement(value: Mapping[str, Any] | None) -> Measurement | None:
    return Measurement.from_json(value) if value else None


def render(
    outcome: Outcome | None,
    trials: Iterable[Trial],
    *,
    final_measurement: Measurement | None = None,
    baseline_measurement: Measurement | None = None,
    incidents: Sequence[Incident] = (),
    setup: Mapping[str, Any] | None = None,
    extra: Mapping[str, str] | None = None,
) -> str:
    """Return the page.

    Args:
        outcome: what the deploy came to; None while it is searching.
        trials: of the run, in order; read once and not kept.
        final_measurement: of the result against the unpruned model, fresh samples.
        baseline_measurement: of the unpruned model against itself.
        incidents: what the lab did.
        setup: what is known before there is an outcome, see `render_run`.
        extra: "command" is shown as the line that repeats the run; everything else is listed as it is.
    """
    subject = about(outcome, setup or {})
    rows = [seen(each, subject) for each in trials]
    notes = dict(extra or {})
    command = notes.pop("command", "")
    return _template().render(
        about=subject,
        verdict=verdict(outcome, rows, subject),
        comparison=comparison(outcome, subject) if outcome else [],
        last_look=last_look(outcome) if outcome else "",
        figures=figures(outcome, rows, subject),
        timing=timing(final_measurement, baseline_measurement, subject),
        trials=[listed(each) for each in rows],
        failures=[each for each in rows if each.failure_kind],
        incidents=incidents,
        facts=_fact_lists(outcome, final_measurement, notes),
        command=command,
        taken_at=final_measurement.taken_at[:16].replace("T", " ") if final_measurement else "",
    )


def _template() -> Template:
    page = files("edgeprune").joinpath("report.html.j2").read_text("utf-8")
    world = Environment(autoescape=True, finalize=_plain, undefined=StrictUndefined, trim_blocks=True)
    world.globals["swatch"] = charts.swatch
    return world.from_string(page)


def _plain(value: object) -> object:
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return clean(value)


def _fact_lists(outcome: Outcome | None, final: Measurement | None, notes: Mapping[str, str]) -> list[dict[str, Any]]:
    conditions = outcome.conditions if outcome and outcome.conditions else final.conditions if final else {}
    runtime = runtime_line(conditions, emulated=outcome.emulated) if outcome else ""
    seconds = {stage: quantities.duration(value) for stage, value in outcome.seconds.items()} if outcome else {}
    lists = {
        "Time spent": seconds,
        "Versions": dict(outcome.versions) if outcome else {},
        "Runtimes of the device": {"chosen": runtime} if runtime else {},
        "Conditions of the final measurement": dict(_flat(conditions)),
        "About this run": dict(notes),
    }
    return [{"title": title, "facts": facts} for title, facts in lists.items() if facts]


def _flat(value: object, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, ", ".join(str(each) for each in value) or "none"
    else:
        yield name, "not known" if value is None else str(value)
