"""Frames between a target and its worker process: a JSON header, then the raw arrays it announces. No pickle.

| 4 bytes, big-endian: bytes of the header | header, JSON | array | array | ...
                                             header["arrays"] = [[name, dtype, shape], ...]
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADER_CAP = 64 << 20
"""Bytes of the longest header that is read; raw samples of a long session are about 100 kB."""

ARRAYS_CAP = 1 << 30
"""Bytes of all arrays of one frame together."""

_LENGTH = struct.Struct(">I")
_KINDS = "biufc"


class FrameError(ValueError):
    """What was read is not a frame."""


def encode(message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> list[bytes]:
    """Return the frame as the chunks to write, in order."""
    given = {name: np.ascontiguousarray(each) for name, each in (arrays or {}).items()}
    announced = [[name, each.dtype.str, list(each.shape)] for name, each in given.items()]
    header = json.dumps({**message, "arrays": announced}).encode()
    return [_LENGTH.pack(len(header)), header, *(each.tobytes() for each in given.values())]


def decode(read: Callable[[int], bytes]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return message and arrays of the next frame.

    Args:
        read: returns exactly as many bytes as it is asked for, or raises.

    Raises:
        FrameError: if the header is too long, is no JSON object, or announces arrays that are too large or of objects.
    """
    (length,) = _LENGTH.unpack(read(_LENGTH.size))
    if length > HEADER_CAP:
        raise FrameError(f"a header of {length} bytes; at most {HEADER_CAP} are read")
    message = _header(read(length))
    announced = [_announced(each) for each in message.pop("arrays", [])]
    total = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in announced)
    if total > ARRAYS_CAP:
        raise FrameError(f"arrays of {total} bytes; at most {ARRAYS_CAP} are read")
    return message, {name: _array(read, dtype, shape) for name, dtype, shape in announced}


def _header(text: bytes) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except ValueError as error:
        raise FrameError("a header that is not JSON") from error
    if not isinstance(message, dict):
        raise FrameError("a header that is not an object")
    return message


def _announced(value: object) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    match value:
        case [str(name), str(spelled), [*sizes]]:
            shape = tuple(each for each in sizes if type(each) is int and each >= 0)
            if len(shape) == len(sizes):
                return name, _dtype(spelled), shape
    raise FrameError("an array without name, dtype and shape")


def _dtype(spelled: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(spelled)
    except (TypeError, ValueError) as error:
        raise FrameError(f"an array of unknown dtype {spelled!r}") from error
    if dtype.kind not in _KINDS:
        raise FrameError(f"an array of dtype {spelled!r}, which is not a number")
    return dtype


def _array(read: Callable[[int], bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    return np.frombuffer(read(dtype.itemsize * math.prod(shape)), dtype).reshape(shape)
