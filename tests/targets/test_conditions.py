from pathlib import Path

import pytest

from edgeprune.targets._conditions import changes, cpu_flags, cpu_model, read_conditions, stolen_share


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """A laptop with everything the kernel can tell."""
    return write(
        tmp_path,
        {
            "sys/devices/system/cpu/cpu3/cpufreq/scaling_governor": "performance\n",
            "sys/devices/system/cpu/cpu3/cpufreq/scaling_cur_freq": "2400000\n",
            "sys/devices/system/cpu/cpu3/cpufreq/scaling_min_freq": "800000\n",
            "sys/devices/system/cpu/cpu3/cpufreq/scaling_max_freq": "3600000\n",
            "sys/devices/system/cpu/cpu2/thermal_throttle/core_throttle_count": "4\n",
            "sys/devices/system/cpu/cpu3/thermal_throttle/core_throttle_count": "3\n",
            "sys/devices/system/cpu/intel_pstate/no_turbo": "0\n",
            "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n",
            "sys/class/thermal/thermal_zone0/temp": "61500\n",
            "sys/class/thermal/thermal_zone1/temp": "not a number\n",
            "proc/loadavg": "1.25 0.90 0.70 2/345 6789\n",
            "proc/stat": "cpu 9 9 9 9 9 9 9 99 0 0\ncpu2 1 1 1 1 1 1 1 7 0 0\ncpu3 1 1 1 1 1 1 1 5 0 0\n",
            "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 2097152 kB\n",
            "proc/cpuinfo": "processor: 0\nmodel name\t: Some CPU @ 2.40GHz\nflags\t\t: fpu avx2 avx512f avx512_vnni\n",
        },
    )


def test_everything_the_kernel_tells_is_read_with_its_unit(board: Path) -> None:
    assert read_conditions([3], board) == {
        "governor": "performance",
        "mhz": 2400.0,
        "mhz_min": 800.0,
        "mhz_max": 3600.0,
        "turbo": True,
        "temperatures_c": {"thermal_zone0 x86_pkg_temp": 61.5},
        "throttle_events": 7,
        "load_1m": 1.25,
        "steal_ticks": 5,
        "free_memory_mib": 2048,
    }


def test_steal_is_summed_over_the_pinned_cpus(board: Path) -> None:
    assert read_conditions([2, 3], board)["steal_ticks"] == 12


def test_what_a_guest_cannot_see_is_none_not_zero(tmp_path: Path) -> None:
    seen = read_conditions([0], tmp_path)
    assert seen.pop("temperatures_c") == {}
    assert set(seen.values()) == {None}


def test_this_machine_has_a_load_and_free_memory() -> None:
    seen = read_conditions([0])
    assert seen["load_1m"] >= 0
    assert seen["free_memory_mib"] > 0


def test_nothing_changed_is_nothing_to_say(board: Path) -> None:
    assert changes(read_conditions([3], board), read_conditions([3], board)) == []


def test_a_new_governor_and_new_throttling_are_said(board: Path) -> None:
    before = read_conditions([3], board)
    write(
        board,
        {
            "sys/devices/system/cpu/cpu3/cpufreq/scaling_governor": "powersave",
            "sys/devices/system/cpu/cpu3/thermal_throttle/core_throttle_count": "5",
        },
    )
    governor, throttled = changes(before, read_conditions([3], board))
    assert "performance to powersave" in governor
    assert "throttled 2 times" in throttled


def test_the_stolen_share_is_of_the_time_measured() -> None:
    assert stolen_share({"steal_ticks": 10}, {"steal_ticks": 30}, 2.0) == pytest.approx(0.1)
    assert stolen_share({"steal_ticks": None}, {"steal_ticks": None}, 2.0) == 0


def test_the_cpu_has_a_name_and_the_flags_that_decide_kernels(board: Path, tmp_path: Path) -> None:
    assert cpu_model(board) == "Some CPU @ 2.40GHz"
    assert cpu_flags(board) == ["avx2", "avx512f", "avx512_vnni"]
    assert cpu_model(tmp_path / "nothing")
    assert cpu_flags(tmp_path / "nothing") == []
