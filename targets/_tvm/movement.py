"""Operators that compute nothing: they say where each element of the result comes from."""

from collections.abc import Sequence
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .graph import Graph, Node, unsupported
from .indexing import broadcast, ravel, unravel
from .site import Site
from .tensorir import tirx
from .values import Reader


def view(site: Site, node: Node) -> Reader:
    """Return the elements in their order, in another shape."""
    source, shape, before = site.source(node.inputs[0]), site.out.shape, site.shape(node.inputs[0])
    if shape == before:
        return source
    return lambda *index: source(*unravel(ravel(index, shape), before))


def concat(site: Site, node: Node) -> Reader:
    """Return the result of Concat."""
    axis = int(node.attributes["axis"]) % len(site.out.shape)
    parts = [(site.source(name), site.shape(name)[axis]) for name in node.inputs]
    starts = np.cumsum([0, *(size for _, size in parts)]).tolist()
    block = site.out.block if axis == 1 else 0
    whole = block and not any(start % block for start in starts[:-1])

    def before(place: Any, end: int) -> Any:
        return place // block < -(-end // block) if whole else place < end

    def body(*index: Any) -> Any:
        result = None
        for (read, size), start in reversed(list(zip(parts, starts, strict=False))):
            own = index[axis] - start
            if block and not whole:
                own = tirx.max(0, tirx.min(own, size - 1))
            found = read(*index[:axis], own, *index[axis + 1 :])
            result = found if result is None else tirx.if_then_else(before(index[axis], start + size), found, result)
        return result

    return body


def transpose(site: Site, node: Node) -> Reader:
    """Return the result of Transpose."""
    rank = len(site.out.shape)
    order = [int(each) for each in node.attributes.get("perm", range(rank)[::-1])]
    back, source = [order.index(axis) for axis in range(rank)], site.source(node.inputs[0])
    return lambda *index: source(*(index[each] for each in back))


def split(site: Site, node: Node) -> Reader:
    """Return that result of Split which the kernel writes."""
    axis = int(node.attributes.get("axis", 0)) % len(site.out.shape)
    place = node.outputs.index(site.out.name)
    start = sum(site.shape(name)[axis] for name in node.outputs[:place])
    return moved(site.source(node.inputs[0]), axis, start, 1)


def moved(source: Reader, axis: int, start: int, step: int) -> Reader:
    """Return a reader of every `step`-th element of an axis from `start` on."""
    return lambda *index: source(*index[:axis], index[axis] * step + start, *index[axis + 1 :])


