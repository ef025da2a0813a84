"""Write a bundle, and make one file of it. The same contents give the same bytes, in any folder, umask or time zone.

contents ─write_bundle─▶ dist/resnet20/ ─pack─▶ dist/resnet20.tar
"""

import hashlib
import math
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import __version__
from edgeprune.archive import mode_of, safe_name, write_archive
from edgeprune.budget import Budget
from edgeprune.bundle import Bundle, check_bundle
from edgeprune.canonical import canonical_json
from edgeprune.durable import FOLDER_MODE, new_file, storage_errors, sync_folder
from edgeprune.errors import BundleError, ConfigError, CorruptArtifact
from edgeprune.manifest import (
    DEVICE,
    MANIFEST,
    MEASUREMENT,
    MODEL,
    PARITY_SAMPLES,
    README,
    RUNNER,
    Signature,
    Tensor,
    check_promise,
    parity_input,
    parity_output,
    seal,
)
from edgeprune.measurement import Measurement
from edgeprune.outcome import ModelFacts, Outcome, counted
from edgeprune.parity_vectors import batch, stacked, to_npy
from edgeprune.plan import Plan
from edgeprune.profile import Profile, load_profile, profile_names
from edgeprune.signature import read_signature
from edgeprune.statistics import Interval

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    Samples = Mapping[str, ArrayLike | Sequence[ArrayLike]]


@dataclass(frozen=True, kw_only=True)
class BundleContents:
    """Everything a bundle is made of.

    Attributes:
        name: of the bundle: letters, digits and ``._-``, at most 64.
        model: the pruned, tuned ONNX file, without external data.
        plan, profile, budget: what was decided, where it was measured and what was promised.
        outcome: accuracy, cost and verdict; its paths are left out.
        measurement: the final timing of `model` against the unpruned model.
        parity_inputs: input name → 3 to 8 samples: [N, ...], or N arrays of [1, ...].
        parity_outputs: output name → what the model must answer, shaped alike.
        tolerances: (atol, rtol): an answer passes if |got - want| <= atol + rtol |want|.
        parent_sha256: of the unpruned model's ONNX file.
        versions: package → version; edgeprune's own is added.
        preprocessing: how pixels from 0 to 255 become the model's input, see `edgeprune.manifest.Preprocessing`; None
            if that is not known.
        device: name below ``device/`` → file, see `edgeprune.target.Packager`.
    """

    name: str
    model: Path
    plan: Plan
    profile: Profile
    budget: Budget
    outcome: Outcome
    measurement: Measurement
    parity_inputs: "Samples"
    parity_outputs: "Samples"
    tolerances: tuple[float, float]
    parent_sha256: str
    versions: Mapping[str, str]
    preprocessing: Mapping[str, Any] | None = None
    device: Mapping[str, Path] = field(default_factory=dict)


def write_bundle(folder: Path, *, contents: BundleContents) -> Bundle:
    """Write the bundle into `folder`, in place of an earlier one at once or not at all, and return it re-read.

    Raises:
        BundleError: if the contents contradict each other or do not fit the model.
        ConfigError: if `folder` holds something that is not a bundle, or cannot be written.
        StorageFull: if the disk is full; an earlier bundle is left as it was.
    """
    written = _files(contents)
    with storage_errors(folder), _replacing_folder(folder) as part:
        for name, content in written.items():
            _make_folder((part / name).parent)
            with new_file(part / name, mode=mode_of(name)) as stream:
                stream.write(content)
        check_bundle(part)
    return check_bundle(folder)


def pack(bundle_folder: Path, archive: Path) -> Path:
    """Write the bundle in `bundle_folder` as one archive, in place of an earlier one; return the archive's path.

    Raises:
        BundleError: if the folder does not hold exactly what its manifest says.
        StorageFull, ConfigError: if the archive cannot be written.
    """
    manifest = check_bundle(bundle_folder).manifest
    names = [MANIFEST, *(each.path for each in manifest.files)]
    return write_archive(archive, top=manifest.name, files={name: bundle_folder / name for name in names})


@contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty sibling of `folder` that takes its place when the block is left without an error.

    A folder cannot be renamed over another one, so for a moment the earlier one has only its second name; a writer
    killed just then is mended by the next.
    """
    part, earlier = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("part", "earlier"))
    if earlier.exists() and not folder.exists():
        earlier.rename(folder)
    _refuse_to_replace(folder)
    _remove(part, earlier)
    try:
        _make_folder(part)
        yield part
        for inner in (*part.iterdir(), part):
            if inner.is_dir():
                sync_folder(inner)
        _swap(part, folder, earlier)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    _remove(earlier)


def _swap(part: Path, folder: Path, earlier: Path) -> None:
    if not folder.exists():
        part.rename(folder)
        return
    folder.rename(earlier)
    try:
        part.rename(folder)
    except BaseException:
        earlier.rename(folder)
        raise


def _refuse_to_replace(folder: Path) -> None:
    if not (folder.exists() or folder.is_symlink()):
        return
    ours = {MANIFEST, MEASUREMENT, MODEL, README, RUNNER, "parity", DEVICE.rstrip("/")}
    if not folder.is_dir() or folder.is_symlink() or (strange := {each.name for each in folder.iterdir()} - ours):
        why = f"it holds {min(strange)!r}" if folder.is_dir() and not folder.is_symlink() else "it is not a folder"
        raise ConfigError(
            f"{folder} is not replaced by a bundle", why=why, next_step="move it away or name another place"
        )


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(FOLDER_MODE)  # whatever the umask says


def _remove(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def _files(contents: BundleContents) -> dict[str, bytes]:
    """Return every file of the bundle, the manifest last."""
    model = _read(contents.model, f"the model {contents.model.name}")
    try:
        signature = read_signature(model, contents.model.name)
    except CorruptArtifact as error:
        raise BundleError(error.what, why=error.why, next_step=error.next_step) from error
    inputs, samples = _parity_files(signature.inputs, contents.parity_inputs, parity_input)
    outputs, answers = _parity_files(signature.outputs, contents.parity_outputs, parity_output)
    if samples != answers or not PARITY_SAMPLES[0] <= samples <= PARITY_SAMPLES[1]:
        raise BundleError(f"{samples} parity samples with {answers} answers", why="3 to 8 of each are wanted")
    others = {
        MODEL: model,
        MEASUREMENT: _spelled(contents.measurement),
        RUNNER: shipped_runner(),
        README: _readme(contents).encode(),
        **inputs,
        **outputs,
        **_device_files(contents.device),
    }
    manifest = seal(_facts(contents, signature, samples) | {"files": _listing(others)})
    check_promise(manifest)
    return others | {MANIFEST: manifest.to_bytes()}


def _spelled(measurement: Measurement) -> bytes:
    try:
        return (canonical_json(measurement.to_json()) + "\n").encode()
    except (ValueError, TypeError) as error:
        raise BundleError("the measurement is not JSON", why=str(error)) from error


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{what} cannot be read", why=error.strerror or str(error)) from error


def shipped_runner() -> bytes:
    """Return the runner that this edgeprune puts into bundles."""
    return (files("edgeprune.device") / RUNNER).read_bytes()


def _parity_files(
    tensors: Sequence[Tensor], given: "Samples", path_of: Callable[[int], str]
) -> tuple[dict[str, bytes], int]:
    """Return path → .npy of each tensor's samples, and how many calls they make; 0 if tensors differ on that."""
    names = [tensor.name for tensor in tensors]
    if set(names) != set(given):
        raise BundleError(f"parity samples are given for {sorted(given)}", why=f"the model has {names}")
    arrays = [stacked(tensor, given[tensor.name]) for tensor in tensors]
    counts = {divmod(len(array), batch(tensor)) for array, tensor in zip(arrays, tensors, strict=True)}
    calls, left = counts.pop() if len(counts) == 1 else (0, 0)
    return {path_of(place): to_npy(array) for place, array in enumerate(arrays)}, 0 if left else calls


