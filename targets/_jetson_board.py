"""A Jetson as its own files describe it: who it is, what state it is in, and the lock that makes it ours.

One script on the board prints ``key<TAB>value`` lines; everything here is read from them and none of it is trusted to
be there. Nothing is changed on the board but files below its cache folder and the lock.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import DeviceBusy, DeviceLost, ProfileError
from edgeprune.profile import Profile

from . import _ssh, _trtexec  # noqa: TID251 private parts of this adapter

PROBE_LIMIT_S = 30.0
VALUE_CAP = 200
"""Characters of one value that are kept."""

SM_OF_SOC = {"tegra210": "53", "tegra186": "62", "tegra194": "72", "tegra234": "87", "tegra264": "110"}
"""SoC → compute capability of its GPU."""

LOCK_WAIT_S = 2.0
LEASE_SILENCE_S = 15.0
"""Seconds without a word from us after which a lock is free again."""

LEASE_GRACE_S = 20.0

_PROBE = r"""
root=$1 wanted=$2
say() { local text=${2//[$'\t\n\r']/ }; printf '%s\t%s\n' "$1" "${text:0:300}"; }
text() { IFS= read -r -d '' -n 300 REPLY < "$1"; } 2> /dev/null
file() { REPLY=; text "$root$2"; say "$1" "$REPLY"; }
file boot_id /proc/sys/kernel/random/boot_id
file release /etc/nv_tegra_release
file model /proc/device-tree/model
{ while IFS= read -r -d '' REPLY; do all="$all $REPLY"; done < "$root/proc/device-tree/compatible"; } 2> /dev/null
say compatible "$all"
file governor /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor
say l4t_core "$(dpkg-query -W -f='${Version}' nvidia-l4t-core 2> /dev/null)"
say cuda "$(readlink -f /usr/local/cuda 2> /dev/null)"
say kernel "$(uname -r)"
say machine "$(uname -m)"
say cache "${XDG_CACHE_HOME:-$HOME/.cache}/edgeprune"
{ while read -r name size _; do [ "$name" = MemAvailable: ] && say memory_kib "$size"; done < "$root/proc/meminfo"; } \
  2> /dev/null
file load /proc/loadavg
say power_mode "$(timeout 10 nvpmodel -q < /dev/null 2> /dev/null)"
for each in "$wanted" "$(command -v trtexec)" /usr/src/tensorrt/bin/trtexec; do
  if [ -n "$each" ] && [ -x "$each" ]; then say trtexec "$each"; break; fi
done
for each in tegrastats nvpmodel jetson_clocks; do say "$each" "$(command -v "$each")"; done
for each in "$root"/sys/class/devfreq/*/; do
  name=${each%/}; REPLY=${name##*/}; text "${each}device/of_node/name"
  case "$REPLY $each" in gpu*|ga10b*|gv11b*|gp10b*|gm20b*|*gpu-gpc*) ;; *) continue ;; esac
  say gpu_hz "$(cat "${each}cur_freq" "${each}min_freq" "${each}max_freq" 2> /dev/null)"
  REPLY=; text "${each}device/load"; say gpu_load "$REPLY"
  break
