"""Our files on a board: graphs by what is in them, engines by what they were made from and for, and timing caches.

    ~/.cache/edgeprune/
    ├── graphs/<sha256>.onnx                                   typed graphs, as uploaded
    ├── engines/<key>/<sha256>-<precision>-<level>.engine      and .json beside it: what is known about it
    ├── timing/<key>.cache                                     what the builder learnt; .prev is the one before
    └── jobs/<random>/                                         one call of trtexec; gone when it ends

A key names TensorRT, the GPU, the system and the power mode: nothing of one state of a board is used in another. What
was not used for longest goes first when the cap is reached.
"""

import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from edgeprune.artifact import Artifact
from edgeprune.errors import DeviceLost

from . import _ssh, _trtexec_log  # noqa: TID251 private parts of this adapter

HOUSEKEEPING_S = 60.0
FILES_CAP = 64 << 20
"""Bytes of log and small files of one call of trtexec that are read."""

TRIM_EVERY = 16
"""Engines after which the cap is looked after."""

LOG_CAP = 4 << 20
"""Bytes of a log; a command that says more is ended by that."""

UPLOAD_S_PER_MIB = 2.0
FOLDERS = ("graphs", "engines", "timing", "jobs")

_MAKE = r"""
cd / && umask 077
for each in graphs timing jobs "engines/$2"; do mkdir -p -- "$1/$each" || exit 1; done
find "$1/jobs" -mindepth 1 -maxdepth 1 -mmin +1440 -exec rm -rf -- {} +
find "$1" -name '*.part' -mmin +1440 -delete
"""

_TRIM = r"""
cd -- "$1" && left=$2
find graphs engines -type f -printf '%A@ %s %p\n' | sort -rn | while read -r _ size name; do
  left=$((left - (size + 1023) / 1024))
  [ "$left" -gt 0 ] || rm -f -- "$name"
done
"""

_SWEEP = r"""
cd -- "$1/jobs" || exit 0
for each in */; do
  each=${each%/}
  [ ! -d "$each" ] || [ -L "$each" ] || (exec 7< "$each" && flock -n 7 && rm -rf -- "$each")
done
exit 0
"""
"""Removes the folders of jobs that are dead: a job and all that it started hold a lock on theirs, see `_RUN`. One that
is used by several jobs in turn is free between them, but then its host has the board's lock, and here we have it.
Where a folder cannot be locked, as on NFS, age alone decides."""

_RUN = r"""
boot=$2 marker=$3 cap=$4 keep=$5 place=$6 count=$7
[ "$keep" = yes ] || { mkdir -- "$1" && trap 'cd / && rm -rf -- "$1"' EXIT; }
cd -- "$1" && exec 7< . || exit 96
flock -n 7 2> /dev/null
names=("${@:8:count}"); command=("${@:8+count}")
head -c 100 "$boot"
"${command[@]}" < /dev/null 2>&1 | head -c "$cap" > log.txt; rc=${PIPESTATUS[0]}
printf '\n%s\n' "$marker"; cat log.txt
for each in "${names[@]}"; do printf '\n%s\n' "$marker"; cat -- "$each" 2> /dev/null; done
printf '\n%s\n' "$marker"
if [ -n "$place" ] && [ -s engine.part ] && [ "$rc" = 0 ]; then
  sync engine.part && sha=$(sha256sum < engine.part) && mv -f -- engine.part "$place.engine" && printf '%s' "${sha%% *}"
elif [ -e "$place.engine" ]; then touch -a -- "$place.engine" "$place.json"; fi
printf '\n%s\n' "$marker"; head -c 100 "$boot"
exit "$rc"
"""
"""Runs a command in a folder and prints, between markers: boot id, log, files asked for, SHA-256 of an engine that it
made and that was moved to its place, boot id."""

