"""How a kernel runs: registers, vectors and loop order, by the CPU's lanes and registers. No search."""

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir


@dataclass(frozen=True)
class Cpu:
    """What a schedule needs to know.

    Attributes:
        lanes: float32 elements of one vector register.
        accumulators: vector registers a tile of results may fill.
    """

    lanes: int
    accumulators: int


def scheduled(func: Any, kind: str, cpu: Cpu) -> Any:
    """Return the scheduled function."""
    schedule = s_tir.Schedule(tvm.IRModule({"main": func}))
    names = [schedule.get(each).name_hint for each in schedule.get_child_blocks(schedule.get_sblock("root"))]
    {"conv": _conv, "depthwise": _window, "gathered": _window, "gemm": _gemm, "reduce": _window, "map": _map}[kind](
        schedule, names, cpu
    )
    return schedule.mod["main"]


def _extents(schedule: Any, loops: Any) -> list[int]:
    return [int(schedule.get(each).extent) for each in loops]


def _divisor(size: int, limit: int) -> int:
    return max((each for each in range(1, min(size, limit) + 1) if size % each == 0), default=1)


def _vectorize_last(schedule: Any, block: Any, cpu: Cpu) -> None:
    """Vectorize the innermost loop of a block, or as much of it as fills registers."""
    loops = schedule.get_loops(block)
    if not loops:
        return
    size = _extents(schedule, loops)[-1]
    width = _divisor(size, 4 * cpu.lanes)
    if width == 1:
        return
    inner = loops[-1]
    if width < size:
        _, inner = schedule.split(inner, [None, width])
    schedule.vectorize(inner)


def _pads(schedule: Any, names: list[str], cpu: Cpu) -> None:
    if "pad" in names:
        _vectorize_last(schedule, schedule.get_sblock("pad"), cpu)


def _map(schedule: Any, names: list[str], cpu: Cpu) -> None:
    _pads(schedule, names, cpu)
    out = schedule.get_sblock("out")
    if schedule.get_loops(out):
        _vectorize_last(schedule, out, cpu)


def _conv(schedule: Any, names: list[str], cpu: Cpu) -> None:
    """Keep a tile of pixels x channel blocks in registers while the reduction runs."""
    total, out = schedule.get_sblock("sum"), schedule.get_sblock("out")
    loops = schedule.get_loops(total)
    if len(loops) != 9:  # a plain result: [n, c, y, x, rc, ry, rx, ri]
        return _window(schedule, names, cpu)
    n, o, y, x, c, rc, ry, rx, ri = loops
    outer, width, lanes = (_extents(schedule, [each])[0] for each in (o, x, c))
    vectors = max(1, lanes // cpu.lanes)
    blocks, pixels = _tile(outer, width, cpu.accumulators // vectors)
    oo, oi = schedule.split(o, [None, blocks])
    xo, xi = schedule.split(x, [None, pixels])
    schedule.reorder(n, oo, y, xo, rc, ry, rx, ri, xi, oi, c)
    same = len(schedule.get_loops(out)) == 5
    if same:
        schedule.reverse_compute_at(out, xo)
        schedule.set_scope(total, 0, "local")
        tail = schedule.get_loops(out)
        schedule.vectorize(tail[-1])
        for each in tail[4:-1]:
            schedule.unroll(each)
    else:
        _vectorize_last(schedule, out, cpu)
    for each in (xi, oi):
        schedule.unroll(each)
    schedule.vectorize(c)
    if _extents(schedule, [rx])[0] <= 7:
        schedule.unroll(rx)
    start = schedule.decompose_reduction(total, rc)
    first = schedule.get_loops(start)
    schedule.vectorize(first[-1])
    for each in first[4:-1]:
        schedule.unroll(each)
    _pads(schedule, names, cpu)
    return None


def _tile(outer: int, width: int, registers: int) -> tuple[int, int]:
    """Return channel blocks and pixels of a tile: as many results as registers allow, near the shape loads like best."""
    options = [
        (blocks * pixels, -abs(blocks - pixels / 3), blocks, pixels)
        for blocks in range(1, 5)
        for pixels in range(1, registers + 1)
        if outer % blocks == 0 and width % pixels == 0 and blocks * pixels <= registers
    ]
    return max(options)[2:]


def _window(schedule: Any, names: list[str], cpu: Cpu) -> None:
    """Reduce windows: the results of a row tile stay in registers, channels are vectors."""
    total, out = schedule.get_sblock("sum"), schedule.get_sblock("out")
    kinds = [str(schedule.get(total).iter_vars[k].iter_type) for k in range(len(schedule.get(total).iter_vars))]
    spatial = sum(each in ("0", "IterVarType.DataPar", "DataPar") for each in kinds)
    loops = schedule.get_loops(total)
    if spatial == len(loops) or not spatial:
        spatial = len(schedule.get_loops(out))
    sizes = _extents(schedule, loops)
    outer, reduced = loops[:spatial], loops[spatial:]
    if len(schedule.get_loops(out)) != spatial or spatial < 2:
        start = schedule.decompose_reduction(total, reduced[0]) if reduced else None
        del start
        return _vectorize_last(schedule, out, cpu)
    lanes = sizes[spatial - 1]
    pixels = _divisor(sizes[spatial - 2], 8) if lanes <= 4 * cpu.lanes and spatial >= 4 else 1
    inner = outer[-1]
    if lanes > 4 * cpu.lanes:
        width = _divisor(lanes, 2 * cpu.lanes)
        rest, inner = schedule.split(inner, [None, width])
        outer = [*outer[:-1], rest, inner]
        at = rest
        schedule.reorder(*outer[:-1], *reduced, inner)
    else:
        xo, xi = schedule.split(outer[-2], [None, pixels])
        schedule.reorder(*outer[:-2], xo, *reduced, xi, inner)
        at = xo
        schedule.unroll(xi)
    schedule.reverse_compute_at(out, at)
    schedule.set_scope(total, 0, "local")
    depth = len(schedule.get_loops(at if False else total)) if False else None
    del depth
    tail = schedule.get_loops(out)
    schedule.vectorize(tail[-1])
    schedule.vectorize(inner)
    for each in reduced[1:]:
        if _extents(schedule, [each])[0] <= 7:
            schedule.unroll(each)
    start = schedule.decompose_reduction(total, reduced[0])
    schedule.vectorize(schedule.get_loops(start)[-1])
    _pads(schedule, names, cpu)
    return None


def _gemm(schedule: Any, names: list[str], cpu: Cpu) -> None:
    """Columns are vectors; several blocks of columns share each loaded element of a row."""
    total, out = schedule.get_sblock("sum"), schedule.get_sblock("out")
    *row, outer, lanes, depth = schedule.get_loops(total)
    blocks = _divisor(_extents(schedule, [outer])[0], 8)
    oo, oi = schedule.split(outer, [None, blocks])
    schedule.reorder(*row, oo, depth, oi, lanes)
    schedule.vectorize(lanes)
    schedule.unroll(oi)
    start = schedule.decompose_reduction(total, depth)
    schedule.vectorize(schedule.get_loops(start)[-1])
    _vectorize_last(schedule, out, cpu)
