"""Recorded inputs and answers of a model: plain .npy files, read without unpickling and never larger than promised."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray

from edgeprune.errors import BundleError
from edgeprune.manifest import Parity, Tensor

Array = NDArray[np.generic]


def stacked(tensor: Tensor, samples: ArrayLike | Sequence[ArrayLike]) -> Array:
    """Return the samples of one input or output as [N * batch, ...], in the tensor's dtype.

    Args:
        tensor: whose samples they are; its first axis is the batch.
        samples: [N * batch, ...], or N arrays of [batch, ...].

    Raises:
        BundleError: if they do not have the tensor's shape or dtype.
    """
    array = np.asarray(samples)
    if array.ndim == len(tensor.shape) + 1:
        array = array.reshape(-1, *array.shape[2:])
    if array.dtype.name != tensor.dtype:
        raise BundleError(f"parity samples of {tensor.name!r} are {array.dtype.name}", why=f"wanted {tensor.dtype}")
    if not _fits(tensor, array.shape):
        raise BundleError(f"parity samples of {tensor.name!r} are {array.shape}", why=f"wanted {tensor.shape}")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def batch(tensor: Tensor) -> int:
    """Return how many rows one call takes: the first axis, 1 if it has no number."""
    first = tensor.shape[0] if tensor.shape else None
    return first if isinstance(first, int) else 1


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    same_rank = bool(shape) and len(shape) == len(tensor.shape)
    rest = zip(shape[1:], tensor.shape[1:], strict=False)
    return same_rank and all(wanted == got for got, wanted in rest if isinstance(wanted, int))


def to_npy(array: Array) -> bytes:
    """Return the one .npy spelling (version 1.0) of a contiguous array."""
    stream = io.BytesIO()
    npy.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def from_npy(content: bytes, tensor: Tensor, samples: int, name: str) -> list[Array]:
    """Return the rows of each recorded call of one tensor, [batch, ...] each.

    Raises:
        BundleError: if the file is not what `to_npy` writes for that many samples of this tensor.
    """
    stream = io.BytesIO(content)
    try:
        version = npy.read_magic(stream)
        shape, by_column, dtype = npy.read_array_header_1_0(stream)
    except ValueError as error:
        raise BundleError(f"{name} is not a .npy file", why=str(error)[:200]) from error
    rows = samples * batch(tensor)
    ordered = dtype == dtype.newbyteorder("<")  # a runtime looks at the kind of number only, not at its bytes' order
    fits = ordered and dtype.name == tensor.dtype and _fits(tensor, shape) and shape[0] == rows
    if version != (1, 0) or by_column or not fits:
        raise BundleError(f"{name} holds {dtype} {shape}", why=f"wanted {rows} rows of {tensor.dtype} {tensor.shape}")
    body = content[stream.tell() :]
    if len(body) != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise BundleError(f"{name} has {len(body)} bytes of data", why="not the number its header promises")
    native = np.frombuffer(body, dtype=dtype).astype(dtype.newbyteorder("="), copy=False)
    return list(np.split(native.reshape(shape), samples))


def worst_excess(got: Mapping[str, Array], wanted: Mapping[str, Array], parity: Parity) -> float:
    """Return the largest |got - wanted| / (atol + rtol |wanted|) over all outputs; at most 1 passes, NaN is infinite.

    An answer of another shape, a missing one and one too many count as infinite.
    """
    if set(got) != set(wanted):
        return float("inf")
    return max((_excess(np.asarray(got[name]), wanted[name], parity) for name in wanted), default=0.0)


def _excess(got: Array, wanted: Array, parity: Parity) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    mine, theirs = got.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.abs(mine - theirs) / (parity.atol + parity.rtol * np.abs(theirs))
    ratio = np.where(mine == theirs, 0.0, ratio)  # equal answers differ by nothing, whatever the tolerance
    return float(np.where(np.isnan(ratio), np.inf, ratio).max(initial=0.0))