done
for each in "$root"/sys/class/thermal/thermal_zone*/; do
  REPLY=; text "${each}type"; zone=${REPLY//[$'\t\n']/}; REPLY=; text "${each}temp"
  [ -n "$zone" ] && say "temperature $zone" "$REPLY"
done
for each in "$root"/sys/class/hwmon/hwmon*/; do
  REPLY=; text "${each}name"; [ "${REPLY//[$'\n']/}" = soctherm_oc ] || continue
  for counter in oc1 oc2 oc3; do REPLY=; text "${each}${counter}_event_cnt"; say "$counter" "$REPLY"; done
done
exit 0
"""

PLAIN_LOCK = r"""
plain() { [ -f "$lock" ] && [ ! -L "$lock" ] && [ "$(stat -c %h -- "$lock")" = 1 ]; }
"""
"""Tells whether a lock is a plain file with one name; nothing of it is opened, for a pipe would wait."""

_LEASE = (
    r"""
lock=$1 note=$2 wait=$3 clocks=$4 store=$5
[ -e "$lock" ] || [ -L "$lock" ] || (umask 0; set -C; : > "$lock") 2> /dev/null
"""
    + PLAIN_LOCK
    + r"""
[ -e "$lock" ] || [ -L "$lock" ] || { echo NOLOCK; exit 3; }
plain || { echo STRANGE; exit 3; }
exec 9< "$lock" || { echo NOLOCK; exit 3; }
flock -w "$wait" 9 || { printf 'BUSY %s\n' "$(head -c 200 <&9 | tr -d '\000\n')"; exit 75; }
[ "$(stat -c '%d %i %h' -- "$lock")" = "$(stat -L -c '%d %i 1' /proc/self/fd/9)" ] && [ -f /proc/self/fd/9 ] \
  || { echo STRANGE; exit 3; }
printf '%s\n' "$note" | dd of=/proc/self/fd/9 conv=nocreat status=none 2> /dev/null
if [ "$clocks" = yes ] && sudo -n jetson_clocks --store "$store" < /dev/null > /dev/null 2>&1; then
  exec 8> >(exec setsid bash -c 'cat; sudo -n jetson_clocks --restore "$1" < /dev/null' restore "$store" \
    > /dev/null 2>&1 9<&-)
  sudo -n jetson_clocks < /dev/null > /dev/null 2>&1 && echo CLOCKS
fi
echo HELD
exec sleep infinity
"""
)
"""Holds the lock until it is ended. Clocks that it pinned are put back by a process that outlives it.

Everybody on the board may write to the folder of the lock, and the lock may be another user's by design: all who
measure share it. So whose it is does not matter, but what it is does: never a link and never a second name of another
file, for the holder's name is written into it. It is made only where nothing is (`set -C` is O_EXCL, which follows no
link), and what is written goes to the file that was opened and looked at, whatever stands at its path by then. Another
user can still keep it locked or take it away, as they can use the GPU without it.
"""


@dataclass(frozen=True, kw_only=True)
class Board:
    """One look at a board; what it does not tell is None or left out.

    Attributes:
        boot_id: changes with every start.
        model: its name in the device tree.
        soc: "tegra234" ...
        l4t: release of its system, "36.4.0".
        cuda: version as far as it is known.
        kernel, machine: of its system.
        cache: folder for our files.
        power_mode: name of it.
        gpu_mhz: now, lowest, highest.
        gpu_load: percent.
        temperatures_c: sensor → degrees Celsius.
        throttled: "oc1", "oc2", "oc3" → events since it was started.
        memory_mib: available.
        load: of its CPUs over a minute.
        trtexec: path of the program.
        tools: those of tegrastats, nvpmodel and jetson_clocks that are there.
        governor: of its CPUs.
    """

    boot_id: str
    model: str | None
    soc: str | None
    l4t: str | None
    cuda: str | None
    kernel: str | None
    machine: str | None
    cache: str
    power_mode: str | None
    gpu_mhz: tuple[int, int, int] | None
    gpu_load: float | None
    temperatures_c: Mapping[str, float]
    throttled: Mapping[str, int]
    memory_mib: int | None
    load: float | None
    trtexec: str | None
    tools: tuple[str, ...]
    governor: str | None

    @property
    def sm(self) -> str | None:
        """Return the compute capability of the GPU without its point, "87"."""
        return SM_OF_SOC.get(self.soc or "")

    @property
    def clocks_pinned(self) -> bool | None:
        """Return whether the GPU can have one clock only; None if it does not tell."""
        return None if self.gpu_mhz is None else self.gpu_mhz[1] == self.gpu_mhz[2]

    def conditions(self) -> dict[str, Any]:
        """Return its state as JSON values."""
        return {
            "power_mode": self.power_mode,
            "gpu_mhz": list(self.gpu_mhz) if self.gpu_mhz else None,
            "temperatures_c": dict(self.temperatures_c),
            "throttled": dict(self.throttled),
            "memory_mib": self.memory_mib,
            "load": self.load,
        }

    def engine_key(self, tensorrt: str) -> str:
        """Return what an engine of this board in this state is good for, as a file name; so does `edge_run.py`."""
        facts = [f"trt{tensorrt}", f"sm{self.sm or '?'}", f"l4t{self.l4t or '?'}", self.model or "?"]
        return _file_name([*facts, self.power_mode or "?"])

    def key(self, tensorrt: str) -> str:
        """Return what our engines and the timing cache belong to: clocks count as well, for the builder times."""
        return f"{self.engine_key(tensorrt)[:140]}_{'pinned' if self.clocks_pinned else 'free'}"


def _file_name(facts: Sequence[str]) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", "-".join(facts))[:150]


def look(ssh: _ssh.Ssh, *, sysroot: str = "", trtexec: str = "") -> Board:
    """Return the board behind a connection.

    Args:
        sysroot: folder that stands for the root of its files, for labs and tests.
        trtexec: where its program is, if not where it is usually.

    Raises:
        DeviceLost: if the connection breaks, or it answers what no board can answer.
    """
    done = ssh.run(["bash", "-c", _PROBE, "probe", sysroot, trtexec], limit_s=PROBE_LIMIT_S, cap=1 << 18)
    return board_from_text(done.stdout, ssh.name)


def board_from_text(text: str, name: str) -> Board:
    """Return the board that the script's lines describe.

    Raises:
        DeviceLost: if they lack what every Linux has, or name a folder that is not used.
    """
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, tab, value = line.partition("\t")
        if tab and value.strip():
            facts.setdefault(key, value.strip()[:VALUE_CAP])
    if not re.fullmatch(r"[0-9a-f-]{36}", facts.get("boot_id", "")) or not facts.get("cache", "").startswith("/"):
        raise DeviceLost(f"{name} does not answer as a Linux board does", why="it tells no boot id or no home folder")
    hertz = [_integer(each) for each in facts.get("gpu_hz", "").split()]
    clocks = [each // 1_000_000 for each in hertz if each is not None]
    zones = {
        key.partition(" ")[2].removesuffix("-thermal"): _integer(facts[key]) for key in facts if key[:5] == "tempe"
    }
    memory, load = _integer(facts.get("memory_kib")), _integer(facts.get("gpu_load"))
    return Board(
        boot_id=facts["boot_id"],
        model=facts.get("model"),
        soc=next(iter(re.findall(r"tegra\d+", facts.get("compatible", ""))), None),
        l4t=_l4t(facts),
        cuda=next(iter(re.findall(r"\d+\.\d+", facts.get("cuda", ""))), None),
        kernel=facts.get("kernel"),
        machine=facts.get("machine"),
        cache=_ssh.remote_path(facts["cache"]),
        power_mode=mode_from_text(facts.get("power_mode", "")),
        gpu_mhz=(clocks[0], clocks[1], clocks[2]) if len(clocks) == 3 else None,
        gpu_load=None if load is None else load / 10,
        temperatures_c={
            zone: value / 1000 for zone, value in zones.items() if zone and value is not None and value > -200_000
        },
        throttled={key: count for key in ("oc1", "oc2", "oc3") if (count := _integer(facts.get(key))) is not None},
        memory_mib=None if memory is None else memory // 1024,
        load=float(found[0]) if (found := re.match(r"\d{1,6}\.\d+(?= )", facts.get("load", ""))) else None,
        trtexec=_ssh.remote_path(facts["trtexec"]) if "trtexec" in facts else None,
        tools=tuple(each for each in ("tegrastats", "nvpmodel", "jetson_clocks") if each in facts),
        governor=facts.get("governor"),
    )


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d{1,18}", text) else None


def _l4t(facts: Mapping[str, str]) -> str | None:
    """Return "36.4.0" from ``# R36 (release), REVISION: 4.0, ...``, else from a package version 36.4.0-2025..."""
    if found := re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", facts.get("release", "")):
        return f"{found[1]}.{found[2]}"
    found = re.match(r"\d+\.\d+(?:\.\d+)?", facts.get("l4t_core", ""))
    return found[0] if found else None