_FIND = r"""
if [ -f "$1.engine" ] && [ -f "$1.json" ]; then
  touch -a -- "$1.engine" "$1.json"; sha256sum < "$1.engine"; head -c 65536 "$1.json"; exit 0
fi
touch -a -- "$2" 2> /dev/null && sha256sum < "$2"
[ ! -s "$3" ] || cp -f -- "$3" "$3.prev"
exit 4
"""
"""Tells of an engine; where there is none, whether its graph is whole, and saves the timing cache: its builder rewrites
it in place, and the power may go meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine on the board.

    Attributes:
        path: there.
        graph_sha256: of the typed graph it was made from.
        sha256: of its own bytes.
        level: of the builder's search.
        precisions: "fp32", "fp16" ... → tensors of that type, read back from the engine; empty if it does not tell.
        built_s: seconds the builder took, as far as it told.
        warnings: of the builder.
        command: that made it.
    """

    path: str
    graph_sha256: str
    sha256: str
    level: int
    precisions: Mapping[str, int]
    built_s: float | None
    warnings: tuple[str, ...]
    command: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what is worth recording, JSON values."""
        facts = {"graph_sha256": self.graph_sha256, "sha256": self.sha256, "level": self.level}
        told = {"precisions": dict(self.precisions), "built_s": self.built_s, "warnings": list(self.warnings)}
        return {**facts, **told, "command": list(self.command)}


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One call of trtexec: its exit status, its log, the files asked for, and the SHA-256 of an engine it made."""

    rc: int
    log: _trtexec_log.Log
    files: Mapping[str, str]
    engine_sha256: str = ""


