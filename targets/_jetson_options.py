"""What a profile may say to a Jetson: where it is, and every option with its default and its range."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from edgeprune.errors import ProfileError
from edgeprune.profile import Profile

from . import _ssh, _ssh_address, _trtexec, _yardstick  # noqa: TID251 private parts of this adapter

COOL_LIMIT_S = 600.0


def address_of(profile: Profile) -> _ssh.Address:
    """Return where the board is.

    Raises:
        ProfileError: if the profile does not say, or says what is no address.
    """
    if profile.address is None:
        raise _ssh_address.missing(profile.name, "a Jetson is reached through ssh")
    return _ssh.Address.parse(profile.address)


def lock_file(options: Mapping[str, Any]) -> str:
    """Return the file on the board that its users lock."""
    return str(options["lock"]) or f"{options['sysroot']}/run/lock/edgeprune.lock"


def ssh_files(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the files for ssh that the options name."""
    return {name: str(options[name]) for name in _ssh.FILE_OPTIONS if options[name]}


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _path(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"(/[A-Za-z0-9._+-]+)*", value) is not None and ".." not in value


def _text(value: Any) -> bool:
    return isinstance(value, str)


_A_PATH = "a path on the board from /, of letters, digits and ._+-"
OPTIONS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "builder_level": (3, _whole(0, 5), "a whole number from 0 to 5"),
    "builder_level_search": (3, _whole(0, 5), "a whole number from 0 to 5"),
    "run_s": (2, _whole(1, 600), "whole seconds from 1 to 600"),
    "warm_up_ms": (2000, _whole(0, 60_000), "milliseconds from 0 to 60000"),
    "iterations": (100, _whole(10, 100_000), "a whole number from 10"),
    "pin_clocks": (False, lambda value: isinstance(value, bool), "true or false"),
    "energy_s": (6, _number(0, 600), "seconds from 0 to 600"),
    "idle_s": (3, _number(0, 600), "seconds from 0 to 600"),
    "slow_limit": (_yardstick.SLOW_LIMIT, lambda value: type(value) in (int, float) and value > 1, "a number above 1"),
    "time_limit_s": (60, _number(1, 86_400), "seconds from 1"),
    "build_limit_s": (1800, _number(1, 86_400), "seconds from 1"),
    "cooldown_limit_s": (COOL_LIMIT_S, _number(0, 86_400), "seconds from 0"),
    "store_mib": (4096, _whole(16, 1 << 20), "MiB from 16"),
    "free_mib": (2048, _whole(0, 1 << 20), "MiB from 0"),
    "memory_needed_mib": (768, _whole(0, 1 << 20), "MiB from 0"),
    "trtexec": ("", _path, _A_PATH),
    "lock": ("", _path, _A_PATH),
    "sysroot": ("", _path, _A_PATH),
    **dict.fromkeys(_ssh.FILE_OPTIONS, ("", _text, "the path of a file on this machine")),
}
"""Option → default, whether a value is one, and what is wanted in words."""


def options_of(profile: Profile) -> dict[str, Any]:
    """Return every option of a profile.

    Raises:
        ProfileError: if one is unknown or out of range, or the precision is none.
    """
    for name, value in profile.options.items():
        if name not in OPTIONS:
            raise ProfileError(
                f"profile {profile.name!r}: unknown option {name!r}", next_step=f"one of {', '.join(OPTIONS)}"
            )
        _, valid, wanted = OPTIONS[name]
        if not valid(value):
            raise ProfileError(f"profile {profile.name!r}: option {name} is {value!r}", why=f"{wanted} is wanted")
    if profile.precision not in _trtexec.PRECISIONS:
        raise ProfileError(
            f"profile {profile.name!r}: precision is {profile.precision!r}",
            why=f"one of {', '.join(_trtexec.PRECISIONS)} is wanted",
        )
    return {name: default for name, (default, _, _) in OPTIONS.items()} | dict(profile.options)
