"""Whether a bundle is whole, answers as recorded and still keeps its promise.

first, or `BundleError`, and nothing that came with the bundle is run
    bytes     every file hashed, none missing, none extra, no way out
    model     stands alone; inputs and outputs are the manifest's
    samples   the claimed intervals are those of the raw samples
    profile   it was measured with the profile that is asked about
    runner    runner.py is one that we know
    promise   met or missed: it follows from those intervals, the accuracies and the model's size
then, and all of it is reported
    promise   what the bundle says of its budget is: met
    parity    on the target, the recorded inputs give the recorded answers
    selftest  so says runner.py as well, in a process of its own
    device    so says the runner that the bundle holds for its device, on the device
    latency   measured again, the budget is not out of reach
    machine   it is the machine the promise was measured on
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import __version__
from edgeprune.artifact import Artifact
from edgeprune.bundle import Bundle, open_bundle
from edgeprune.canonical import file_sha256
from edgeprune.errors import BudgetMissed, BundleError, ConfigError, ParityFailed, ResultError
from edgeprune.manifest import DEVICE, MANIFEST, MEASUREMENT, RUNNER, Proof, budget_of, check_promise, profile_of
from edgeprune.measurement import Measurement, Sampling
from edgeprune.metric import limit_of, unit_of
from edgeprune.pack import derived, how_to_verify, shipped_runner
from edgeprune.parity_vectors import worst_excess
from edgeprune.profile import Profile
from edgeprune.signature import input_specs, read_signature
from edgeprune.statistics import Interval
from edgeprune.target import Packager, Target

ABSOLUTE_SLACK = 0.25
"""Share by which an absolute latency may be longer than claimed: machines drift by more than results differ."""

RUNNER_LIMIT_S = 300.0

_MACHINE = "cpu_model"
_RUNTIME = "onnxruntime"
_INTERVALS = ("ratio", "latency", "baseline_latency")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at, whether it holds, and what was found, in one sentence."""

    name: str
    ok: bool
    detail: str

    def to_json(self) -> dict[str, object]:
        """Return the check as JSON values."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Everything that was looked at, in order, and what was not.

    Attributes:
        emulated: the claimed latency comes from a formula or an emulator.
        skipped: what was not looked at and why, one sentence each.
    """

    name: str
    checks: tuple[Check, ...]
    emulated: bool
    skipped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether every check holds."""
        return all(check.ok for check in self.checks)

    def require(self) -> "VerifyReport":
        """Return self if every check holds.

        Raises:
            ParityFailed: if the first that fails is about answers.
            BudgetMissed: if it is about latency.
        """
        for check in self.checks:
            if not check.ok:
                raise _GATES.get(check.name, BudgetMissed)(f"{self.name}: {check.name}", why=check.detail)
        return self

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values."""
        checks = [check.to_json() for check in self.checks]
        facts = {"bundle": self.name, "ok": self.ok, "emulated": self.emulated}
        return {**facts, "checks": checks, "skipped": list(self.skipped)}


_GATES: Mapping[str, type[ResultError]] = {"parity": ParityFailed, "selftest": ParityFailed, "device": ParityFailed}


def own_profile(bundle: Path, candidates: Sequence[Profile]) -> Profile:
    """Return the one of `candidates` that a bundle was made for, or else the first of the same name.

    Raises:
        BundleError: if none has the name of the bundle's profile, or the bundle is not whole.
        ConfigError: if there is nothing at `bundle`.
    """
    with open_bundle(bundle) as whole:
        theirs = profile_of(whole.manifest)
    named = [each for each in candidates if each.name == theirs.name]
    exact = [each for each in named if each.digest == theirs.digest]
    if not named:
        raise BundleError(
            f"the bundle was made for the profile {theirs.name!r}, which is not known here",
            why=f"known are {', '.join(sorted({each.name for each in candidates}))}",
            next_step=how_to_verify(str(bundle), theirs),
        )
    return (exact or named)[0]