def mode_from_text(text: str) -> str | None:
    """Return the name in what ``nvpmodel -q`` prints: ``NV Power Mode: MAXN`` and its number below."""
    found = re.search(r"NV Power Mode: *([A-Za-z0-9_.-]{1,40})", text)
    return found[1] if found else None


def take_lock(
    ssh: _ssh.Ssh, lock: str, *, holder: str, pin_clocks: bool = False, store: str = ""
) -> tuple["_ssh.Job", bool]:
    """Return the job that holds the board's lock until it is closed, and whether it pinned the clocks.

    Args:
        lock: file on the board that every user of it locks.
        holder: told to those who find it locked.
        pin_clocks: run ``jetson_clocks`` if this user may; put back when the lock is given up, even by a broken link.
        store: file on the board where the clocks of before are kept.

    Raises:
        DeviceBusy: if somebody else holds it.
        DeviceLost: if it cannot be locked.
    """
    words = [lock, holder, f"{LOCK_WAIT_S:g}", "yes" if pin_clocks else "no", store]
    job = ssh.start(["bash", "-c", _LEASE, "lease", *words], silence_s=LEASE_SILENCE_S)
    if job.wait_for("HELD", LOCK_WAIT_S + LEASE_GRACE_S):
        return job, "CLOCKS" in job.stdout
    said = job.stdout.strip()
    job.close()
    if "BUSY" in said:
        raise DeviceBusy(
            f"{ssh.name} is in use",
            why=f"its lock is held: {said.partition('BUSY ')[2] or 'by somebody who left no name'}",
            next_step="wait until it is free, then run the command again",
        )
    if "STRANGE" in said:
        raise strange_lock(ssh, lock)
    raise DeviceLost(
        f"{ssh.name} cannot be locked",
        why=job.stderr.strip()[-200:] or "flock failed",
        next_step=f"see who may write {lock}",
    )