class Store:
    """The files of one board in one state.

    Args:
        root: folder on the board.
        key: of the state, see `_jetson_board.Board.key`.
        boot_file: file on the board that holds its boot id.
        boot_id: what it held when the board was opened.
        cap_mib: of graphs and engines together.
        free_mib: that must stay free on the board's disk.
    """

    def __init__(
        self, ssh: _ssh.Ssh, *, root: str, key: str, boot_file: str, boot_id: str, cap_mib: int, free_mib: int
    ) -> None:
        self.ssh, self.key = ssh, key
        self._root, self._boot_file, self._boot_id = _ssh.remote_path(root), boot_file, boot_id
        self._cap_mib, self._free_mib = cap_mib, free_mib
        self._graphs: set[str] = set()
        self._kept = 0

    @property
    def timing_cache(self) -> str:
        """Return where the builder's cache for this state is."""
        return f"{self._root}/timing/{self.key}.cache"

    def make(self) -> None:
        """Make the folders and sweep what others left behind more than a day ago, even what is not provably dead.

        Raises:
            DeviceLost: if they cannot be made.
        """
        done = self._do(_MAKE, self._root, self.key)
        if done.rc != 0:
            raise DeviceLost(f"{self.ssh.name}: {self._root} cannot be made", why=done.said)

    def sweep(self) -> None:
        """Remove what dead jobs left, whenever they died; whoever calls it holds the board's lock."""
        self._do(_SWEEP, self._root)

    def _do(self, script: str, *arguments: str, stdin: bytes = b"", limit_s: float = HOUSEKEEPING_S) -> "_ssh.Done":
        return self.ssh.run(["bash", "-c", script, "store", *arguments], limit_s=limit_s, stdin=stdin)

    # -- graphs -----------------------------------------------------------------------------------------------------

    def graph(self, graph: Artifact) -> str:
        """Return the path on the board of a graph, which is uploaded unless it is there.

        Raises:
            StorageFull: if the board's disk has too little room for it and what is built from it.
            DeviceLost: if it cannot be copied.
        """
        path = self._graph_path(graph)
        if graph.sha256 in self._graphs:
            return path
        size = graph.check().path.stat().st_size
        needed, free = 3 * size + (self._free_mib << 20), self.ssh.free_bytes(f"{self._root}/graphs")
        if free < needed:
            self.trim(0)
            free = self.ssh.free_bytes(f"{self._root}/graphs")
        if free < needed:
            raise _ssh.disk_full(self.ssh.name, free, needed)
        self.ssh.put(graph.path, path, limit_s=30 + UPLOAD_S_PER_MIB * size / 2**20)
        self._graphs.add(graph.sha256)
        return path

    def _graph_path(self, graph: Artifact) -> str:
        return f"{self._root}/graphs/{graph.sha256}.onnx"

    # -- engines ----------------------------------------------------------------------------------------------------

    def place(self, graph: Artifact, precision: str, level: int) -> str:
        """Return the path of an engine, without its suffix."""
        return f"{self._root}/engines/{self.key}/{graph.sha256}-{precision}-{level}"

    def find(self, place: str, graph: Artifact) -> Engine | None:
        """Return the engine at a place, None if there is none that is whole."""
        path = self._graph_path(graph)
        done = self._do(_FIND, place, path, self.timing_cache)
        first, _, rest = done.stdout.partition("\n")
        if done.rc == 0:
            return _engine(f"{place}.engine", first[:64], rest)
        if first.split()[:1] == [graph.sha256]:
            self._graphs.add(graph.sha256)
        return None

    def keep(self, place: str, facts: Mapping[str, Any]) -> Engine:
        """Return the engine that was just built and moved to its place, and note what is known about it.

        Raises:
            DeviceLost: if it was not kept.
        """
        told = json.dumps(facts)
        found = _engine(f"{place}.engine", str(facts["sha256"]), told)
        noted = self._do('cat > "$1.part" && mv -f -- "$1.part" "$1"', f"{place}.json", stdin=told.encode())
        if noted.rc != 0 or found is None:
            raise DeviceLost(f"{self.ssh.name}: an engine could not be kept", why=noted.said)
        self._kept += 1
        if self._kept % TRIM_EVERY == 0:
            self.trim()
        return found

    def drop(self, engine: Engine) -> None:
        """Remove an engine that cannot be loaded any more."""
        self._do('rm -f -- "$1"', engine.path)

    def drop_timing_cache(self) -> None:
        """Remove a timing cache that the builder refuses, and the one before it."""
        self._do('rm -f -- "$1" "$1.prev" "$1.lock"', self.timing_cache)

    def trim(self, cap_mib: int | None = None) -> None:
        """Remove what was not used for longest until graphs and engines fit under the cap."""
        self._do(_TRIM, self._root, str(1024 * (self._cap_mib if cap_mib is None else cap_mib)))
        self._graphs.clear()

    # -- jobs -------------------------------------------------------------------------------------------------------

    @contextmanager
    def job(self) -> Iterator[str]:
        """Yield a new folder on the board, which is removed afterwards."""
        folder = self._new_folder()
        if (done := self._do('mkdir -- "$1"', folder)).rc != 0:
            raise DeviceLost(f"{self.ssh.name}: {folder} cannot be made", why=done.said)
        try:
            yield folder
        finally:
            with suppress(DeviceLost):  # what a lost board keeps is swept when it is opened again
                self._do('rm -rf -- "$1"', folder)

    def _new_folder(self) -> str:
        return f"{self._root}/jobs/{secrets.token_hex(8)}"

    def run(
        self,
        argv: Sequence[str],
        *,
        limit_s: float,
        files: Sequence[str] = (),
        job: str | None = None,
        place: str = "",
    ) -> Ran:
        """Return how a command ended that ran in a job's folder, or in one of its own.

        Args:
            limit_s: seconds it may take.
            files: names of small files it writes there.
            job: folder to use and to keep; None: one that is gone afterwards.
            place: of the engine that it makes, as engine.part, or uses.

        Raises:
            DeviceLost: if the connection breaks or the board was started anew meanwhile.
        """
        marker = f"EDGEPRUNE_PART_{secrets.token_hex(8)}"
        folder, keep = job or self._new_folder(), "yes" if job else "no"
        settings = [self._boot_file, marker, str(LOG_CAP), keep, place, str(len(files))]
        words = ["bash", "-c", _RUN, "run", folder, *settings, *files, *argv]
        done = self.ssh.run(words, limit_s=limit_s, cap=FILES_CAP)
        first, *parts = done.stdout.split(f"\n{marker}\n")
        if len(parts) != len(files) + 3:
            raise DeviceLost(f"{self.ssh.name}: a job answered in another form", why=done.said)
        for each in (first, parts[-1]):
            if each.strip() != self._boot_id:
                raise DeviceLost(
                    f"{self.ssh.name} was started anew in the middle of a job",
                    why="its boot id has changed",
                    next_step="see why it restarts (power supply, heat), then run the command again",
                )
        found = dict(zip(files, parts[1:-2], strict=True))
        log = _trtexec_log.log_from_text(parts[0])
        return Ran(rc=done.rc, log=log, files=found, engine_sha256=parts[-2].strip())


def _engine(path: str, sha256: str, text: str) -> Engine | None:
    """Return the engine that a board's file describes, None if it does not describe the one that lies there."""
    try:
        facts = json.loads(text)
        if facts["sha256"] != sha256 or len(sha256) != 64:
            return None
        return Engine(
            path=_ssh.remote_path(path),
            graph_sha256=str(facts["graph_sha256"])[:64],
            sha256=sha256,
            level=int(facts["level"]),
            precisions={_words(name)[:8]: int(count) for name, count in dict(facts["precisions"]).items()},
            built_s=None if facts["built_s"] is None else _seconds(facts["built_s"]),
            warnings=tuple(_words(each) for each in list(facts["warnings"])[:20]),
            command=tuple(_words(each) for each in list(facts["command"])[:60]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _words(value: object) -> str:
    """Return text of a board's file for people: JSON may spell escape codes that the file itself does not hold."""
    return _ssh.plain(str(value))[:300]


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError("no number of seconds")
    return seconds
