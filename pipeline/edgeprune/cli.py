"""The command line: parse, one call, print. Heavy imports happen inside the commands.

Exit codes: 0 done · 1 ran and a gate failed · 2 the request is wrong · 3 device or machine · 4 artifact refused ·
5 interrupted, resumable · 70 our bug.
"""

import json
import os
import shlex
import signal
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from edgeprune import __version__
from edgeprune.errors import ConfigError, EdgepruneError, Interrupted, UserError

app = typer.Typer(
    name="edgeprune",
    help="Prune a trained CNN until it measurably meets a latency budget on your device; get a bundle with the proof.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="edgeprune.toml", show_default=False)]
TargetOption = Annotated[
    str, typer.Option("--target", "-t", help="a profile, or a [targets.NAME] of the configuration")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="folder of runs and bundles")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="one JSON object on standard output, progress on standard error")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]
TuneOption = Annotated[
    int | None,
    typer.Option("--tune", help="trials of a faster schedule for each kernel, on boards of adapter tvm_rpc", min=0),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="any setting, for example --set search.trials=60", show_default=False)
]

Json = Mapping[str, Any]

_USAGE_ERROR: Any = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")
"""Typer brings a copy of click from 0.25 on, and needs click itself before."""


def main() -> None:
    """Run the command line and leave with its exit code."""
    # Threads that spin while they wait starve the measured process: an accuracy pass took 14 s instead of 3 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if len(sys.argv) == 1:
        app()  # shows its help and leaves
    try:
        sys.exit(int(app(standalone_mode=False) or 0))
    except _USAGE_ERROR as error:
        sys.exit(_misspelt(error))


def _misspelt(error: Any) -> int:
    """Say what is wrong with a command line in the words and the form of every other refusal; return the exit code."""
    command = next((each for each in sys.argv[1:] if not each.startswith("-")), "")
    known = command in {each.name or each.callback.__name__ for each in app.registered_commands if each.callback}
    next_step = f"edgeprune {command} --help" if known else "edgeprune --help"
    refusal = ConfigError(error.format_message().replace("\n", " ").rstrip("."), next_step=next_step)
    _say(command if known else "", refusal, as_json="--json" in sys.argv[1:])
    return refusal.exit_code


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Declare the options of the whole program."""


# -- commands -------------------------------------------------------------------------------------------------------


@app.command()
def deploy(
    config: ConfigOption = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", help="a profile, or a [targets.NAME]; several: one bundle each", show_default="host"
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", "-b", help="8ms, 800us, or 0.5x of the unpruned model")
    ] = None,
    out: OutOption = Path("dist"),
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="how widths and channels are chosen; see edgeprune methods")
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="weights only: no image is looked at before the last evaluation")
    ] = False,
    strategy: Annotated[str | None, typer.Option("--strategy", help="ddpg, sac, uniform, random or walk")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="candidates to measure")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="of the search")] = None,
    finetune: Annotated[
        str | None, typer.Option("--finetune", help="one-step, or decay: channels that go shrink to nothing first")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", help="of --finetune decay, who picks: group-norm, gates or half-space"),
    ] = None,
    tune: TuneOption = None,
    settings: SetOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of resuming")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prune, fine-tune, measure, package and report: from a trained model to a bundle that meets the budget.

    Killed at any point, the same command continues. Exit code 1: everything ran, but the budget is missed.
    """

    def act() -> tuple[Json, int]:
        from edgeprune.progress import watch
        from edgeprune.stages.prepare import Request

        overrides = {
            "budget.latency": budget,
            "search.method": method,
            "search.data_free": data_free or None,
            "search.strategy": strategy,
            "search.trials": trials,
            "search.seed": seed,
            "finetune.method": finetune,
            "finetune.decay.host": host,
        }
        names = target or ["host"]
        options = {each: {"tune": tune or None} for each in names if tune is not None}
        loaded, progress = _config(config, settings, overrides, options), watch(quiet=quiet)
        _check_host(host, loaded.finetune.method)
        with _Stop() as stop:
            requests = [
                Request(
                    config=loaded,
                    target=each,
                    out=out,
                    command=_same_command(),
                    progress=progress,
                    stop=stop.check,
                    fresh=fresh,
                )
                for each in names
            ]
            return _deployed(requests)

    _run("deploy", act, as_json, _print_deployed)


