"""Poolings: windows of a bordered image reduced by their largest element or their mean."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .convolution import bordered
from .graph import Node, unsupported
from .indexing import border, spatial
from .site import Image, Site
from .tensorir import te
from .tiles import Plan, window_tile
from .values import Reader, Value

LOWEST = {"float32": float(np.finfo(np.float32).min), "float16": float(np.finfo(np.float16).min)}


def max_pool(site: Site, node: Node) -> Reader:
    """Return the result of MaxPool."""
    if len(node.outputs) > 1 and node.outputs[1] in site.graph.uses():
        raise unsupported(node, "its indices are read")
    return _Pool(site, node).reduced(LOWEST[site.dtype], te.max)


def average_pool(site: Site, node: Node) -> Reader:
    """Return the result of AveragePool."""
    pool = _Pool(site, node)
    total, counts = pool.reduced(0.0, te.sum), pool.counts()
    if np.ptp(counts) == 0:
        share = site.number(1 / counts.flat[0])
        return lambda *index: total(*index) * share
    shares = site.table(1 / counts.reshape(counts.shape[-len(site.out.shape) + 2 :]))
    return lambda *index: total(*index) * shares(*index[2:])


class _Pool:
    """One pooling of a kernel; a sequence is an image of one row."""

    def __init__(self, site: Site, node: Node) -> None:
        self.site = site
        self.name = node.inputs[0]
        sizes = site.shape(self.name)[2:]
        if len(sizes) not in (1, 2):
            raise unsupported(node, f"{len(sizes)} spatial axes")
        kernel = spatial(node, "kernel_shape", len(sizes))
        strides, dilations = (spatial(node, key, len(sizes)) for key in ("strides", "dilations"))
        before, after = border(node, sizes, kernel, strides, dilations)
        one = (1,) * (2 - len(sizes))
        self.kernel, self.strides, self.dilations = ((*one, *each) for each in (kernel, strides, dilations))
        self.size = (*one, *site.shape(node.outputs[0])[2:])
        self.image_size = (*one, *sizes)
        self.before, self.after = ((*(0,) * len(one), *each) for each in (before, after))
        self.whole = bool(node.attributes.get("count_include_pad", 0))
        if any(0 in self._counted(axis, whole=False) for axis in (0, 1)):
            raise unsupported(node, "a window lies beyond the image")

    def reduced(self, fill: float, reduce: Any) -> Reader:
        """Return each window's reduction at the indices of the output."""
        site = self.site
        image = self._image(fill)
        ry, rx = (te.reduce_axis((0, size), name) for size, name in zip(self.kernel, ("ry", "rx"), strict=True))
        (sy, sx), (dy, dx) = self.strides, self.dilations

        def body(n: Any, c: Any, y: Any, x: Any) -> Any:
            return reduce(image.read(n, c, y * sy + ry * dy, x * sx + rx * dx), axis=[ry, rx])

        value = Value(name="sum", shape=(*site.out.shape[:2], *self.size), block=site.out.block)
        if value.block:
            high, wide = value.shape[2:]
            kernel, strides = (self.kernel[0], self.kernel[1]), (sy, sx)
            tile = window_tile(high, wide, kernel, strides, site.cpu.registers)
            site.plan = Plan(kind="window", tile=tile, joined=True)
        total = site.stage("sum", value, body)
        return total if len(site.out.shape) == 4 else lambda n, c, x: total(n, c, 0, x)

    def _image(self, fill: float) -> Image:
        image, behind = self.site.image(self.name), self._behind()
        if not any((*self.before, *behind)):
            return image
        before = (self.before[0], self.before[1])
        return bordered(self.site, image, before, (behind[0], behind[1]), fill, image.block)

    def _behind(self) -> list[int]:
        """Return the border behind the image that the last windows reach, `ceil_mode` included."""
        axes = zip(self.size, self.strides, self.kernel, self.dilations, strict=True)
        needed = [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in axes]
        return [max(0, n - size - b) for n, size, b in zip(needed, self.image_size, self.before, strict=True)]

    def counts(self) -> NDArray[Any]:
        """Return [height, width]: elements each window's mean is taken over."""
        rows, columns = (self._counted(axis, whole=self.whole) for axis in (0, 1))
        return np.outer(rows, columns)

    def _counted(self, axis: int, *, whole: bool) -> Sequence[int]:
        size, before = self.image_size[axis], self.before[axis]
        first, last = (-before, size + self.after[axis]) if whole else (0, size)
        taps = range(0, self.kernel[axis] * self.dilations[axis], self.dilations[axis])
        starts = (place * self.strides[axis] - before for place in range(self.size[axis]))
        return [sum(first <= start + tap < last for tap in taps) for start in starts]
