"""Means, sums and extremes over axes, softmax, and the norms that are computed while the network runs.

All of it in single precision: squares overflow in half.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from .elementwise import bound, exp, literal, log
from .graph import Node, unsupported
from .indexing import broadcast
from .site import Site
from .tensorir import te, tirx
from .values import Reader, Value


def single(site: Site, read: Reader) -> Reader:
    """Return a reader in single precision."""
    return read if site.dtype == "float32" else lambda *index: read(*index).astype("float32")


def own(site: Site, read: Reader) -> Reader:
    """Return a reader in the kernel's precision."""
    return read if site.dtype == "float32" else lambda *index: read(*index).astype(site.dtype)


class Reduction:
    """Which axes of a tensor are reduced; the result keeps them with size 1.

    Args:
        block: of the result's channels; only if channels are not reduced.
    """

    def __init__(self, site: Site, shape: Sequence[int], axes: Sequence[int], block: int = 0) -> None:
        self.site, self.shape = site, tuple(shape)
        self.axes = tuple(sorted(each % len(shape) for each in axes))
        kept = tuple(1 if axis in self.axes else size for axis, size in enumerate(shape))
        self.value = Value(name="reduced", shape=kept, block=block)
        self.count = prod(size for axis, size in enumerate(shape) if axis in self.axes)

    def of(self, name: str, read: Reader, reduce: Any = te.sum) -> Reader:
        """Return a reader, with all of the tensor's axes, of a stage that reduces `read`."""
        reduced = {axis: te.reduce_axis((0, self.shape[axis]), f"r{axis}") for axis in self.axes}

        def body(*index: Any) -> Any:
            whole = [reduced.get(axis, each) for axis, each in enumerate(index)]
            return reduce(read(*whole), axis=list(reduced.values()))

        return broadcast(self.site.stage(name, self.value, body), self.value.shape, len(self.shape))


REDUCED: Mapping[str, tuple[Any, Callable[[Any], Any] | None, Callable[[Any, float], Any] | None]] = {
    "ReduceMean": (te.sum, None, lambda x, count: x * literal(1 / count)),
    "ReduceSum": (te.sum, None, None),
    "ReduceMax": (te.max, None, None),
    "ReduceMin": (te.min, None, None),
    "ReduceSumSquare": (te.sum, lambda x: x * x, None),
    "ReduceL1": (te.sum, te.abs, None),
    "ReduceL2": (te.sum, lambda x: x * x, lambda x, _: te.sqrt(x)),
    "ReduceLogSum": (te.sum, None, lambda x, _: log(x)),
    "GlobalAveragePool": (te.sum, None, lambda x, count: x * literal(1 / count)),
    "GlobalMaxPool": (te.max, None, None),
}
"""Operator → reduction, what is done to each element before, and to the result after, with the count of elements."""


def reduce(site: Site, node: Node) -> Reader:
    """Return the result of a reduction over axes."""
    how, before, after = REDUCED[node.op]
    shape = site.shape(node.inputs[0])
    axes = _axes(site, node, len(shape))
    read = single(site, site.source(node.inputs[0]))
    work = _Flat(site, shape, axes, keep=len(site.out.shape) == len(shape))
    total = work.of(read if before is None else lambda *index: bound(read(*index), before), how)
    return own(site, total if after is None else lambda *index: after(total(*index), work.count))


class _Flat:
    """A reduction whose result has the output's own shape."""

    def __init__(self, site: Site, shape: Sequence[int], axes: Sequence[int], *, keep: bool) -> None:
        self.site, self.shape, self.axes, self.keep = site, tuple(shape), frozenset(axes), keep
        self.count = prod(size for axis, size in enumerate(shape) if axis in self.axes)

    def of(self, read: Reader, reduce: Any) -> Reader:
        """Return a reader, at the output's indices, of the reduction."""
        reduced = {axis: te.reduce_axis((0, self.shape[axis]), f"r{axis}") for axis in sorted(self.axes)}

        def body(*index: Any) -> Any:
            rest = list(index)
            if self.keep:
                rest = [each for axis, each in enumerate(index) if axis not in reduced]
            whole = [reduced[axis] if axis in reduced else rest.pop(0) for axis in range(len(self.shape))]
            return reduce(read(*whole), axis=list(reduced.values()))

        value = Value(name="sum", shape=self.site.out.shape, block=self.site.out.block)
        return self.site.stage("total", value, body) if reduced else read


def _axes(site: Site, node: Node, rank: int) -> tuple[int, ...]:
    if node.op.startswith("Global"):
        return tuple(range(2, rank))
    given = site.graph.integers(node, 1) if node.input(1) else node.attributes.get("axes")
    if not given:
        return () if node.attributes.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(int(each) % rank for each in given))


