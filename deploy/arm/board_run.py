"""Run, time and check the engine of the bundle this file lies in, from Python. Needs numpy and apache-tvm-ffi, no more.

    python device/board_run.py --input x.npy [--output y.npy]      answers for every row of x.npy
    python device/board_run.py --bench [--seconds 3]               milliseconds on this device, now
    python device/board_run.py --selftest                          every digest, and the recorded answers

Options, words and exit codes are those of runner.py in the bundle, which does everything but the inference. To use the
engine in a program of your own, copy `Engine`: `Engine(path).run(None, {"x": array})`.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

ALIGNMENT = 64
"""Bytes; generated code loads whole vector registers."""

ENGINE = "device/engine.so"
TAKE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
GIVE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
"""Of TVMBackendAllocWorkspace and TVMBackendFreeWorkspace, which kernels call through pointers that they export."""


class Scratch:
    """Scratch memory for kernels, kept from call to call; requests are given back in reverse order."""

    def __init__(self) -> None:
        self._blocks: list[Array] = []
        self._depth = 0
        self.take, self.give = TAKE(self._take), GIVE(self._give)

    def _take(self, _device: int, _number: int, size: int, _code: int, _bits: int) -> int:
        if self._depth == len(self._blocks):
            self._blocks.append(aligned(size))
        if self._blocks[self._depth].nbytes < size:
            self._blocks[self._depth] = aligned(size)
        self._depth += 1
        return int(self._blocks[self._depth - 1].ctypes.data)

    def _give(self, _device: int, _number: int, _memory: int | None) -> int:
        self._depth -= 1
        return 0


def aligned(size: int) -> Array:
    """Return zeroed bytes at an aligned address."""
    import numpy

    whole = numpy.zeros(size + ALIGNMENT, numpy.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return whole[start : start + size]


class Engine:
    """An engine file, loaded; its program is read as deploy/arm/program.h of edgeprune describes it.

    Args:
        path: of an engine that is what it was: it is code, and its text is believed.
    """

    def __init__(self, path: Path) -> None:
        tvm_ffi = importlib.import_module("tvm_ffi")
        self._from_dlpack = tvm_ffi.from_dlpack
        self._kernels = tvm_ffi.load_module(str(path))
        self._library = ctypes.CDLL(str(path))
        self._scratch = Scratch()
        self._lend("__TVMBackendAllocWorkspace", self._scratch.take)
        self._lend("__TVMBackendFreeWorkspace", self._scratch.give)
        self._memories: list[Array] = []
        self._arrays: list[Array] = []
        self.inputs: dict[str, Array] = {}
        self.outputs: dict[str, Array] = {}
        self._calls: list[tuple[Any, list[Any]]] = []
        for line in self._between("edgeprune_program").tobytes().decode("ascii").splitlines():
            self._read(line.split(" "))

    def run(self, names: list[str] | None, given: dict[str, Array]) -> list[Array]:
        """Return copies of the outputs called `names`, all of them if that is None, for inputs by name."""
        for name, array in given.items():
            if array.shape != self.inputs[name].shape or array.dtype != self.inputs[name].dtype:
                raise ValueError(f"input {name!r} is {self.inputs[name].dtype} {self.inputs[name].shape}")
            self.inputs[name][...] = array
        for kernel, arguments in self._calls:
            kernel(*arguments)
        return [self.outputs[name].copy() for name in names or self.outputs]

    def _lend(self, symbol: str, function: Any) -> None:
        if hasattr(self._library, symbol):
            place = ctypes.c_void_p.in_dll(self._library, symbol)
            place.value = ctypes.cast(function, ctypes.c_void_p).value

    def _between(self, symbol: str) -> Array:
        """Return the bytes of the library from a symbol to the one that ends it."""
        import numpy

        first, last = (ctypes.addressof(ctypes.c_char.in_dll(self._library, symbol + each)) for each in ("", "_end"))
        return numpy.ctypeslib.as_array((ctypes.c_uint8 * (last - first)).from_address(first))

    def _read(self, words: list[str]) -> None:
        verb = words[0]
        if verb == "memory":
            constants = words[2] == "constants"
            self._memories.append(self._between("edgeprune_constants") if constants else aligned(int(words[3])))
        elif verb == "buffer":
            self._arrays.append(self._array(int(words[2]), words[3], int(words[4]), [int(each) for each in words[6:]]))
        elif verb in ("input", "output"):
            ports = self.inputs if verb == "input" else self.outputs
            ports[unquote(words[2])] = self._arrays[int(words[1])]
        elif verb == "step":
            arguments = [self._from_dlpack(self._arrays[int(each)]) for each in words[4:]]
            self._calls.append((self._kernels[words[1]], arguments))

    def _array(self, memory: int, dtype: str, offset: int, shape: list[int]) -> Array:
        import numpy

        size = numpy.dtype(dtype).itemsize * int(numpy.prod(shape))
        part: Array = self._memories[memory][offset : offset + size]
        return part.view(dtype).reshape(shape)


def runner() -> ModuleType:
    """Return runner.py of the bundle, made to run the engine instead of the portable model."""
    place = Path(__file__).absolute().parent.parent / "runner.py"
    spec = importlib.util.spec_from_file_location("edgeprune_bundle_runner", place)
    if spec is None or spec.loader is None or not place.is_file():
        raise SystemExit(f"{place} is missing; copy the bundle again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _adapt(module)
    return module


def _adapt(module: Any) -> None:
    """Put the engine in place of ONNX Runtime, and say so where it would be named."""
    timed, sentence = module.bench, module._sentence

    def session(_model: bytes, threads: int) -> Engine:
        if threads != 1:
            raise module.RunnerError(module.WRONG_REQUEST, "the engine runs on one thread", "leave --threads out")
        module._checked(ENGINE, module._manifest())
        module._package("tvm_ffi")
        try:
            return Engine(module._folder() / ENGINE)
        except (OSError, RuntimeError, AttributeError) as error:
            what = f"the engine cannot be loaded: {error}"
            raise module.RunnerError(module.WRONG_REQUEST, what, "run it on the device it was made for") from error

    def bench(request: Any) -> dict[str, Any]:
        report: dict[str, Any] = timed(request)
        del report["onnxruntime"]
        return {**report, "tvm_ffi": version("apache-tvm-ffi")}

    def worded(command: str, report: dict[str, Any]) -> str:
        named = {**report, "onnxruntime": ""} if command == "bench" else report
        text: str = sentence(command, named)
        return text.replace("onnxruntime ", f"tvm_ffi {report['tvm_ffi']}") if command == "bench" else text

    module._session, module.bench, module._sentence = session, bench, worded
    module._onnxruntime = lambda: sys.modules[__name__]


__version__ = ""
"""Stands where the version of ONNX Runtime would."""

if __name__ == "__main__":
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # tvm_ffi takes it along if it is there
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    sys.exit(runner()._piped())
