"""The part of NVIDIA's driver that timing an engine needs, called directly: memory, a stream, events, a graph.

libcuda.so.1 comes with every driver, so nothing is to be installed; without a driver loading it fails, harmlessly. Only
a worker process may open it: an engine that goes wrong spoils the context of its whole process.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from numpy.typing import NDArray

from ._serve import RefusedError  # noqa: TID251 a private part of the adapters

LIBRARY = "libcuda.so.1"
"""Looked up by the loader, which knows where the driver put it."""

INSTALL = "install the NVIDIA driver, then see that nvidia-smi lists the GPU"

_OUT_OF_MEMORY, _NO_DEVICE = 2, 100
_SPIN = 0x1
"""CU_CTX_SCHED_SPIN: the host waits for an event without giving up its CPU, so that it sees the end at once."""

_CAPTURE_RELAXED = 2
_COMPUTE_MAJOR, _COMPUTE_MINOR, _MULTIPROCESSORS = 75, 76, 16

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (c_void_p,),
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetPCIBusId": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDeviceTotalMem_v2": (c_void_p, c_int),
    "cuDevicePrimaryCtxSetFlags_v2": (c_int, c_uint),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemAlloc_v2": (c_void_p, c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuStreamCreate": (c_void_p, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (c_void_p, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (c_void_p, c_void_p, c_void_p),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, c_void_p),
    "cuGraphInstantiateWithFlags": (c_void_p, c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuGetErrorString": (c_int, c_void_p),
}
"""Function → types of its arguments, by the CUDA driver API reference; all return an error code."""


class CudaError(Exception):
    """A call of the driver failed; the context is not to be trusted after it, so it ends the worker."""


class Driver:
    """One GPU, its primary context made current in the thread that opens it, and one stream.

    Args:
        index: as CUDA counts the devices that CUDA_VISIBLE_DEVICES leaves.

    Raises:
        RefusedError: "lost" if there is no driver or no such GPU.
    """

    def __init__(self, index: int) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise RefusedError(f"there is no NVIDIA driver here ({error})", "lost", INSTALL) from error
        for name, types in _SIGNATURES.items():
            getattr(self._library, name).argtypes = types
        code = self._library.cuInit(0)
        if code:
            raise RefusedError(f"the NVIDIA driver finds no GPU: {self._said(code)}", "lost", INSTALL)
        self._device = self._find(index)
        self._call("cuDevicePrimaryCtxSetFlags_v2", self._device, _SPIN)
        context, stream = c_void_p(), c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", byref(stream), 1)  # does not wait for the default stream
        self.stream = int(stream.value or 0)
        self._ends = self._event(), self._event()

    def _find(self, index: int) -> int:
        count, device = c_int(), c_int()
        self._call("cuDeviceGetCount", byref(count))
        if index >= count.value:
            found = f"GPU {index} is wanted, the driver has {count.value}"
            raise RefusedError(found, "lost", "set option gpu of the profile to one that nvidia-smi lists")
        self._call("cuDeviceGet", byref(device), index)
        return device.value

    def facts(self) -> dict[str, Any]:
        """Return what decides which kernels run, and where the GPU is, JSON values."""
        name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(32)
        memory, version = c_size_t(), c_int()
        self._call("cuDeviceGetName", name, len(name), self._device)
        self._call("cuDeviceGetPCIBusId", bus, len(bus), self._device)
        self._call("cuDeviceTotalMem_v2", byref(memory), self._device)
        self._call("cuDriverGetVersion", byref(version))
        return {
            "gpu": name.value.decode(errors="replace"),
            "bus_id": bus.value.decode(errors="replace"),
            "compute_capability": f"{self._attribute(_COMPUTE_MAJOR)}.{self._attribute(_COMPUTE_MINOR)}",
            "multiprocessors": self._attribute(_MULTIPROCESSORS),
            "memory_mib": memory.value >> 20,
            "cuda_of_driver": f"{version.value // 1000}.{version.value % 1000 // 10}",
        }

    def _attribute(self, which: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), which, self._device)
        return value.value

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes on the device.

        Raises:
            RefusedError: "machine" if it has no more memory.
        """
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), max(size, 1))
        return address.value

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", address)

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device and wait for it."""
        self._call("cuMemcpyHtoD_v2", address, array.ctypes.data, array.nbytes)

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        """Fill a contiguous array from the device."""
        self._call("cuMemcpyDtoH_v2", array.ctypes.data, address, array.nbytes)

    def synchronize(self) -> None:
        """Wait until the stream is empty."""
        self._call("cuStreamSynchronize", self.stream)

    def timed(self, enqueue: Callable[[], None]) -> int:
        """Return nanoseconds on the device between the events around what `enqueue` puts into the stream; wait for it.

        The driver counts milliseconds in float32 with a resolution of about 0.5 microseconds.
        """
        before, after = self._ends
        self._call("cuEventRecord", before, self.stream)
        enqueue()
        self._call("cuEventRecord", after, self.stream)
        self._call("cuEventSynchronize", after)
        milliseconds = c_float()
        self._call("cuEventElapsedTime", byref(milliseconds), before, after)
        return max(1, round(milliseconds.value * 1e6))

    def _event(self) -> c_void_p:
        event = c_void_p()
        self._call("cuEventCreate", byref(event), 0)
        return event

    @contextmanager
    def captured(self, enqueue: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """Yield a function that launches, as one CUDA graph, what `enqueue` puts into the stream."""
        graph, executable = c_void_p(), c_void_p()
        self._call("cuStreamBeginCapture_v2", self.stream, _CAPTURE_RELAXED)
        enqueue()
        self._call("cuStreamEndCapture", self.stream, byref(graph))
        self._call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        try:
            yield lambda: self._call("cuGraphLaunch", executable, self.stream)
        finally:
            self._call("cuGraphExecDestroy", executable)
            self._call("cuGraphDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise RefusedError(f"the GPU has no memory left ({name})", "machine")
        if code:
            raise CudaError(f"{name} failed: {self._said(code)}")

    def _said(self, code: int) -> str:
        text = c_char_p()
        self._library.cuGetErrorString(code, byref(text))
        return f"{(text.value or b'unknown error').decode(errors='replace')} ({code})"
