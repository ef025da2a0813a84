"""One kernel while it is put together: what it reads, constants it carries, stages on the way, what it writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cpus import Cpu
from .elementwise import bound, element
from .graph import Graph, Node
from .indexing import broadcast
from .program import Kernel
from .tensorir import te, tirx
from .tiles import Plan
from .values import Reader, Value


@dataclass(frozen=True, kw_only=True)
class Image:
    """A two-dimensional map with channels, read by (batch, channel, y, x); a sequence is a map of one row.

    Attributes:
        shape: (batch, channels, height, width).
        block: channels that lie together, 0 if none do.
        copied: whether it is a stage of this kernel, which may be made larger than the map.
    """

    read: Reader
    shape: tuple[int, int, int, int]
    block: int
    copied: bool = False


class Site:
    """A kernel in the making.

    Args:
        values: every value that an earlier step wrote, and the inputs.
        out: what this kernel writes.
    """

    def __init__(self, graph: Graph, values: Mapping[str, Value], cpu: Cpu, out: Value) -> None:
        self.graph, self.cpu, self.out = graph, cpu, out
        self.plan = Plan()
        self.reads: list[Value] = []
        self.constants: list[NDArray[Any]] = []
        self._values = values
        self._placeholders: list[Any] = []
        self._tables: list[Any] = []
        self._inside: dict[str, Reader] = {}

    @property
    def dtype(self) -> str:
        """Return the precision it computes in."""
        return self.cpu.dtype

    # -- what is read

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the logical shape of a value or constant."""
        return self.graph.shapes[name]

    def array(self, node: Node, place: int) -> NDArray[Any]:
        """Return an input that must be constant.

        Raises:
            CompileError: if it is not.
        """
        return self.graph.array(node, place)

    def is_constant(self, name: str) -> bool:
        """Return whether a name is a constant of the graph."""
        return name in self.graph.constants

    def source(self, name: str) -> Reader:
        """Return a reader of a value or a constant at its own logical indices."""
        if name in self._inside:
            return self._inside[name]
        if name in self.graph.constants:
            table = self.table(self.graph.constants[name])
            return lambda *index: table[index]
        return self._read(self._values[name])

    def operand(self, name: str) -> Reader:
        """Return a reader of a value or a constant at the indices of the kernel's output."""
        if name in self.graph.constants:
            return self.spread(self.graph.constants[name])
        read = broadcast(self.source(name), self.shape(name), len(self.out.shape))
        if not self.out.ragged or len(self.shape(name)) == len(self.out.shape):
            return read
        last = self.out.shape[1] - 1
        return lambda n, c, *maps: read(n, tirx.min(c, last), *maps)

    def image(self, name: str) -> Image:
        """Return a value with one or two spatial axes."""
        value, read = self._values.get(name), self.source(name)
        block = value.block if value is not None and name not in self._inside else 0
        shape = self.shape(name)
        if len(shape) == 4:
            return Image(read=read, shape=(shape[0], shape[1], shape[2], shape[3]), block=block)
        flat = (shape[0], shape[1], 1, shape[2])
        return Image(read=lambda n, c, _, x: read(n, c, x), shape=flat, block=block)

    def _read(self, value: Value) -> Reader:
        if value not in self.reads:
            self.reads.append(value)
            self._placeholders.append(te.placeholder(value.physical, value.dtype, f"in{len(self.reads)}"))
        tensor = self._placeholders[self.reads.index(value)]
        last = self._last_channel(value)

        def at(*index: Any) -> Any:
            if last is not None:
                index = (index[0], tirx.min(index[1], last), *index[2:])
            found = tensor(*value.place(*index))
            return found if value.dtype == self.dtype else found.astype(self.dtype)

        return at

    def _last_channel(self, value: Value) -> int | None:
        """Return the last channel that may be read, if lanes beyond the last one of the output might ask for more."""
        if not self.out.ragged or len(value.shape) != len(self.out.shape):
            return None
        return (value.physical[1] * value.block if value.block else value.shape[1]) - 1

    # -- constants

    def number(self, value: float) -> Any:
        """Return a literal in the kernel's precision."""
        return tirx.const(float(value), self.dtype)

    def table(self, array: NDArray[Any], dtype: str = "") -> Any:
        """Return the tensor of an array that travels with the kernel."""
        dtype = dtype or self.dtype
        self.constants.append(np.ascontiguousarray(array, dtype=dtype))
        tensor = te.placeholder(array.shape, dtype, f"constant{len(self.constants)}")
        self._tables.append(tensor)
        return tensor

    def spread(self, array: NDArray[Any]) -> Reader:
        """Return a reader of an array at the indices of the output, by NumPy's rules, in the output's layout."""
        if array.size == 1:
            only = self.number(array.reshape(()).item())
            return lambda *_: only
        rank = len(self.out.shape)
        array = array.reshape((1,) * (rank - array.ndim) + array.shape)
        value = Value(name="", shape=array.shape, block=self.out.block if array.shape[1:2] != (1,) else 0)
        tensor = self.table(packed(array, value))
        return broadcast(lambda *index: tensor(*value.place(*index)), array.shape, rank)

    def by_channel(self, array: NDArray[Any]) -> Reader:
        """Return a reader of one number per channel at the indices of the output."""
        return self.spread(array.reshape(-1, *[1] * (len(self.out.shape) - 2)))

    # -- stages

    def stage(self, name: str, value: Value, body: Reader) -> Reader:
        """Return a reader of an intermediate tensor that lies in memory as `value` does."""
        tensor = te.compute(value.physical, lambda *place: body(*value.logical(*place)), name)
        return lambda *index: tensor(*value.place(*index))

    def element(self, node: Node) -> Reader:
        """Return an element-wise operator's result at the indices of the output."""
        compute = element(node.op, node.attributes, self.dtype)
        if node.op == "Pow" and self.is_constant(node.inputs[1]) and self.array(node, 1).size == 1:
            compute = self._power(self.array(node, 1).reshape(()).item(), compute)
        operands = [self.operand(name) if name else None for name in node.inputs]
        if node.op == "Clip" and len(operands) == 1:  # bounds were attributes before opset 11
            operands += [self._bound(node, "min"), self._bound(node, "max")]
        return lambda *index: compute(*(None if each is None else each(*index) for each in operands))

    def _bound(self, node: Node, key: str) -> Reader | None:
        if key not in node.attributes:
            return None
        bound_of = self.number(node.attributes[key])
        return lambda *_: bound_of

    def _power(self, exponent: float, otherwise: Any) -> Any:
        if exponent in (2.0, 3.0):
            return lambda x, _: bound(x, lambda v: v * v if exponent == 2.0 else v * v * v)
        if exponent == 0.5:
            return lambda x, _: te.sqrt(x)
        return (lambda x, _: x) if exponent == 1.0 else otherwise

    def add(self, name: str, read: Reader) -> None:
        """Let later operators of this kernel read a result by its name."""
        self._inside[name] = read

    def finish(self, name: str, *, masked: bool) -> Kernel:
        """Return the kernel that writes the result `name`.

        Args:
            masked: lanes beyond the last channel are set to 0, since what is computed there may not be finite.
        """
        body, out = self._inside[name], self.out

        def at(*place: Any) -> Any:
            index = out.logical(*place)
            found = body(*index)
            if masked and out.ragged:
                found = tirx.Select(index[1] < out.shape[1], found, self.number(0))
            return found if out.dtype == self.dtype else found.astype(out.dtype)

        tensor = te.compute(out.physical, at, "out")
        func = te.create_prim_func([*self._placeholders, *self._tables, tensor])
        return Kernel(func=func, plan=self.plan)


def packed(array: NDArray[Any], value: Value) -> NDArray[Any]:
    """Return an array as `value` lies in memory, lanes beyond the last channel 0."""
    if not value.block:
        return array
    widths: Sequence[tuple[int, int]] = [(0, 0), (0, -value.shape[1] % value.block), *[(0, 0)] * (array.ndim - 2)]
    split = np.pad(array, widths).reshape(array.shape[0], -1, value.block, *array.shape[2:])
    return np.moveaxis(split, 2, -1)
