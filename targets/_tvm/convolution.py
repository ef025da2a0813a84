"""Convolutions, dense, grouped, depthwise and transposed, as one contraction over a bordered image.

    sum[n, o, y, x, l] += image[n, channel, y s + ry d, x s + rx d] * packed[o / B, rc, ry, rx, ri, o % B, l]

Weights are packed on the host, so that the tile reads them in one stream: B blocks of channels, `l` within a register.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .graph import Node, unsupported
from .indexing import border, halves, spatial
from .site import Image, Site
from .tensorir import te, tirx
from .tiles import Plan, Tile, contraction_tile, cost, window_tile
from .values import Reader, Value

WORTH_A_COPY = 1.15
"""A tile so many times cheaper is worth copying the image for, if nothing else asks for a copy."""


def conv(site: Site, node: Node) -> Reader:
    """Return the result of Conv."""
    weight = _planar(node, site.array(node, 1).astype(np.float32))
    image = site.image(node.inputs[0])
    rank = len(site.shape(node.inputs[0])) - 2
    strides, dilations = (spatial(node, key, rank) for key in ("strides", "dilations"))
    sizes = site.shape(node.inputs[0])[2:]
    before, after = border(node, sizes, weight.shape[4 - rank :], strides, dilations)
    work = Convolution(
        site, weight, _two(strides, 1), _two(dilations, 1), int(node.attributes.get("group", 1)), _size(site, node)
    )
    return _biased(site, node, work.result(image, _two(before, 0), _two(after, 0)))


def conv_transpose(site: Site, node: Node) -> Reader:
    """Return the result of ConvTranspose: the image spread out by the strides, convolved with the turned weights."""
    weight = _planar(node, site.array(node, 1).astype(np.float32))
    groups = int(node.attributes.get("group", 1))
    inner, per, high, wide = weight.shape
    rank = len(site.shape(node.inputs[0])) - 2
    strides, dilations = (spatial(node, key, rank) for key in ("strides", "dilations"))
    before = _two(_cut(site, node, weight.shape[4 - rank :], strides, dilations), 0)
    turned = weight[:, :, ::-1, ::-1].reshape(groups, inner // groups, per, high, wide).transpose(0, 2, 1, 3, 4)
    turned = turned.reshape(groups * per, inner // groups, high, wide)
    work = Convolution(site, turned, (1, 1), _two(dilations, 1), groups, _size(site, node))
    return _biased(site, node, work.spread_result(site.image(node.inputs[0]), _two(strides, 1), before))


def _planar(node: Node, weight: NDArray[Any]) -> NDArray[Any]:
    """Return weights [out, in, height, width]; a sequence's kernel is one row high."""
    if weight.ndim not in (3, 4):
        raise unsupported(node, f"{weight.ndim - 2} spatial axes")
    return weight if weight.ndim == 4 else weight[:, :, None, :]


def _two(values: Sequence[int], missing: int) -> tuple[int, int]:
    return (missing, values[0]) if len(values) == 1 else (values[0], values[1])


def _size(site: Site, node: Node) -> tuple[int, int]:
    return _two(site.shape(node.outputs[0])[2:], 1)