def softmax(site: Site, node: Node) -> Reader:
    """Return the result of Softmax or LogSoftmax over one axis; before opset 13 over all axes from it on."""
    shape = site.shape(node.inputs[0])
    axis = int(node.attributes.get("axis", -1 if site.graph.opset >= 13 else 1)) % len(shape)
    axes = [axis] if site.graph.opset >= 13 else list(range(axis, len(shape)))
    read = single(site, site.source(node.inputs[0]))
    over = Reduction(site, shape, axes)
    largest = over.of("largest", read, te.max)
    if node.op == "LogSoftmax":
        total = over.of("total", lambda *i: exp(read(*i) - largest(*i)))
        return own(site, lambda *i: read(*i) - largest(*i) - log(total(*i)))
    powers = site.stage("powers", Value(name="powers", shape=shape), lambda *i: exp(read(*i) - largest(*i)))
    total = over.of("total", powers)
    return own(site, lambda *i: powers(*i) / total(*i))


def _normalized(over: Reduction, read: Reader, epsilon: float, *, centred: bool = True) -> Reader:
    """Return (x - mean) / sqrt(variance + epsilon), in two passes, since one pass cancels."""
    share = literal(1 / over.count)
    total = over.of("mean", read) if centred else None

    def moved(*i: Any) -> Any:
        return read(*i) if total is None else read(*i) - total(*i) * share

    squares = over.of("variance", lambda *i: bound(moved(*i), lambda d: d * d))
    return lambda *i: moved(*i) / te.sqrt(squares(*i) * share + literal(epsilon))


def layer_normalization(site: Site, node: Node) -> Reader:
    """Return the result of LayerNormalization or RMSNormalization."""
    if any(name in site.graph.uses() for name in node.outputs[1:]):
        raise unsupported(node, "its mean or deviation is read")
    shape = site.shape(node.inputs[0])
    axis = int(node.attributes.get("axis", -1)) % len(shape)
    over = Reduction(site, shape, range(axis, len(shape)))
    read = single(site, site.source(node.inputs[0]))
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    normal = own(site, _normalized(over, read, epsilon, centred=node.op == "LayerNormalization"))
    return _affine(normal, [site.operand(name) for name in node.inputs[1:] if name])


def _affine(read: Reader, operands: Sequence[Reader]) -> Reader:
    if len(operands) < 2:
        return lambda *i: read(*i) * operands[0](*i) if operands else read(*i)
    return lambda *i: read(*i) * operands[0](*i) + operands[1](*i)


def instance_normalization(site: Site, node: Node) -> Reader:
    """Return the result of InstanceNormalization: each channel by its own mean and deviation."""
    shape = site.shape(node.inputs[0])
    over = Reduction(site, shape, range(2, len(shape)), site.out.block)
    read = single(site, site.source(node.inputs[0]))
    normal = own(site, _normalized(over, read, float(node.attributes.get("epsilon", 1e-5))))
    return _affine(normal, [site.by_channel(site.array(node, place)) for place in (1, 2)])


def group_normalization(site: Site, node: Node) -> Reader:
    """Return the result of GroupNormalization: neighbouring channels share mean and deviation."""
    shape, groups = site.shape(node.inputs[0]), int(node.attributes["num_groups"])
    per = shape[1] // groups
    read = single(site, site.source(node.inputs[0]))
    grouped = (shape[0], groups, per, *shape[2:])
    over = Reduction(site, grouped, range(2, len(grouped)))
    normal = _normalized(
        over, lambda n, g, c, *maps: read(n, g * per + c, *maps), float(node.attributes.get("epsilon", 1e-5))
    )
    result = own(site, lambda n, c, *maps: normal(n, c // per, c % per, *maps))
    arrays = [site.array(node, place) for place in (1, 2)]
    wide = [np.repeat(each, per) if each.size == groups != shape[1] else each for each in arrays]
    return _affine(result, [site.by_channel(each) for each in wide])


def lrn(site: Site, node: Node) -> Reader:
    """Return the result of LRN: each element by the squares of its neighbours in other channels."""
    size, channels = int(node.attributes["size"]), site.shape(node.inputs[0])[1]
    alpha, beta, bias = (
        float(node.attributes.get(key, value)) for key, value in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    )
    read = single(site, site.source(node.inputs[0]))
    near, first = te.reduce_axis((0, size), "near"), (size - 1) // 2

    def squares(n: Any, c: Any, *maps: Any) -> Any:
        other = c + near - first
        found = bound(read(n, tirx.max(0, tirx.min(other, channels - 1)), *maps), lambda x: x * x)
        return te.sum(tirx.Select(tirx.all(other >= 0, other < channels), found, literal(0)), axis=[near])

    total = site.stage("total", Value(name="total", shape=site.out.shape), squares)
    factor = literal(alpha / size)
    return own(site, lambda *i: read(*i) * exp(literal(-beta) * log(literal(bias) + factor * total(*i))))
