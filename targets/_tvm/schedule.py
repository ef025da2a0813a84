"""How a kernel runs: which results stay in registers, in which order loops nest, what is a vector. No search.

    contraction    for o, y, x:   init tile;  for rc, ry, rx, ri:  tile += image * weights;   out(tile)
    window         for o, y, x:   init tile;  for ry, rx:          tile += image [* weights]; out(tile)
    map            every stage by itself, its last axis a vector

A stage is recognised by its name: `sum` is the contraction or window, `out` the result; any other is copied or reduced
before them.

A tuned kernel carries the trace of another schedule, which takes the place of this one, and a name of its own, by which
object code is cached; see `winners`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .cpus import Cpu
from .program import Kernel
from .tensorir import s_tir, tvm
from .tiles import Plan, Tile

Order = Literal["oyx", "yox", "yxo"]
"""How tiles follow each other, outermost first: blocks of channels, rows, pixels of a row."""

VERSION = 2
"""To be raised with every change of what a plan is scheduled to: object code is cached by it."""

UNROLLED_TAPS = 7
"""Window widths up to this one are unrolled."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a tiled kernel leaves open.

    Attributes:
        tile: results that stay in registers.
        order: how tiles follow each other.
        unrolled: a contraction's small reduction loops are written out, as a window's always are.
    """

    tile: Tile
    order: Order = "oyx"
    unrolled: bool = False


def scheduled(kernel: Kernel, cpu: Cpu) -> Any:
    """Return the kernel's PrimFunc with its loops in order, ready to be compiled."""
    schedule = s_tir.Schedule(tvm.IRModule({"main": kernel.func}))
    if kernel.trace:
        s_tir.schedule.Trace.apply_json_to_schedule(json.loads(kernel.trace), schedule)
    else:
        arrange(schedule, kernel.plan, cpu, Choice(tile=kernel.plan.tile))
    return schedule.mod["main"]


def arrange(schedule: Any, plan: Plan, cpu: Cpu, choice: Choice) -> None:
    """Put the loops of a TVM schedule of "main" in order; a plan of kind "map" leaves no choice."""
    loops = _Loops(schedule, plan, cpu)
    if plan.kind == "map":
        loops.every_stage()
    else:
        loops.tiled(choice)


class _Loops:
    """One kernel while its loops are put in order."""

    def __init__(self, schedule: Any, plan: Plan, cpu: Cpu) -> None:
        self.schedule, self._plan, self._cpu = schedule, plan, cpu
        root = schedule.get_sblock("root")
        self._names = [schedule.get(each).name_hint for each in schedule.get_child_blocks(root)]

    def every_stage(self, *, but: Sequence[str] = ()) -> None:
        """Make each stage's last axis a vector, and reductions run around it."""
        for name in self._names:
            if name not in but:
                self._stage(self.schedule.get_sblock(name))

    def _stage(self, block: Any) -> None:
        loops = list(self.schedule.get_loops(block))
        reduced = [loop for loop, axis in zip(loops, self._axes(block), strict=False) if _is_reduced(axis)]
        kept = [each for each in loops if not any(each.same_as(other) for other in reduced)]
        if not loops or (reduced and not kept):
            return
        lanes = self._vector(kept)
        if reduced:
            inner = [lanes] if lanes is not None else []
            self.schedule.reorder(*reduced, *inner)
            if lanes is not None:
                self.schedule.vectorize(lanes)
            start = self.schedule.decompose_reduction(block, reduced[0])
            if lanes is not None:
                self.schedule.vectorize(self.schedule.get_loops(start)[-1])
        elif lanes is not None:
            self.schedule.vectorize(lanes)

    def _axes(self, block: Any) -> Sequence[Any]:
        return list(self.schedule.get(block).iter_vars)

    def _vector(self, kept: Sequence[Any]) -> Any:
        """Return the loop that becomes a vector, None if the last axis has a single element or no small divisor."""
        if not kept:
            return None
        size = self._extent(kept[-1])
        width = max(each for each in range(1, min(size, self._cpu.lanes) + 1) if size % each == 0)
        if width == 1:
            return None
        return self.schedule.split(kept[-1], [None, width])[1] if width < size else kept[-1]

    def _extent(self, loop: Any) -> int:
        return int(self.schedule.get(loop).extent)

    def tiled(self, choice: Choice) -> None:
        """Keep a tile of `sum` in registers while it is reduced."""
        schedule, tile = self.schedule, choice.tile
        total, out = schedule.get_sblock("sum"), schedule.get_sblock("out")
        n, o, y, x, lane, *reduced = schedule.get_loops(total)
        oo, oi = schedule.split(o, [None, tile.blocks])
        yo, yi = schedule.split(y, [None, tile.rows])
        xo, xi = schedule.split(x, [None, tile.pixels])
        tiles = {"o": oo, "y": yo, "x": xo}
        schedule.reorder(n, *(tiles[each] for each in choice.order), *reduced, yi, xi, oi, lane)
        if self._plan.joined:
            self._join(out, tiles[choice.order[-1]])
        if self._by_element(reduced):
            self._load_registers(total, reduced)
        for loop in (oi, yi, xi, *self._taps(reduced, choice.unrolled)):
            schedule.unroll(loop)
        schedule.vectorize(lane)
        start = schedule.decompose_reduction(total, reduced[0])
        self._unroll_tail(start)
        self.every_stage(but=("sum", "out") if self._plan.joined else ("sum",))

    def _taps(self, reduced: Sequence[Any], unrolled: bool) -> Sequence[Any]:
        """Return the reduction loops to unroll: neighbouring pixels of a window share what they load."""
        if self._plan.kind == "window":
            return [each for each in reduced if self._extent(each) <= UNROLLED_TAPS]
        if unrolled:
            inner = self._by_element(reduced)
            small = [each for each in reduced[1:-1] if self._extent(each) <= UNROLLED_TAPS]
            return [*small, *(reduced[-1:] if inner or self._extent(reduced[-1]) <= UNROLLED_TAPS else [])]
        return reduced[-1:] if self._by_element(reduced) else []

    def _by_element(self, reduced: Sequence[Any]) -> bool:
        """Return whether neighbouring channels of a pixel fill a register whose elements are multiplied by."""
        contraction, registers = self._plan.kind == "contraction", self._cpu.registers
        return contraction and registers.by_element and self._extent(reduced[-1]) == self._cpu.lanes

    def _load_registers(self, total: Any, reduced: Sequence[Any]) -> None:
        """Load the pixels of a tile as registers before their elements are used one by one."""
        schedule = self.schedule
        pixels = schedule.cache_read(total, 0, "global")
        schedule.compute_at(pixels, reduced[-2])
        *inside, last = schedule.get_loops(pixels)[4 + len(reduced) - 1 :]
        schedule.vectorize(last)
        for each in inside:
            schedule.unroll(each)

    def _join(self, out: Any, loop: Any) -> None:
        """Compute the result tile by tile."""
        self.schedule.reverse_compute_at(out, loop)
        self._unroll_tail(out)

    def _unroll_tail(self, block: Any) -> None:
        """Unroll the loops within a tile, the last one as a vector."""
        *inside, last = self.schedule.get_loops(block)[4:]
        self.schedule.vectorize(last)
        for each in inside:
            self.schedule.unroll(each)


def _is_reduced(axis: Any) -> bool:
    return str(axis.iter_type) in ("2", "IterVarType.CommReduce", "CommReduce") or int(axis.iter_type) == 2
