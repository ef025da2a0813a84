"""A stand-in for the `tensorrt` module: the names of each version, and answers and refusals computed by ONNX Runtime.

REPLAY_TENSORRT says which version it imitates: 8.6.1, 10.3.0 or 11.1.0 (names and rules of the open-source bindings at
those tags). REPLAY_TENSORRT_CRASH=import or =build ends the process as a broken installation does. It works on the
memory of `driver.c`, and crashes as the real one does if it is used before the driver is opened.
"""

import ctypes
import enum
import os
import signal
import time

import numpy as np
import onnx
import onnxruntime

__version__ = os.environ.get("REPLAY_TENSORRT", "10.3.0")
_MAJOR = int(__version__.split(".")[0])
_MAGIC = f"replayed engine {__version__}\n".encode()

if os.environ.get("REPLAY_TENSORRT_CRASH") == "import":
    os.kill(os.getpid(), signal.SIGSEGV)

_driver = ctypes.CDLL("libcuda.so.1")
_WORK = ctypes.CFUNCTYPE(ctypes.c_int)


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity

    def log(self, severity, msg):
        raise NotImplementedError


class IProfiler:
    pass


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    INT64 = 8


_NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT32: np.int32, DataType.INT64: np.int64}


def nptype(kind):
    return _NUMPY[kind]


def _flags(**members):
    return enum.IntEnum("Flags", members)


if _MAJOR >= 11:
    NetworkDefinitionCreationFlag = _flags(STRONGLY_TYPED=1)
    BuilderFlag = _flags(TF32=7)
elif _MAJOR == 10:
    NetworkDefinitionCreationFlag = _flags(EXPLICIT_BATCH=0, STRONGLY_TYPED=1)
    BuilderFlag = _flags(FP16=0, INT8=1, TF32=7)
else:
    NetworkDefinitionCreationFlag = _flags(EXPLICIT_BATCH=0, EXPLICIT_PRECISION=1)
    BuilderFlag = _flags(FP16=0, INT8=1, TF32=7)


class _TimingCache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return self.content


class _Config:
    def __init__(self):
        self.flags = {BuilderFlag.TF32}
        self.builder_optimization_level = 3
        self.workspace = None
        self.cache = None

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool, size):
        assert isinstance(pool, MemoryPoolType)
        self.workspace = size

    def create_timing_cache(self, content):
        return _TimingCache(bytes(content) or _MAGIC) if not content or content.startswith(_MAGIC) else None

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class _Tensor:
    def __init__(self, value):
        self.dtype = {1: DataType.FLOAT, 10: DataType.HALF}.get(value.type.tensor_type.elem_type, DataType.INT64)


class _Layer:
    type = "LayerType.ANY"
    num_outputs = 0


class _Network:
    def __init__(self, flags):
        self.flags = flags
        self.model = None

    @property
    def num_layers(self):
        return len(self.model.graph.node)

    def get_layer(self, at):
        return _Layer()

    @property
    def num_inputs(self):
        return len(self.model.graph.input)

    @property
    def num_outputs(self):
        return len(self.model.graph.output)

    def get_input(self, at):
        return _Tensor(self.model.graph.input[at])

    def get_output(self, at):
        return _Tensor(self.model.graph.output[at])


class _ParserError:
    def __init__(self, text):
        self._text = text

    def node(self):
        return 0

    def desc(self):
        return self._text


if _MAJOR >= 10:
    _ParserError.node_name = lambda self: "somewhere"


class OnnxParser:
    def __init__(self, network, logger):
        self.network = network
        self.errors = []
        batch = 1 << 0 if _MAJOR < 10 else 0
        assert network.flags & batch == batch, "the parser wants explicit batch"

    def parse(self, content):
        try:
            model = onnx.load_model_from_string(content)
            _session(model)
        except Exception as error:
            self.errors.append(_ParserError(str(error).splitlines()[0]))
            return False
        self.network.model = model
        return bool(model.graph.output)

    @property
    def num_errors(self):
        return len(self.errors)

    def get_error(self, at):
        return self.errors[at]


