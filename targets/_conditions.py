"""What state a Linux machine is in while something is timed on it, as far as its kernel tells."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path("/")

CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
)
"""Instruction sets that decide which kernels a runtime picks."""

STEAL_NOTED = 0.02
"""Share of the time taken by other guests of the host from which it is worth a note."""


def read_conditions(cpus: Sequence[int], root: Path = ROOT) -> dict[str, Any]:
    """Return the state of the machine now, JSON values; what the kernel does not tell is None or left empty.

    Args:
        cpus: the CPUs that the timed process is pinned to.
        root: of the file system, so that a test can bring its own ``/proc`` and ``/sys``.
    """
    policy = root / f"sys/devices/system/cpu/cpu{cpus[0]}/cpufreq"
    return {
        "governor": _text(policy / "scaling_governor"),
        "mhz": _mhz(policy / "scaling_cur_freq"),
        "mhz_min": _mhz(policy / "scaling_min_freq"),
        "mhz_max": _mhz(policy / "scaling_max_freq"),
        "turbo": _turbo(root),
        "temperatures_c": _temperatures(root),
        "throttle_events": _throttle_events(root),
        "load_1m": _load(root),
        "steal_ticks": _steal(root, cpus),
        "free_memory_mib": _free_memory(root),
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what changed between two readings that makes timings suspect, one sentence each."""
    found = [
        f"{name} changed from {before[key]} to {after[key]} while measuring"
        for key, name in (("governor", "the CPU governor"), ("mhz_max", "the highest CPU clock"), ("turbo", "turbo"))
        if before[key] != after[key]
    ]
    throttled = (after["throttle_events"] or 0) - (before["throttle_events"] or 0)
    return [*found, f"the CPU was throttled {throttled} times while measuring"] if throttled > 0 else found


def stolen_share(before: Mapping[str, Any], after: Mapping[str, Any], cpu_seconds: float) -> float:
    """Return the share of `cpu_seconds` that the host gave to other guests between two readings."""
    ticks = (after["steal_ticks"] or 0) - (before["steal_ticks"] or 0)
    return max(0.0, ticks / os.sysconf("SC_CLK_TCK") / max(cpu_seconds, 1e-9))


def cpu_model(root: Path = ROOT) -> str:
    """Return the CPU's name, or its architecture where it has none."""
    lines = (_text(root / "proc/cpuinfo") or "").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else os.uname().machine


def cpu_flags(root: Path = ROOT) -> list[str]:
    """Return those of `CPU_FLAGS` that the CPU has."""
    lines = (_text(root / "proc/cpuinfo") or "").splitlines()
    listed = next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )
    return [each for each in CPU_FLAGS if each in listed]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None  # the kernel does not tell; guests and containers often have none of these files


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and re.fullmatch(r"-?[0-9]{1,18}", text) else None


def _mhz(path: Path) -> float | None:
    kilohertz = _number(path)
    return None if kilohertz is None else kilohertz / 1000


def _turbo(root: Path) -> bool | None:
    off = _number(root / "sys/devices/system/cpu/intel_pstate/no_turbo")
    boost = _number(root / "sys/devices/system/cpu/cpufreq/boost")
    if off is not None:
        return off == 0
    return None if boost is None else boost == 1


def _temperatures(root: Path) -> dict[str, float]:
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    read = {f"{zone.name} {_text(zone / 'type') or ''}".strip(): _number(zone / "temp") for zone in zones}
    return {name: millidegrees / 1000 for name, millidegrees in read.items() if millidegrees is not None}


def _throttle_events(root: Path) -> int | None:
    counters = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    counts = [count for each in counters if (count := _number(each)) is not None]
    return sum(counts) if counts else None


def _load(root: Path) -> float | None:
    text = _text(root / "proc/loadavg")
    return float(text.split()[0]) if text else None


def _steal(root: Path, cpus: Sequence[int]) -> int | None:
    wanted = {f"cpu{each}" for each in cpus}
    rows = [line.split() for line in (_text(root / "proc/stat") or "").splitlines()]
    ticks = [int(row[8]) for row in rows if row and row[0] in wanted and len(row) > 8]
    return sum(ticks) if ticks else None


def _free_memory(root: Path) -> int | None:
    rows = [line.split() for line in (_text(root / "proc/meminfo") or "").splitlines()]
    return next((int(row[1]) // 1024 for row in rows if row and row[0] == "MemAvailable:"), None)
