"""The one protocol an adapter author reads, and how an adapter is opened: by profile, lazily.

An adapter is a module `edgeprune.targets.<adapter>` (or an entry point of group ``edgeprune.targets``) that offers

    connect(profile) -> AbstractContextManager[Target]      holds the device until it is left
    examine(profile) -> list[Finding]                       what is missing, without holding anything
"""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from edgeprune.artifact import Artifact
from edgeprune.errors import EdgepruneError, LabError, ProfileError, UserError
from edgeprune.measurement import Measurement, Sampling
from edgeprune.profile import Profile

if TYPE_CHECKING:
    from numpy.typing import NDArray


@runtime_checkable
class Target(Protocol):
    """A device that compiles, times and runs graphs."""

    @property
    def profile(self) -> Profile:
        """Return the profile it was opened with."""
        ...

    def compile(self, graph: Artifact) -> Artifact:
        """Return the engine for an ONNX graph, built where it must be built: on the host or on the device.

        Raises:
            CompileError: if the runtime refuses the graph.
        """
        ...

    def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
        """Return the timing of `engine` against `sampling.reference`, which this target compiled as well.

        Raises:
            CompileError: if the engine cannot be loaded or run.
            Unstable: if the device ran too unevenly to mean anything.
            DeviceLost: if the device or its worker is gone.
        """
        ...

    def run(self, engine: Artifact, inputs: Mapping[str, "NDArray[Any]"]) -> Mapping[str, "NDArray[Any]"]:
        """Return the outputs of one call on the device, by name.

        Raises:
            CompileError: if the engine cannot be loaded or run.
            DeviceLost: if the device or its worker is gone.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Selftest:
    """Whether a bundle's own runner, on the device, gave the recorded answers, and what it said, in one sentence."""

    ok: bool
    detail: str


@runtime_checkable
class Packager(Protocol):
    """What a target offers beside `Target` if its bundles hold more than the portable model."""

    def package(self, engine: Artifact) -> Mapping[str, Path]:
        """Return what runs `engine` on the device without edgeprune: name below the bundle's ``device/`` → file.

        ``README.txt`` says how; names below ``bin/`` are programs. The files must last until the target is left.

        Raises:
            DeviceLost: if they lie on the device and it is gone.
        """
        ...

    def selftest(self, bundle: Path, model: Artifact, *, trusted: bool) -> Selftest:
        """Return what the runner of the unpacked bundle says when it checks itself on the device.

        Args:
            bundle: its folder, an absolute path, every byte of which is as its manifest says.
            model: its portable model, checked.
            trusted: run code of the bundle that is not what this edgeprune would have put there.

        Raises:
            BundleError: if the bundle holds such code and it is not trusted.
            DeviceLost: if the device is gone.
        """
        ...


@runtime_checkable
class Tuner(Protocol):
    """What a target offers beside `Target` if it can look for faster kernels of a graph."""

    def tune(self, graph: Artifact, progress: Callable[[float, str], None]) -> None:
        """Make `compile` return the fastest engine that a search found; nothing changes if the profile asks for none.

        What was tried is kept: a search that was ended goes on where it was.

        Args:
            graph: an ONNX graph.
            progress: told which share of the search is done, from 0 to 1, and a word on it.

        Raises:
            CompileError: if the runtime refuses the graph.
            DeviceLost, DeviceBusy: if the device is gone.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of `edgeprune doctor`: what was looked at, what was found, and the command that mends it.

    Attributes:
        severity: "ok", "note" (worth knowing) or "problem" (the target does not work until it is mended).
        blame: of a problem: "user" if the request, its settings or what is installed is wrong, else "lab".
    """

    subject: str
    severity: str
    found: str
    mend: str = ""
    blame: str = ""

    def __post_init__(self) -> None:
        """Blame the device or the machine for a problem that nobody else is blamed for."""
        if self.severity == "problem" and not self.blame:
            object.__setattr__(self, "blame", LabError.blame)

    @classmethod
    def not_installed(cls, package: str, command: str) -> "Finding":
        """Return that a package is missing here, and the command that installs it."""
        return cls(subject=package, severity="problem", found="not installed", mend=command, blame=UserError.blame)

    @classmethod
    def of_error(cls, subject: str, error: EdgepruneError, *, mend: str = "") -> "Finding":
        """Return the problem that an error tells of, which whoever opens the target would meet.

        Args:
            mend: what to do if the error does not say.
        """
        found = f"{error.what}: {error.why}" if error.why else error.what
        blame = UserError.blame if isinstance(error, UserError) else LabError.blame
        return cls(subject=subject, severity="problem", found=found, mend=error.next_step or mend, blame=blame)


def load_adapter(name: str) -> ModuleType:
    """Return the adapter module `name`: ours, or one that another package registered.

    Raises:
        ProfileError: if there is none or its dependencies are missing.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ProfileError(f"{name!r} is not an adapter name", why="lower-case letters, digits and underscores only")
    try:
        return import_module(f"edgeprune.targets.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"edgeprune.targets.{name}":
            raise ProfileError(f"adapter {name!r} needs {error.name}", next_step=f"pip install {error.name}") from error
    for point in entry_points(group="edgeprune.targets", name=name):
        return cast(ModuleType, point.load())
    raise ProfileError(f"unknown adapter {name!r}", next_step="edgeprune targets lists those that exist")


def open_target(profile: Profile) -> AbstractContextManager[Target]:
    """Return the target that `profile` names, as a context manager that holds the device.

    Raises:
        ProfileError: if the adapter is unknown.
        DeviceLost, DeviceBusy: on entering, if the device cannot be had.
    """
    return cast(AbstractContextManager[Target], load_adapter(profile.adapter).connect(profile))


def examine_target(profile: Profile) -> list[Finding]:
    """Return what is in order and what is missing for `profile`, holding nothing."""
    return cast(list[Finding], load_adapter(profile.adapter).examine(profile))