def _session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Builder:
    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        return _Network(flags)

    def create_builder_config(self):
        return _Config()

    def build_serialized_network(self, network, config):
        if os.environ.get("REPLAY_TENSORRT_CRASH") == "build":
            os.kill(os.getpid(), signal.SIGSEGV)
        said = _misuse(network, config) or os.environ.get("REPLAY_TENSORRT_BUILD_ERROR")
        if said:
            self.logger.log(Severity.ERROR, said)
            return None
        config.cache.content += b"one more tactic\n"
        return memoryview(_MAGIC + network.model.SerializeToString())


def _misuse(network, config):
    """Return what the real builder would object to."""
    half = any(each.data_type == onnx.TensorProto.FLOAT16 for each in network.model.graph.initializer)
    quantised = any(node.op_type == "QuantizeLinear" for node in network.model.graph.node)
    permitted = {each.name for each in config.flags}
    if _MAJOR >= 10:
        if not network.flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED:
            return "the network is not strongly typed: its precision would be chosen by the builder"
        if permitted & {"FP16", "INT8"}:
            return "Invalid usage, setting fp16 mode is not allowed if graph is strongly typed"
        return None
    if ((half or quantised) and "FP16" not in permitted) or (quantised and "INT8" not in permitted):
        return "precision flags are missing: the layers would run in fp32"
    return None


class Runtime:
    def __init__(self, logger):
        if not _driver.replay_usable():
            os.kill(os.getpid(), signal.SIGSEGV)
        self.logger = logger

    def deserialize_cuda_engine(self, content):
        if not content.startswith(_MAGIC):
            self.logger.log(Severity.ERROR, "The engine plan file is not compatible with this version of TensorRT")
            return None
        return _Engine(onnx.load_model_from_string(content[len(_MAGIC) :]))


class _Engine:
    def __init__(self, model):
        self.session = _session(model)
        self.layers = _layers(model)
        self.ends = {each.name: (TensorIOMode.INPUT, each) for each in self.session.get_inputs()}
        self.ends |= {each.name: (TensorIOMode.OUTPUT, each) for each in self.session.get_outputs()}

    @property
    def num_io_tensors(self):
        return len(self.ends)

    def get_tensor_name(self, at):
        return list(self.ends)[at]

    def get_tensor_mode(self, name):
        return self.ends[name][0]

    def get_tensor_shape(self, name):
        return tuple(self.ends[name][1].shape)

    def get_tensor_dtype(self, name):
        return {"tensor(float)": DataType.FLOAT, "tensor(int64)": DataType.INT64}[self.ends[name][1].type]

    def create_execution_context(self):
        return _Context(self)


class _Context:
    def __init__(self, engine):
        self.engine = engine
        self.profiler = None
        self.addresses = {}
        self._work = _WORK(self._run)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle):
        assert stream_handle
        return _driver.replay_enqueue(self._work) == 0

    def _run(self):
        inputs = {name: self._view(name) for name, (mode, _) in self.engine.ends.items() if mode == TensorIOMode.INPUT}
        outputs = [name for name, (mode, _) in self.engine.ends.items() if mode == TensorIOMode.OUTPUT]
        before = time.perf_counter()
        for name, value in zip(outputs, self.engine.session.run(outputs, inputs), strict=True):
            self._view(name)[...] = value
        if self.profiler is not None:
            spent = 1000 * (time.perf_counter() - before)
            for name, share in self.engine.layers.items():
                self.profiler.report_layer_time(name, spent * share)
        return 0

    def _view(self, name):
        shape = self.engine.get_tensor_shape(name)
        kind = np.dtype(nptype(self.engine.get_tensor_dtype(name)))
        size = int(np.prod(shape)) * kind.itemsize
        memory = (ctypes.c_char * max(size, 1)).from_address(self.addresses[name])
        return np.frombuffer(memory, kind, int(np.prod(shape))).reshape(shape)


def _layers(model):
    """Return layer name → share of the time: weighted nodes, each with the activation that follows it."""
    sizes = {each.name: int(np.prod(each.dims)) for each in model.graph.initializer}
    readers = {node.input[0]: node for node in model.graph.node if node.op_type == "Relu"}
    found = {"Reformatting CopyNode for Input Tensor 0 to first": 1}
    for node in model.graph.node:
        weights = [sizes.get(each, 0) for each in node.input[1:2]]
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            after = readers.get(node.output[0])
            found[f"{node.name} + {after.name}" if after else node.name] = weights[0] + 1
    total = sum(found.values())
    return {name: size / total for name, size in found.items()}
