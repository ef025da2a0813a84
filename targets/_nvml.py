"""The state of an NVIDIA GPU while something is timed on it, as far as its driver tells (NVML through `nvidia-ml-py`).

What NVML does not tell, on a board without it, under MIG, or because the package is missing, is None or left out.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

THROTTLING: Mapping[int, str] = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
"""Bit of the clock event reasons → what it means; the bits that make timings suspect (NVML API reference)."""

CLOCK_MOVED = 0.03
"""Share by which the clocks at the end of two sessions may differ before it is worth a flag."""


class Gpu:
    """A GPU as NVML sees it; one that cannot be seen reads as nothing.

    Args:
        bus_id: PCI bus id, "0000:01:00.0": NVML and CUDA count devices differently.
    """

    def __init__(self, bus_id: str) -> None:
        self.missing = ""
        self._nvml: ModuleType | None = None
        try:
            pynvml = import_module("pynvml")  # without types
        except ImportError:
            self.missing = "nvidia-ml-py is not installed: clocks, temperature and throttling are not recorded"
            return
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id.encode())
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self.missing = f"NVML does not answer ({error}): clocks, temperature and throttling are not recorded"

    def read(self) -> dict[str, Any]:
        """Return the state now, JSON values; empty if NVML does not answer."""
        nvml = self._nvml
        if nvml is None:
            return {}
        handle = self._handle
        power = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        limit = self._ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        return {
            "sm_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "temperature_c": self._ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "power_w": None if power is None else power / 1000,
            "power_limit_w": None if limit is None else limit / 1000,
            "state": self._ask(lambda: nvml.nvmlDeviceGetPerformanceState(handle)),
            "throttling": self._reasons(),
            "processes": self._ask(lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))),
        }

    def _reasons(self) -> list[str] | None:
        nvml = self._nvml
        assert nvml is not None
        names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        for ask in (getattr(nvml, name) for name in names if hasattr(nvml, name)):
            bits = self._ask(partial(ask, self._handle))
            if bits is not None:
                return [meaning for bit, meaning in THROTTLING.items() if bits & bit]
        return None

    def _ask(self, question: Callable[[], Any]) -> Any:
        assert self._nvml is not None
        try:
            return question()
        except self._nvml.NVMLError:
            return None  # this GPU or its driver does not tell


def suspicions(states: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the states at the ends of the sessions say against the timings, one sentence each."""
    reasons = sorted({reason for state in states for reason in state.get("throttling") or ()})
    found = [f"the GPU was throttled while measuring: {', '.join(reasons)}"] if reasons else []
    for key, name in (("sm_mhz", "the GPU's clock"), ("memory_mhz", "the GPU's memory clock")):
        seen = [state[key] for state in states if state.get(key)]
        if seen and max(seen) > (1 + CLOCK_MOVED) * min(seen):
            found.append(f"{name} moved between {min(seen)} and {max(seen)} MHz while measuring")
    return found


def company(states: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note if other processes computed on the GPU; the worker is one itself."""
    most = max((state.get("processes") or 0 for state in states), default=0)
    return [f"{most - 1} other processes had the GPU open while measuring"] if most > 1 else []
