"""What `tegrastats` prints, read by pattern: boards and releases name their rails and sensors as they like.

    11-30-2025 13:26:01 RAM 2461/7620MB ... CPU [19%@729,off] EMC_FREQ 4%@2133 GR3D_FREQ 0%@[305] ... gpu@48.218C
    tj@48.843C VDD_IN 5704mW/5704mW VDD_CPU_GPU_CV 831mW/831mW

Of the values of a rail the first is of now and the second the mean since tegrastats began; only the first is used.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

SENSOR_OFF_C = -200.0
"""A sensor whose power is gated reads -256."""

DUMMY_SENSORS = ("pmic",)
"""Reads 100 °C on every board."""

TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")
"""Rails that carry everything a module takes; AGX Orin has none of them."""

AGX_ORIN_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")
"""Their sum is the closest to a total there, and less than what the wall gives."""

# Digits are counted: what stands there may be no number that fits anywhere.
_RAM = re.compile(r"\bRAM (\d{1,9})/(\d{1,9})MB")
_GPU = re.compile(r"\bGR3D_FREQ (?:(\d{1,3})%)?(?:@\[?(\d{1,6}(?:,\d{1,6}){0,7})\]?)?")
_EMC = re.compile(r"\bEMC_FREQ (?:(\d{1,3})%)?(?:@(\d{1,6}))?")
_TEMPERATURE = re.compile(r"\b([A-Za-z][A-Za-z0-9_]*)@(-?\d{1,6}(?:\.\d{1,6})?)C\b")
_RAIL_MW = re.compile(r"\b([A-Z][A-Z0-9_]{2,}) (\d{1,9})mW/\d+mW")
_RAIL = re.compile(r"\b(POM_[A-Z0-9_]+|GPU|CPU|SOC|CV|VDDRQ|SYS5V|VDD_[A-Z0-9_]+|VIN[A-Z0-9_]*) (\d{1,9})/\d+(?=\s|$)")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One line of tegrastats; what a board does not tell is None or left out.

    Attributes:
        ram_mib: in use, of CPU and GPU together.
        gpu_load: percent.
        gpu_mhz: of every GPU cluster, the slowest.
        emc_mhz: memory clock.
        temperatures_c: sensor, in lower case → degrees Celsius.
        rails_mw: rail → milliwatts now.
    """

    ram_mib: int | None
    gpu_load: int | None
    gpu_mhz: int | None
    emc_mhz: int | None
    temperatures_c: Mapping[str, float]
    rails_mw: Mapping[str, int]


def reading_from_line(line: str) -> Reading | None:
    """Return what one line says, None if it is no line of tegrastats."""
    ram = _RAM.search(line)
    if ram is None:
        return None
    gpu, emc = _GPU.search(line), _EMC.search(line)
    heat = {name.lower(): float(value) for name, value in _TEMPERATURE.findall(line)}
    clocks = [int(each) for each in (gpu[2] or "").split(",") if each] if gpu else []
    return Reading(
        ram_mib=int(ram[1]),
        gpu_load=int(gpu[1]) if gpu and gpu[1] else None,
        gpu_mhz=min(clocks, default=None),
        emc_mhz=int(emc[2]) if emc and emc[2] else None,
        temperatures_c={
            name: value for name, value in heat.items() if value > SENSOR_OFF_C and name not in DUMMY_SENSORS
        },
        rails_mw={name: int(value) for name, value in (*_RAIL.findall(line), *_RAIL_MW.findall(line))},
    )


def readings_from_text(text: str) -> list[Reading]:
    """Return the readings of all lines that are some."""
    return [reading for line in text.splitlines() if (reading := reading_from_line(line)) is not None]


def module_mw(reading: Reading) -> tuple[float, str] | None:
    """Return the power of the module and what it is the sum of; None if the board shows no rail for it."""
    rails = reading.rails_mw
    for name in TOTAL_RAILS:
        if name in rails:
            return float(rails[name]), name
    present = [name for name in AGX_ORIN_RAILS if name in rails]
    if len(present) >= 2:
        return float(sum(rails[name] for name in present)), " + ".join(present)
    return None


def summary(readings: Sequence[Reading]) -> dict[str, object]:
    """Return the range of what was seen meanwhile, JSON values."""
    gpu = [each.gpu_mhz for each in readings if each.gpu_mhz is not None]
    heat = [max(each.temperatures_c.values()) for each in readings if each.temperatures_c]
    power = [mw for each in readings if (mw := module_mw(each)) is not None]
    return {
        "readings": len(readings),
        "gpu_mhz": [min(gpu), max(gpu)] if gpu else None,
        "temperature_c": [min(heat), max(heat)] if heat else None,
        "module_mw": round(fmean(value for value, _ in power), 1) if power else None,
        "rails": power[0][1] if power else None,
    }


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Of one inference, from the rails of the module; not from the wall.

    Attributes:
        gross_mj: everything the module took meanwhile, millijoules.
        net_mj: above what it took when idle.
        idle_mw, busy_mw: power before and during the load.
        rails: what the power is the sum of.
        inferences, seconds: of the window.
    """

    gross_mj: float
    net_mj: float
    idle_mw: float
    busy_mw: float
    rails: str
    inferences: int
    seconds: float


def energy(
    readings: Sequence[tuple[float, Reading]],
    *,
    idle: tuple[float, float],
    busy: tuple[float, float],
    inferences: int,
) -> Energy | None:
    """Return the energy of one inference; None if a window has fewer than three readings of the rails.

    Args:
        readings: seconds on the board's clock, and what was read then.
        idle, busy: first and last second of a window before the load and of one inside it.
        inferences: in the busy window.
    """
    powers = [(at, *found) for at, each in readings if (found := module_mw(each)) is not None]
    before = [mw for at, mw, _ in powers if idle[0] <= at <= idle[1]]
    during = [mw for at, mw, _ in powers if busy[0] <= at <= busy[1]]
    if min(len(before), len(during)) < 3 or inferences < 1:
        return None
    seconds, idle_mw, busy_mw = busy[1] - busy[0], fmean(before), fmean(during)
    return Energy(
        gross_mj=busy_mw * seconds / inferences,
        net_mj=(busy_mw - idle_mw) * seconds / inferences,
        idle_mw=idle_mw,
        busy_mw=busy_mw,
        rails=powers[0][2],
        inferences=inferences,
        seconds=seconds,
    )
