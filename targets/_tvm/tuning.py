"""A measured search for faster schedules of a network's kernels: tasks for whoever holds the board, one at a time.

kernel ─▶ space: tiles, order of tiles, unrolling ─▶ MetaSchedule replays `arrange` ─▶ trials, N in all
                                                          │ timed in turn with ours, a batch at a time
record of the kernel  ◀── verdict of N trials: the one that won a fresh comparison with ours, or none
record of the network ◀── whether all winners together make it faster; if not, our schedules stay
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path

from edgeprune.canonical import digest
from edgeprune.errors import CompileError

from .cache import KernelCache, object_of
from .cpus import Cpu
from .engine import Call, Region, Script, Slot, bytes_of, script_of, write_engine
from .program import Kernel, Program
from .records import Record, Records, Trial, Verdict
from .schedule import Choice
from .space import choices, draw, traces
from .winners import network_record, tuned, tuned_name

BATCH = 8
"""Trials that are timed in turn with ours in one engine."""

FINALISTS = 2
"""The fastest trials are compared with ours once more, because the fastest of many is fast by luck as well."""

OURS = "ours"
"""Layer of a batch's engine that runs our schedule."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be done on the board next.

    Attributes:
        record: name of what it is about, a kernel or the network.
        engines: to be measured: a batch is one engine, whose layers are ours and "0", "1", ... in the order of
            `choices`; finalists are an engine each, after ours.
        trials: of a batch, waiting for their times; those that cannot be compiled have failed already.
        finalists: places in the record; empty: it is a batch.
        whole: it is the network with all winners, after the one with none.
        share: of the search that is done, from 0 to 1.
        again: its record was damaged, so that it starts over.
    """

    record: str
    engines: tuple[Path, ...]
    trials: tuple[Trial, ...] = ()
    finalists: tuple[int, ...] = ()
    whole: bool = False
    share: float
    again: bool = False


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
        """Return what is to be measured now, None if everything has its verdict."""
        for done, name in enumerate(self._spaces):
            record = self._read(name)
            task = None if self.trials in record.verdicts else self._task(name, record)
            if task is not None:
                return replace(task, share=(done + task.share) / len(self._spaces), again=record.damaged)
        return self._whole()

    @cached_property
    def _spaces(self) -> Mapping[str, Sequence[tuple[Choice, float]]]:
        """Return what may be tried of each kernel that leaves a choice, and how readily."""
        spaces = {name: choices(kernel, self.cpu) for name, kernel in self.program.kernels.items()}
        return {name: space for name, space in spaces.items() if space}

    def _read(self, name: str) -> Record:
        return self.records.read(name, [choice for choice, _ in self._spaces.get(name, ())])

    def _task(self, name: str, record: Record) -> Task | None:
        """Return what is to be measured of a kernel, None if nothing is, which is its verdict then."""
        kernel, done = self.program.kernels[name], len(record.trials)
        missing = min(BATCH, self.trials - done)
        drawn = draw(self._spaces[name], record, missing, f"{name} {done}") if missing > 0 else []
        if drawn:
            trials, engine = self._batch(name, kernel, drawn)
            return Task(record=name, engines=(engine,), trials=trials, share=0.9 * done / self.trials)
        finalists = self._finalists(record)
        if finalists:
            wanted = ["", *traces(name, kernel, self.cpu, [record.trials[place].choice for place in finalists])]
            engines = tuple(self._engine(kernel, [self._object(name, kernel, trace)]) for trace in wanted)
            return Task(record=name, engines=engines, finalists=finalists, share=0.9)
        self._judge(name, Verdict(trial=None))
        return None

    def _whole(self) -> Task | None:
        """Return the comparison of the network with all winners with the one with none, None if it is known."""
        best = tuned(self.program, self.cpu, self.records, self.trials)
        name = network_record(self.graph, best)
        record = self._read(name)
        if best.kernels.keys() == self.program.kernels.keys() or self.trials in record.verdicts:
            return None
        engines = tuple(self._network(each) for each in (self.program, best))
        return Task(record=name, engines=engines, finalists=(0,), whole=True, share=1.0, again=record.damaged)

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

    def _finalists(self, record: Record) -> tuple[int, ...]:
        faster = [(each.ratio, place) for place, each in enumerate(record.trials[: self.trials]) if each.ratio]
        return tuple(place for ratio, place in sorted(faster)[:FINALISTS] if ratio < 1)

    def _batch(self, name: str, kernel: Kernel, drawn: Sequence[Choice]) -> tuple[tuple[Trial, ...], Path]:
        """Return the trials of some choices, and the engine that runs ours and those that could be compiled."""
        trials, objects = [], [self._object(name, kernel, "")]
        for choice in drawn:
            trial = Trial(choice=choice)
            try:
                [trace] = traces(name, kernel, self.cpu, [choice])
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
        record = self._read(task.record)
        self.records.write(task.record, replace(record, trials=(*record.trials, *told)))

    def judged(self, task: Task, ratios: Sequence[tuple[float, float, float]]) -> None:
        """Keep how the finalists compared with ours: p50, low and high of each ratio."""
        seen = dict(zip(task.finalists, ratios, strict=True))
        faster = [place for place, (_, _, high) in seen.items() if high < 1]
        self._judge(task.record, Verdict(trial=min(faster, key=lambda each: seen[each][0], default=None), ratio=seen))

    def _judge(self, name: str, verdict: Verdict) -> None:
        record = self._read(name)
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
