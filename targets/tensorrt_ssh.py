"""A Jetson at the other end of ssh, driven through the `trtexec` that its JetPack brings; nothing is installed on it.

    # profiles/jetson-orin-nano.toml, and in edgeprune.toml: [targets.jetson] address = "ssh://me@orin.local"
    adapter = "tensorrt_ssh"
    precision = "fp16"      # written into the graph: "fp32", "fp16" or "int8"; inputs and outputs stay float32
    power_mode = "MAXN"     # that the board must be in; nothing: as found. It is never changed from here
    cooldown_c = 55.0       # measure only below this temperature
    memory_mib = 2048       # workspace of the builder
    [options]
    builder_level = 3       # of the builder's search for the baseline and the result, TensorRT 8.6 and later
    builder_level_search = 3  # of the same for candidates
    run_s = 2               # seconds of one timed run, at least; two engines, two runs a session
    warm_up_ms = 2000       # before it: clocks take longer to rise than trtexec's own 200 ms
    iterations = 100        # calls of one timed run, at least
    pin_clocks = false      # run jetson_clocks meanwhile, where sudo needs no password; put back afterwards
    energy_s = 6            # seconds under load of the energy pass of baseline and result; 0: none
    idle_s = 3              # seconds without load before it
    trtexec = ""            # path of it, if it is neither in PATH nor in /usr/src/tensorrt/bin
    lock = ""               # file that every user of the board locks, if not /run/lock/edgeprune.lock

The number is a ratio to the sentinel. Each session is one fresh process for each of the two engines, in random order,
on one board that is locked for us. A sample is the time of one call on the GPU between two CUDA events, with CUDA
graphs and spin wait on and data transfers off, whatever the version's own default. What is compiled is the typed graph;
the engine stays on the board, where it is kept by what it was made from and for, and is built again when it is gone.
"""

import getpass
import math
import os
import random
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.artifact import Artifact
from edgeprune.errors import CompileError, DeviceBusy, DeviceLost, EdgepruneError, ProfileError, StorageFull, Unstable
from edgeprune.measurement import Calls, Measurement, Sampling, Session
from edgeprune.profile import Profile
from edgeprune.scratch import Scratch
from edgeprune.target import Finding, Selftest, Target

