"""Fashion-MNIST, all 70,000 images, as Debian packages it; not part of edgeprune.

apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb raw

leaves the four files in raw/usr/share/datasets/fashion-mnist.
"""

import gzip
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PACKAGED = Path("/usr/share/datasets/fashion-mnist")
"""Where the package puts them when it is installed."""

MEAN, STD = 0.2860, 0.3530
"""Of the 60,000 training images, pixels scaled to [0, 1]."""

FILES = {
    "x_train": "train-images-idx3-ubyte.gz",
    "y_train": "train-labels-idx1-ubyte.gz",
    "x_test": "t10k-images-idx3-ubyte.gz",
    "y_test": "t10k-labels-idx1-ubyte.gz",
}


def folder() -> Path:
    """Return the folder that $EDGEPRUNE_FASHION names, or the package's own.

    Raises:
        SystemExit: with what to do, if the images are not there.
    """
    found = Path(os.environ.get("EDGEPRUNE_FASHION", PACKAGED))
    if not all((found / name).is_file() for name in FILES.values()):
        raise SystemExit("apt install dataset-fashion-mnist, or unpack it and set EDGEPRUNE_FASHION to its folder")
    return found


def load(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """Return x_train [60000, 28, 28], y_train, x_test [10000, 28, 28] and y_test, uint8."""
    return {name: _read_idx(folder / file) for name, file in FILES.items()}


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array in a gzipped IDX file of unsigned bytes: magic 0, 0, 8, rank; big-endian sizes; data."""
    raw = gzip.decompress(path.read_bytes())
    assert raw[:3] == b"\x00\x00\x08", f"{path} is not an IDX file of bytes"
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(tuple(int(each) for each in shape)).copy()
