"""Models to try the TVM lowering on, and how far its answers are from ONNX Runtime's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgeprune.targets._tvm.cache import library
from edgeprune.targets._tvm.cpus import Cpu, cpu_of
from edgeprune.targets._tvm.host import OnHost
from edgeprune.targets._tvm.lower import lower

OPSET = 18

_FUNCTIONS: dict[int, dict[str, Any]] = {}
"""Kernels compiled in this session; the name of one stands for all that its code depends on."""


def host_cpu() -> Cpu:
    """Return the CPU of this machine."""
    return cpu_of("x86_64", "native")


def on_host(model: onnx.ModelProto, cpu: Cpu, effort: int = 3) -> OnHost:
    """Return a model lowered, compiled with LLVM's optimisation level `effort` and ready to run."""
    program, known = lower(model, cpu), _FUNCTIONS.setdefault(effort, {})
    for name, kernel in program.kernels.items():
        if name not in known:
            known[name] = library(name, kernel, cpu, effort)[name]
    return OnHost(program, known)


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


def gap(
    model: onnx.ModelProto, cpu: Cpu | None = None, feeds: Mapping[str, np.ndarray] | None = None, effort: int = 0
) -> float:
    """Return the largest difference from ONNX Runtime, relative to the largest answer, over all outputs."""
    cpu = cpu or host_cpu()
    feeds = feeds or feeds_of(model)
    seen = on_host(model, cpu, effort).outputs(feeds)
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
