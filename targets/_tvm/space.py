"""Which schedules of a kernel a search may try, and which it tries next.

The space is our own schedule with other numbers in it (MetaSchedule's `ScheduleFn`), because its rules for CPUs start
from loops that our kernels have already left behind. A schedule only changes in which order a kernel computes, so its
arguments and the rest of the engine stay as they are.
"""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from edgeprune.errors import CompileError

from .cpus import Cpu
from .program import Kernel
from .records import Record
from .schedule import UNROLLED_TAPS, Choice, Order, arrange
from .tensorir import s_tir, tvm
from .tiles import Registers, Tile, cost

ORDERS: tuple[Order, ...] = ("oyx", "yox", "yxo")
WRITTEN_OUT = 1024
"""Most multiply-adds that a kernel is unrolled to: more of them take LLVM seconds, and the CPU's instruction cache."""

LIKELY = 4
"""Power of the inverse of the counted cost by which a choice is drawn: twice the instructions, 16 times as rare."""

NEAR = 4.0
"""A choice that differs little from the best so far is drawn so many times as often."""


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
