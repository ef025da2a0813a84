"""One kernel while it is put together: tensors it reads, constants it carries, stages, and what it writes."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import te, tirx

from .values import Reader, Value


@dataclass
class Kernel:
    """A kernel in the making.

    Attributes:
        kind: "map", "conv", "depthwise", "gemm" or "reduce": which schedule it gets.
        reads: values it reads, in argument order.
        constants: arrays in argument order, packed as the kernel wants them.
    """

    kind: str = "map"
    reads: list[Value] = field(default_factory=list)
    constants: list[NDArray[Any]] = field(default_factory=list)
    _tensors: list[Any] = field(default_factory=list)
    _packed: list[Any] = field(default_factory=list)

    def read(self, value: Value) -> Reader:
        """Return a reader of a value that another step wrote."""
        if value not in self.reads:
            self.reads.append(value)
            self._tensors.append(te.placeholder(value.physical, "float32", f"in{len(self.reads)}"))
        tensor = self._tensors[self.reads.index(value)]
        return lambda *index: tensor[value.place(*index)]

    def constant(self, array: NDArray[Any]) -> Any:
        """Return the tensor of an array that travels with the kernel."""
        self.constants.append(np.ascontiguousarray(array, dtype=np.float32))
        tensor = te.placeholder(array.shape, "float32", f"constant{len(self.constants)}")
        self._packed.append(tensor)
        return tensor

    def stage(self, name: str, value: Value, body: Reader) -> Reader:
        """Return a reader of an intermediate tensor that lies in memory as `value` does."""
        tensor = te.compute(value.physical, lambda *place: body(*value.logical(*place)), name)
        return lambda *index: tensor[value.place(*index)]

    def finish(self, value: Value, body: Reader) -> Any:
        """Return the function that writes `value`; arguments: what is read, the constants, what is written."""
        out = te.compute(value.physical, lambda *place: body(*value.logical(*place)), "out")
        return te.create_prim_func([*self._tensors, *self._packed, out])


def const(number: float) -> Any:
    """Return a float32 literal."""
    return tirx.const(float(number), "float32")