def _device_files(given: Mapping[str, Path]) -> dict[str, bytes]:
    """Return path in the bundle → content of what runs on the device."""
    if wrong := [name for name in given if not safe_name(f"{DEVICE}{name}")]:
        raise BundleError(f"{wrong[0]!r} cannot stand in a bundle", why="letters, digits and ._-/ only")
    return {f"{DEVICE}{name}": _read(path, f"the device's {name}") for name, path in given.items()}


def _listing(written: Mapping[str, bytes]) -> list[dict[str, object]]:
    return [
        {"path": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(written.items())
    ]


def _facts(contents: BundleContents, signature: Signature, samples: int) -> dict[str, Any]:
    outcome, profile = contents.outcome, contents.profile
    atol, rtol = contents.tolerances
    return {
        "format": "edgeprune-bundle",
        "schema_version": 2,
        "name": contents.name,
        "origin": _origin(outcome),
        "plan": {name: list(units) for name, units in contents.plan.kept.items()},
        "repair": dict(contents.plan.repair),
        "plan_digest": contents.plan.digest,
        "profile": profile.to_json() | {"address": None},  # where a device is says nothing about what it is
        "profile_digest": profile.digest,
        "budget": _promise(contents.budget, outcome),
        "measurement": _proof(contents),
        "baseline": _card(outcome.baseline),
        "result": _card(outcome.result),
        "signature": signature.model_dump(mode="json"),
        "preprocessing": dict(contents.preprocessing) if contents.preprocessing else None,
        "parity": {"samples": samples, "atol": atol, "rtol": rtol},
        "parent_sha256": contents.parent_sha256,
        "versions": dict(contents.versions) | {"edgeprune": __version__},
    }


def _origin(outcome: Outcome) -> dict[str, object]:
    return {
        "model": outcome.model.replace("\\", "/").rpartition("/")[2],  # a path means nothing on another machine
        "target": outcome.target,
        "strategy": outcome.strategy,
        "method": outcome.method,
        "judged_by": outcome.judged_by,
        "tested_on": outcome.tested_on,
        "finetuning": outcome.finetuning,
        "importance": outcome.importance,
        "reconstruction": outcome.reconstruction,
        "seed": outcome.seed,
        "measurements": outcome.measurements,
        "trials": outcome.trials,
    }


def _promise(budget: Budget, outcome: Outcome) -> dict[str, object]:
    return budget.to_json() | asdict(outcome.budget)


def _proof(contents: BundleContents) -> dict[str, Any]:
    seen = contents.measurement
    if seen.profile_digest != contents.profile.digest:
        raise BundleError("the measurement was taken with another profile", next_step="measure with this one")
    ratio = seen.ratio(contents.budget.confidence, contents.budget.quantile)
    _check_agreement(contents.outcome.result.ratio, ratio)
    return derived(seen, contents.budget) | {
        "metric": seen.metric,
        "emulated": seen.emulated,
        "taken_at": seen.taken_at,
        "seconds": seen.seconds,
        "flags": list(seen.flags),
        "conditions": dict(seen.conditions),
    }


def derived(seen: Measurement, budget: Budget) -> dict[str, Any]:
    """Return what the manifest derives from raw samples: intervals at the budget's quantile, and counts."""
    at = (budget.confidence, budget.quantile)
    return {
        "ratio": seen.ratio(*at).to_json(),
        "latency": seen.latency(*at).to_json(),
        "baseline_latency": seen.reference_latency(*at).to_json(),
        "sessions": len(seen.sessions),
        "calls": sum(len(each.candidate.elapsed) for each in seen.sessions),
        "baseline_calls": sum(len(each.reference.elapsed) for each in seen.sessions),
    }


def _check_agreement(claimed: Interval | None, seen: Interval) -> None:
    """Refuse a claimed ratio that is not what the samples say at the budget's quantile and confidence."""
    ends = zip(claimed.to_json().values(), seen.to_json().values(), strict=True) if claimed else [(0.0, 1.0)]
    if not all(math.isclose(one, other, rel_tol=1e-6) for one, other in ends):
        raise BundleError(f"the outcome claims a ratio of {claimed}", why=f"the samples give {seen}")


def _card(facts: ModelFacts) -> dict[str, object]:
    return {
        "accuracy": facts.accuracy,
        "test_images": facts.test_images,
        "validation": dict(facts.validation),
        "parameters": facts.parameters,
        "macs": facts.macs,
        "size_bytes": facts.size_bytes,
        "attacked": dict(facts.attacked),
        "attacked_images": facts.attacked_images,
    }


def how_to_verify(place: str, profile: Profile) -> str:
    """Return the command that verifies a bundle in `place` with the profile it was made for, after what it needs."""
    needs, line = _verifying(place, profile)
    return f"{needs}: {line}" if needs else line


def _verifying(place: str, profile: Profile) -> tuple[str, str]:
    """Return what is needed to verify a bundle beside a shipped profile, and the command."""
    line = shlex.join(["edgeprune", "verify", place, "--target", profile.name])
    if profile.name in profile_names() and load_profile(profile.name).digest == profile.digest:
        return "", line
    needs = f"with the edgeprune.toml it was made with, or --target {profile.name}.toml if that was its target"
    return needs, f"{line} --config edgeprune.toml"


def _readme(contents: BundleContents) -> str:
    outcome, emulated = contents.outcome, contents.measurement.emulated
    ratio = contents.measurement.ratio(contents.budget.confidence, contents.budget.quantile)
    needs, verify = _verifying(".", contents.profile)
    return _README.format(
        name=contents.name,
        target=outcome.target,
        method=f"{outcome.method}, searched by {outcome.strategy}",
        source="an emulator" if emulated else "the device",
        budget=outcome.budget.summary(contents.measurement.metric),
        ratio=f"{ratio.p50:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        counted=counted(outcome.tested_on),
        before=_accuracy(outcome.baseline),
        after=_accuracy(outcome.result),
        images=f"{outcome.result.test_images:,} {outcome.tested_on}",
        confidence=f"{contents.budget.confidence:.0%}",
        preprocessing=_preprocessing_line(contents.preprocessing),
        machine="any machine, as no device was measured" if emulated else "the machine it was made for",
        needs=f",\n{needs}" if needs else "",
        device=_ON_THE_DEVICE if contents.device else "",
        verify=verify,
    )


def _accuracy(facts: ModelFacts) -> str:
    seen = facts.accuracy_interval
    return f"{facts.accuracy:.2%} [{seen.low:.2%}, {seen.high:.2%}]"


def _preprocessing_line(facts: Mapping[str, Any] | None) -> str:
    if not facts:
        return "as the model was trained on; how pixels become it is not known here"
    mean, std = (", ".join(f"{each:g}" for each in facts[name]) for name in ("mean", "std"))
    return f"(pixel / 255 - mean) / std of each channel, mean {mean}, std {std}; {facts['layout']}"


_ON_THE_DEVICE = "On the device it was made for it runs without Python packages: see device/README.txt.\n\n"

_README = """\
{name}: a pruned network, the latency it was measured at, and the means to check both.

    target          {target}
    method          {method}
    budget          {budget}
    latency ratio   {ratio} of the unpruned network, {confidence} interval, by {source}
    {counted:<15} {before} before, {after} after
                    on {images}; 95% interval of what as many others could show
    input           {preprocessing}

Run it. Python 3.8 or newer, onnxruntime and numpy are all it needs:

    pip install onnxruntime numpy
    python runner.py --input x.npy --output ../y.npy     answers for every row of x.npy
    python runner.py --bench                             milliseconds on this machine, now
    python runner.py --selftest                          every digest, and the recorded answers

{device}Each takes --json. Write nothing into this folder: a bundle holds exactly the files its manifest lists.

Check the promise. With edgeprune installed, on {machine}{needs}:

    {verify}

The digests in manifest.json show that nothing changed by accident. They are no signature: anybody can make a
bundle, so take one only from where you trust.
"""
