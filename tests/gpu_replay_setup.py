"""A machine with a replayed GPU: `driver.c` built as NVIDIA's two libraries, `tensorrt` and NVML on top of it.

Nothing outside the tests can reach it; what it times is the host's CPU.
"""

import atexit
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from edgeprune.scratch import Scratch

HERE = Path(__file__).parent / "gpu_replay"

built = pytest.mark.skipif(
    shutil.which("cc") is None,
    reason="a C compiler is missing; to replay a GPU: sudo apt-get install gcc libc6-dev",
)


@cache
def libraries() -> Path:
    """Return the folder of libcuda.so.1 and libnvidia-ml.so.1, built once in a test session."""
    scratch = Scratch("replay")
    atexit.register(scratch.close)
    folder = scratch.path
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        command = ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", folder / name, HERE / "driver.c"]
        subprocess.run(command, check=True, timeout=120)
    return folder


def install(monkeypatch: pytest.MonkeyPatch, home: Path, **settings: str) -> None:
    """Let this process and those it starts find the replayed GPU, and keep engines under `home`."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries()))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