def strange_lock(ssh: _ssh.Ssh, lock: str) -> DeviceLost:
    """Return the error of a lock that is a link, has a second name, or is no file."""
    return DeviceLost(
        f"{ssh.name} cannot be locked",
        why=f"{lock} is no plain file of its own: through a link, what is written there would go into another file",
        next_step=f"see who put it there, then remove it: ssh {ssh.address.login} ls -l {lock}; or name another file "
        'in the options of all who share the board: lock = "/run/lock/another.lock"',
    )


def insist_on_mode(profile: Profile, board: Board, name: str) -> None:
    """Raise ProfileError unless the board is in the power mode that the profile wants; it is never changed here."""
    if profile.power_mode is not None and board.power_mode != profile.power_mode:
        raise ProfileError(
            f"{name} is in power mode {board.power_mode or 'unknown'}, the target wants {profile.power_mode}",
            why="SM count and clocks follow the power mode, so an engine belongs to one of them",
            next_step="on the board: sudo nvpmodel -p --verbose lists the modes, sudo nvpmodel -m NUMBER sets one; "
            "some take a restart, and sudo nvpmodel -q tells what holds",
        )


def tool_of(ssh: _ssh.Ssh, board: Board, wanted: str) -> _trtexec.Trtexec:
    """Return the board's trtexec, asked what it is.

    Raises:
        ProfileError: if there is none, it is not where the profile says, or its version is unknown.
    """
    if board.trtexec is None or (wanted and board.trtexec != wanted):
        raise ProfileError(
            f"there is no trtexec on {ssh.name}" + (f" at {wanted}" if wanted else ""),
            why="it is looked for in PATH and in /usr/src/tensorrt/bin",
            next_step="on the board: sudo apt-get install libnvinfer-bin; or name it in the target's options: "
            'trtexec = "/path/to/trtexec"',
        )
    done = ssh.run([board.trtexec, "--help"], limit_s=PROBE_LIMIT_S, cap=1 << 20)
    return _trtexec.tool_from_help(board.trtexec, done.stdout + done.stderr, ssh.name)
