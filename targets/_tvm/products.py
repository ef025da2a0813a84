"""Matrix products: rows of one operand times columns of the other, the columns packed into registers."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .graph import Node, unsupported
from .indexing import broadcast, ravel, unravel
from .site import Site
from .tensorir import te, tirx
from .tiles import Plan, contraction_tile, cost
from .values import Reader

WORTH_A_COPY = 1.15


def gemm(site: Site, node: Node) -> Reader:
    """Return the result of Gemm: alpha A B + beta C."""
    alpha, beta = float(node.attributes.get("alpha", 1.0)), float(node.attributes.get("beta", 1.0))
    turned = bool(node.attributes.get("transA", 0)), bool(node.attributes.get("transB", 0))
    left, right = site.source(node.inputs[0]), node.inputs[1]
    depth = site.shape(node.inputs[0])[0 if turned[0] else 1]
    rows = (lambda m, k: left(k, m)) if turned[0] else left
    if site.is_constant(right):
        matrix = site.array(node, 1).astype(np.float32) * alpha
        total = _Product(site, (), depth).with_matrix(rows, matrix.T if turned[1] else matrix)
    else:
        read, factor = site.source(right), site.number(alpha)
        columns = (lambda k, n: read(n, k) * factor) if turned[1] else (lambda k, n: read(k, n) * factor)
        total = _Product(site, (), depth).with_columns(rows, columns)
    return total if not node.input(2) else _added(site, node, total, beta)


def _added(site: Site, node: Node, total: Reader, beta: float) -> Reader:
    if site.is_constant(node.inputs[2]):
        bias = site.spread(site.array(node, 2).astype(np.float32) * beta)
        return lambda *index: total(*index) + bias(*index)
    other, factor = site.operand(node.inputs[2]), site.number(beta)
    return lambda *index: total(*index) + other(*index) * factor


def matmul(site: Site, node: Node) -> Reader:
    """Return the result of MatMul of matrices, or of stacks of matrices."""
    shapes = [site.shape(name) for name in node.inputs]
    if min(len(each) for each in shapes) < 2:
        raise unsupported(node, "a product with a vector")
    batch, depth = site.out.shape[:-2], shapes[0][-1]
    rank = len(site.out.shape)
    left = broadcast(site.source(node.inputs[0]), (*shapes[0][:-2], -1, -1), rank)
    product = _Product(site, batch, depth)
    if site.is_constant(node.inputs[1]) and len(shapes[1]) == 2:
        return product.with_matrix(left, site.array(node, 1))
    return product.with_columns(left, broadcast(site.source(node.inputs[1]), (*shapes[1][:-2], -1, -1), rank))


class _Product:
    """A product of a kernel, as a contraction whose pixels are the rows.

    Args:
        batch: leading axes of the result.
        depth: elements of a row.
    """

    def __init__(self, site: Site, batch: Sequence[int], depth: int) -> None:
        self.site, self.batch, self.depth = site, tuple(batch), depth
        self.rows, self.columns = site.out.shape[-2:]
        self.lanes = site.cpu.lanes
        self.outer = -(-self.columns // self.lanes)
        registers = site.cpu.registers
        loose, exact = (contraction_tile(self.outer, 1, self.rows, registers, padded=each) for each in (True, False))
        self.copied = cost(exact, self.rows, registers) > WORTH_A_COPY * cost(loose, self.rows, registers)
        self.tile = loose if self.copied else exact

    def with_matrix(self, left: Reader, matrix: NDArray[Any]) -> Reader:
        """Return a reader of left(…, m, k) times a constant matrix [k, n]."""
        padded = np.pad(matrix, ((0, 0), (0, -self.columns % self.lanes)))
        shape = (self.depth, self.outer // self.tile.blocks, self.tile.blocks, self.lanes)
        packed = self.site.table(padded.reshape(shape).transpose(1, 0, 2, 3))
        return self._total(left, lambda _, o, k, lane: packed(o // self.tile.blocks, k, o % self.tile.blocks, lane))

    def with_columns(self, left: Reader, right: Reader) -> Reader:
        """Return a reader of left(…, m, k) times right(…, k, n), whose columns are packed first."""
        shape = (prod(self.batch), self.outer, self.depth, self.lanes)

        def body(b: Any, o: Any, k: Any, lane: Any) -> Any:
            column = o * self.lanes + lane
            inside = tirx.min(column, self.columns - 1)
            return right(*unravel(b, self.batch), k, inside)

        packed = te.compute(shape, body, "pack")
        return self._total(left, packed)

    def _total(self, left: Reader, right: Reader) -> Reader:
        width = -(-self.rows // self.tile.pixels) * self.tile.pixels
        rows = self._copied_rows(left, width) if self.copied else left
        inner = self.lanes if self.depth % self.lanes == 0 else 1
        rc, ri = te.reduce_axis((0, self.depth // inner), "rc"), te.reduce_axis((0, inner), "ri")
        batch = prod(self.batch)

        def body(b: Any, o: Any, _: Any, m: Any, lane: Any) -> Any:
            k = rc * inner + ri
            return te.sum(rows(*unravel(b, self.batch), m, k) * right(b, o, k, lane), axis=[rc, ri])

        total = te.compute((batch, self.outer, 1, width, self.lanes), body, "sum")
        self.site.plan = Plan(kind="contraction", tile=self.tile)

        def at(*index: Any) -> Any:
            *lead, m, n = index
            return total(ravel(tuple(lead), self.batch), n // self.lanes, 0, m, n % self.lanes)

        return at

    def _copied_rows(self, left: Reader, width: int) -> Reader:
        """Return a reader of the rows with more behind the last one, so that tiles may be whole."""
        shape = (*self.batch, width, self.depth)
        tensor = te.compute(shape, lambda *i: left(*i[:-2], tirx.min(i[-2], self.rows - 1), i[-1]), "rows")
        return lambda *index: tensor(*index)
