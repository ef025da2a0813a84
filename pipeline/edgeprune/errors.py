"""Every error edgeprune raises on purpose, classed by whose turn it is to act.

    EdgepruneError
    ├── UserError        (2)  ConfigError  ProfileError  BudgetError  DataError  ModelError
    ├── CandidateError   (1)  PlanError  ExportError  CompileError
    ├── LabError         (3)  DeviceLost  DeviceBusy  Unstable  StorageFull
    ├── ResultError      (1)  NothingFits  BudgetMissed  ParityFailed
    ├── ArtifactError    (4)  BundleError  CorruptArtifact  LedgerError
    └── Interrupted      (5)

The search acts on the branch, not on the leaf: a `CandidateError` is a failed trial, a `LabError` is retried and
never becomes a reward, everything else stops the run.
"""

from typing import ClassVar


class EdgepruneWarning(UserWarning):
    """Something the user should know that does not stop the run."""


class EdgepruneError(Exception):
    """What happened, why, and what to do next.

    Args:
        what: one clause that says what happened, naming the thing it happened to.
        why: the cause as far as it is known, or empty.
        next_step: what the reader can do about it, or empty.
    """

    blame: ClassVar[str] = "bug"
    exit_code: ClassVar[int] = 70

    def __init__(self, what: str, *, why: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step

    def __str__(self) -> str:
        text = f"{self.what}: {self.why}" if self.why else self.what
        return f"{text}\n  next: {self.next_step}" if self.next_step else text

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.why, self.next_step)


def _rebuild(kind: type[EdgepruneError], what: str, why: str, next_step: str) -> EdgepruneError:
    return kind(what, why=why, next_step=next_step)


class UserError(EdgepruneError):
    """The request cannot be carried out as written."""

    blame = "user"
    exit_code = 2


class ConfigError(UserError):
    """A setting is missing, unknown or out of range."""


class ProfileError(UserError):
    """A target profile is unknown or malformed."""


class BudgetError(UserError):
    """A budget cannot be read or contradicts itself."""


class ModelError(UserError):
    """The model or its weights cannot be used."""


class DataError(UserError):
    """The data cannot be used."""


class CandidateError(EdgepruneError):
    """One candidate is broken; the search stores a failed trial and goes on."""

    blame = "candidate"
    exit_code = 1


class PlanError(CandidateError):
    """A plan does not fit its space."""


class ExportError(CandidateError):
    """A candidate's graph and weights do not fit together."""


class CompileError(CandidateError):
    """A target refuses a graph."""


class LabError(EdgepruneError):
    """The device, the cable or the room failed; never a reward."""

    blame = "lab"
    exit_code = 3


class DeviceLost(LabError):
    """The device or its worker is gone."""


class DeviceBusy(LabError):
    """Somebody else holds the device."""


class Unstable(LabError):
    """The device ran too unevenly for its timings to mean anything."""


class StorageFull(LabError):
    """The disk is full; nothing earlier is lost."""


class ResultError(EdgepruneError):
    """The run finished and its result fails a gate."""

    blame = "result"
    exit_code = 1


class NothingFits(ResultError):
    """No plan of the space meets the budget."""


class BudgetMissed(ResultError):
    """A plan was found but misses the budget on re-measurement."""


class ParityFailed(ResultError):
    """Two forms of one model disagree by more than the stated tolerance."""


class ArtifactError(EdgepruneError):
    """A file is corrupt, tampered with or not ours; it is refused."""

    blame = "artifact"
    exit_code = 4


class BundleError(ArtifactError):
    """A bundle does not hold what its manifest says."""


class CorruptArtifact(ArtifactError):
    """A graph or engine cannot be read."""


class LedgerError(ArtifactError):
    """The ledger cannot be read."""


class Interrupted(EdgepruneError):
    """The user stopped the run; the same command continues it."""

    blame = "user"
    exit_code = 5
