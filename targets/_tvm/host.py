"""A program run in this very process, on the CPU that compiles it: for checks, and for timing without a board."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arena import ALIGNMENT
from .program import Buffer, Program
from .tensorir import tvm_ffi


class OnHost:
    """A program and its memory.

    Args:
        functions: of each kernel, by its name, as a module of `cache.library` holds it.
    """

    def __init__(self, program: Program, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._program = program
        self._spaces = {"constant": _memory(program.constant_bytes), "arena": _memory(program.arena_bytes)}
        self._spaces["constant"][:] = np.frombuffer(program.blob(), np.uint8)
        self._buffers = [self._array(each) for each in program.buffers]
        tensors = [tvm_ffi.from_dlpack(each) for each in self._buffers]
        self._calls = [(functions[step.kernel], [tensors[place] for place in step.buffers]) for step in program.steps]

    def _array(self, buffer: Buffer) -> NDArray[Any]:
        count = prod(buffer.shape) * np.dtype(buffer.dtype).itemsize
        whole = self._spaces.get(buffer.space)
        part = _memory(count) if whole is None else whole[buffer.offset :]
        return part[:count].view(buffer.dtype).reshape(buffer.shape)

    def run(self) -> None:
        """Call every kernel in order."""
        for function, arguments in self._calls:
            function(*arguments)

    def outputs(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the outputs by name. The arena starts as NaN: reading what no step has written shows."""
        self._spaces["arena"][:] = 0xFF
        for port in self._program.inputs:
            self._buffers[port.buffer][...] = feeds[port.name]
        self.run()
        return {port.name: self._buffers[port.buffer].copy() for port in self._program.outputs}


def _memory(count: int) -> NDArray[np.uint8]:
    """Return so many bytes at an address that whole vectors may be loaded from."""
    whole = np.zeros(count + ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return whole[start : start + count]
