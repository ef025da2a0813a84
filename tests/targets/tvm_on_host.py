"""Programs run on this machine: kernels compiled by TVM's LLVM and called through its FFI, memory laid out by hand.

The arena is filled with NaN before each run: whatever reads what no step has written cannot give the right answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgeprune.targets._tvm.arena import ALIGNMENT
from edgeprune.targets._tvm.cache import library
from edgeprune.targets._tvm.cpus import Cpu, cpu_of
from edgeprune.targets._tvm.lower import lower
from edgeprune.targets._tvm.program import Buffer, Program

OPSET = 18

_LIBRARIES: dict[str, Any] = {}
"""Kernels compiled in this session; the name of one stands for all that its code depends on."""


def host_cpu() -> Cpu:
    """Return the CPU of this machine."""
    return cpu_of("x86_64", "native")


class OnHost:
    """A program with its memory."""

    def __init__(self, program: Program, cpu: Cpu) -> None:
        import tvm_ffi

        self._program = program
        for name, kernel in program.kernels.items():
            if name not in _LIBRARIES:
                _LIBRARIES[name] = library(name, kernel, cpu)
        self._spaces = {"constant": aligned(program.constant_bytes), "arena": aligned(program.arena_bytes)}
        self._spaces["constant"][: program.constant_bytes] = np.frombuffer(program.blob(), np.uint8)
        self.buffers = [self._array(each) for each in program.buffers]
        tensors = [tvm_ffi.from_dlpack(each) for each in self.buffers]
        self.calls = [
            (_LIBRARIES[step.kernel][step.kernel], [tensors[place] for place in step.buffers]) for step in program.steps
        ]

    def _array(self, buffer: Buffer) -> np.ndarray:
        count = int(np.prod(buffer.shape)) * np.dtype(buffer.dtype).itemsize
        whole = self._spaces.get(buffer.space)
        part = aligned(count) if whole is None else whole[buffer.offset :]
        return part[:count].view(buffer.dtype).reshape(buffer.shape)

    def run(self) -> None:
        """Call every kernel in order."""
        for function, arguments in self.calls:
            function(*arguments)

    def outputs(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        self._spaces["arena"][:] = 0xFF
        for port in self._program.inputs:
            self.buffers[port.buffer][...] = feeds[port.name]
        self.run()
        return {port.name: self.buffers[port.buffer].copy() for port in self._program.outputs}


def aligned(count: int) -> np.ndarray:
    """Return so many bytes at an address that whole vectors may be loaded from."""
    memory = np.zeros(count + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count]


def feeds_of(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    """Return normal random inputs."""
    draw = np.random.default_rng(seed)
    constants = {each.name for each in model.graph.initializer}
    shapes = {
        each.name: [size.dim_value for size in each.type.tensor_type.shape.dim]
        for each in model.graph.input
        if each.name not in constants
    }
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gap(model: onnx.ModelProto, cpu: Cpu | None = None, feeds: Mapping[str, np.ndarray] | None = None) -> float:
    """Return the largest difference from ONNX Runtime, relative to the largest answer, over all outputs."""
    cpu = cpu or host_cpu()
    feeds = feeds or feeds_of(model)
    seen = OnHost(lower(model, cpu), cpu).outputs(feeds)
    wanted = expected(model, feeds)
    assert {name: each.shape for name, each in seen.items()} == {name: each.shape for name, each in wanted.items()}
    return max(float(np.abs(seen[name] - wanted[name]).max() / np.abs(wanted[name]).max()) for name in wanted)


def expected(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return ONNX Runtime's outputs by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int]],
    outputs: Sequence[str],
    constants: Mapping[str, Any] | None = None,
    opset: int = OPSET,
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> onnx.ModelProto:
    """Return a model of float32 inputs and outputs, whose shapes are inferred unless they are given as `sizes`."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (sizes or {}).get(name)) for name in outputs]
    arrays = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "net", ports, ends, arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return model if sizes else onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Return a random float32 array."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)
