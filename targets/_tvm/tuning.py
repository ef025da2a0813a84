"""A measured search among schedules of a kernel: proposed here, timed by whoever holds the board, records on disk.

    kernel ─▶ choices: tiles, order of tiles, unrolling ─▶ MetaSchedule replays `arrange` ─▶ traces, N in all
                                                                │ timed in turn with ours, a batch at a time
    record  FOLDER/k3f2a….json  ◀───────────────────────────────┘
       └── verdict of N trials: the trace that won a fresh comparison with ours, or none

    record  FOLDER/graph-….json     whether all winners together make the network faster; if not, ours stay

The space is our own schedule with other numbers in it (MetaSchedule's `ScheduleFn`), because its rules for CPUs start
from loops that our kernels have already left behind. A schedule only changes in which order a kernel computes, so its
arguments and the rest of the engine stay as they are.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from edgeprune.canonical import digest
from edgeprune.errors import CompileError, StorageFull

from .cache import KernelCache, object_of, write_whole
from .cpus import Cpu
from .engine import Call, Region, Script, Slot, bytes_of, script_of, write_engine
from .program import Kernel, Program
from .schedule import UNROLLED_TAPS, Choice, Order, arrange
from .tensorir import s_tir, tvm
from .tiles import Registers, Tile, cost

BATCH = 8
"""Trials that are timed in turn with ours in one engine."""

FINALISTS = 2
"""The fastest trials are compared with ours once more, because the fastest of many is fast by luck as well."""

ORDERS: tuple[Order, ...] = ("oyx", "yox", "yxo")
WRITTEN_OUT = 1024
"""Most multiply-adds that a kernel is unrolled to: more of them take LLVM seconds, and the CPU's instruction cache."""

LIKELY = 4
"""Power of the inverse of the counted cost by which a choice is drawn: twice the instructions, 16 times as rare."""

NEAR = 4.0
"""A choice that differs little from the best so far is drawn so many times as often."""