from . import (  # noqa: TID251 private parts of this adapter
    _jetson_board,
    _jetson_bundle,
    _jetson_doctor,
    _jetson_energy,
    _jetson_options,
    _jetson_stats,
    _jetson_store,
    _ssh,
    _trtexec,
    _trtexec_log,
    _yardstick,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

CALLS_KEPT = 400
"""Samples of one run that are kept, evenly over it; a fast engine makes thousands, and as many tell no more."""

PROFILE_CALLS = 50
STEP_NOTED = 0.005
"""Resolution of the clock, as a share of the latency, from which it is worth a note."""

OUTPUT_CAP = 256 << 20
COOL_POLL_S, COOL_LIMIT_S = 10.0, 600.0
TYPED_CAP_MIB, TYPED_KEPT = 1024, 8
"""Typed graphs kept on this machine while a board is open: as many MiB, but never fewer than so many files."""

TEGRASTATS_MS, ENERGY_MS = 1000, 100
"""Between two lines of tegrastats while timing, and in the energy pass; it takes CPU time itself."""

GPU_BUSY = 5.0
"""Percent of GPU load without our doing from which the board is not alone."""

BUSY_LOOKS, BUSY_POLL_S = 4, 0.5


@contextmanager
def connect(profile: Profile) -> Iterator[Target]:
    """Yield the board, locked; the lock and every job on it end with the context, or with this process.

    Raises:
        ProfileError: if there is no address, an option is wrong, the board lets nobody in or has no known trtexec.
        DeviceLost: if it cannot be reached.
        DeviceBusy: if somebody else has locked it.
    """
    target = TensorrtSsh(profile)
    try:
        target.start()
        yield target
    finally:
        target.close()


@dataclass(frozen=True, kw_only=True)
class _Open:
    """An open board: its connection, its lock, what was found there, and our files."""

    ssh: _ssh.Ssh
    lease: _ssh.Job
    board: _jetson_board.Board
    tool: _trtexec.Trtexec
    store: _jetson_store.Store
    pinned_by_us: bool
    engines: dict[tuple[str, int], _jetson_store.Engine]


class TensorrtSsh:
    """One Jetson; a connection that is lost is made anew on the next call."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._options = _jetson_options.options_of(profile)
        self._address = _jetson_options.address_of(profile)
        self._open: _Open | None = None
        self._folder: Scratch | None = None
        self._typed: dict[str, Artifact] = {}
        self._yardstick = _yardstick.Yardstick(float(self._options["slow_limit"]))

    @property
    def profile(self) -> Profile:
        """Return the profile it was opened with."""
        return self._profile

    def start(self) -> None:
        """Connect, look at the board and lock it, unless that is done.

        Raises:
            ProfileError, DeviceLost, DeviceBusy: see `connect`.
        """
        held = self._open
        if held is not None and held.ssh.alive and held.lease.alive:
            return
        self._leave()
        ssh = _ssh.Ssh(self._address, _jetson_options.ssh_files(self._options))
        try:
            ssh.open()
            self._open = self._take(ssh)
        except BaseException:
            ssh.close()
            raise

    def _take(self, ssh: _ssh.Ssh) -> _Open:
        board = self._look(ssh)
        tool = _jetson_board.tool_of(ssh, board, self._options["trtexec"])
        _jetson_board.insist_on_mode(self._profile, board, ssh.name)
        board = self._idle(ssh, board)
        store = _jetson_store.Store(
            ssh,
            root=board.cache,
            key=board.key(str(tool.version)),
            boot_file=f"{self._options['sysroot']}/proc/sys/kernel/random/boot_id",
            boot_id=board.boot_id,
            cap_mib=int(self._options["store_mib"]),
            free_mib=int(self._options["free_mib"]),
        )
        store.make()
        store.trim()
        lease, pinned = _jetson_board.take_lock(
            ssh,
            _jetson_options.lock_file(self._options),
            holder=_holder(),
            pin_clocks=bool(self._options["pin_clocks"]),
            store=f"{board.cache}/clocks",
        )
        store.sweep()
        return _Open(ssh=ssh, lease=lease, board=board, tool=tool, store=store, pinned_by_us=pinned, engines={})

    def _look(self, ssh: _ssh.Ssh) -> _jetson_board.Board:
        return _jetson_board.look(ssh, sysroot=self._options["sysroot"], trtexec=self._options["trtexec"])

    def _idle(self, ssh: _ssh.Ssh, board: _jetson_board.Board) -> _jetson_board.Board:
        """Return the board once its GPU rests; a desktop makes peaks, so a few looks decide.

        Raises:
            DeviceBusy: if it does not.
        """
        for _ in range(BUSY_LOOKS):
            if board.gpu_load is None or board.gpu_load <= GPU_BUSY:
                return board
            time.sleep(BUSY_POLL_S)
            board = self._look(ssh)
        raise DeviceBusy(
            f"the GPU of {ssh.name} is {board.gpu_load:g} % busy without our doing",
            why="somebody uses it without its lock",
            next_step=f"see who: ssh {self._address.login} sudo fuser -v /dev/nvhost-gpu",
        )

    def _leave(self) -> None:
        held, self._open = self._open, None
        if held is not None:
            held.ssh.close()

    def close(self) -> None:
        """Give the board back and remove what was kept here."""
        self._leave()
        if self._folder is not None:
            self._folder.close()
            self._folder = None
        self._typed.clear()

    @contextmanager
    def _on_board(self, doing: str) -> Iterator[_Open]:
        """Yield the open board; one that is lost, or that we lost the lock of, is left."""
        self.start()
        assert self._open is not None
        held = self._open
        try:
            yield held
            if not held.lease.alive:
                raise DeviceLost(
                    f"the lock of {held.ssh.name} was lost while {doing}",
                    why=held.lease.client_words,
                    next_step="run the command again; it is locked anew by itself",
                )
        except (DeviceLost, KeyboardInterrupt):
            self._leave()
            raise

    # -- compile ----------------------------------------------------------------------------------------------------

    def compile(self, graph: Artifact) -> Artifact:
        """Return the graph in the profile's precision, once the board has built an engine from it.

        Raises:
            CompileError: if TensorRT refuses it, or builds an engine of another precision.
            DeviceLost, StorageFull: if the board fails.
        """
        typed = self._typed_graph(graph.check())
        with self._on_board(f"building {graph.path.name}") as held:
            self._engine(held, typed, int(self._options["builder_level_search"]))
        return typed

    def _typed_graph(self, graph: Artifact) -> Artifact:
        known = self._typed.pop(graph.sha256, None)
        if known is None or not known.path.is_file():
            known = _typed(graph, self._profile.precision, self._own_folder)
        self._typed[graph.sha256] = known  # the last is the one used last
        self._forget_old()
        return known

    def _used(self, *typed: Artifact) -> None:
        """Note that these typed graphs are in use; the sentinel is, in every measurement."""
        for source, each in list(self._typed.items()):
            if each in typed:
                self._typed[source] = self._typed.pop(source)

    def _own_folder(self) -> Path:
        if self._folder is None:
            self._folder = Scratch("typed")
        return self._folder.path

    def _forget_old(self) -> None:
        """Remove typed graphs that were not asked for in a long time; one that is asked for again is made again."""
        mine = [each for each in self._typed.items() if self._folder and self._folder.path in each[1].path.parents]
        total = sum(each.path.stat().st_size for _, each in mine)
        while len(mine) > TYPED_KEPT and total > TYPED_CAP_MIB << 20:
            source, oldest = mine.pop(0)
            total -= oldest.path.stat().st_size
            shutil.rmtree(oldest.path.parent, ignore_errors=True)
            del self._typed[source]

    def _engine(self, held: _Open, graph: Artifact, level: int) -> _jetson_store.Engine:
        """Return the engine of a typed graph: the one on the board, or a new one."""
        known = held.engines.get((graph.sha256, level))
        if known is None:
            place = held.store.place(graph, self._profile.precision, level)
            known = held.store.find(place, graph) or self._build(held, graph.check(), level, place)
            held.engines[graph.sha256, level] = known
        return known

    def _build(self, held: _Open, graph: Artifact, level: int, place: str) -> _jetson_store.Engine:
        self._insist_on_memory(held, graph)
        path = held.store.graph(graph)
        command = self._build_command(held, path, level)
        limit_s = float(self._options["build_limit_s"])
        for attempt in (1, 2):
            ran = held.store.run(command, limit_s=limit_s, files=["layers.json"], place=place)
            failure = _trtexec_log.failure_of(ran.rc, ran.log)
            if failure is None:
                return self._kept(held, place, graph, level, ran, command)
            if failure.kind != "cache" or attempt == 2:
                raise self._failed(held, failure, f"building {graph.path.name}")
            held.store.drop_timing_cache()
        raise AssertionError("the second attempt returns or raises")

    def _build_command(self, held: _Open, path: str, level: int) -> list[str]:
        return held.tool.build(
            onnx=path,
            engine="engine.part",
            timing_cache=held.store.timing_cache,
            layer_info="layers.json",
            precision=self._profile.precision,
            workspace_mib=self._profile.memory_mib or _trtexec.WORKSPACE_MIB,
            level=level,
        )

    def _kept(
        self,
        held: _Open,
        place: str,
        graph: Artifact,
        level: int,
        ran: _jetson_store.Ran,
        command: Sequence[str],
    ) -> _jetson_store.Engine:
        precisions = _trtexec_log.precisions_from_layer_info(ran.files["layers.json"])
        wanted = self._profile.precision
        if held.tool.typed_by_graph and wanted != "fp32" and precisions and not precisions.get(wanted):
            raise CompileError(
                f"the engine of {graph.path.name} runs in {', '.join(precisions)} and {wanted} was asked for",
                why=f"TensorRT {held.tool.version} on {held.ssh.name} did not keep the types of the graph",
                next_step='set precision = "fp32" for this target, or report the graph',
            )
        facts = {
            "graph_sha256": graph.sha256,
            "sha256": ran.engine_sha256,
            "level": level,
            "precisions": precisions,
            "built_s": ran.log.built_s,
            "warnings": list(ran.log.warnings),
            "command": list(command),
        }
        return held.store.keep(place, facts)

    def _insist_on_memory(self, held: _Open, graph: Artifact) -> None:
        free, needed = held.board.memory_mib, int(self._options["memory_needed_mib"])
        if free is not None and free < needed:
            raise DeviceLost(
                f"{held.ssh.name} has {free} MiB of memory left, {needed} are needed to build {graph.path.name}",
                why="CPU and GPU share it; swap does not help the GPU",
                next_step=f"end what else runs there, the desktop first: ssh {self._address.login} "
                "sudo systemctl isolate multi-user.target",
            )

    def _failed(self, held: _Open, failure: _trtexec_log.Failure, doing: str) -> EdgepruneError:
        """Return the error of a run of trtexec that failed, by whose turn it is."""
        name, version = held.ssh.name, held.tool.version
        if failure.kind == "graph":
            return CompileError(f"TensorRT {version} on {name} failed at {doing}", why=failure.why)
        if failure.kind == "option":
            return ProfileError(
                f"trtexec {version} on {name} took another meaning from its command",
                why=failure.why,
                next_step='name another trtexec of the board in the target\'s options: trtexec = "/path/to/trtexec"',
            )
        if failure.kind == "disk":
            return StorageFull(f"the disk of {name} is full", why=failure.why, next_step="free some, then run again")
        mend = {
            "memory": "end what else uses its memory, or lower memory_mib of the target, then run the command again",
            "device": f"see what the GPU says: ssh {self._address.login} sudo dmesg | tail; a restart often helps",
        }
        return DeviceLost(
            f"{name} failed while {doing}",
            why=failure.why,
            next_step=mend.get(failure.kind, "run the command again"),
        )

    # -- measure ----------------------------------------------------------------------------------------------------

    def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
        """Return the timing of `engine` against `sampling.reference`.

        A session takes two processes of about five seconds each, so a measurement of two sessions takes twenty.

        Raises:
            Unstable: if the board throttled, or the sentinel was slower than `slow_limit` times what it was before.
        """
        with self._on_board(f"timing {engine.path.name}") as held:
            started = time.monotonic()
            self._used(engine, sampling.reference)
            before = self._cooled(held)
            level = int(self._options["builder_level" if sampling.layers else "builder_level_search"])
            engines = [self._engine(held, each, level) for each in (engine, sampling.reference)]
            with _watching(held) as readings:
                timed = self._sessions(held, (engine, sampling.reference), level, sampling)
            layers = self._layers(held, engine, engines[0]) if sampling.layers else {}
            energy = self._energy(held, engines[0]) if sampling.layers else None
            after = self._look(held.ssh)
            _insist_on_same_boot(before, after, held.ssh.name)
            seen = Measurement(
                profile_digest=self._profile.digest,
                artifact_sha256=engine.sha256,
                reference_sha256=sampling.reference.sha256,
                sessions=tuple(_session(*each) for each in timed),
                conditions=self._facts(held, before, after, engines, readings(), energy),
                taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=time.monotonic() - started,
                layers=layers,
            )
        return self._judged(seen, before, after, engines, timed)

    def _judged(
        self,
        seen: Measurement,
        before: _jetson_board.Board,
        after: _jetson_board.Board,
        engines: Sequence[_jetson_store.Engine],
        timed: "Sequence[tuple[_Timed, _Timed]]",
    ) -> Measurement:
        flags = [*_changes(before, after), *_other_precision(engines[0], self._profile.precision)]
        flags += self._yardstick.compare(seen.reference_sha256, seen.reference_latency().p50)
        notes = _notes(after, [each for pair in timed for each in pair])
        return replace(seen, flags=(*flags, *seen.unsteady()), conditions={**seen.conditions, "notes": notes})

    def _cooled(self, held: _Open) -> _jetson_board.Board:
        """Return the board once it is as cool as the profile wants it."""
        board, end = self._look(held.ssh), time.monotonic() + float(self._options["cooldown_limit_s"])
        _insist_on_same_boot(held.board, board, held.ssh.name)
        _jetson_board.insist_on_mode(self._profile, board, held.ssh.name)
        wanted = self._profile.cooldown_c
        while wanted is not None and board.temperatures_c and max(board.temperatures_c.values()) > wanted:
            if time.monotonic() > end:
                raise Unstable(
                    f"{held.ssh.name} does not cool down to {wanted:g} °C",
                    why=f"its hottest sensor reads {max(board.temperatures_c.values()):g} °C",
                    next_step="give it a fan, or raise cooldown_c of the target",
                )
            time.sleep(min(COOL_POLL_S, max(0.0, end - time.monotonic())))
            board = self._look(held.ssh)
        return board

    def _sessions(
        self, held: _Open, pair: tuple[Artifact, Artifact], level: int, sampling: Sampling
    ) -> "list[tuple[_Timed, _Timed]]":
        timed: list[tuple[_Timed, _Timed]] = []
        sessions: list[Session] = []
        while not sampling.enough(sessions):  # a session is as long as two processes take to start; that is no load
            found: dict[int, _Timed] = {}
            for which in random.Random(f"{sampling.seed} {len(sessions)}").sample((0, 1), 2):  # noqa: S311
                found[which] = self._time(held, pair[which], level, sampling)
            timed.append((found[0], found[1]))
            sessions.append(_session(*timed[-1]))
        return timed

    def _time(self, held: _Open, graph: Artifact, level: int, sampling: Sampling) -> "_Timed":
        """Return the calls of one fresh process."""
        run_s = max(math.ceil(sampling.session_ms / 1000), int(self._options["run_s"]))
        warm_up_ms = int(self._options["warm_up_ms"])

        def command(engine: _jetson_store.Engine) -> list[str]:
            return held.tool.time(
                engine=engine.path,
                times="times.json",
                warm_up_ms=warm_up_ms,
                duration_s=run_s,
                iterations=int(self._options["iterations"]),
            )

        limit_s = run_s + warm_up_ms / 1000 + float(self._options["time_limit_s"])
        ran = self._run_engine(held, graph, level, command, f"timing {graph.path.name}", limit_s, ["times.json"])
        times = _read(held, _trtexec_log.times_from_json, ran.files["times.json"])
        return _Timed(times=times, warnings=ran.log.warnings)

    def _run_engine(
        self,
        held: _Open,
        graph: Artifact,
        level: int,
        command: Callable[[_jetson_store.Engine], list[str]],
        doing: str,
        limit_s: float,
        files: Sequence[str],
    ) -> _jetson_store.Ran:
        """Return one successful run of an engine, built anew if the board cannot load the one it has."""
        for attempt in (1, 2):
            engine = self._engine(held, graph, level)
            place = engine.path.removesuffix(".engine")
            ran = held.store.run(command(engine), limit_s=limit_s, files=files, place=place)
            failure = _trtexec_log.failure_of(ran.rc, ran.log)
            if failure is None:
                return ran
            if failure.kind != "stale" or attempt == 2:
                raise self._failed(held, failure, doing)
            held.store.drop(engine)
            del held.engines[graph.sha256, level]
        raise AssertionError("the second attempt returns or raises")

    def _layers(self, held: _Open, graph: Artifact, engine: _jetson_store.Engine) -> dict[str, float]:
        import onnx

        def command(engine: _jetson_store.Engine) -> list[str]:
            warm_up_ms = int(self._options["warm_up_ms"])
            return held.tool.profile(
                engine=engine.path, profile="profile.json", warm_up_ms=warm_up_ms, iterations=PROFILE_CALLS
            )

        limit_s = float(self._options["time_limit_s"]) + 60
        doing = f"profiling {graph.path.name}"
        ran = self._run_engine(held, graph, engine.level, command, doing, limit_s, ["profile.json"])
        by_layer = _read(held, _trtexec_log.layer_times_from_json, ran.files["profile.json"])
        nodes = onnx.load(str(graph.path), load_external_data=False).graph.node
        names = [node.name or f"{node.op_type}_{place}" for place, node in enumerate(nodes)]
        found = _trtexec_log.layers_by_graph_node(by_layer, names)
        return {name: spent * 1e6 for name, spent in found.items() if spent > 0}

    def _energy(self, held: _Open, engine: _jetson_store.Engine) -> _jetson_stats.Energy | None:
        """Return the energy of one inference, None where the board shows no rails."""
        busy_s, idle_s = float(self._options["energy_s"]), float(self._options["idle_s"])
        if not busy_s or "tegrastats" not in held.board.tools:
            return None
        warm_up_ms = int(self._options["warm_up_ms"])
        command = held.tool.time(
            engine=engine.path, times="times.json", warm_up_ms=warm_up_ms, duration_s=math.ceil(busy_s), iterations=10
        )
        limit_s = busy_s + idle_s + warm_up_ms / 1000 + float(self._options["time_limit_s"])
        with held.store.job() as job:
            words = ["bash", "-c", _jetson_energy.ENERGY_SCRIPT, "energy", job, f"{idle_s:g}", str(ENERGY_MS), *command]
            done = held.ssh.run(words, limit_s=limit_s)
        return _jetson_energy.energy_from_text(done.stdout, idle_s=idle_s, warm_up_s=warm_up_ms / 1000)

    def _facts(
        self,
        held: _Open,
        before: _jetson_board.Board,
        after: _jetson_board.Board,
        engines: Sequence[_jetson_store.Engine],
        readings: Sequence[_jetson_stats.Reading],
        energy: _jetson_stats.Energy | None,
    ) -> dict[str, Any]:
        board = held.board
        return {
            "cpu_model": f"{board.model or board.machine or 'unknown'}, {before.power_mode or 'unknown power mode'}",
            "board": held.ssh.name,
            "tensorrt": str(held.tool.version),
            "l4t": board.l4t,
            "cuda": board.cuda,
            "kernel": board.kernel,
            "power_mode": before.power_mode,
            "clocks": _clocks(before, held.pinned_by_us),
            "precision": self._profile.precision,
            "engine": engines[0].to_json(),
            "reference_engine": engines[1].to_json(),
            "timed": "GPU time of one call; CUDA graph and spin wait on, data transfers off",
            "warm_up_ms": self._options["warm_up_ms"],
            "before": before.conditions(),
            "after": after.conditions(),
            "tegrastats": _jetson_stats.summary(readings),
            "energy": None if energy is None else asdict(energy),
        }

    # -- run --------------------------------------------------------------------------------------------------------

    def run(self, engine: Artifact, inputs: "Mapping[str, NDArray[Any]]") -> "Mapping[str, NDArray[Any]]":
        """Return the outputs of one call on the board, by name."""
        _insist_on_inputs(engine, inputs)
        outputs = _output_names(engine)
        with self._on_board(f"running {engine.path.name}") as held, Scratch("run") as folder:
            level = int(self._options["builder_level_search"])
            here = self._engine(held, engine, level)
            with held.store.job() as job:
                for place, value in enumerate(inputs.values()):
                    raw = folder / f"in{place}.bin"
                    raw.write_bytes(_raw(value, held.tool.version.major))
                    held.ssh.put(raw, f"{job}/in{place}.bin", limit_s=120)
                given = {name: f"in{place}.bin" for place, name in enumerate(inputs)}
                command = held.tool.answer(engine=here.path, inputs=given, outputs="out.json")
                files = [] if held.tool.writes_raw_outputs else ["out.json"]
                limit_s = float(self._options["time_limit_s"]) + 60
                ran = held.store.run(command, limit_s=limit_s, files=files, job=job)
                failure = _trtexec_log.failure_of(ran.rc, ran.log)
                if failure is not None:
                    raise self._failed(held, failure, f"running {engine.path.name}")
                if files:
                    found = _read(held, _trtexec_log.outputs_from_json, ran.files["out.json"])
                else:
                    found = self._raw_outputs(held, job, folder)
        return _by_name(found, outputs, held.ssh.name)

    def _raw_outputs(self, held: _Open, job: str, folder: Path) -> "dict[str, NDArray[Any]]":
        import numpy as np

        done = held.ssh.run(["bash", "-c", 'cd -- "$1" && ls -1 -- *.output.*raw', "list", job], limit_s=30)
        found = {}
        for place, file in enumerate(done.stdout.split("\n")[:64]):
            if not file:
                continue
            name, dtype, shape = _read(held, _trtexec_log.output_from_raw_name, file)
            there = f"{job}/out{place}.raw"
            held.ssh.run(["mv", "--", f"{job}/{file}", there], limit_s=30)  # a name that sftp does not expand
            here = folder / f"out{place}.raw"
            held.ssh.get(there, here, cap=OUTPUT_CAP, limit_s=120)
            content, wanted = here.read_bytes(), math.prod(shape) * np.dtype(dtype).itemsize
            if len(content) != wanted:
                raise DeviceLost(f"{held.ssh.name}: output {name!r} has {len(content)} bytes, {wanted} were announced")
            found[name] = np.frombuffer(content, dtype).reshape(shape)
        return found

    # -- package ----------------------------------------------------------------------------------------------------

    def package(self, engine: Artifact) -> Mapping[str, Path]:
        """Return what runs `engine` on a board like this one without edgeprune: name below ``device/`` → file."""
        folder = self._own_folder() / f"package-{secrets.token_hex(8)}"
        folder.mkdir()
        with self._on_board(f"packaging {engine.path.name}") as held:
            here = self._engine(held, engine, int(self._options["builder_level"]))
            facts = {
                "key": held.board.engine_key(str(held.tool.version)),
                "precision": self._profile.precision,
                "workspace_mib": self._profile.memory_mib or _trtexec.WORKSPACE_MIB,
                "tensorrt": str(held.tool.version),
            }
            return _jetson_bundle.contents(held.store, here, engine, folder, facts)

    def selftest(self, bundle: Path, model: Artifact, *, trusted: bool) -> Selftest:
        """Return what the bundle's runner says when it checks itself on the board."""
        with self._on_board(f"checking {model.path.name}") as held:
            arguments = [f"--trtexec={held.tool.path}", f"--sysroot={self._options['sysroot']}"]
            limit_s = float(self._options["build_limit_s"]) + 10 * float(self._options["time_limit_s"])
            return _jetson_bundle.selftest(held.store, bundle, trusted=trusted, arguments=arguments, limit_s=limit_s)


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """One timed process."""

    times: _trtexec_log.CallTimes
    warnings: tuple[str, ...]

    def calls(self) -> Calls:
        """Return an even selection of its calls; a call of the GPU has no CPU time and is never preempted."""
        compute = self.times.compute_ms
        count = min(len(compute), CALLS_KEPT)
        chosen = tuple(max(1, round(compute[place * len(compute) // count] * 1e6)) for place in range(count))
        return Calls(elapsed=chosen, on_cpu=chosen, preempted=(0,) * count)


def _session(candidate: _Timed, reference: _Timed) -> Session:
    return Session(candidate=candidate.calls(), reference=reference.calls(), single_threaded=False)


@contextmanager
def _watching(held: _Open) -> Iterator[Callable[[], list[_jetson_stats.Reading]]]:
    """Yield what returns the readings of tegrastats meanwhile; none where the board has no tegrastats."""
    if "tegrastats" not in held.board.tools:
        yield list
        return
    job = held.ssh.start(["tegrastats", "--interval", str(TEGRASTATS_MS)])
    try:
        yield lambda: _jetson_stats.readings_from_text(job.stdout)
    finally:
        job.close()


def _changes(before: _jetson_board.Board, after: _jetson_board.Board) -> list[str]:
    """Return what changed on the board that makes timings suspect, one sentence each.

    Raises:
        Unstable: if it was throttled for lack of voltage or for too much current.
    """
    events = {each: after.throttled[each] - before.throttled.get(each, 0) for each in after.throttled}
    if events.get("oc1", 0) > 0 or events.get("oc2", 0) > 0:
        raise Unstable(
            "the board was throttled while measuring",
            why=f"{events.get('oc1', 0)} events of low voltage and {events.get('oc2', 0)} of high current",
            next_step="give it a stronger power supply or a smaller power mode, then run the command again",
        )
    flags = []
    if before.power_mode != after.power_mode:
        flags.append(f"the power mode changed from {before.power_mode} to {after.power_mode} while measuring")
    if before.gpu_mhz and after.gpu_mhz and before.gpu_mhz[1:] != after.gpu_mhz[1:]:
        flags.append(f"the GPU's clock limits changed from {before.gpu_mhz[1:]} to {after.gpu_mhz[1:]} MHz")
    if events.get("oc3", 0) > 0:
        flags.append(f"short current peaks throttled the board {events['oc3']} times while measuring")
    return flags


def _other_precision(engine: _jetson_store.Engine, wanted: str) -> list[str]:
    if wanted == "fp32" or not engine.precisions or engine.precisions.get(wanted):
        return []
    return [f"the engine runs in {', '.join(engine.precisions)} although {wanted} was permitted"]


def _notes(after: _jetson_board.Board, timed: Sequence[_Timed]) -> list[str]:
    """Return what is worth knowing but spoils nothing."""
    notes = list(dict.fromkeys(warning for each in timed for warning in each.warnings))[:5]
    coarse = max(each.times.step_ms / sorted(each.times.compute_ms)[len(each.times.compute_ms) // 2] for each in timed)
    if coarse > STEP_NOTED:
        notes.append(f"the clock of a run this long has steps of {coarse:.1%} of a call")
    if after.clocks_pinned is False:
        notes.append("the clocks were not pinned; sudo jetson_clocks on the board pins them")
    return notes


def _clocks(board: _jetson_board.Board, by_us: bool) -> str:
    if by_us:
        return "pinned for this measurement"
    return {True: "pinned", False: "free", None: "unknown"}[board.clocks_pinned]


def _insist_on_same_boot(before: _jetson_board.Board, after: _jetson_board.Board, name: str) -> None:
    if before.boot_id != after.boot_id:
        raise DeviceLost(
            f"{name} was started anew meanwhile",
            why="its boot id has changed",
            next_step="see why it restarts (power supply, heat), then run the command again",
        )


def _read(held: _Open, reader: Callable[[str], Any], text: str) -> Any:
    """Return what a reader makes of what the board wrote; what no known version writes is the board's fault."""
    try:
        return reader(text)
    except _trtexec_log.Unreadable as error:
        raise DeviceLost(
            f"{held.ssh.name}: trtexec {held.tool.version} wrote what cannot be read",
            why=str(error),
            next_step="run the command again; if it stays so, report the version",
        ) from error


# -- graphs and arrays ----------------------------------------------------------------------------------------------


def _typed(graph: Artifact, precision: str, folder: Callable[[], Path]) -> Artifact:
    """Return the graph in a precision; one that is typed already, and every graph in fp32, is itself."""
    if precision == "fp32":
        return graph
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from ._typed_onnx import typed  # noqa: TID251 private part of this adapter

    try:
        model = onnx.load(str(graph.path), load_external_data=False)
        if _is_typed(model):
            return graph
        made = typed(model, precision)
    except CompileError as error:
        raise CompileError(f"{graph.path.name}: {error.what}", why=error.why, next_step=error.next_step) from error
    except (DecodeError, RuntimeError, ValueError, LookupError) as error:
        raise CompileError(
            f"{graph.path.name} cannot be written in {precision}",
            why=(str(error) or type(error).__name__).splitlines()[0][:300],
            next_step="export the graph again, all of it in one file",
        ) from error
    place = folder() / graph.sha256[:32]
    place.mkdir(exist_ok=True)
    (place / graph.path.name).write_bytes(made.SerializeToString(deterministic=True))
    return Artifact.of(place / graph.path.name, kind="onnx", inputs=graph.inputs)


def _is_typed(model: Any) -> bool:
    """Return whether a graph says its precision itself: float16 weights, or Q/DQ pairs."""
    half = any(each.data_type == 10 for each in model.graph.initializer)
    return half or any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)


def _insist_on_inputs(engine: Artifact, inputs: "Mapping[str, NDArray[Any]]") -> None:
    wanted = {each.name: (each.shape, each.dtype) for each in engine.inputs}
    given = {name: (tuple(each.shape), each.dtype.name) for name, each in inputs.items()}
    if given != wanted:
        raise CompileError(f"{engine.path.name} does not take these inputs", why=f"it takes {wanted}, not {given}")


def _raw(value: "NDArray[Any]", major: int) -> bytes:
    """Return the bytes of an input as the engine takes them: row by row, and before TensorRT 10 without int64."""
    import numpy as np

    narrow = value.astype(np.int32) if value.dtype == np.int64 and major < 10 else value
    return np.ascontiguousarray(narrow).tobytes()


def _output_names(engine: Artifact) -> list[str]:
    import onnx

    return [each.name for each in onnx.load(str(engine.check().path), load_external_data=False).graph.output]


def _by_name(found: "Mapping[str, NDArray[Any]]", wanted: Sequence[str], board: str) -> "dict[str, NDArray[Any]]":
    """Return the outputs under the names of the graph; in names of files some characters are replaced."""
    safe = {_trtexec_log.safe_file_name(name): each for name, each in found.items()}
    missing = [name for name in wanted if _trtexec_log.safe_file_name(name) not in safe]
    if missing:
        raise DeviceLost(f"{board} did not write output {missing[0]!r}", why=f"it wrote {', '.join(safe) or 'none'}")
    return {name: safe[_trtexec_log.safe_file_name(name)] for name in wanted}


def _holder() -> str:
    """Return who holds a lock, for those who find it held."""
    words = f"{getpass.getuser()} on {socket.gethostname()}, process {os.getpid()}, since "
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return "".join(each for each in words + since if each.isprintable())[:180]


def examine(profile: Profile) -> list[Finding]:
    """Return what is in order and what is missing on the way to the board and on it, holding nothing."""
    return _jetson_doctor.examine(profile)
