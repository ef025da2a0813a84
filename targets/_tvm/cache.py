"""Object code by kernel, kept on disk: a candidate that differs in two layers compiles two layers.

    FOLDER/k1f…c4.o      64 hexadecimal digits of the SHA-256 of what follows, a line feed, then the object file

A kernel's name is a digest of its TensorIR, its plan, the target and the versions of TVM and of our schedules, so an
entry never goes stale. One that is damaged is made again. The least recently used ones go when the folder is full.
"""

import hashlib
import os
import shutil
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.errors import CompileError, DeviceLost, EdgepruneError, StorageFull
from edgeprune.scratch import Scratch

from .cpus import Cpu
from .program import Kernel, Program
from .schedule import scheduled
from .tensorir import tvm

LIMIT_BYTES = 1 << 30
DIGEST_CHARACTERS = 64

ROOM_BYTES = 1 << 24
"""Less free room than this for temporary files is a full disk: objects take under 1 MiB."""

COMPILING = threading.Lock()
"""TVM's scheduling and LLVM's global state are not ours to vouch for: one kernel at a time."""


@dataclass(kw_only=True)
class KernelCache:
    """Object files in a folder that several processes may share.

    Attributes:
        folder: made on first use.
        limit_bytes: the folder is kept below it.
        compiled, reused: kernels made, and taken from the folder, since this object was made.
    """

    folder: Path
    limit_bytes: int = LIMIT_BYTES
    compiled: int = field(default=0, init=False)
    reused: int = field(default=0, init=False)

    def objects(self, program: Program, cpu: Cpu) -> dict[str, bytes]:
        """Return the object file of each kernel of a program, by its name; each defines `__tvm_ffi_<name>`.

        Raises:
            CompileError: if TVM cannot compile one.
            StorageFull: if an object cannot be written.
        """
        return {name: self._object(name, kernel, cpu) for name, kernel in program.kernels.items()}

    def _object(self, name: str, kernel: Kernel, cpu: Cpu) -> bytes:
        path = self.folder / f"{name}.o"
        found = _read(path)
        if found is not None:
            self.reused += 1
            return found
        made = object_of(name, kernel, cpu)
        self.compiled += 1
        self._keep(path, made)
        return made

    def _keep(self, path: Path, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest().encode()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, digest + b"\n" + content)
            self._shrink(keep=path)
        except OSError as error:
            raise StorageFull(
                f"the kernel cache {str(self.folder)!r} cannot be written",
                why=str(error),
                next_step="free some space there, or name another folder",
            ) from error

    def _shrink(self, keep: Path) -> None:
        """Remove the entries that were used longest ago until the rest is below the limit."""
        entries = []
        for path in self.folder.glob("k*.o"):
            with suppress(FileNotFoundError):
                facts = path.stat()
                entries.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit_bytes:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def _read(path: Path) -> bytes | None:
    """Return an entry's object file, None if there is none or it is damaged; note that it was used."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    digest, content = whole[:DIGEST_CHARACTERS], whole[DIGEST_CHARACTERS + 1 :]
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    with suppress(OSError):
        os.utime(path)
    return content


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def object_of(name: str, kernel: Kernel, cpu: Cpu) -> bytes:
    """Return the object file of one kernel, compiled now.

    Raises:
        CompileError: if TVM refuses it.
        DeviceLost: if this machine has no memory left for it.
        StorageFull: if there is no room for a temporary file.
    """
    try:
        with COMPILING, Scratch("kernel") as folder:
            path = folder / "kernel.o"
            library(name, kernel, cpu).write_to_file(str(path), "o")
            return path.read_bytes()
    except (MemoryError, OSError, RuntimeError, ValueError, TypeError) as error:  # tvm's own errors derive from these
        raise _translated(name, error, Path(tempfile.gettempdir())) from error


def _translated(name: str, error: Exception, folder: Path) -> EdgepruneError:
    """Return whose turn it is: a machine without memory or disk says nothing about the kernel."""
    lines = str(error).strip().splitlines()
    why = lines[-1] if lines else repr(error)
    if isinstance(error, MemoryError) or "bad_alloc" in str(error):
        return DeviceLost(f"out of memory while compiling the kernel {name}", why=why, next_step="end other programs")
    if isinstance(error, OSError) or shutil.disk_usage(folder).free < ROOM_BYTES:
        return StorageFull(f"{str(folder)!r} cannot be written", why=why, next_step="free some space there")
    return CompileError(f"TVM cannot compile the kernel {name}", why=why)


def library(name: str, kernel: Kernel, cpu: Cpu, effort: int = 3) -> Any:
    """Return TVM's module of one scheduled and compiled kernel.

    Args:
        effort: LLVM's optimisation level. 0 compiles three times as fast to the same results.
    """
    func = scheduled(kernel, cpu).with_attr("global_symbol", name)
    target = tvm.target.Target({**cpu.target(), "opt-level": effort})
    return tvm.compile(tvm.IRModule({name: func}), target).mod