# --- records


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One schedule that was tried.

    Attributes:
        trace: JSON of TVM's trace.
        ratio: its time over ours in the same calls; None: it failed, `failed` says how.
    """

    choice: Choice
    trace: str
    ratio: float | None = None
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a search among the first so many trials ended with.

    Attributes:
        trial: place of the one that is faster than ours; None: none is.
        ratio: p50, low and high of each comparison with ours, by the place of the trial.
    """

    trial: int | None
    ratio: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything that was tried of one kernel on one kind of board, oldest first; verdicts by number of trials."""

    trials: tuple[Trial, ...] = ()
    verdicts: Mapping[int, Verdict] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Records:
    """Records in a folder, one file a kernel; a damaged one counts as none.

    Attributes:
        folder: of one kind of board: what is fast on one need not be on another. Made on first use.
    """

    folder: Path

    def read(self, name: str) -> Record:
        """Return what is known of a kernel; its name stands for all that its code depends on."""
        try:
            whole = json.loads(self._path(name).read_bytes())
            facts = whole["record"]
            return _record(facts) if whole["sha256"] == digest(facts) else Record()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return Record()

    def write(self, name: str, record: Record) -> None:
        """Keep a record in place of the one before.

        Raises:
            StorageFull: if it cannot be written.
        """
        facts = _facts(record)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(name), json.dumps({"sha256": digest(facts), "record": facts}).encode())
        except OSError as error:
            raise StorageFull(
                f"the tuning records {str(self.folder)!r} cannot be written",
                why=str(error),
                next_step="free some space",
            ) from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _facts(record: Record) -> dict[str, Any]:
    verdicts = {
        str(trials): {"trial": each.trial, "ratio": {str(place): list(seen) for place, seen in each.ratio.items()}}
        for trials, each in record.verdicts.items()
    }
    return {"trials": [asdict(each) for each in record.trials], "verdicts": verdicts}


def _record(facts: Mapping[str, Any]) -> Record:
    trials = [
        Trial(**{**each, "choice": Choice(**{**each["choice"], "tile": Tile(**each["choice"]["tile"])})})
        for each in facts["trials"]
    ]
    verdicts = {
        int(amount): Verdict(
            trial=each["trial"],
            ratio={int(place): (seen[0], seen[1], seen[2]) for place, seen in each["ratio"].items()},
        )
        for amount, each in facts["verdicts"].items()
    }
    return Record(trials=tuple(trials), verdicts=verdicts)


def graph_record(sha256: str) -> str:
    """Return the name of the record that tells whether a graph is faster with the winners among its kernels."""
    return f"graph-{sha256[:24]}"


def chosen(program: Program, records: Records, trials: int, graph: str) -> Program:
    """Return the program with its winners if the graph was seen to be faster with them, else as it is."""
    verdict = records.read(graph_record(graph)).verdicts.get(trials)
    return tuned(program, records, trials) if verdict and verdict.trial is not None else program


def tuned(program: Program, records: Records, trials: int) -> Program:
    """Return the program with the winner among the first `trials` trials in place of each kernel that has one."""
    kernels, names = {}, {}
    for name, kernel in program.kernels.items():
        record = records.read(name)
        verdict = record.verdicts.get(trials)
        trace = record.trials[verdict.trial].trace if verdict and verdict.trial is not None else ""
        names[name] = tuned_name(name, trace)
        kernels[names[name]] = replace(kernel, trace=trace)
    return replace(
        program, kernels=kernels, steps=tuple(replace(each, kernel=names[each.kernel]) for each in program.steps)
    )


def tuned_name(name: str, trace: str) -> str:
    """Return the name of a kernel with another schedule: its object code is cached beside that of ours."""
    return "k" + hashlib.sha256(f"{name} {trace}".encode()).hexdigest()[:24] if trace else name


# --- the space


def choices(kernel: Kernel, cpu: Cpu) -> list[tuple[Choice, float]]:
    """Return every choice but ours, and how readily it is drawn; none for a kernel without a tile."""
    if kernel.plan.kind == "map":
        return []
    contraction = kernel.plan.kind == "contraction"
    (blocks, rows, width), reduced = _extents(kernel)
    seen, found = {_effect(Choice(tile=kernel.plan.tile), (blocks, rows, width))}, []
    for tile in _tiles(blocks, rows, width, cpu.registers):
        weight = cost(tile, width, cpu.registers) ** -LIKELY if contraction else 1.0
        for unrolled in (False, True) if contraction and _unrollable(tile, reduced) else (False,):
            for order in ORDERS:
                choice = Choice(tile=tile, order=order, unrolled=unrolled)
                effect = _effect(choice, (blocks, rows, width))
                if effect not in seen:
                    seen.add(effect)
                    found.append((choice, weight))
    return found


def _extents(kernel: Kernel) -> tuple[tuple[int, int, int], list[int]]:
    """Return blocks, rows and pixels of the stage `sum`, and its reduction loops."""
    schedule = s_tir.Schedule(tvm.IRModule({"main": kernel.func}))
    loops = schedule.get_loops(schedule.get_sblock("sum"))
    _, blocks, rows, width, _, *reduced = (int(schedule.get(each).extent) for each in loops)
    return (blocks, rows, width), reduced


def _tiles(blocks: int, rows: int, width: int, registers: Registers) -> Iterator[Tile]:
    """Yield the tiles that divide the result and leave registers for what they read."""
    for outer in _divisors(blocks, registers.count // 2):
        for high in _divisors(rows, 8):
            for pixels in _divisors(width, registers.count):
                used = (outer + registers.by_element) * high * pixels + outer + (not registers.by_element)
                if used <= registers.count:
                    yield Tile(blocks=outer, rows=high, pixels=pixels)


def _divisors(size: int, limit: int) -> list[int]:
    return [each for each in range(1, min(size, limit) + 1) if size % each == 0]


def _unrollable(tile: Tile, reduced: Sequence[int]) -> bool:
    """Return whether there is a small reduction loop whose unrolling is not too much."""
    written = tile.blocks * tile.rows * tile.pixels
    for each in reduced[1:]:
        written *= each if each <= UNROLLED_TAPS else 1
    return written <= WRITTEN_OUT and any(1 < each <= UNROLLED_TAPS for each in reduced[1:])


def _effect(choice: Choice, sizes: tuple[int, int, int]) -> tuple[object, ...]:
    """Return what a choice comes to: a loop that runs once may stand anywhere."""
    tile = (choice.tile.blocks, choice.tile.rows, choice.tile.pixels)
    turns = {axis: size // part for axis, size, part in zip("oyx", sizes, tile, strict=True)}
    return (*tile, choice.unrolled, "".join(axis for axis in choice.order if turns[axis] > 1))


def draw(options: Sequence[tuple[Choice, float]], record: Record, wanted: int, seed: str) -> list[Choice]:
    """Return up to `wanted` choices that were not tried yet: likely ones, and ones like the best so far."""
    known = {each.choice for each in record.trials}
    timed = [(each.ratio, each.choice) for each in record.trials if each.ratio is not None]
    best = min(timed, key=lambda each: each[0])[1] if timed else None
    near = {each: NEAR if best and _near(each, best) else 1.0 for each, _ in options}
    left = [(each, weight * near[each]) for each, weight in options if each not in known]
    drawn: list[Choice] = []
    generator = random.Random(seed)  # noqa: S311 - the same search every time, no secret
    while left and len(drawn) < wanted:
        (place,) = generator.choices(range(len(left)), [weight for _, weight in left])
        drawn.append(left.pop(place)[0])
    return drawn


def _near(one: Choice, other: Choice) -> bool:
    parts = [(each.tile.blocks, each.tile.rows, each.tile.pixels, each.order, each.unrolled) for each in (one, other)]
    return [a == b for a, b in zip(*parts, strict=True)].count(False) <= 2


def traces(name: str, kernel: Kernel, cpu: Cpu, drawn: Sequence[Choice]) -> list[str]:
    """Return the schedules of some choices, each as the JSON of its trace.

    MetaSchedule's `TuneContext` would draw them as well, but its constructor imports the intrinsics of every processor
    that TVM knows, which takes half a minute.

    Raises:
        CompileError: if TVM refuses one.
    """

    def space(schedule: Any) -> list[Any]:
        schedules = [schedule.copy() for _ in drawn]
        for each, choice in zip(schedules, drawn, strict=True):
            arrange(each, kernel.plan, cpu, choice)
        return schedules

    generator = s_tir.meta_schedule.space_generator.ScheduleFn(space, sch_rules=[], postprocs=[], mutator_probs={})
    try:
        found = generator.generate_design_space(tvm.IRModule({"main": kernel.func}))
    except (RuntimeError, ValueError, TypeError) as error:
        raise CompileError(f"TVM cannot schedule the kernel {name}", why=str(error).strip().splitlines()[-1]) from error
    return [json.dumps(each.trace.as_json(), default=int) for each in found]  # some numbers are TVM's own


# --- the search


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be done on the board next.

    Attributes:
        kernel: its name.
        engines: to be measured: a batch is one engine, whose layers are ours and "0", "1", ... in the order of
            `choices`; finalists are an engine each, after ours.
        trials: of a batch, waiting for their times; those that cannot be compiled have failed already.
        finalists: places in the record; empty: it is a batch.
        whole: it is the network with all winners, after the one with none.
        done, total: kernels of the network whose search is over, and all of them.
    """

    kernel: str
    engines: tuple[Path, ...]
    trials: tuple[Trial, ...] = ()
    finalists: tuple[int, ...] = ()
    whole: bool = False
    done: float
    total: int