def verify(
    path: Path,
    *,
    profile: Profile,
    target: Target | None = None,
    baseline: Path | None = None,
    remeasure: bool = True,
    trust_runner: bool = False,
) -> VerifyReport:
    """Return what holds of the bundle at `path`.

    Args:
        path: a bundle's folder or archive.
        profile: the profile that the bundle must have been measured with.
        target: the open device of that profile; None: nothing is run on it. One that packages runs the bundle's device
            runner as well.
        baseline: the unpruned ONNX, ``baseline.onnx`` of the run; without it only absolute latency can be compared.
        remeasure: measure again, if there is a target.
        trust_runner: run the bundle's runners even if this edgeprune does not know them. It can do anything you can.

    Raises:
        BundleError: if the bundle is not whole, contradicts itself, is of another profile, or has an unknown runner.
        ConfigError: if there is nothing at `path`, or `baseline` is not the bundle's parent.
        CompileError, LabError: from the target.
    """
    with open_bundle(path) as bundle:
        checks = [_bytes(bundle), _model(bundle), _samples(bundle), _profile(bundle, profile, path)]
        checks += [_runner(bundle, trust_runner), _promise(bundle)]
        reference = _reference(bundle, baseline)
        skipped = ["accuracy: the bundle holds no test data"]
        if target is None:
            skipped.append("parity on the target, latency, machine: no target is open")
        else:
            checks.append(_parity(bundle, target))
        checks.append(_selftest(bundle))
        if isinstance(target, Packager):
            checks += _on_the_device(bundle, target, trust_runner)
        if target is not None and remeasure:
            seen = _measured(bundle, target, reference)
            checks += [_latency(bundle, seen, reference), *_machine(bundle.manifest.measurement, seen)]
        elif target is not None:
            skipped.append("latency, machine: not measured again, as asked")
        manifest = bundle.manifest
        return VerifyReport(
            name=manifest.name, checks=tuple(checks), emulated=manifest.measurement.emulated, skipped=tuple(skipped)
        )


def _bytes(bundle: Bundle) -> Check:
    size = sum(each.size for each in bundle.manifest.files)
    return Check(
        name="bytes", ok=True, detail=f"{len(bundle.manifest.files) + 1} files, {size} bytes beside the manifest"
    )


def _model(bundle: Bundle) -> Check:
    signature = bundle.signature()
    if signature != bundle.manifest.signature:
        raise BundleError(
            "the model is not the one the manifest describes", why=f"its inputs and outputs are {signature}"
        )
    bundle.parity_inputs()
    bundle.parity_outputs()
    shapes = ", ".join(f"{each.name} {list(each.shape)}" for each in (*signature.inputs, *signature.outputs))
    return Check(name="model", ok=True, detail=f"stands alone; {shapes}")


def _samples(bundle: Bundle) -> Check:
    """Derive the claim again from the raw samples."""
    claimed, seen = bundle.manifest.measurement, bundle.measurement()
    try:
        again = derived(seen, budget_of(bundle.manifest))
    except (ValueError, TypeError, ZeroDivisionError, IndexError, OverflowError) as error:
        raise BundleError(f"{MEASUREMENT} holds no usable samples", why=str(error)[:200]) from error
    author = bundle.manifest.versions.get("edgeprune", "?")
    differs = next((name for name, value in again.items() if not _same(value, claimed.model_dump()[name])), None)
    if differs and author == __version__:
        claim = claimed.model_dump()[differs]
        raise BundleError(f"{MANIFEST} claims {differs} {claim}", why=f"the samples give {again[differs]}")
    if (seen.profile_digest, seen.emulated) != (bundle.manifest.profile_digest, claimed.emulated):
        raise BundleError(f"{MEASUREMENT} was taken with another profile than the manifest names")
    latency = f"{claimed.latency} {unit_of(claimed.metric)}"
    detail = f"ratio {claimed.ratio}, {latency} from {claimed.calls} calls in {claimed.sessions} sessions"
    detail += ", emulated" if claimed.emulated else ""
    if not differs:
        return Check(name="samples", ok=True, detail=detail)
    now = Interval(**again["ratio"])
    detail += f", as edgeprune {author} saw it; today's statistics give a ratio of {_shown(now)}"
    return Check(name="samples", ok=_nearly(claimed, again), detail=detail)


