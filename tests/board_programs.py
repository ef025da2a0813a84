"""The programs of a board, built for tests by the project's own script, and engines whose kernels are lines of C."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from edgeprune.targets._tvm.engine import Script, write_engine

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "deploy" / "emulated" / "setup"
HERE = platform.machine()


@cache
def programs(arch: str = HERE) -> Path:
    """Return the folder of the programs for `arch`, built now if they are not; skip the test if that cannot be."""
    command = ["sh", str(SETUP), "--arch", arch, "--python", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if done.returncode == 1 and "as root:" in done.stderr:
        pytest.skip(f"{done.stderr.strip()}, then: {' '.join(command)}")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def qemu(arch: str, *, count: bool = True) -> list[str]:
    """Return the command that runs a program for `arch` here, empty if none is needed."""
    if arch == HERE:
        return []
    plugin = ["-plugin", str(programs(arch) / "count.so")] if count else []
    return [f"qemu-{arch}", "-cpu", "cortex-a72", *plugin, "-L", str(programs(arch) / "root")]


@contextmanager
def server(
    folder: Path, *options: str, arch: str = HERE, key: str = "edgeprune", count: bool = True, **how: Any
) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """Run a board's server and yield its port and its process."""
    command = [*qemu(arch, count=count), str(programs(arch) / "bin" / "edgeprune-board"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--folder", str(folder), "--until-stdin-closes", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "EDGEPRUNE_BOARD_KEY": key, "TVM_NUM_THREADS": "1"},
        **how,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        yield int(line.rpartition(b":")[2]), process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


KERNELS = """
#include <stdint.h>
#include <stddef.h>
typedef struct {
  void *data; int32_t device_type, device_id; int32_t ndim; uint8_t code, bits; uint16_t lanes;
  int64_t *shape, *strides; uint64_t byte_offset;
} Tensor;
typedef struct { int32_t type_index, zero; Tensor *tensor; } Any;
#define KERNEL(name) int __tvm_ffi_##name(void *self, const Any *given, int32_t count, Any *result)
static size_t size(const Tensor *t) {
  size_t n = 1; for (int k = 0; k < t->ndim; ++k) n *= t->shape[k]; return n;
}
/* out = in * 2 + constant[0], as far as both are long */
KERNEL(twice) {
  if (count != 3) return -1;
  for (int k = 0; k < 3; ++k)
    if (given[k].tensor->bits != 32 || given[k].tensor->code != 2 || !size(given[k].tensor)) return -1;
  const float *in = given[0].tensor->data, *add = given[1].tensor->data;
  float *out = given[2].tensor->data;
  size_t n = size(given[0].tensor), m = size(given[2].tensor);
  for (size_t k = 0; k < n && k < m; ++k) out[k] = 2 * in[k] + add[0];
  return 0;
}
KERNEL(refuse) { return -1; }
KERNEL(hang) { for (volatile int k = 0;; ++k) {} }
KERNEL(crash) { *(volatile int *)8 = 1; return 0; }
KERNEL(illegal) { __builtin_trap(); }
"""

SCRIPT = """edgeprune-program 1
memory 0 constants 64
memory 1 arena 64
memory 2 input 32
memory 3 output 32
buffer 0 2 float32 0 2 2 4
buffer 1 0 float32 0 1 1
buffer 2 1 float32 0 2 2 4
buffer 3 3 float32 0 2 2 4
input 0 x
output 3 y
step {kernel} first 3 0 1 2
step twice second 3 2 1 3
end
"""
"""y = 2 (2 x + 1) + 1 = 4 x + 3 for the constant 1, x and y: [2, 4]."""

ONE = b"\0\0\x80?" + bytes(60)


class Spelled(Script):
    """A script whose text is given, right or wrong."""

    def __new__(cls, _: str) -> "Spelled":
        return object.__new__(cls)

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "_spelled", text)

    def text(self) -> str:
        """Return the text."""
        return str(self._spelled)  # type: ignore[attr-defined]


@cache
def kernels(arch: str = HERE, source: str = KERNELS) -> bytes:
    """Return the object file of kernels in C."""
    compiler = "gcc" if arch == HERE else f"{arch}-linux-gnu-gcc"
    programs(arch)  # installs the compiler
    with TemporaryDirectory() as folder:
        place = Path(folder) / "kernels.o"
        command = [compiler, "-O1", "-fPIC", "-w", "-xc", "-c", "-", "-o", str(place)]
        subprocess.run(command, input=source.encode(), check=True)
        return place.read_bytes()


def engine(path: Path, *, text: str = SCRIPT, kernel: str = "twice", arch: str = HERE, constants: bytes = ONE) -> bytes:
    """Write an engine and return its bytes."""
    script = Spelled(text.replace("{kernel}", kernel))
    write_engine(path, script=script, constants=constants, kernels={"all": kernels(arch)}, arch=arch)
    return path.read_bytes()
