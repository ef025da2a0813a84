"""Raw samples as bytes: three rows of unsigned little-endian integers, compressed.

    packed(calls) = item size (4, or 8 once a call lasts over 4.29 s) ‖ zlib level 1 of [elapsed, on_cpu, preempted]

About 1 kB for 200 calls.
"""

import zlib
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from edgeprune.measurement import Calls

_WIDEST_UINT32 = 2**32 - 1


def packed(calls: Calls) -> bytes:
    """Return timed calls as bytes.

    Raises:
        ValueError, OverflowError: if the lists differ in length or hold negative numbers.
    """
    table = _table(calls)
    return bytes([table.itemsize]) + zlib.compress(table.tobytes(), 1)


def unpacked(blob: bytes) -> Calls:
    """Return the calls that `packed` wrote.

    Raises:
        ValueError, zlib.error: if the bytes are damaged.
    """
    if blob[:1] not in (b"\x04", b"\x08"):
        raise ValueError("samples of an unknown width")
    rows = np.frombuffer(zlib.decompress(blob[1:]), dtype=f"<u{blob[0]}").reshape(3, -1)
    wall, cpu, preempted = (tuple(each) for each in rows.tolist())
    return Calls(elapsed=wall, on_cpu=cpu, preempted=preempted)


def samples_sha256(calls: Calls) -> str:
    """Return the SHA-256 of the samples themselves, whatever the compressor made of them."""
    return sha256(_table(calls).tobytes()).hexdigest()


def _table(calls: Calls) -> NDArray[np.unsignedinteger]:
    rows = np.array([calls.elapsed, calls.on_cpu, calls.preempted], dtype="<u8")
    return rows if rows.max(initial=0) > _WIDEST_UINT32 else rows.astype("<u4")
