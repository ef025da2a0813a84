"""What the adapters of a local NVIDIA GPU do alike: sessions, cooling down, and what the GPU says of its state."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from edgeprune.artifact import Artifact
from edgeprune.errors import EdgepruneError, ProfileError, Unstable
from edgeprune.measurement import Calls, Measurement, Sampling, Session
from edgeprune.profile import Profile
from edgeprune.target import Finding

from . import _nvml  # noqa: TID251 private parts of the adapters
from ._engine_cache import used  # noqa: TID251
from ._worker import WatchedWorker  # noqa: TID251
from ._yardstick import Yardstick  # noqa: TID251

WARM_UP_S = 0.2
"""Least seconds of a warm-up: a GPU takes tens of milliseconds to raise its clocks, and more from idle."""

COOLING_LIMIT_S = 300.0
"""Longest wait for the temperature that a profile asks for."""

COOLING_STEP_S = 2.0


def measured(
    worker: WatchedWorker,
    profile: Profile,
    yardstick: Yardstick,
    engine: Artifact,
    sampling: Sampling,
    *,
    layers: Callable[[], Mapping[str, float]],
    notes: Sequence[str] = (),
) -> Measurement:
    """Return the timing of `engine` against `sampling.reference`, by the GPU's own clock.

    Args:
        worker: answers "time" and "state".
        yardstick: of the sentinel, over the connection.
        layers: asked for node name → nanoseconds, if the sampling wants them.
        notes: what is worth knowing besides.

    Raises:
        Unstable: if the GPU does not cool down, or the sentinel was far slower than before.
    """
    started = time.monotonic()
    for each in (engine, sampling.reference):
        used(each.path)
    _cool_down(worker, profile)
    replies: list[Mapping[str, Any]] = []
    sessions: list[Session] = []
    while not sampling.enough(sessions, sum(each["sampled_s"] for each in replies)):  # warming up is no overtime
        replies.append(_timed(worker, engine, sampling, len(sessions)))
        candidate, reference = (_calls(replies[-1][name]) for name in ("candidate", "reference"))
        sessions.append(Session(candidate=candidate, reference=reference))
    states = [each["after"] for each in replies]
    seen = Measurement(
        profile_digest=profile.digest,
        artifact_sha256=engine.sha256,
        reference_sha256=sampling.reference.sha256,
        sessions=tuple(sessions),
        conditions=_conditions(worker, replies),
        taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
        layers=dict(layers()) if sampling.layers else {},
    )
    slow = yardstick.compare(seen.reference_sha256, seen.reference_latency().p50)
    told = [*_nvml.company(states), *filter(None, [worker.hello.get("unseen")]), *notes]
    flags = (*_nvml.suspicions(states), *slow, *seen.unsteady())
    return replace(seen, flags=flags, conditions={**seen.conditions, "notes": told})


def _timed(worker: WatchedWorker, engine: Artifact, sampling: Sampling, number: int) -> Mapping[str, Any]:
    request = {
        "do": "time",
        "candidate": model_of(engine),
        "reference": model_of(sampling.reference),
        "session_ms": sampling.session_ms,
        "block_ms": sampling.block_ms,
        "dropped_calls": sampling.dropped_calls,
        "seed": f"{sampling.seed} {number}",
    }
    reply, _ = worker.ask(request, f"timing {engine.path.name}", extra_s=sampling.session_ms / 1000)
    return reply


def _calls(columns: Mapping[str, Sequence[int]]) -> Calls:
    return Calls(**{name: tuple(values) for name, values in columns.items()})


def _conditions(worker: WatchedWorker, replies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        **{name: value for name, value in worker.hello.items() if name not in ("pid", "unseen")},
        "before": replies[0]["before"],
        "after": replies[-1]["after"],
        "warm_up": [each["warm_up"] for each in replies],
    }


def _cool_down(worker: WatchedWorker, profile: Profile, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait for the temperature that the profile asks for.

    Raises:
        ProfileError: if the temperature cannot be read.
        Unstable: if the GPU stays hotter.
    """
    if profile.cooldown_c is None:
        return
    for _ in range(math.ceil(COOLING_LIMIT_S / COOLING_STEP_S)):
        state, _ = worker.ask({"do": "state"}, "reading the GPU's temperature")
        hot = state.get("temperature_c")
        if hot is None:
            raise ProfileError(
                f"profile {profile.name!r} asks for {profile.cooldown_c} degrees Celsius",
                why="this GPU's temperature cannot be read",
                next_step="remove cooldown_c from the profile, or pip install nvidia-ml-py",
            )
        if hot <= profile.cooldown_c:
            return
        sleep(COOLING_STEP_S)
    raise Unstable(
        f"the GPU is still at {hot} degrees Celsius after {COOLING_LIMIT_S:.0f} seconds",
        why=f"profile {profile.name!r} asks for {profile.cooldown_c} before measuring",
        next_step="end what else runs on it, or raise cooldown_c in the profile",
    )