def _check_host(host: str | None, finetuning: str) -> None:
    if host is not None and finetuning != "decay":
        raise ConfigError(
            "--host is given, and nothing decays",
            why="it says who picks the channels that decay",
            next_step="add --finetune decay, or leave --host out",
        )


@app.command()
def measure(
    models: Annotated[list[Path], typer.Argument(help="ONNX files; the first is the reference", show_default=False)],
    target: TargetOption = "host",
    config: ConfigOption = None,
    seconds: Annotated[float, typer.Option("--seconds", help="of sampling, for each model", min=0.2)] = 3.0,
    tune: TuneOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time ONNX models against the first one: trustworthy ratios with their intervals."""

    def act() -> tuple[Json, int]:
        from edgeprune.comparison import compare
        from edgeprune.progress import watch

        boards = _boards(config, target, tune)
        with watch(quiet=quiet).stage("measure", total=max(1, len(models) - 1)) as stage:
            results = compare(
                models,
                boards,
                seconds=seconds,
                progress=lambda name, done, _total: stage.advance(min(done, 1), note=name),
            )
        return {"target": target, "models": [each.to_json() for each in results]}, 0

    _run("measure", act, as_json, _print_comparison)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="a bundle's folder or .tar", show_default=False)],
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="the profile it must have been made for; if not given: the one it names"),
    ] = None,
    config: ConfigOption = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="the unpruned ONNX; found beside the bundle if it is there")
    ] = None,
    remeasure: Annotated[bool, typer.Option(help="measure the latency again")] = True,
    trust_runner: Annotated[
        bool, typer.Option("--trust-runner", help="run a runner.py this edgeprune does not know")
    ] = False,
    tune: TuneOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle: every byte, the answers, the runner's self-test, and the latency measured again."""

    def act() -> tuple[Json, int]:
        from edgeprune.bundle import open_bundle
        from edgeprune.fleet import open_boards
        from edgeprune.verify import verify as check

        with open_bundle(bundle) as whole:  # first: a device that cannot be had must not hide a changed file
            parent = whole.manifest.parent_sha256
        boards = _boards(config, target, tune) if target else _own_boards(bundle, config, tune)
        with open_boards(boards) as device:
            report = check(
                bundle,
                profile=boards[0],
                target=device,
                baseline=baseline or _baseline_beside(bundle, parent),
                remeasure=remeasure,
                trust_runner=trust_runner,
            )
        return report.to_json(), 0 if report.ok else 1

    _run("verify", act, as_json, _print_checks)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="the folder of a run, dist/<name>.run", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Write a run's page again: one self-contained HTML file."""

    def act() -> tuple[Json, int]:
        from edgeprune.report import render_run

        return {"report": str(render_run(run))}, 0

    _run("report", act, as_json, lambda data: typer.echo(data["report"]))


@app.command()
def space(
    config: ConfigOption = None,
    target: TargetOption = "host",
    settings: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List every channel group with its members, and for everything that cannot be pruned the reason."""

    def act() -> tuple[Json, int]:
        from edgeprune.inspection import describe_space
        from edgeprune.progress import watch

        loaded = _config(config, settings, {})
        return describe_space(loaded, loaded.profile(target), watch(quiet=quiet)), 0

    _run("space", act, as_json, _print_space)


@app.command()
def doctor(
    target: TargetOption = "host",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is missing on this machine and on a target, and the command that mends it."""

    def act() -> tuple[Json, int]:
        from edgeprune.inspection import examine, exit_code

        findings = examine(_boards(config, target))
        return {"target": target, "findings": findings}, exit_code(findings)

    _run("doctor", act, as_json, _print_findings)


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the methods of pruning and fine-tuning: what each needs, what it optimises, and where it comes from."""

    def act() -> tuple[Json, int]:
        from dataclasses import asdict

        from edgeprune.methods import DEFAULT, FINETUNING, METHODS

        known = [{"name": name, "default": name == DEFAULT, **asdict(each)} for name, each in METHODS.items()]
        beside = [
            {"name": name, "default": place == 0, **asdict(each)}
            for place, (name, each) in enumerate(FINETUNING.items())
        ]
        return {"methods": known, "finetuning": beside}, 0

    _run("methods", act, as_json, _print_methods)


@app.command()
def targets(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the profiles, their adapters, and which are reachable now."""

    def act() -> tuple[Json, int]:
        from edgeprune.inspection import list_targets
        from edgeprune.intake.config import load_devices

        return {"targets": list_targets(load_devices(_found(config)))}, 0

    _run("targets", act, as_json, _print_targets)


def _deployed(requests: list[Any]) -> tuple[Json, int]:
    """Return the outcome of one request as it is, of several under the names of their targets."""
    if len(requests) == 1:
        from edgeprune.deploy import deploy as carry_out

        outcome = carry_out(requests[0])
        return outcome.to_json(), 0 if outcome.budget.met else 1
    from edgeprune.rollout import exit_code, roll_out

    results = roll_out(requests)
    return {"results": [each.to_json() for each in results]}, exit_code(results)


# -- what they share ------------------------------------------------------------------------------------------------


def _config(
    path: Path | None,
    settings: list[str] | None,
    overrides: Mapping[str, object],
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> Any:
    from edgeprune.intake.config import load_config

    given = {name: value for name, value in overrides.items() if value is not None}
    return load_config(_found(path), {**_assignments(settings or []), **given}, options)


def _found(path: Path | None) -> Path | None:
    """Return the configuration that was named, or the one that lies in this folder."""
    return path or (Path("edgeprune.toml") if Path("edgeprune.toml").is_file() else None)


def _assignments(settings: list[str]) -> dict[str, object]:
    pairs: dict[str, object] = {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign:
            raise ConfigError(f"--set {setting!r} has no value", next_step="write --set section.name=value")
        pairs[name.strip()] = _value(value.strip())
    return pairs


def _value(text: str) -> object:
    """Return what a value means in TOML, or the text itself: names and paths need no quotes here."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _boards(config: Path | None, target: str, tune: int | None = None) -> Any:
    """Return the profile of a target once for each board it lists."""
    from edgeprune.intake.config import load_devices

    return _tuned(load_devices(_found(config)).boards(target), tune)


def _tuned(profiles: Iterable[Any], tune: int | None) -> tuple[Any, ...]:
    """Return the profiles with the option that ``--tune`` stands for, without it for 0."""
    if tune is None:
        return tuple(profiles)
    option = {"tune": tune} if tune else {}
    return tuple(
        replace(each, options={**{name: value for name, value in each.options.items() if name != "tune"}, **option})
        for each in profiles
    )


def _own_boards(bundle: Path, config: Path | None, tune: int | None) -> Any:
    """Return the boards of the target that a bundle was made for: all that are listed under that name here."""
    from edgeprune.verify import own_profile

    known = _tuned(_profiles(config), tune)
    profile = own_profile(bundle, known)
    same = {each.address: each for each in known if (each.name, each.digest) == (profile.name, profile.digest)}
    return tuple(each for address, each in same.items() if address or len(same) == 1)


def _profiles(config: Path | None) -> list[Any]:
    """Return every profile that has a name here: of the configuration, or of the one in this folder, and shipped."""
    from edgeprune.intake.config import load_devices
    from edgeprune.profile import load_profile, profile_names

    shipped = [load_profile(name) for name in profile_names()]
    if config is None and not Path("edgeprune.toml").is_file():
        return shipped
    try:
        devices = load_devices(_found(config))
        named = [board for name in sorted({*profile_names(), *devices.targets}) for board in devices.boards(name)]
    except UserError:
        if config:
            raise
        return shipped  # what happens to lie in this folder was not asked for
    return named if config else [*named, *shipped]


def _baseline_beside(bundle: Path, sha256: str) -> Path | None:
    """Return the unpruned graph of the run that made a bundle, if it still lies beside it and is the one."""
    from edgeprune.canonical import file_sha256

    place = bundle.resolve()
    candidate = place.with_name(place.name.removesuffix(".tar") + ".run") / "baseline.onnx"
    return candidate if candidate.is_file() and file_sha256(candidate) == sha256 else None


class _Stop:
    """Ctrl-C once finishes the current step and stops, resumable; twice stops now."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> "_Stop":
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        sys.stderr.write("\nstopping after the current step; Ctrl-C again stops now\n")

    def check(self) -> None:
        """Raise if the user asked to stop."""
        if self._asked:
            raise Interrupted("stopped as asked")


def _resumable(what: str) -> Interrupted:
    return Interrupted(what, why="nothing is lost", next_step=f"continue with: {_same_command()}")


def _same_command() -> str:
    """Return the line that continues this run; with `--fresh` it would start over."""
    return shlex.join(["edgeprune", *(each for each in sys.argv[1:] if each != "--fresh")])


@contextmanager
def _stdout_for_the_envelope(as_json: bool) -> Iterator[None]:
    """Send to standard error whatever a user's module or a library prints, so that one JSON object is all there is."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _run(command: str, act: Callable[[], tuple[Json, int]], as_json: bool, show: Callable[[Json], None]) -> None:
    """Act, print one envelope or a text, and leave with the exit code."""
    try:
        with _stdout_for_the_envelope(as_json):
            data, code = act()
    except KeyboardInterrupt:
        _fail(command, _resumable("stopped at once"), as_json)
    except Interrupted as error:
        _fail(command, _resumable(error.what), as_json)
    except EdgepruneError as error:
        _fail(command, error, as_json)
    except Exception as error:  # noqa: BLE001 - the last resort: our bug, said as such
        _fail(command, _bug(error), as_json, traceback_of=error)
    else:
        _succeed(command, data, code, as_json, show)


def _succeed(command: str, data: Json, code: int, as_json: bool, show: Callable[[Json], None]) -> None:
    if as_json:
        flat = data if command == "deploy" else {}
        _envelope(command, "ok" if code == 0 else "failed", data, _diagnostics(data), flat)
    else:
        show(data)
        if command in ("deploy", "verify"):
            typer.echo(f"edgeprune: {'PASSED' if code == 0 else 'FAILED'}")
    raise typer.Exit(code)


def _diagnostics(data: Json) -> list[Json]:
    """Return the warnings of a command, and of each target the error or the warnings."""
    found: list[Json] = []
    for each in data.get("results", ()):
        found += [each["error"]] if each.get("error") else _diagnostics(each.get("outcome") or {})
    blank = {"blame": "", "why": "", "next": ""}  # the keys of every diagnostic
    return [*found, *({"kind": "Warning", "what": each, **blank} for each in data.get("warnings", ()))]


def _fail(command: str, error: EdgepruneError, as_json: bool, *, traceback_of: Exception | None = None) -> None:
    if "--fresh" in sys.argv[1:]:
        error.next_step = error.next_step.replace("the same command again", "the same command again without --fresh")
    if traceback_of is not None:
        import traceback

        traceback.print_exception(traceback_of, file=sys.stderr)
    _say(command, error, as_json)
    raise typer.Exit(error.exit_code)


def _say(command: str, error: EdgepruneError, as_json: bool) -> None:
    if as_json:
        diagnostic = {
            "kind": type(error).__name__,
            "blame": error.blame,
            "what": error.what,
            "why": error.why,
            "next": error.next_step,
        }
        _envelope(command, "error", None, [diagnostic], {})
    sys.stderr.write(f"{f'edgeprune {command}'.rstrip()}: {error}\n")


def _bug(error: Exception) -> EdgepruneError:
    return EdgepruneError(
        "edgeprune has a bug", why=f"{type(error).__name__}: {error}", next_step="report it with the traceback above"
    )


def _envelope(command: str, status: str, data: Json | None, diagnostics: list[Json], flat: Json) -> None:
    value = {
        **flat,
        "version": __version__,
        "command": command,
        "status": status,
        "data": data,
        "diagnostics": diagnostics,
    }
    typer.echo(json.dumps(value))


# -- texts ----------------------------------------------------------------------------------------------------------


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 120
    Console(width=width, markup=False, emoji=False).print(table)  # names, and what boards say, are text


def _span(interval: Json, digits: int = 3) -> str:
    return f"{interval['p50']:.{digits}f}  [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def _percent(facts: Json) -> str:
    return _span({name: 100 * value for name, value in facts["accuracy_interval"].items()}, 2)


def _attacked(before: Json, after: Json) -> list[list[str]]:
    """Return a row for each attack; none for a run of a version that carried out none."""
    images, names = after.get("attacked_images", 0), after.get("attacked", {})
    return [
        [f"after {name}, % of {images:,}", *(_share(each["attacked"][name], images) for each in (before, after))]
        for name in names
    ]


def _share(share: float, count: int) -> str:
    from edgeprune.statistics import share_interval

    return _span({name: 100 * value for name, value in share_interval(share, count).to_json().items()}, 2)


def _print_if_emulated(data: Json) -> None:
    if data["emulated"]:
        typer.echo("NOT MEASURED: latencies come from a formula or an emulator")


def _print_outcome(data: Json) -> None:
    from edgeprune.metric import unit_of
    from edgeprune.outcome import BudgetVerdict, counted, runtime_line

    before, after, budget = data["baseline"], data["result"], BudgetVerdict(**data["budget"])
    unit = unit_of(data["metric"])
    rows = [
        [
            f"{counted(data['tested_on'])}, % of {after['test_images']:,} {data['tested_on']}",
            _percent(before),
            _percent(after),
        ],
        *_attacked(before, after),
        [f"latency, {unit}", _span(before["latency"]), _span(after["latency"])],
        ["ratio", "1", _span(after["ratio"], 4)],
        ["parameters", f"{before['parameters']:,}", f"{after['parameters']:,}"],
        ["MACs", f"{before['macs']:,}", f"{after['macs']:,}"],
        ["size, KiB", f"{before['size_bytes'] / 1024:.0f}", f"{after['size_bytes'] / 1024:.0f}"],
    ]
    _print_if_emulated(data)
    _table(f"{data['model']} on {data['target']}", ["", "before", "after"], rows)
    typer.echo(f"budget {budget.summary(data['metric'])}")
    if runtime := runtime_line(data["conditions"], emulated=data["emulated"]):
        typer.echo(f"runtime: {runtime}")
    for each in budget.missed:
        typer.echo(f"  {each}")
    for each in data["flags"]:
        typer.echo(f"  doubtful: {each}; measure again with edgeprune verify {data['bundle']}")
    for each in data["warnings"]:
        typer.echo(f"warning: {each}")
    search = f"{data['trials']} candidates, {data['method']} by {data['strategy']}, fine-tuning: {data['finetuning']}"
    typer.echo(f"measurements used: {data['measurements']} ({search})")
    for name in ("bundle", "archive", "report"):
        typer.echo(f"{name}: {data[name]}")


def _print_deployed(data: Json) -> None:
    if "results" not in data:
        _print_outcome(data)
        return
    for each in data["results"]:
        if each["outcome"]:
            _print_outcome(each["outcome"])
            typer.echo("")
    _table("in all", ["target", "accuracy, %", "latency", "ratio", "budget"], [_row(each) for each in data["results"]])
    for each in data["results"]:
        if each["error"]:
            _print_error(each["target"], each["error"])


def _row(result: Json) -> list[str]:
    """Return what became of one target in one line of the closing table."""
    from edgeprune.metric import limit_of
    from edgeprune.outcome import BudgetVerdict, counted

    if result["error"]:
        return [result["target"], "-", "-", "-", f"{result['error']['kind']}, see below"]
    outcome = result["outcome"]
    before, after, budget = outcome["baseline"], outcome["result"], BudgetVerdict(**outcome["budget"])
    accuracy = " → ".join(f"{100 * each['accuracy']:.2f}" for each in (before, after))
    accuracy += " agree" if counted(outcome["tested_on"]) == "agreement" else ""
    latency = " → ".join(f"{each['latency']['p50']:.3g}" for each in (before, after))
    kept = f"{limit_of(budget.requested, outcome['metric'])} {'met' if budget.met else 'MISSED'}"
    return [result["target"], accuracy, f"{latency} {outcome['unit']}", f"{after['ratio']['p50']:.3f}", kept]


def _print_error(target: str, error: Json) -> None:
    why = f": {error['why']}" if error["why"] else ""
    typer.echo(f"{target}: {error['what']}{why}")
    if error["next"]:
        typer.echo(f"  next: {error['next']}")


def _print_comparison(data: Json) -> None:
    from edgeprune.metric import unit_of

    first = data["models"][0]
    _print_if_emulated(first)
    rows = [[first["reference"], "1", _span(first["reference_latency"]), "-"]] if len(data["models"]) > 1 else []
    rows += [
        [each["model"], _span(each["ratio"], 4), _span(each["latency"]), "; ".join(each["flags"]) or "-"]
        for each in data["models"]
    ]
    unit = unit_of(first["metric"])
    _table(f"on {data['target']}", ["model", "ratio to the first", unit, "unsteady because"], rows)


def _print_checks(data: Json) -> None:
    _print_if_emulated(data)
    for each in data["checks"]:
        typer.echo(f"{'ok    ' if each['ok'] else 'FAILED'}  {each['name']}: {each['detail']}")
    for each in data["skipped"]:
        typer.echo(f"skipped {each}")


def _print_findings(data: Json) -> None:
    for each in data["findings"]:
        typer.echo(f"{each['severity']:<8}{each['subject']}: {each['found']}")
        if each["mend"]:
            typer.echo(f"        {each['mend']}")


def _print_targets(data: Json) -> None:
    rows = [[each["name"], each["adapter"], each["reachable"], each["description"]] for each in data["targets"]]
    _table("targets", ["profile", "adapter", "reachable now", "what it is"], rows)


def _print_methods(data: Json) -> None:
    flags = {"methods": "--method", "finetuning": "--finetune"}
    for flag, each in ((flag, each) for kind, flag in flags.items() for each in data[kind]):
        typer.echo(f"{flag} {each['name']}{' (default)' * each['default']}: {each['title']}")
        needs = "; ".join(each["needs"])
        for name, text in {**each, "needs": needs}.items():
            if name in ("idea", "optimises", "needs", "source", "page"):
                typer.echo(f"    {name:<10} {text}")


def _print_space(data: Json) -> None:
    rows = [
        [each["name"], str(each["channels"]), " ".join(map(str, each["choices"])), ", ".join(each["members"])]
        for each in data["groups"]
    ]
    _table(f"{len(rows)} channel groups", ["group", "channels", "may keep", "members"], rows)
    stays = [[each["layer"], f"{each['channels']} of {each['of']}", each["reason"]] for each in data["unprunable"]]
    if stays:
        _table("what stays, and why", ["layer", "channels", "reason"], stays)
