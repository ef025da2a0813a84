"""What a bundle says about itself: every claim, what it rests on, and the digest of every byte beside it.

    manifest.json        this, as canonical JSON; carries its own digest
    README.txt           how to run it
    measurement.json     the raw samples behind the claimed latency
    model.onnx           the pruned, tuned model, without external data
    parity/input_0.npy   samples for every input, and what the model answered: parity/output_0.npy
    runner.py            runs, times and checks the model with onnxruntime and numpy alone
    device/...           what runs it on the device it was made for, if that is more; device/bin/ holds programs

The digests say that a bundle is whole, not who made it: they are no signature.
"""

import json
import math
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from edgeprune.archive import safe_name
from edgeprune.budget import Budget
from edgeprune.canonical import canonical_json, digest
from edgeprune.errors import BundleError, EdgepruneError
from edgeprune.outcome import BudgetVerdict, ModelFacts
from edgeprune.plan import Plan
from edgeprune.profile import Profile
from edgeprune.statistics import Interval
from edgeprune.verdict import verdict

MANIFEST = "manifest.json"
MODEL = "model.onnx"
MEASUREMENT = "measurement.json"
RUNNER = "runner.py"
README = "README.txt"
DEVICE = "device/"
"""Folder of what runs on the device; see `edgeprune.target.Packager`."""

MANIFEST_BYTES = 16 << 20
"""A manifest larger than this is refused unread."""

PARITY_SAMPLES = (3, 8)

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Count = Annotated[int, Field(ge=0)]


