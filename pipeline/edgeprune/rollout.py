"""One deploy for each of several targets: every one gets its own search, its own bundle and its own verdict.

host ──deploy──▶ outcome ┐
rpi5 ──deploy──▶ outcome ├─▶ one table
jetson ─deploy─▶ error   ┘   a board that is lost takes nothing from the others
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.deploy import deploy
from edgeprune.errors import ConfigError, DeviceLost, EdgepruneError, Interrupted, ProfileError, UserError
from edgeprune.outcome import Outcome
from edgeprune.stages.prepare import Request
from edgeprune.target import Finding, examine_target


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one target: an outcome or an error, never both."""

    target: str
    outcome: Outcome | None = None
    error: EdgepruneError | None = None

    @property
    def exit_code(self) -> int:
        """Return what the command would leave with, were this the only target."""
        if self.error is not None:
            return self.error.exit_code
        return 0 if self.outcome is not None and self.outcome.budget.met else 1

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        outcome = self.outcome.to_json() if self.outcome else None
        return {"target": self.target, "outcome": outcome, "error": _described(self.error) if self.error else None}


def _described(error: EdgepruneError) -> dict[str, str]:
    kind = type(error).__name__
    return {"kind": kind, "blame": error.blame, "what": error.what, "why": error.why, "next": error.next_step}


def roll_out(requests: Sequence[Request], done: Callable[[Result], None] = lambda _: None) -> tuple[Result, ...]:
    """Return what became of each request, one after another; a target that fails does not stop the next.

    Args:
        requests: one for each target.
        done: told each result as it comes.

    Raises:
        ConfigError: if a target is named twice.
        ProfileError: if a profile cannot be read or a target is described wrongly; nothing was started.
        DeviceLost: if a target is not ready; nothing was started.
        Interrupted: if the user stopped; the same requests continue.
    """
    _check_names([each.target for each in requests])
    _check_ready(requests)
    results = []
    for place, request in enumerate(requests, 1):
        request.progress.note(f"target {place} of {len(requests)}: {request.target}")
        results.append(_tried(request))
        done(results[-1])
    return tuple(results)


def _check_names(names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"target {twice[0]!r} is named twice", next_step="name each target once")


def _check_ready(requests: Sequence[Request]) -> None:
    """Check every target before the first search: a typing error in the last must not be found out after hours."""
    found = [(each.target, _problems(each)) for each in requests]
    if missing := [(target, problems) for target, problems in found if problems]:
        users = any(each.blame == UserError.blame for _, problems in missing for each in problems)
        raise (ProfileError if users else DeviceLost)(
            f"{', '.join(repr(target) for target, _ in missing)} cannot be measured on, so nothing was started",
            why="; ".join(
                f"{target}: {each.subject}: {each.found}" for target, problems in missing for each in problems
            ),
            next_step="; ".join(each.mend for _, problems in missing for each in problems if each.mend),
        )


def _problems(request: Request) -> list[Finding]:
    boards = request.config.boards(request.target)
    return [each for board in boards for each in examine_target(board) if each.severity == "problem"]


def _tried(request: Request) -> Result:
    try:
        return Result(target=request.target, outcome=deploy(request))
    except Interrupted:
        raise
    except EdgepruneError as error:
        return Result(target=request.target, error=error)


def exit_code(results: Sequence[Result]) -> int:
    """Return 0 if every target met its budget, else the code of the first that did not."""
    return next((each.exit_code for each in results if each.exit_code), 0)