def model_of(artifact: Artifact) -> dict[str, Any]:
    """Return what a worker is told of an engine or a graph."""
    inputs = [asdict(each) for each in artifact.inputs]
    return {"path": str(artifact.path.resolve()), "sha256": artifact.sha256, "inputs": inputs}


def checked_options(
    profile: Profile, known: Mapping[str, tuple[Any, Callable[[Any], bool], str]], precisions: Sequence[str]
) -> dict[str, Any]:
    """Return the adapter's options, defaults filled in.

    Args:
        known: option → default, whether a value may be used, what is wanted.
        precisions: that the adapter can run.

    Raises:
        ProfileError: if one is unknown or out of range, or the profile asks for what the adapter cannot do.
    """
    for name, value in profile.options.items():
        if name not in known:
            raise ProfileError(
                f"profile {profile.name!r}: unknown option {name!r}", next_step=f"one of {', '.join(known)}"
            )
        _, valid, wanted = known[name]
        if not valid(value):
            raise ProfileError(f"profile {profile.name!r}: option {name} is {value!r}", why=f"{wanted} is wanted")
    if profile.precision not in precisions:
        raise ProfileError(
            f"profile {profile.name!r}: precision is {profile.precision!r}",
            why=f"this adapter runs {', '.join(precisions)}",
        )
    if profile.address is not None:
        raise ProfileError(
            f"profile {profile.name!r}: address is {profile.address!r}",
            why="this adapter drives a GPU of this machine",
            next_step="remove the address, or take a profile of a board that is reached through ssh",
        )
    return {name: default for name, (default, *_) in known.items()} | dict(profile.options)


def check_architecture(profile: Profile, hello: Mapping[str, Any]) -> None:
    """Check that the GPU is of the architecture that the profile names, "any" or "sm_86".

    Raises:
        ProfileError: if it is another.
    """
    if profile.arch == "any":
        return
    here = f"sm_{str(hello.get('compute_capability', '')).replace('.', '')}"
    if profile.arch != here:
        raise ProfileError(
            f"profile {profile.name!r} is of a GPU with {profile.arch}",
            why=f"{hello.get('gpu')} is {here}",
            next_step='set option gpu to the right one, or arch to "any"',
        )


def refused_profile(error: ProfileError) -> Finding:
    """Return what `doctor` says of a profile that cannot be used."""
    return Finding.of_error("profile", error, mend="change [options] of the profile")


def probed(worker: WatchedWorker, subject: str) -> list[Finding]:
    """Return what the worker finds when it starts, and end it: a driver that crashes takes nothing else with it."""
    try:
        worker.start()
        found = worker.hello
    except EdgepruneError as error:
        return [Finding.of_error(subject, error)]
    finally:
        worker.close()
    gpu = f"{found['gpu']}, compute capability {found['compute_capability']}, {found['memory_mib']} MiB"
    sensors = Finding(subject="sensors", severity="ok", found="clocks, temperature and throttle reasons are readable")
    if found["unseen"]:
        mend = "pip install nvidia-ml-py" if "not installed" in found["unseen"] else ""
        sensors = Finding(subject="sensors", severity="note", found=found["unseen"], mend=mend)
    return [
        Finding(subject=subject, severity="ok", found=f"{found['version']} on CUDA {found['cuda_of_driver']}"),
        Finding(subject="gpu", severity="ok", found=gpu),
        sensors,
    ]


def whole(low: int, high: int) -> Callable[[Any], bool]:
    """Return whether a value is a whole number in a range, ends included."""
    return lambda value: type(value) is int and low <= value <= high


def not_negative(value: Any) -> bool:
    """Return whether a value is a number from 0."""
    return type(value) in (int, float) and value >= 0


def positive(value: Any) -> bool:
    """Return whether a value is a number above 0."""
    return not_negative(value) and value > 0
