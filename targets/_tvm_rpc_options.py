"""What a profile may say to a board that TVM compiles for: every option with its default and its range."""

from collections.abc import Callable, Mapping
from typing import Any

from edgeprune.errors import ProfileError
from edgeprune.profile import Profile

from . import _ssh, _ssh_address  # noqa: TID251 private parts of this adapter
from ._tvm_rpc_board import BOARD_PORT, Board, ChildBoard, SshBoard, TcpBoard, tcp_port  # noqa: TID251
from ._tvm_rpc_runtime import AUTO, ONNXRUNTIME, TVM  # noqa: TID251
from ._yardstick import SLOW_LIMIT  # noqa: TID251

TIME_LIMIT_S = 120.0
BUSY_WAIT_S = 10.0
COOL_LIMIT_S = 600.0

Test = Callable[[Any], bool]


def _number(low: float) -> Test:
    return lambda value: type(value) in (int, float) and low <= value < 1e6


def _whole(low: int, high: int) -> Test:
    return lambda value: type(value) is int and low <= value <= high


def _cpu(value: Any) -> bool:
    """Return whether a value can be a CPU's name: it becomes an argument of an emulator."""
    plain = isinstance(value, str) and 0 < len(value) < 40 and value.isascii()
    return plain and value[0].isalnum() and value.replace("-", "").isalnum()


_A_FILE = "the path of a file on this machine"
_OPTIONS: dict[str, tuple[Any, Test, str]] = {
    "board": ("remote", lambda value: value in ("remote", "emulated", "local"), '"remote", "emulated" or "local"'),
    "cpu": ("generic", _cpu, "a CPU's name"),
    "runtime": (TVM, lambda value: value in (TVM, ONNXRUNTIME, AUTO), f'"{TVM}", "{ONNXRUNTIME}" or "{AUTO}"'),
    "threads": (1, _whole(1, 1), "1, because kernels run on one thread"),
    "pin": (None, _whole(0, 1023), "the number of a CPU"),
    "priority": ("auto", lambda value: value in ("auto", "normal"), '"auto" or "normal"'),
    "time_limit_s": (TIME_LIMIT_S, _number(0.1), "a number of seconds above 0"),
    "busy_wait_s": (BUSY_WAIT_S, _number(0), "a number of seconds from 0"),
    "cooldown_limit_s": (COOL_LIMIT_S, _number(0), "a number of seconds from 0"),
    "slow_limit": (SLOW_LIMIT, _number(1.000001), "a number above 1"),
    "tune": (0, _whole(0, 10_000), "a number of trials, 0: none"),
    "server_port": (BOARD_PORT, _whole(1, 65535), "a port"),
    **dict.fromkeys(_ssh.FILE_OPTIONS, (None, lambda value: isinstance(value, str), _A_FILE)),
}
"""Option → default, whether a value is one, and what is wanted in words."""


def options_of(profile: Profile) -> dict[str, Any]:
    """Return every option of the profile.

    Raises:
        ProfileError: if one is unknown or makes no sense.
    """
    for name, value in profile.options.items():
        if name not in _OPTIONS:
            raise ProfileError(
                f"profile {profile.name!r}: unknown option {name!r}", next_step=f"one of {', '.join(_OPTIONS)}"
            )
        _, valid, wanted = _OPTIONS[name]
        if not valid(value):
            raise ProfileError(f"profile {profile.name!r}: option {name} is {value!r}", why=f"{wanted} is wanted")
    found = {name: default for name, (default, *_) in _OPTIONS.items()} | dict(profile.options)
    if found["runtime"] != TVM and profile.precision != "fp32":
        raise ProfileError(
            f"profile {profile.name!r}: runtime {found['runtime']!r} knows no precision {profile.precision!r}",
            why="ONNX Runtime runs the graph as it is, in fp32",
            next_step='set runtime = "tvm" or precision = "fp32"',
        )
    _check_tuning(profile, found)
    return found


def _check_tuning(profile: Profile, options: Mapping[str, Any]) -> None:
    if options["tune"] and options["board"] == "emulated":
        raise ProfileError(
            f"profile {profile.name!r}: kernels cannot be tuned on an emulated board",
            why="it counts instructions, and the fastest schedule is not the one with the fewest",
            next_step="leave out --tune, or tune on the board itself",
        )
    if options["tune"] and options["runtime"] == ONNXRUNTIME:
        raise ProfileError(
            f"profile {profile.name!r}: ONNX Runtime's kernels cannot be tuned",
            next_step='leave out --tune, or set runtime = "tvm" or "auto"',
        )


def board_of(profile: Profile, options: Mapping[str, Any]) -> Board:
    """Return the way to the board that the profile names.

    Raises:
        ProfileError: if it names none.
    """
    if profile.address is not None and profile.address.startswith("ssh://"):
        named = {name: str(options[name]) for name in _ssh.FILE_OPTIONS if options[name]}
        return SshBoard(_ssh.Ssh(_ssh.Address.parse(profile.address), named), int(options["server_port"]))
    if profile.address is not None:
        return TcpBoard(tcp_port(profile.address))
    if options["board"] == "emulated":
        return ChildBoard(profile.arch, options["cpu"])
    if options["board"] == "local":
        return ChildBoard(profile.arch, None)
    raise _ssh_address.missing(profile.name, "this profile is of a board of its own", "ssh://me@pi.local")