def _nearly(claimed: Proof, again: Mapping[str, Any]) -> bool:
    """Statistics may change between versions, but not by more than they promise."""
    pairs = ((getattr(claimed, name), again[name]["p50"]) for name in _INTERVALS)
    return all(interval.low <= p50 <= interval.high for interval, p50 in pairs)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(math.isclose(one[key], other[key], rel_tol=1e-6) for key in one)
    return bool(one == other)


def _profile(bundle: Bundle, profile: Profile, path: Path) -> Check:
    if profile.digest != bundle.manifest.profile_digest:
        made_for = profile_of(bundle.manifest)
        theirs, ours = made_for.to_json(), profile.to_json()
        differ = [key for key in ours if key not in ("address", "description") and ours[key] != theirs[key]]
        raise BundleError(
            f"the bundle was made for another profile than {profile.name!r}",
            why="; ".join(f"{key} was {theirs[key]!r} and is {ours[key]!r}" for key in differ),
            next_step=how_to_verify(str(path), made_for),
        )
    return Check(name="profile", ok=True, detail=f"{profile.name}, digest {profile.digest[:12]}")


def _runner(bundle: Bundle, trusted: bool) -> Check:
    """Refuse to run code that came with the bundle unless it is ours: the digests do not say who made it."""
    theirs, ours = bundle.runner.read_bytes(), shipped_runner()
    known = theirs == ours
    if not (known or trusted):
        author = bundle.manifest.versions.get("edgeprune", "?")
        whole = (
            f"verify it with edgeprune {author}"
            if author != __version__
            else "run its deploy again for a bundle with this runner"
        )
        raise BundleError(
            f"{RUNNER} is not the one this edgeprune puts into bundles, so it was not run",
            why=f"its SHA-256 is {_short(theirs)}..., by edgeprune {author}; "
            f"ours is {_short(ours)}..., of edgeprune {__version__}",
            next_step=f"{whole}, or pass --trust-runner if you trust where the bundle came from",
        )
    return Check(name="runner", ok=True, detail="as shipped" if known else "unknown, and trusted because you said so")


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _promise(bundle: Bundle) -> Check:
    """Hold the bundle to its own words: it may have been written although it misses its budget.

    Its intervals were held to the samples before, its sizes to the files.
    """
    said = check_promise(bundle.manifest)
    summary = said.summary(bundle.manifest.measurement.metric)
    return Check(name="promise", ok=said.met, detail="; ".join([summary, *said.missed]))


def _parity(bundle: Bundle, target: Target) -> Check:
    engine = target.compile(bundle.model)
    pairs = zip(bundle.parity_inputs(), bundle.parity_outputs(), strict=True)
    worst = max(worst_excess(target.run(engine, given), wanted, bundle.manifest.parity) for given, wanted in pairs)
    count = bundle.manifest.parity.samples
    detail = f"{count} recorded samples, worst at {worst:.3g} of what is tolerated, on {target.profile.name}"
    return Check(name="parity", ok=worst <= 1, detail=detail)