def slice_ranges(graph: Graph, node: Node, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, step) of each axis of a Slice whose bounds are constant."""
    if "starts" in node.attributes:
        starts, axes, steps = list(node.attributes["starts"]), node.attributes.get("axes"), None
    else:
        starts, axes, steps = graph.integers(node, 1) or [], graph.integers(node, 3), graph.integers(node, 4)
    axes = [int(each) % len(shape) for each in axes] if axes else list(range(len(starts)))
    ranges = [(0, 1)] * len(shape)
    for axis, start, step in zip(axes, starts, steps or [1] * len(starts), strict=True):
        ranges[axis] = (slice(start, None, step).indices(shape[axis])[0], step)
    return ranges


def slice_(site: Site, node: Node) -> Reader:
    """Return the result of Slice."""
    ranges = slice_ranges(site.graph, node, site.shape(node.inputs[0]))
    source = site.source(node.inputs[0])
    return lambda *index: source(*(each * step + first for each, (first, step) in zip(index, ranges, strict=True)))


def gather(site: Site, node: Node) -> Reader:
    """Return the result of Gather with constant indices."""
    shape = site.shape(node.inputs[0])
    axis = int(node.attributes.get("axis", 0)) % len(shape)
    places = site.array(node, 1) % shape[axis]
    source, rank = site.source(node.inputs[0]), places.ndim
    if places.size == 1:
        only = int(places.reshape(()))
        return lambda *index: source(*index[:axis], only, *index[axis + rank :])
    table = site.table(places, "int32")
    return lambda *index: source(*index[:axis], table(*index[axis : axis + rank]), *index[axis + rank :])


def expand(site: Site, node: Node) -> Reader:
    """Return the result of Expand."""
    return broadcast(site.source(node.inputs[0]), site.shape(node.inputs[0]), len(site.out.shape))


def tile(site: Site, node: Node) -> Reader:
    """Return the result of Tile."""
    source, shape = site.source(node.inputs[0]), site.shape(node.inputs[0])
    return lambda *index: source(*(each % size for each, size in zip(index, shape, strict=True)))


def depth_to_space(site: Site, node: Node) -> Reader:
    """Return the result of DepthToSpace."""
    size, channels = int(node.attributes["blocksize"]), site.out.shape[1]
    source, columns_first = site.source(node.inputs[0]), node.text("mode", "DCR") == "DCR"

    def body(n: Any, c: Any, y: Any, x: Any) -> Any:
        inner = (y % size) * size + x % size
        channel = inner * channels + c if columns_first else c * size * size + inner
        return source(n, channel, y // size, x // size)

    return body


def space_to_depth(site: Site, node: Node) -> Reader:
    """Return the result of SpaceToDepth."""
    size, channels = int(node.attributes["blocksize"]), site.shape(node.inputs[0])[1]
    source = site.source(node.inputs[0])

    def body(n: Any, c: Any, y: Any, x: Any) -> Any:
        inner = c // channels
        return source(n, c % channels, y * size + inner // size, x * size + inner % size)

    return body


def pad(site: Site, node: Node) -> Reader:
    """Return the result of Pad."""
    shape, mode = site.shape(node.inputs[0]), node.text("mode", "constant")
    before = _pads(site, node, len(shape))
    source = site.source(node.inputs[0])
    if mode == "constant":
        fill = float(site.array(node, 2).item()) if node.input(2) else float(node.attributes.get("value", 0.0))
        return _padded(site, source, shape, before, fill)
    tables = {
        axis: site.table(_reflected(node, mode, np.arange(-before[axis], size - before[axis]), shape[axis]), "int32")
        for axis, size in enumerate(site.out.shape)
        if size != shape[axis]
    }
    return lambda *index: source(*(tables[axis](each) if axis in tables else each for axis, each in enumerate(index)))


def _pads(site: Site, node: Node, rank: int) -> list[int]:
    given = site.graph.integers(node, 1) if len(node.inputs) > 1 else [int(each) for each in node.attributes["pads"]]
    axes = site.graph.integers(node, 3) or list(range(rank))
    before = [0] * rank
    for axis, count in zip(axes, (given or [])[: len(axes)], strict=True):
        before[axis % rank] = count
    return before


def _padded(site: Site, source: Reader, shape: Sequence[int], before: Sequence[int], fill: float) -> Reader:
    value = site.number(fill)

    def body(*index: Any) -> Any:
        own, inside = [each - first for each, first in zip(index, before, strict=True)], []
        for axis, (size, whole) in enumerate(zip(shape, site.out.shape, strict=True)):
            if size != whole or before[axis]:
                inside += [own[axis] >= 0, own[axis] < size]
                own[axis] = tirx.max(0, tirx.min(own[axis], size - 1)) if axis == 1 else own[axis]
        found = source(*own)
        return tirx.if_then_else(tirx.all(*inside), found, value) if inside else found

    return body


def _reflected(node: Node, mode: str, places: NDArray[Any], size: int) -> NDArray[Any]:
    if mode == "edge":
        return np.asarray(np.clip(places, 0, size - 1))
    if mode == "wrap":
        return np.asarray(places % size)
    if mode != "reflect":
        raise unsupported(node, f"padding by {mode!r}")
    period = max(1, 2 * (size - 1))
    return np.asarray(size - 1 - np.abs(places % period - (size - 1)))


def resize(site: Site, node: Node) -> Reader:
    """Return the result of Resize: along each axis a sum of taps, whose places and weights are known beforehand."""
    shape, whole = site.shape(node.inputs[0]), site.out.shape
    _check_resize(node)
    scales = _scales(site, node, shape)
    axes = [axis for axis in range(len(shape)) if shape[axis] != whole[axis] or scales[axis] != 1.0]
    taps = {axis: _Taps(site, node, shape[axis], whole[axis], scales[axis]) for axis in axes}
    read = site.source(node.inputs[0])
    for axis in axes:
        read = taps[axis].applied(read, axis)
    return read


def _check_resize(node: Node) -> None:
    known = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
    if node.text("coordinate_transformation_mode", "half_pixel") not in known or node.attributes.get("antialias", 0):
        raise unsupported(node, "this way of finding coordinates")
    if node.attributes.get("exclude_outside", 0) or node.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise unsupported(node, "exclude_outside or keep_aspect_ratio_policy")


def _scales(site: Site, node: Node, shape: Sequence[int]) -> list[float]:
    place = 2 if len(node.inputs) > 2 else 1
    scales = [float(each) for each in site.array(node, place).reshape(-1)] if node.input(place) else []
    axes = [int(each) % len(shape) for each in node.attributes.get("axes", range(len(shape)))]
    if not scales:
        scales = [site.out.shape[axis] / shape[axis] for axis in axes]
    given = dict(zip(axes, scales, strict=True))
    return [given.get(axis, 1.0) for axis in range(len(shape))]


class _Taps:
    """Which elements of an axis each element of the result is made of, and their weights."""

    def __init__(self, site: Site, node: Node, size: int, whole: int, scale: float) -> None:
        places = np.array([_coordinate(node, each, size, whole, scale) for each in range(whole)])
        mode = node.text("mode", "nearest")
        if mode == "nearest":
            columns = [(_nearest(node, places), np.ones(whole))]
        elif mode == "linear":
            columns = _linear(np.clip(places, 0, size - 1))
        else:
            columns = _cubic(places, float(node.attributes.get("cubic_coeff_a", -0.75)))
        self._repeats = _repeats(np.clip(columns[0][0], 0, size - 1), size) if mode == "nearest" else 0
        if self._repeats:
            return
        clipped = [(site.table(np.clip(place, 0, size - 1), "int32"), weight) for place, weight in columns]
        self._columns = [
            (place, None if np.all(weight == 1) else site.table(weight)) for place, weight in clipped if np.any(weight)
        ]

    def applied(self, read: Reader, axis: int) -> Reader:
        """Return a reader with this axis resized."""
        if self._repeats:
            return lambda *index: read(*index[:axis], index[axis] // self._repeats, *index[axis + 1 :])

        def body(*index: Any) -> Any:
            total = None
            for place, weight in self._columns:
                found = read(*index[:axis], place(index[axis]), *index[axis + 1 :])
                found = found if weight is None else found * weight(index[axis])
                total = found if total is None else total + found
            return total

        return body


def _repeats(places: NDArray[Any], size: int) -> int:
    """Return how often each element is repeated, 0 if not all are as often."""
    times = len(places) // size
    return times if times * size == len(places) and np.array_equal(places, np.arange(len(places)) // times) else 0


def _coordinate(node: Node, place: int, size: int, whole: int, scale: float) -> float:
    """Return where an element of the result lies in the original (ONNX, operator Resize)."""
    mode = node.text("coordinate_transformation_mode", "half_pixel")
    if mode == "asymmetric":
        return place / scale
    if mode == "align_corners":
        return place * (size - 1) / (whole - 1) if whole > 1 else 0.0
    if mode == "pytorch_half_pixel" and whole == 1:
        return 0.0
    return (place + 0.5) / scale - 0.5


def _nearest(node: Node, places: NDArray[Any]) -> NDArray[Any]:
    how = node.text("nearest_mode", "round_prefer_floor")
    if how == "floor":
        return np.asarray(np.floor(places), dtype=np.int64)
    if how == "ceil":
        return np.asarray(np.ceil(places), dtype=np.int64)
    return np.asarray(np.floor(places + 0.5) if how == "round_prefer_ceil" else np.ceil(places - 0.5), dtype=np.int64)


def _linear(places: NDArray[Any]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    first = np.array([floor(each) for each in places])
    return [(first, 1 - (places - first)), (first + 1, places - first)]


def _cubic(places: NDArray[Any], a: float) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Return four taps (Keys, "Cubic Convolution Interpolation", 1981)."""
    first = np.floor(places).astype(np.int64)
    t = places - first
    near, far = np.stack([t, 1 - t]), np.stack([t + 1, 2 - t])
    near = ((a + 2) * near - (a + 3)) * near * near + 1
    far = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    weights = (far[0], near[0], near[1], far[1])
    return [(first + offset, weight) for offset, weight in zip((-1, 0, 1, 2), weights, strict=True)]