OURS = "ours"
"""Layer of a batch's engine that runs our schedule."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """The search for one network: asks for one task after another, and keeps what it is told in the records.

    Attributes:
        graph: SHA-256 of the network's ONNX file.
        trials: of each kernel.
        kernels: where object code of whole networks is cached.
        folder: engines are written there; each takes the place of the one before.
    """

    program: Program
    cpu: Cpu
    arch: str
    records: Records
    graph: str
    trials: int
    kernels: KernelCache
    folder: Path

    def next_task(self) -> Task | None:
        """Return what is to be measured now, None if every kernel has its verdict."""
        names = [name for name, kernel in self.program.kernels.items() if kernel.plan.kind != "map"]
        waiting = [name for name in names if self.trials not in self.records.read(name).verdicts]
        for name in waiting:
            done = len(names) - len(waiting)
            task = self._task(name, done, len(names))
            if task is not None:
                return task
            waiting = waiting[1:]
        return self._whole(len(names))

    def _whole(self, total: int) -> Task | None:
        """Return the comparison of the network with all winners with the one with none, None if it is known."""
        name = graph_record(self.graph)
        if self.trials in self.records.read(name).verdicts:
            return None
        best = tuned(self.program, self.records, self.trials)
        if best.kernels.keys() == self.program.kernels.keys():
            self._judge(name, Verdict(trial=None))
            return None
        engines = tuple(self._network(each) for each in (self.program, best))
        return Task(kernel=name, engines=engines, finalists=(0,), whole=True, done=total - 0.1, total=total)

    def _network(self, program: Program) -> Path:
        path = self.folder / f"tuning-{digest(sorted(program.kernels))[:16]}.so"
        write_engine(
            path,
            script=script_of(program),
            constants=program.blob(),
            kernels=self.kernels.objects(program, self.cpu),
            arch=self.arch,
        )
        return path

    def _task(self, name: str, done: int, total: int) -> Task | None:
        kernel, record = self.program.kernels[name], self.records.read(name)
        missing = min(BATCH, self.trials - len(record.trials))
        drawn = draw(choices(kernel, self.cpu), record, missing, f"{name} {len(record.trials)}") if missing > 0 else []
        if drawn:
            share = len(record.trials) / self.trials
            trials, engine = self._batch(name, kernel, drawn)
            return Task(kernel=name, engines=(engine,), trials=trials, done=done + share, total=total)
        finalists = self._finalists(record)
        if finalists:
            wanted = ["", *(record.trials[place].trace for place in finalists)]
            engines = tuple(self._engine(kernel, [self._object(name, kernel, trace)]) for trace in wanted)
            return Task(kernel=name, engines=engines, finalists=finalists, done=done + 0.9, total=total)
        self._judge(name, Verdict(trial=None))
        return None

    def _finalists(self, record: Record) -> tuple[int, ...]:
        faster = [(each.ratio, place) for place, each in enumerate(record.trials[: self.trials]) if each.ratio]
        return tuple(place for ratio, place in sorted(faster)[:FINALISTS] if ratio < 1)

    def _batch(self, name: str, kernel: Kernel, drawn: Sequence[Choice]) -> tuple[tuple[Trial, ...], Path]:
        """Return the trials of some choices, and the engine that runs ours and those that could be compiled."""
        trials, objects = [], [self._object(name, kernel, "")]
        for choice, trace in zip(drawn, traces(name, kernel, self.cpu, drawn), strict=True):
            trial = Trial(choice=choice, trace=trace)
            try:
                objects.append(self._object(name, kernel, trace))
            except CompileError as error:
                trial = replace(trial, failed=error.why)
            trials.append(trial)
        return tuple(trials), self._engine(kernel, objects)

    def _object(self, name: str, kernel: Kernel, trace: str) -> tuple[str, bytes]:
        """Return name and object file of a kernel with a trace; it is kept nowhere, because most trials lose."""
        own = tuned_name(name, trace)
        return own, object_of(own, replace(kernel, trace=trace), self.cpu)

    def _engine(self, kernel: Kernel, objects: Sequence[tuple[str, bytes]]) -> Path:
        """Return an engine that calls each object once, the first as ours."""
        names = [name for name, _ in objects]
        path = self.folder / f"tuning-{digest(names)[:16]}.so"
        write_engine(path, script=_alone(kernel, names), constants=b"", kernels=dict(objects), arch=self.arch)
        return path

    def tried(self, task: Task, costs: Mapping[str, float], wrong: Mapping[str, str]) -> None:
        """Keep what a batch took; `costs` and what `wrong` says of answers are by layer, see `Task`."""
        layers = map(str, count())
        told = [each if each.failed else _told(each, next(layers), costs, wrong) for each in task.trials]
        record = self.records.read(task.kernel)
        self.records.write(task.kernel, replace(record, trials=(*record.trials, *told)))

    def judged(self, task: Task, ratios: Sequence[tuple[float, float, float]]) -> None:
        """Keep how the finalists compared with ours: p50, low and high of each ratio."""
        seen = dict(zip(task.finalists, ratios, strict=True))
        faster = [place for place, (_, _, high) in seen.items() if high < 1]
        self._judge(task.kernel, Verdict(trial=min(faster, key=lambda each: seen[each][0], default=None), ratio=seen))

    def _judge(self, name: str, verdict: Verdict) -> None:
        record = self.records.read(name)
        self.records.write(name, replace(record, verdicts={**record.verdicts, self.trials: verdict}))


def _told(trial: Trial, layer: str, costs: Mapping[str, float], wrong: Mapping[str, str]) -> Trial:
    if layer in wrong:
        return replace(trial, failed=wrong[layer])
    return replace(trial, ratio=costs[layer] / costs[OURS])


def _alone(kernel: Kernel, names: Sequence[str]) -> Script:
    """Return the script that calls kernels of equal arguments on the same inputs, each with an output of its own."""
    shapes = [(str(each.dtype), tuple(int(size) for size in each.shape)) for each in kernel.func.params]
    *read, written = shapes
    kinds = [*(("input", each) for each in read), *(("output", written) for _ in names)]
    first, layers = len(read), [OURS, *map(str, range(len(names) - 1))]
    return Script(
        regions=tuple(Region(kind=kind, size=bytes_of(*each)) for kind, each in kinds),
        slots=tuple(
            Slot(region=place, offset=0, dtype=dtype, shape=shape) for place, (_, (dtype, shape)) in enumerate(kinds)
        ),
        inputs=tuple((f"in{place}", place) for place in range(first)),
        outputs=tuple((layer, first + place) for place, layer in enumerate(layers)),
        calls=tuple(
            Call(kernel=name, layer=layer, slots=(*range(first), first + place))
            for place, (name, layer) in enumerate(zip(names, layers, strict=True))
        ),
    )