def _cut(
    site: Site, node: Node, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[int, ...]:
    """Return what is cut off before each spatial axis (ONNX, operator ConvTranspose)."""
    auto, rank = node.text("auto_pad", "NOTSET"), len(kernel)
    if auto == "NOTSET" and "output_shape" not in node.attributes:
        return tuple(int(each) for each in node.attributes.get("pads", (0,) * 2 * rank))[:rank]
    if auto == "VALID":
        return (0,) * rank
    sizes = zip(site.shape(node.inputs[0])[2:], site.shape(node.outputs[0])[2:], strict=True)
    extra = spatial(node, "output_padding", rank, 0)
    total = [
        max(0, s * (small - 1) + e + (k - 1) * d + 1 - large)
        for (small, large), s, e, k, d in zip(sizes, strides, extra, kernel, dilations, strict=True)
    ]
    return halves(total, upper=auto == "SAME_UPPER")[0]


def _biased(site: Site, node: Node, total: Reader) -> Reader:
    """Return the sum with the bias added, at the indices of the output."""
    flat = len(site.out.shape) == 3

    def plain(*index: Any) -> Any:
        return total(index[0], index[1], 0, index[2]) if flat else total(*index)

    if not node.input(2):
        return plain
    bias = site.by_channel(site.array(node, 2))
    return lambda *index: plain(*index) + bias(*index)


class Convolution:
    """One convolution of a kernel.

    Args:
        weight: [out, in / groups, height, width].
        size: height and width of the result.
    """

    def __init__(
        self,
        site: Site,
        weight: NDArray[Any],
        strides: tuple[int, int],
        dilations: tuple[int, int],
        groups: int,
        size: tuple[int, int],
    ) -> None:
        self.site, self.strides, self.dilations, self.size = site, strides, dilations, size
        self.lanes = site.cpu.lanes
        self.channels = weight.shape[0]
        self.per_channel = weight.shape[1] == 1 and groups > 1
        self.repeats = weight.shape[0] // groups
        self.groups, self.weight = (groups, weight) if self.per_channel else merged_groups(weight, groups, self.lanes)

    def result(self, image: Image, before: tuple[int, int], after: tuple[int, int]) -> Reader:
        """Return a reader (n, c, y, x) of the convolution of an image with a border of zeros."""
        tile, copy = self._tile(copied=any((*before, *after)))
        if self.per_channel:
            return self._window(self._blocked(image, before, after), tile)
        if copy:
            image = bordered(self.site, image, before, self._reach(image, before, after, tile), 0.0, image.block)
        return self._contraction(image, tile)

    def spread_result(self, image: Image, strides: tuple[int, int], cut: tuple[int, int]) -> Reader:
        """Return a reader of the convolution of an image between whose pixels lie zeros."""
        tile, _ = self._tile(copied=True)
        (sy, sx), (_, _, high, wide) = strides, image.shape
        reach = [(k - 1) * d for k, d in zip(self.weight.shape[2:], self.dilations, strict=True)]
        top, left = reach[0] - cut[0], reach[1] - cut[1]
        width = -(-self.size[1] // tile.pixels) * tile.pixels
        zero = self.site.number(0)

        def body(n: Any, c: Any, y: Any, x: Any) -> Any:
            y, x = y - top, x - left
            inside = tirx.all(y >= 0, x >= 0, y < high * sy, x < wide * sx, y % sy == 0, x % sx == 0)
            return tirx.if_then_else(inside, image.read(n, self._channel_read(c), y // sy, x // sx), zero)

        channels = self.channels if self.per_channel else image.shape[1]
        shape = (image.shape[0], channels, self.size[0] + reach[0], width + reach[1])
        spread = stage_image(self.site, shape, self.lanes if self.per_channel else image.block, body)
        return self._window(spread, tile) if self.per_channel else self._contraction(spread, tile)

    def _channel_read(self, c: Any) -> Any:
        return tirx.min(c, self.channels - 1) // self.repeats if self.per_channel else c

    def _tile(self, *, copied: bool) -> tuple[Tile, bool]:
        """Return the tile, and whether the image must be copied for it."""
        registers, (high, wide) = self.site.cpu.registers, self.size
        if self.per_channel:
            return window_tile(high, wide, self._kernel(), self.strides, registers), True
        outer = -(-self.channels // self.lanes) // self.groups
        loose = contraction_tile(outer, high, wide, registers, padded=True)
        exact = contraction_tile(outer, high, wide, registers, padded=False)
        if copied or cost(exact, wide, registers) > WORTH_A_COPY * cost(loose, wide, registers):
            return loose, True
        return exact, False

    def _kernel(self) -> tuple[int, int]:
        return self.weight.shape[2], self.weight.shape[3]

    def _reach(self, image: Image, before: tuple[int, int], after: tuple[int, int], tile: Tile) -> tuple[int, int]:
        """Return the border behind the image that the last tile of a row reads."""
        width = -(-self.size[1] // tile.pixels) * tile.pixels
        needed = (width - 1) * self.strides[1] + (self.weight.shape[3] - 1) * self.dilations[1] + 1
        return after[0], max(after[1], needed - image.shape[3] - before[1])

    def _blocked(self, image: Image, before: tuple[int, int], after: tuple[int, int]) -> Image:
        """Return the image with each channel as often as it has results, blocked, with its border."""
        if self.repeats == 1 and image.block and not any((*before, *after)):
            return image
        shape = (image.shape[0], self.channels, *image.shape[2:])
        repeated = Image(read=lambda n, c, y, x: image.read(n, self._channel_read(c), y, x), shape=shape, block=0)
        return bordered(self.site, repeated, before, after, 0.0, self.lanes)

    def _window(self, image: Image, tile: Tile) -> Reader:
        """Return the depthwise convolution."""
        high, wide = self._kernel()
        outer = -(-self.channels // self.lanes)
        lanes = np.pad(self.weight[:, 0], ((0, outer * self.lanes - self.channels), (0, 0), (0, 0)))
        packed = self.site.table(lanes.reshape(outer, self.lanes, high, wide).transpose(0, 2, 3, 1))
        ry, rx = te.reduce_axis((0, high), "ry"), te.reduce_axis((0, wide), "rx")
        (sy, sx), (dy, dx) = self.strides, self.dilations
        return self._summed(
            image.shape[0],
            self.size[1],
            lambda n, o, y, x, lane: te.sum(
                image.read(n, o * self.lanes + lane, y * sy + ry * dy, x * sx + rx * dx) * packed(o, ry, rx, lane),
                axis=[ry, rx],
            ),
            Plan(kind="window", tile=tile, joined=bool(self.site.out.block)),
        )

    def _contraction(self, image: Image, tile: Tile) -> Reader:
        """Return the dense or grouped convolution."""
        _, depth, high, wide = self.weight.shape
        inner = image.block if image.block and (self.groups == 1 or depth % image.block == 0) else 1
        rc, ri = te.reduce_axis((0, -(-depth // inner)), "rc"), te.reduce_axis((0, inner), "ri")
        ry, rx = te.reduce_axis((0, high), "ry"), te.reduce_axis((0, wide), "rx")
        packed = self.site.table(packed_weights(self.weight, self.lanes, inner, tile.blocks))
        (sy, sx), (dy, dx), blocks = self.strides, self.dilations, tile.blocks
        blocks_of_group = -(-self.channels // self.lanes) // self.groups

        def body(n: Any, o: Any, y: Any, x: Any, lane: Any) -> Any:
            first = 0 if self.groups == 1 else o // blocks_of_group * depth
            pixel = image.read(n, first + rc * inner + ri, y * sy + ry * dy, x * sx + rx * dx)
            return te.sum(pixel * packed(o // blocks, rc, ry, rx, ri, o % blocks, lane), axis=[rc, ry, rx, ri])

        width = -(-self.size[1] // tile.pixels) * tile.pixels
        plan = Plan(kind="contraction", tile=tile, joined=bool(self.site.out.block))
        return self._summed(image.shape[0], width, body, plan)

    def _summed(self, batch: int, width: int, body: Reader, plan: Plan) -> Reader:
        outer = -(-self.channels // self.lanes)
        total = te.compute((batch, outer, self.size[0], width, self.lanes), body, "sum")
        self.site.plan = plan
        return lambda n, c, y, x: total(n, c // self.lanes, y, x, c % self.lanes)


def bordered(
    site: Site, image: Image, before: tuple[int, int], after: tuple[int, int], fill: float, block: int
) -> Image:
    """Return a copy of the image with a border, in blocks of `block` channels."""
    (top, left), (bottom, right), (batch, channels, high, wide) = before, after, image.shape
    value = site.number(fill)

    def body(n: Any, c: Any, y: Any, x: Any) -> Any:
        inside = [*([y >= top] if top else []), *([y < top + high] if bottom else [])]
        inside += [*([x >= left] if left else []), *([x < left + wide] if right else [])]
        found = image.read(n, c, y - top, x - left)
        return tirx.if_then_else(tirx.all(*inside), found, value) if inside else found

    return stage_image(site, (batch, channels, top + high + bottom, left + wide + right), block, body)


def stage_image(site: Site, shape: tuple[int, int, int, int], block: int, body: Reader) -> Image:
    """Return an image that this kernel writes first."""
    value = Value(name="pad", shape=shape, dtype=site.dtype, block=block)
    return Image(read=site.stage("pad", value, body), shape=shape, block=block, copied=True)


def merged_groups(weight: NDArray[Any], groups: int, lanes: int) -> tuple[int, NDArray[Any]]:
    """Return fewer groups, and their weights with zeros between, so that each group fills whole registers.

    A register whose lanes belong to several groups would need a different pixel in every lane.
    """
    per, depth = weight.shape[0] // groups, weight.shape[1]
    together = lanes // gcd(per, lanes)
    together = together if groups % together == 0 else groups
    if together == 1:
        return groups, weight
    merged = np.zeros((weight.shape[0], depth * together, *weight.shape[2:]), weight.dtype)
    for channel in range(weight.shape[0]):
        start = channel // per % together * depth
        merged[channel, start : start + depth] = weight[channel]
    return groups // together, merged


def packed_weights(weight: NDArray[Any], lanes: int, inner: int, blocks: int) -> NDArray[Any]:
    """Return weights [out, in, height, width] as [out / (B lanes), in / inner, height, width, inner, B, lanes]."""
    out, depth, high, wide = weight.shape
    padded = np.pad(weight, ((0, -out % lanes), (0, -depth % inner), (0, 0), (0, 0)))
    shape = (padded.shape[0] // lanes // blocks, blocks, lanes, padded.shape[1] // inner, inner, high, wide)
    return padded.reshape(shape).transpose(0, 3, 5, 6, 4, 1, 2)
