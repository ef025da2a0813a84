"""One line for everything a Jetson needs before it can be measured on; looks, and holds nothing."""

import re
from collections.abc import Mapping
from typing import Any

from edgeprune.errors import EdgepruneError
from edgeprune.profile import Profile
from edgeprune.target import Finding

from . import _jetson_board, _jetson_options, _ssh  # noqa: TID251 private parts of this adapter

STRANGE = 76
_LOOK_AT_LOCK = (
    r"""
lock=$1
[ -e "$lock" ] || [ -L "$lock" ] || exit 0
"""
    + _jetson_board.PLAIN_LOCK
    + r"""
plain || exit 76
flock -n -s "$lock" true || { head -c 200 "$lock" | tr -d "\n"; exit 75; }
"""
)


def examine(profile: Profile) -> list[Finding]:
    """Return what is in order and what is missing on the way to the board and on it, holding nothing."""
    try:
        options, address = _jetson_options.options_of(profile), _jetson_options.address_of(profile)
        ssh = _ssh.Ssh(address, _jetson_options.ssh_files(options))
        ssh.open()
    except EdgepruneError as error:
        return [_problem("ssh", error)]
    try:
        return [_ok("ssh", f"{address}, host key known"), *_examine_board(profile, options, ssh)]
    except EdgepruneError as error:
        return [_problem("board", error)]
    finally:
        ssh.close()


def _ok(subject: str, found: str) -> Finding:
    return Finding(subject=subject, severity="ok", found=found)


def _note(subject: str, found: str, mend: str = "") -> Finding:
    return Finding(subject=subject, severity="note", found=found, mend=mend)


def _problem(subject: str, error: EdgepruneError) -> Finding:
    return Finding.of_error(subject, error)


def _examine_board(profile: Profile, options: Mapping[str, Any], ssh: _ssh.Ssh) -> list[Finding]:
    board = _jetson_board.look(ssh, sysroot=options["sysroot"], trtexec=options["trtexec"])
    return [
        _examine_model(board),
        _examine_tool(ssh, board, options["trtexec"]),
        _examine_lock(ssh, _jetson_options.lock_file(options)),
        _examine_mode(profile, board, ssh.name),
        _examine_clocks(board),
        _examine_disk(ssh, board, int(options["free_mib"])),
        _examine_memory(board, int(options["memory_needed_mib"])),
        _examine_throttling(board),
        _examine_heat(profile, board),
        _examine_meter(board),
    ]


def _examine_model(board: _jetson_board.Board) -> Finding:
    found = f"{board.model or 'unknown model'}, L4T {board.l4t or 'unknown'}, GPU of SM {board.sm or 'unknown'}"
    return _ok("board", found) if board.sm and board.l4t else _note("board", f"{found}; no Jetson that is known here")


def _examine_tool(ssh: _ssh.Ssh, board: _jetson_board.Board, wanted: str) -> Finding:
    try:
        tool = _jetson_board.tool_of(ssh, board, wanted)
    except EdgepruneError as error:
        return _problem("trtexec", error)
    return _ok("trtexec", f"{tool.path}, TensorRT {tool.version}")


def _examine_lock(ssh: _ssh.Ssh, lock: str) -> Finding:
    done = ssh.run(["bash", "-c", _LOOK_AT_LOCK, "lock", lock], limit_s=20)
    if done.rc == STRANGE:
        return _problem("lock", _jetson_board.strange_lock(ssh, lock))
    if done.rc == 75:
        return _note("lock", f"in use now: {done.said}", mend="wait until it is free")
    return _ok("lock", "free")


def _examine_mode(profile: Profile, board: _jetson_board.Board, name: str) -> Finding:
    try:
        _jetson_board.insist_on_mode(profile, board, name)
    except EdgepruneError as error:
        return _problem("power mode", error)
    if board.power_mode is None:
        return _note("power mode", "not told; nvpmodel is missing or may not be asked", "sudo nvpmodel -q")
    return _ok("power mode", board.power_mode)


def _examine_clocks(board: _jetson_board.Board) -> Finding:
    if board.gpu_mhz is None:
        return _note("clocks", "the GPU's clock is not readable; the sentinel notices throttling by itself")
    now, low, high = board.gpu_mhz
    if low == high:
        return _ok("clocks", f"GPU pinned at {high} MHz")
    mend = "sudo jetson_clocks on the board, until it restarts; or pin_clocks = true in the target's options"
    return _note("clocks", f"GPU follows its load between {low} and {high} MHz, now {now}", mend)


def _examine_disk(ssh: _ssh.Ssh, board: _jetson_board.Board, needed_mib: int) -> Finding:
    script = 'mkdir -p -- "$1" && df -P -k -- "$1" | tail -n 1 | tr -s " " | cut -d " " -f 4'
    done = ssh.run(["bash", "-c", script, "disk", board.cache], limit_s=20)
    if not re.fullmatch(r"[0-9]{1,18}\n?", done.stdout):
        return Finding(subject="disk", severity="problem", found=done.said, mend=f"see who may write {board.cache}")
    free_mib = int(done.stdout) // 1024
    if free_mib >= needed_mib:
        return _ok("disk", f"{free_mib} MiB free for {board.cache}")
    found = f"{free_mib} MiB free for {board.cache}, {needed_mib} are needed"
    return Finding(subject="disk", severity="problem", found=found, mend="sudo apt-get clean; see du -sh ~/* as well")


def _examine_memory(board: _jetson_board.Board, needed_mib: int) -> Finding:
    if board.memory_mib is None or board.memory_mib >= needed_mib:
        return _ok("memory", "unknown" if board.memory_mib is None else f"{board.memory_mib} MiB free")
    found = f"{board.memory_mib} MiB free, {needed_mib} are needed to build an engine"
    mend = "sudo systemctl isolate multi-user.target ends the desktop"
    return Finding(subject="memory", severity="problem", found=found, mend=mend)


def _examine_throttling(board: _jetson_board.Board) -> Finding:
    if not board.throttled:
        return _note("throttling", "no counters to read; the sentinel notices throttling by itself")
    told = ", ".join(f"{name} {count}" for name, count in board.throttled.items())
    if board.throttled.get("oc1", 0) or board.throttled.get("oc2", 0):
        mend = "a stronger power supply, or a smaller power mode"
        return _note("throttling", f"the board was throttled since it was started: {told}", mend)
    return _ok("throttling", f"events since it was started: {told}")


def _examine_heat(profile: Profile, board: _jetson_board.Board) -> Finding:
    if not board.temperatures_c:
        return _note("temperature", "no sensor to read")
    name, value = max(board.temperatures_c.items(), key=lambda each: each[1])
    if profile.cooldown_c is not None and value > profile.cooldown_c:
        return _note("temperature", f"{value:g} °C at {name}; measuring waits for {profile.cooldown_c:g} °C")
    return _ok("temperature", f"{value:g} °C at {name}, the hottest")


def _examine_meter(board: _jetson_board.Board) -> Finding:
    if "tegrastats" in board.tools:
        return _ok("tegrastats", "there: clocks, temperatures and rails are recorded")
    return _note("tegrastats", "not there; clocks and energy are not recorded", "sudo apt-get install nvidia-l4t-tools")