class Facts(BaseModel):
    """A frozen record that refuses unknown keys, coercions, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Tensor(Facts):
    """One input or output: its name, NumPy dtype name, and axes (a number, a symbol, or None where unknown)."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Signature(Facts):
    """What goes in and what comes out of the model, in the graph's order."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Limit(Facts):
    """The latency limit: milliseconds, or "x": a ratio of the unpruned model."""

    value: Annotated[float, Field(gt=0)]
    unit: Literal["ms", "x"]


class Promise(Facts):
    """The budget (see `edgeprune.budget.Budget`) and whether it is kept (see `edgeprune.outcome.BudgetVerdict`)."""

    latency: Limit
    quantile: float
    confidence: float
    max_accuracy_drop: float | None
    size_mib: float | None
    requested: str
    limit_ratio: float
    met: bool
    used: float
    missed: tuple[str, ...]


class Estimate(Facts):
    """An estimate and its two-sided interval."""

    p50: float
    low: float
    high: float

    def interval(self) -> Interval:
        """Return it as the noun the statistics speak of."""
        return Interval(p50=self.p50, low=self.low, high=self.high)

    def __str__(self) -> str:
        return f"{self.p50:.4g} [{self.low:.4g}, {self.high:.4g}]"


class Proof(Facts):
    """The latency that was seen, derived from the samples in measurement.json at the budget's quantile and confidence.

    Attributes:
        ratio: latency of the model as a ratio of the unpruned model's, timed in alternating blocks.
        latency, baseline_latency: of the same sessions, in the unit of `metric`; they drift with the machine, the
            ratio does not.
        sessions, calls, baseline_calls: how many samples.
        metric, emulated, taken_at, seconds, flags, conditions: as in `edgeprune.measurement.Measurement`.
    """

    ratio: Estimate
    latency: Estimate
    baseline_latency: Estimate
    sessions: Count
    calls: Count
    baseline_calls: Count
    metric: str
    emulated: bool
    taken_at: str
    seconds: float
    flags: tuple[str, ...]
    conditions: dict[str, JsonValue]


class ModelCard(Facts):
    """Accuracy and cost of one model: top-1 on test, per stage on validation, after attacks on test; sizes."""

    accuracy: Annotated[float, Field(ge=0, le=1)]
    test_images: Count
    validation: dict[str, float]
    parameters: Count
    macs: Count
    size_bytes: Count
    attacked: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    attacked_images: Annotated[int, Field(ge=0)] = 0


class Origin(Facts):
    """What was pruned, how it was searched, and what its accuracies are counted on."""

    model: str
    target: str
    strategy: str
    method: str = "amc"
    judged_by: str = "labels"
    tested_on: str = "test images"
    finetuning: str = "one-step"
    importance: str = ""
    reconstruction: str = ""
    seed: int
    measurements: Count
    trials: Count


class Preprocessing(Facts):
    """How pixels from 0 to 255 become input: (pixel * scale - mean) / std of each channel, in this layout."""

    layout: Literal["N x C x H x W"]
    scale: Annotated[float, Field(gt=0)]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Parity(Facts):
    """How many samples are recorded, and how far an answer may be off: |got - want| <= atol + rtol |want|."""

    samples: Annotated[int, Field(ge=PARITY_SAMPLES[0], le=PARITY_SAMPLES[1])]
    atol: Annotated[float, Field(ge=0)]
    rtol: Annotated[float, Field(ge=0)]


class FileEntry(Facts):
    """One file of the bundle."""

    path: str
    size: Count
    sha256: Digest


class Manifest(Facts):
    """Everything a bundle claims.

    Attributes:
        repair: group → coefficient of the reconstruction that the weights began with; empty: the method's own.
        preprocessing: of images; None if the data came normalised, so that it is not known.
        parent_sha256: of the unpruned model's ONNX, which stays outside the bundle.
        files: every file but the manifest, in ascending order of path.
        manifest_sha256: of the canonical JSON of everything else in here.
    """

    format: Literal["edgeprune-bundle"]
    schema_version: Literal[2]
    name: Name
    origin: Origin
    plan: dict[str, tuple[int, ...]]
    repair: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    plan_digest: Digest
    profile: dict[str, JsonValue]
    profile_digest: Digest
    budget: Promise
    measurement: Proof
    baseline: ModelCard
    result: ModelCard
    signature: Signature
    preprocessing: Preprocessing | None
    parity: Parity
    parent_sha256: Digest
    versions: dict[str, str]
    files: tuple[FileEntry, ...]
    manifest_sha256: Digest

    def file_names(self) -> tuple[str, ...]:
        """Return the files this bundle must hold beside the manifest, no more and no less, ascending.

        What lies below ``device/`` is up to the target, so it is what is listed.
        """
        parity = [*map(parity_input, range(len(self.signature.inputs)))]
        parity += map(parity_output, range(len(self.signature.outputs)))
        device = [each.path for each in self.files if each.path.startswith(DEVICE)]
        return tuple(sorted([README, MEASUREMENT, MODEL, RUNNER, *parity, *device]))

    def to_bytes(self) -> bytes:
        """Return the one spelling of this manifest: canonical JSON and a line feed."""
        return (canonical_json(self.model_dump(mode="json")) + "\n").encode()


def parity_input(place: int) -> str:
    """Return the path of the recorded samples of the `place`-th input."""
    return f"parity/input_{place}.npy"


def parity_output(place: int) -> str:
    """Return the path of the recorded answers of the `place`-th output."""
    return f"parity/output_{place}.npy"


def seal(facts: dict[str, Any]) -> Manifest:
    """Return the manifest with these facts and its own digest.

    Args:
        facts: every field but `manifest_sha256`.

    Raises:
        BundleError: naming the first fact that is missing, unknown or of the wrong type.
    """
    blank = _validated(facts | {"manifest_sha256": "0" * 64})
    sealed = blank.model_copy(update={"manifest_sha256": _own_digest(blank.model_dump(mode="json"))})
    _check(sealed)
    return sealed


def read_manifest(content: bytes) -> Manifest:
    """Return the manifest spelled by these bytes.

    Raises:
        BundleError: if they are not the one spelling of a manifest of this schema whose digests and paths hold.
    """
    try:
        value = json.loads(content)
        spelled = (canonical_json(value) + "\n").encode()
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST} is not JSON", why=str(error)[:200], next_step=_NEXT) from error
    if spelled != content or not isinstance(value, dict):
        raise BundleError(f"{MANIFEST} is not spelled as edgeprune spells it", why="it was edited", next_step=_NEXT)
    if value.get("manifest_sha256") != _own_digest(value):
        raise BundleError(f"{MANIFEST} was changed", why="its own digest does not hold", next_step=_NEXT)
    manifest = _validated(value)
    if manifest.to_bytes() != content:
        raise BundleError(f"{MANIFEST} is not spelled as edgeprune spells it", why="a number has another type")
    _check(manifest)
    return manifest


_NEXT = "copy the bundle again from where it was made; do not trust this copy"


def _own_digest(value: dict[str, Any]) -> str:
    return digest({key: each for key, each in value.items() if key != "manifest_sha256"})


def _validated(value: dict[str, Any]) -> Manifest:
    try:
        return Manifest.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{MANIFEST}: {place}: {first['msg']}",
            why="it does not follow schema 2 of edgeprune bundles",
            next_step="read it with the edgeprune version that wrote it",
        ) from error


def _check(manifest: Manifest) -> None:
    paths = tuple(each.path for each in manifest.files)
    if unsafe := [path for path in paths if not safe_name(path)]:
        raise BundleError(f"{MANIFEST} names {unsafe[0]!r}", why="that path may leave the bundle", next_step=_NEXT)
    if paths != manifest.file_names():
        raise BundleError(f"{MANIFEST} lists {list(paths)}", why=f"wanted {list(manifest.file_names())}")
    if Plan(kept=manifest.plan, repair=manifest.repair).digest != manifest.plan_digest:
        raise BundleError(f"{MANIFEST}: the plan does not have the digest it is given", next_step=_NEXT)
    if profile_of(manifest).digest != manifest.profile_digest:
        raise BundleError(f"{MANIFEST}: the profile does not have the digest it is given", next_step=_NEXT)


def budget_of(manifest: Manifest) -> Budget:
    """Return the budget the bundle was made for.

    Raises:
        BundleError: if it contradicts itself.
    """
    facts = manifest.budget.model_dump(include={each.name for each in fields(Budget)})
    try:
        return Budget.from_json(facts)
    except EdgepruneError as error:
        raise BundleError(f"{MANIFEST}: the budget cannot be read", why=str(error)) from error


def check_promise(manifest: Manifest) -> BudgetVerdict:
    """Return what is said of the budget, derived again: from intervals, accuracies and the model's size in here.

    Raises:
        BundleError: naming the first claim that does not follow from them.
    """
    claimed, size = manifest.result.size_bytes, next(each.size for each in manifest.files if each.path == MODEL)
    if claimed != size:
        raise BundleError(f"{MANIFEST} says the model has {claimed} bytes", why=f"it has {size}", next_step=_NEXT)
    follows = _verdict(manifest)
    for name in (each.name for each in fields(BudgetVerdict)):
        claim, derived = getattr(manifest.budget, name), getattr(follows, name)
        if not _agree(claim, derived):
            raise BundleError(
                f"{MANIFEST} says of its budget: {name} {claim}",
                why=f"its own numbers give {derived}; {'; '.join(follows.missed) or 'every limit is kept'}",
                next_step="do not trust it: a promise that contradicts its proof was not written by edgeprune",
            )
    return follows


def _verdict(manifest: Manifest) -> BudgetVerdict:
    budget, seen = budget_of(manifest), manifest.measurement
    facts = manifest.result.model_dump()
    result = ModelFacts(**facts, latency=seen.latency.interval(), ratio=seen.ratio.interval())
    # of milliseconds, the ratio rests on an earlier timing of the unpruned model, and decides nothing
    limit_ratio = budget.latency.value if budget.latency.unit == "x" else manifest.budget.limit_ratio
    return verdict(budget, limit_ratio, result, manifest.baseline.accuracy, metric=seen.metric)


def _agree(claim: Any, derived: Any) -> bool:
    if isinstance(derived, tuple):  # of sentences, which may be worded otherwise in another version
        return len(claim) == len(derived)
    return math.isclose(claim, derived, rel_tol=1e-6) if isinstance(derived, float) else bool(claim == derived)


def profile_of(manifest: Manifest) -> Profile:
    """Return the profile that the latency was measured with.

    Raises:
        BundleError: if it is not a profile.
    """
    try:
        return Profile.from_json(manifest.profile)
    except EdgepruneError as error:
        raise BundleError(f"{MANIFEST}: the profile cannot be read", why=str(error)) from error