def _selftest(bundle: Bundle) -> Check:
    """Run the bundle's own runner as a stranger would: its own process, no environment, no user packages."""
    kept = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    command = [sys.executable, "-I", "-B", str(bundle.runner.absolute()), "--selftest", "--json"]
    try:
        done = subprocess.run(
            command, env=kept, capture_output=True, check=False, timeout=RUNNER_LIMIT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Check(name="selftest", ok=False, detail=f"{RUNNER} did not end within {RUNNER_LIMIT_S:g} s")
    said = _said(done.stdout) or f"exit code {done.returncode}, {done.stderr.decode(errors='replace')[-500:]!r}"
    if done.returncode == BundleError.exit_code:
        raise BundleError(f"{RUNNER} refuses the bundle", why=said)
    return Check(name="selftest", ok=done.returncode == 0, detail=said)


def _on_the_device(bundle: Bundle, target: Packager, trusted: bool) -> list[Check]:
    """Run what the bundle holds for its device on the device; a bundle that holds nothing for it has nothing to run."""
    if not any(each.path.startswith(DEVICE) for each in bundle.manifest.files):
        return []
    said = target.selftest(bundle.path.absolute(), bundle.model, trusted=trusted)
    return [Check(name="device", ok=said.ok, detail=said.detail)]


def _said(output: bytes) -> str:
    """Return the runner's report as one sentence, empty if it made none."""
    try:
        report = json.loads(output)
        if report["status"] not in ("ok", 0):  # numbers and text: runners of old bundles, if they are trusted
            first = report["diagnostics"][0]
            return f"{first['what']} {first['why']}".strip() if isinstance(first, dict) else str(first).strip()
        data = report["data"]
        return (
            f"{data['files']} files, {data['samples']} samples, worst at {data['worst_of_tolerance']:.3g} of tolerance"
        )
    except (ValueError, KeyError, IndexError, TypeError):
        return ""


def _reference(bundle: Bundle, baseline: Path | None) -> Artifact | None:
    """Return the unpruned model that ratios are taken to."""
    if baseline is None:
        return None
    if not baseline.is_file():
        raise ConfigError(f"there is no baseline at {baseline}", next_step="give baseline.onnx of the run's folder")
    if file_sha256(baseline) != bundle.manifest.parent_sha256:
        raise ConfigError(
            f"{baseline.name} is not the model that {bundle.manifest.name} was pruned from",
            why=f"its SHA-256 is not {bundle.manifest.parent_sha256[:12]}...",
            next_step="give baseline.onnx of the run that made the bundle",
        )
    signature = read_signature(baseline.read_bytes(), baseline.name)
    return Artifact.of(baseline, kind="onnx", inputs=input_specs(signature))


def _measured(bundle: Bundle, target: Target, reference: Artifact | None) -> Measurement:
    """Time the model against the unpruned one, or against itself where there is none."""
    budget, engine = budget_of(bundle.manifest), target.compile(bundle.model)
    ratio = budget.latency.unit == "x" and reference is not None
    sampling = Sampling(
        reference=target.compile(reference) if reference else engine,
        threshold=budget.latency.value if ratio else None,
        confidence=budget.confidence,
    )
    return target.measure(engine, sampling)


RULE = "the whole interval would have to lie above"


def _latency(bundle: Bundle, seen: Measurement, reference: Artifact | None) -> Check:
    """Compare with the budget; it is out of reach only if the whole interval is."""
    budget, claimed = budget_of(bundle.manifest), bundle.manifest.measurement
    now_takes = seen.latency(budget.confidence, budget.quantile)
    unit, limit = unit_of(seen.metric), limit_of(str(budget.latency), seen.metric)
    absolute = f"{_shown(now_takes)} {unit} now, {claimed.latency} {unit} claimed"
    if budget.latency.unit == "ms":
        ok, found = now_takes.low <= budget.latency.value, f"{absolute}; {RULE} {limit}"
    elif reference is not None:
        now = seen.ratio(budget.confidence, budget.quantile)
        ok = now.low <= budget.latency.value
        found = f"ratio {_shown(now)} now, {claimed.ratio} claimed; {RULE} {limit}; {absolute}"
    else:
        ok = now_takes.low <= claimed.latency.high * (1 + ABSOLUTE_SLACK)
        found = (
            f"{absolute}, {ABSOLUTE_SLACK:.0%} slack: weak, because machine speed drifts; --baseline gives the ratio"
        )
    return Check(name="latency", ok=ok, detail="; ".join([found, *seen.flags]))


def _shown(interval: Interval) -> str:
    return f"{interval.p50:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def _machine(claimed: Proof, seen: Measurement) -> list[Check]:
    """Compare the machines, where the target tells which one it is."""
    then, now = claimed.conditions.get(_MACHINE), seen.conditions.get(_MACHINE)
    if then is None or now is None:
        return []
    if then != now:
        return [
            Check(name="machine", ok=False, detail=f"the latency was proven on another machine: {then}; this is {now}")
        ]
    runtimes = claimed.conditions.get(_RUNTIME), seen.conditions.get(_RUNTIME)
    changed = "" if runtimes[0] == runtimes[1] else f", but onnxruntime was {runtimes[0]} and is {runtimes[1]}"
    return [Check(name="machine", ok=True, detail=f"{now}{changed}")]
