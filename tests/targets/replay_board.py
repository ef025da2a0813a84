"""A Jetson that is none: a real OpenSSH server on the loopback, files like a Jetson's, and the replay of its programs.

with ReplayBoard(tmp_path) as board:
    with open_target(board.profile()) as target: ...
    board.set(fault="crash", fault_at="time")
"""

import json
import os
import sys
import uuid
from pathlib import Path
from typing import Self

from loopback_sshd import LoopbackSshd

from edgeprune.profile import Profile, load_profile

REPLAY = Path(__file__).parent / "replay"

FILES = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
    "proc/meminfo": "MemTotal: 7802000 kB\nMemAvailable: 5200000 kB\n",
    "proc/loadavg": "0.25 0.20 0.10 1/345 6789\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "624750000\n",
    "sys/class/devfreq/17000000.gpu/device/of_node/name": "gpu\0",
    "sys/class/devfreq/17000000.gpu/device/load": "0\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "46531\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "48218\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",
    "sys/class/thermal/thermal_zone2/temp": "-256000\n",
    "sys/class/hwmon/hwmon3/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon3/oc2_event_cnt": "0\n",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "37\n",
    "power_mode": "NV Power Mode: 15W\n0\n",
    "run/lock/.keep": "",
}
"""What an Orin Nano on JetPack 6 shows."""

QUICK = {"run_s": 1, "warm_up_ms": 100, "energy_s": 0, "time_limit_s": 30, "free_mib": 1, "slow_limit": 20.0}
"""Options of tests: the clock of the replay is made up, and so are its seconds."""


class ReplayBoard:
    """One board; a context manager. Several can live at once."""

    def __init__(self, folder: Path, version: str = "10.3") -> None:
        self.root, self.home = folder / "root", folder / "home"
        for name, content in FILES.items():
            self.write(name, content)
        self.home.mkdir(parents=True)
        self._config = folder / "replay.json"
        self._settings: dict[str, object] = {}
        self.boot_file = self.root / "proc/sys/kernel/random/boot_id"
        self.reboot()
        self.set(version=version)
        self.sshd = LoopbackSshd(folder / "sshd", self._environment())

    def __enter__(self) -> Self:
        self.sshd.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.sshd.stop()

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": f"{REPLAY}:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.cache.parent),
            "EDGEPRUNE_REPLAY": str(self._config),
            "EDGEPRUNE_REPLAY_PYTHON": sys.executable,
            "EDGEPRUNE_SYSROOT": str(self.root),
            "OMP_NUM_THREADS": "1",
        }

    @property
    def cache(self) -> Path:
        """Return our folder on the board."""
        return self.home / ".cache/edgeprune"

    def write(self, name: str, content: str) -> None:
        """Write a file of the board, as its kernel would."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.new")
        part.write_text(content)
        part.replace(path)

    def set(self, **settings: object) -> None:
        """Have the programs do otherwise from now on; None takes a setting back."""
        kept = {**self._settings, "boot_file": str(self.boot_file), **settings}
        self._settings = {name: value for name, value in kept.items() if value is not None}
        part = self._config.with_suffix(".new")
        part.write_text(json.dumps(self._settings))
        part.replace(self._config)

    def commands(self, *, only: str = "") -> list[str]:
        """Return the command lines that trtexec was given, those that hold `only`."""
        log = self._config.with_suffix(".log")
        return [each for each in (log.read_text().splitlines() if log.exists() else []) if only in each]

    def reboot(self) -> None:
        self.write("proc/sys/kernel/random/boot_id", f"{uuid.uuid4()}\n")

    def profile(self, name: str = "jetson-orin-nano", **overrides: object) -> Profile:
        """Return the shipped profile at this address, its options for tests changed by `options`."""
        options = {**QUICK, "sysroot": str(self.root), **self.sshd.files, **overrides.pop("options", {})}  # type: ignore[dict-item]
        return load_profile(name, {"address": self.sshd.address, "precision": "fp32", **overrides, "options": options})

    def processes(self) -> list[int]:
        """Return what runs on the board: processes whose environment is that of its sessions."""
        mark = f"EDGEPRUNE_REPLAY={self._config}".encode()
        found = []
        for each in Path("/proc").iterdir():
            if each.name.isdigit() and int(each.name) != os.getpid():
                try:
                    if mark in (each / "environ").read_bytes().split(b"\0"):
                        found.append(int(each.name))
                except OSError:
                    continue
        return found
