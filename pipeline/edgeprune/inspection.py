"""What there is to prune and where it could run: the reading behind `space`, `doctor` and `targets`."""

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from edgeprune.errors import EdgepruneError, LabError, ProfileError, UserError
from edgeprune.profile import Profile, load_profile, profile_names
from edgeprune.target import Finding, examine_target

if TYPE_CHECKING:
    from edgeprune.intake.config import Config, Devices
    from edgeprune.progress import Progress

OLDEST_PYTHON = (3, 11)


def describe_space(config: "Config", profile: Profile, progress: "Progress") -> dict[str, Any]:
    """Return every channel group of a model and everything that stays, as JSON values.

    Raises:
        UserError: if the model or the data cannot be used.
    """
    from edgeprune.export import export
    from edgeprune.intake.data import load_data
    from edgeprune.intake.model import load_model
    from edgeprune.stages.prepare import find_structure

    with progress.stage("load data and model"):
        splits = load_data(config.data)
        model = load_model(config.model, input_shape=splits.input_shape)
    example = splits.calibration.tensor(slice(0, 2))
    with progress.stage("find channel groups"):
        structure = find_structure(config, profile, model.module, example, export(model.module, example[:1]))
    groups = [
        {
            "name": group.name,
            "channels": group.width * group.unit_channels,
            "choices": [width * group.unit_channels for width in group.choices],
            "removable": group.removable,
            "members": [f"{layer} {side}" for layer, side in structure.members[group.name]],
        }
        for group in structure.space.groups
    ]
    return {"model": model.name, "groups": groups, "unprunable": [asdict(each) for each in structure.unprunable]}


def examine(boards: Sequence[Profile]) -> list[dict[str, str]]:
    """Return what is in order and what is missing: this machine first, then every board of a target by its address."""
    several = len(boards) > 1
    found = [_of(board, each, several) for board in boards for each in examine_target(board)]
    return [asdict(each) for each in (_python(), _torch(), *found)]


def exit_code(findings: Sequence[Mapping[str, str]]) -> int:
    """Return what the doctor leaves with, the code of whoever must act first: wrong settings are the user's."""
    blamed = {each["blame"] for each in findings if each["severity"] == "problem"}
    if not blamed:
        return 0
    return UserError.exit_code if UserError.blame in blamed else LabError.exit_code


def _of(board: Profile, finding: Finding, several: bool) -> Finding:
    return replace(finding, subject=f"{board.address}: {finding.subject}") if several else finding


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= OLDEST_PYTHON:
        return Finding(subject="Python", severity="ok", found=found)
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return Finding(subject="Python", severity="problem", found=found, mend=f"install Python {wanted} or newer")


def _torch() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return Finding(subject="PyTorch", severity="ok", found=version("torch"))
    except PackageNotFoundError:
        return Finding(subject="PyTorch", severity="problem", found="not installed", mend="pip install torch")


def list_targets(devices: "Devices") -> list[dict[str, str]]:
    """Return every board of every profile, shipped or of the configuration, and whether it is reachable now.

    They are asked at the same time: one that does not answer holds up no other.
    """
    configured = sorted(devices.targets)
    profiles = [load_profile(name) for name in profile_names() if name not in configured]
    unusable = []
    for name in configured:
        try:
            profiles += devices.boards(name)
        except ProfileError as error:  # a table that cannot be used hides no other
            unusable.append(_row(Profile(name=name, adapter="", description=""), f"no: {error.what}"))
    with ThreadPoolExecutor(max_workers=len(profiles)) as pool:
        reachable = pool.map(_reachable, profiles)
    return [*(_row(*each) for each in zip(profiles, reachable, strict=True)), *unusable]


def _row(profile: Profile, reachable: str) -> dict[str, str]:
    return {
        "name": profile.name,
        "adapter": profile.adapter,
        "address": profile.address or "",
        "reachable": reachable,
        "description": profile.description,
    }


def _reachable(profile: Profile) -> str:
    try:
        problems = [each for each in examine_target(profile) if each.severity == "problem"]
    except EdgepruneError as error:
        return f"no: {error.what}"
    return f"no: {problems[0].subject}: {problems[0].found}" if problems else "yes"
