"""Lines of tegrastats of five boards, and energy from them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.targets._jetson_energy import energy_from_text
from edgeprune.targets._jetson_stats import energy, module_mw, reading_from_line, readings_from_text, summary

LINES = (Path(__file__).parent / "replay/tegrastats.txt").read_text().splitlines()
AGX_7, AGX_6, NANO_6, XAVIER_4, THOR = (reading_from_line(each) for each in LINES)


def test_an_orin_nano_has_one_rail_for_all() -> None:
    assert NANO_6 is not None
    assert NANO_6.rails_mw == {"VDD_IN": 5704, "VDD_CPU_GPU_CV": 831, "VDD_SOC": 1624}
    assert module_mw(NANO_6) == (5704.0, "VDD_IN")
    assert (NANO_6.ram_mib, NANO_6.gpu_load, NANO_6.gpu_mhz, NANO_6.emc_mhz) == (2461, 0, 305, 2133)
    assert NANO_6.temperatures_c["tj"] == 48.843


def test_an_agx_orin_has_none_and_its_sum_says_so() -> None:
    assert AGX_6 is not None
    assert module_mw(AGX_6) == (
        3150.0 + 14312 + 4968 + 1091,
        "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0 + VDDQ_VDD2_1V8AO",
    )
    assert AGX_6.temperatures_c["tj"] == 77.281


def test_three_values_of_a_rail_and_two_of_a_sensor_are_read() -> None:
    assert AGX_7 is not None
    assert AGX_7.rails_mw["VDD_GPU_SOC"] == 5139
    assert AGX_7.temperatures_c["cpu"] == 52.968
    assert AGX_7.gpu_mhz == 1300


def test_rails_without_a_unit_are_read_and_a_dummy_sensor_is_not() -> None:
    assert XAVIER_4 is not None
    assert XAVIER_4.rails_mw == {"GPU": 463, "CPU": 618, "SOC": 2936, "CV": 0, "VDDRQ": 192, "SYS5V": 3306}
    assert "pmic" not in XAVIER_4.temperatures_c
    assert XAVIER_4.gpu_mhz is None


def test_a_sensor_without_power_is_none_and_a_board_without_load_has_none() -> None:
    assert THOR is not None
    assert THOR.temperatures_c == {"tj": 41.5}
    assert (THOR.gpu_load, THOR.gpu_mhz) == (None, 1000)
    assert module_mw(THOR) is None


@given(st.text(max_size=200))
def test_any_line_is_a_reading_or_none(line: str) -> None:
    assert reading_from_line(line) is None or "RAM" in line
    seen = reading_from_line(f"RAM 1/2MB {line}")
    assert seen is not None
    assert seen.ram_mib == 1


@pytest.mark.parametrize("digits", [400, 5000])
def test_numbers_of_absurd_length_are_not_read(digits: int) -> None:
    much = "9" * digits
    assert reading_from_line(f"RAM {much}/2MB") is None
    seen = reading_from_line(
        f"RAM 1/2MB EMC_FREQ {much}%@{much} GR3D_FREQ {much}%@[{much}] gpu@{much}C VDD_IN {much}mW/1mW GPU {much}/1"
    )
    assert seen is not None
    assert (seen.gpu_load, seen.gpu_mhz, seen.emc_mhz, seen.temperatures_c, seen.rails_mw) == (None, None, None, {}, {})


def test_a_summary_says_what_was_seen_meanwhile() -> None:
    seen = summary(readings_from_text("\n".join([*LINES, "noise"])))
    assert seen["readings"] == 5
    assert seen["gpu_mhz"] == [305, 1300]
    assert seen["temperature_c"] == [32.0, 77.281]
    assert summary([]) == {"readings": 0, "gpu_mhz": None, "temperature_c": None, "module_mw": None, "rails": None}


def watts(mw: int) -> str:
    return f"RAM 1/2MB GR3D_FREQ 0% VDD_IN {mw}mW/1mW"


def test_energy_is_power_above_idle_times_the_window_over_inferences() -> None:
    readings = [(at / 10, reading_from_line(watts(4000 if at < 100 else 9000))) for at in range(200)]
    found = energy([(at, each) for at, each in readings if each], idle=(5.0, 9.9), busy=(12.0, 18.0), inferences=3000)
    assert found is not None
    assert (found.idle_mw, found.busy_mw, found.rails) == (4000, 9000, "VDD_IN")
    assert found.gross_mj == pytest.approx(9000 * 6 / 3000)
    assert found.net_mj == pytest.approx(5000 * 6 / 3000)


def test_without_readings_there_is_no_energy() -> None:
    assert energy([], idle=(0, 1), busy=(1, 2), inferences=5) is None


def stamped(begin: float, calls: int) -> str:
    lines = [f"{begin - 3 + 0.1 * k:.3f} {watts(4000 if k < 30 else 10_000)}" for k in range(140)]
    log = "[11/21/2026-20:01:02] [I]"
    lines += [
        f"{begin:.3f} EDGEPRUNE_LOAD",
        f"{begin + 1:.3f} {log} Starting inference",
        f"{begin + 9:.3f} {log} Timing trace has {calls} queries over 6 s",
        f"{begin + 9.1:.3f} &&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec",
    ]
    return "\n".join(lines)


def test_the_window_is_cut_by_the_boards_own_stamps() -> None:
    """Two of eight seconds after the first call are warm-up, so 3000 calls are in six."""
    found = energy_from_text(stamped(1000.0, 3000), idle_s=3.0, warm_up_s=2.0)
    assert found is not None
    assert found.gross_mj == pytest.approx(10_000 * 6 / 3000, rel=1e-3)
    assert found.net_mj == pytest.approx(6000 * 6 / 3000, rel=1e-3)


@pytest.mark.parametrize("lost", ["EDGEPRUNE_LOAD", "Starting", "Timing", "PASSED", "VDD_IN"])
def test_a_pass_that_lacks_something_gives_no_energy(lost: str) -> None:
    text = "\n".join(line for line in stamped(1000.0, 3000).splitlines() if lost not in line)
    assert energy_from_text(text, idle_s=3.0, warm_up_s=2.0) is None
