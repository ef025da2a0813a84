"""A lowered network: kernels, the constants and buffers they work on, and the calls in order.

    step  k3f2a…  in0  c0  c1  a0         reads input 0, two constants, writes the arena
    step  k77b0…  a0   c2  a1
    step  k12c9…  a1   c3  out0

On Arm a kernel calls nothing but `memset`, `memcpy` and the two functions by which TVM asks for scratch memory, through
the pointers `__TVMBackendAllocWorkspace` and `__TVMBackendFreeWorkspace` of its library; scratch is given back in the
reverse order. A wrong argument is reported through `TVMFFIErrorSetRaisedFromCStrParts`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .arena import aligned
from .tiles import Plan

Space = Literal["constant", "arena", "input", "output"]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What one kernel computes, and how it is to run.

    Attributes:
        func: TVM's PrimFunc as TE made it, not yet scheduled; arguments: what is read, constants, what is written.
        plan: which schedule it gets.
        trace: JSON of the TVM trace of a tuned schedule, which is replayed in place of the plan's; empty: the plan's.
    """

    func: Any
    plan: Plan
    trace: str = ""


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A tensor in memory, row-major without gaps.

    Attributes:
        space: which memory it lies in; each input and each output is a memory of its own.
        offset: bytes from the start of that memory, a multiple of 64; 0 in an input or output.
        dtype: "float32", "float16" or "int32".
    """

    space: Space
    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output by the name that the ONNX model gives it, always plain float32."""

    name: str
    buffer: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call.

    Attributes:
        kernel: its name.
        buffers: its arguments; the last one is written, all others are read.
        node: the first ONNX node whose work it does.
    """

    kernel: str
    buffers: tuple[int, ...]
    node: str


@dataclass(frozen=True, kw_only=True)
class Program:
    """A network ready to be compiled and run.

    Attributes:
        kernels: by name; the name is a digest of all that its object code depends on.
        constants: packed as the kernels want them; a buffer of space "constant" lies at their start in `blob`.
        arena_bytes: bytes of the memory that intermediate tensors share.
    """

    kernels: Mapping[str, Kernel]
    constants: tuple[NDArray[Any], ...]
    buffers: tuple[Buffer, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    steps: tuple[Step, ...]
    arena_bytes: int

    @property
    def constant_bytes(self) -> int:
        """Return the bytes of all constants with the gaps between them."""
        return sum(aligned(each.nbytes) for each in self.constants)

    def blob(self) -> bytes:
        """Return all constants, little-endian, each at a multiple of 64 bytes."""
        parts = []
        for each in self.constants:
            content = np.ascontiguousarray(each).astype(each.dtype.newbyteorder("<"), copy=False).tobytes()
            parts += [content, bytes(aligned(len(content)) - len(content))]
        return b"".join(parts)
