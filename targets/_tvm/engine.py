"""The engine file: kernels, constants and the program that calls them, linked into one shared library.

    objects of kernels ──┐
    constants, aligned ──┼─ as, ld ─▶ model.so      __tvm_ffi_<kernel>, edgeprune_constants, edgeprune_program
    program as text ─────┘

The same parts give the same bytes. Plain binutils link it, so no cross compiler is needed, and nothing but the C
library is needed to load it. `deploy/arm/program.h` says what the text means, and checks it on the device.
"""

import math
import platform
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from edgeprune.errors import CompileError, CorruptArtifact, EdgepruneError, ProfileError
from edgeprune.scratch import Scratch

if TYPE_CHECKING:
    from .program import Program

ALIGNMENT = 64
"""Bytes; generated code loads whole vector registers."""

MACHINES = {"aarch64": 183, "x86_64": 62}
"""Architecture → its number in an ELF header (System V ABI, e_machine)."""

BYTES = {"float32": 4, "float16": 2, "float64": 8, "int8": 1, "int32": 4, "int64": 8, "uint8": 1, "bool": 1}
"""NumPy's name of a type → bytes of one element."""

PROGRAM_CAP = 64 << 20
"""Bytes of the longest program text that is read back."""

LINK_LIMIT_S = 120.0
NAME_CAP = 240
"""Characters of a name in the text before it is spelled there; a node of ONNX may be called anything."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """One memory: "constants", "arena", "input" or "output", and its bytes."""

    kind: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A dense tensor in a memory, at a multiple of `ALIGNMENT` bytes."""

    region: int
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a kernel for a node of the graph; the last slot is written, the others are read."""

    kernel: str
    layer: str
    slots: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Script:
    """What an engine does, as its text says it: where everything lies, and what is called in order.

    Attributes:
        inputs, outputs: name → slot, in the order of the graph.
    """

    regions: tuple[Region, ...]
    slots: tuple[Slot, ...]
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, int], ...]
    calls: tuple[Call, ...]

    def text(self) -> str:
        """Return the text that devices read."""
        return "\n".join(["edgeprune-program 1", *self._lines(), "end", ""])

    def _lines(self) -> list[str]:
        regions = [f"memory {place} {each.kind} {each.size}" for place, each in enumerate(self.regions)]
        slots = [
            _row("buffer", place, each.region, each.dtype, each.offset, len(each.shape), *each.shape)
            for place, each in enumerate(self.slots)
        ]
        inputs = [_row("input", slot, spelled(name)) for name, slot in self.inputs]
        outputs = [_row("output", slot, spelled(name)) for name, slot in self.outputs]
        calls = [_row("step", each.kernel, spelled(each.layer), len(each.slots), *each.slots) for each in self.calls]
        return [*regions, *slots, *inputs, *outputs, *calls]


def _row(*words: object) -> str:
    return " ".join(map(str, words))


def spelled(name: str) -> str:
    """Return a name as one word of the text; one that is too long keeps its end, which tells layers apart."""
    return quote(name[-NAME_CAP:] or "?", safe="/:._-")


def script_of(program: "Program") -> Script:
    """Return where a program's buffers lie in an engine, and what it calls."""
    regions = [Region(kind="constants", size=program.constant_bytes), Region(kind="arena", size=program.arena_bytes)]
    slots = []
    for buffer in program.buffers:
        place = {"constant": 0, "arena": 1}.get(buffer.space, len(regions))
        if place == len(regions):  # each input and each output is a memory of its own
            regions.append(Region(kind=buffer.space, size=bytes_of(buffer.dtype, buffer.shape)))
        slots.append(Slot(region=place, offset=buffer.offset, dtype=buffer.dtype, shape=tuple(buffer.shape)))
    return Script(
        regions=tuple(regions),
        slots=tuple(slots),
        inputs=tuple((each.name, each.buffer) for each in program.inputs),
        outputs=tuple((each.name, each.buffer) for each in program.outputs),
        calls=tuple(Call(kernel=each.kernel, layer=each.node, slots=each.buffers) for each in program.steps),
    )


def bytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a dense tensor."""
    return BYTES[dtype] * math.prod(shape)


def read_script(text: str) -> Script:
    """Return what a text says.

    Raises:
        CorruptArtifact: if it is not one of ours.
    """
    try:
        first, *lines = text.removesuffix("\n").split("\n")
        if first != "edgeprune-program 1" or lines.pop() != "end":
            raise ValueError("its first or last line is another")
        rows = [line.split(" ") for line in lines]
        return Script(
            regions=tuple(Region(kind=row[2], size=int(row[3])) for row in rows if row[0] == "memory"),
            slots=tuple(_slot(row) for row in rows if row[0] == "buffer"),
            inputs=tuple((unquote(row[2]), int(row[1])) for row in rows if row[0] == "input"),
            outputs=tuple((unquote(row[2]), int(row[1])) for row in rows if row[0] == "output"),
            calls=tuple(
                Call(kernel=row[1], layer=unquote(row[2]), slots=tuple(map(int, row[4:])))
                for row in rows
                if row[0] == "step"
            ),
        )
    except (ValueError, LookupError) as error:
        raise CorruptArtifact("the program of an engine cannot be read", why=str(error)) from error


def _slot(row: Sequence[str]) -> Slot:
    return Slot(region=int(row[2]), dtype=row[3], offset=int(row[4]), shape=tuple(map(int, row[6:])))


def write_engine(path: Path, *, script: Script, constants: bytes, kernels: Mapping[str, bytes], arch: str) -> None:
    """Write the engine, in place of an earlier one at once.

    Args:
        path: where it goes.
        script: what it does.
        constants: the memory of constants.
        kernels: name → object file for `arch`.
        arch: "aarch64" or "x86_64".

    Raises:
        CompileError: if the parts cannot be linked.
        ProfileError: if this machine has no linker for `arch`.
    """
    assembler, linker = (_tool(name, arch) for name in ("as", "ld"))
    with Scratch("link") as here:
        (here / "constants").write_bytes(constants)
        (here / "program").write_text(script.text(), encoding="ascii")
        (here / "parts.s").write_text(_PARTS, encoding="ascii")
        names = [f"k{place}.o" for place in range(len(kernels))]
        for name, kernel in zip(names, sorted(kernels), strict=True):
            (here / name).write_bytes(kernels[kernel])
        _run([assembler, "-o", "parts.o", "parts.s"], here)
        _run([linker, *_LINKED, "-o", "model.so", "parts.o", *names], here)
        part = path.with_name(f".{path.name}.part")
        shutil.copyfile(here / "model.so", part)
        part.replace(path)


_PARTS = f"""
        .section .rodata.edgeprune, "a"
        .balign {ALIGNMENT}
        .globl edgeprune_constants, edgeprune_constants_end, edgeprune_program, edgeprune_program_end
edgeprune_constants:
        .incbin "constants"
edgeprune_constants_end:
edgeprune_program:
        .incbin "program"
edgeprune_program_end:
        .byte 0
        .section .note.GNU-stack, "", %progbits
"""

_LINKED = ("-shared", "--strip-all", "--build-id=none", "--hash-style=gnu", "-z", "noexecstack")


def _tool(name: str, arch: str) -> str:
    """Return the path of an assembler or linker for `arch`."""
    if arch not in MACHINES:
        raise ProfileError(f"arch {arch!r} is unknown", next_step=f"one of {', '.join(MACHINES)}")
    own = [name] if platform.machine() == arch else []
    for candidate in (f"{arch}-linux-gnu-{name}", *own):
        if found := shutil.which(candidate):
            return found
    raise ProfileError(
        f"no {name} for {arch} on this machine",
        why=f"{arch}-linux-gnu-{name} is not installed",
        next_step=f"sudo apt-get install binutils-{arch.replace('_', '-')}-linux-gnu",
    )


def _run(command: Sequence[str], folder: Path) -> None:
    what = f"{Path(command[0]).name} could not link the engine"
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, timeout=LINK_LIMIT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(what, why=str(error)) from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise CompileError(what, why=said[0] if said else f"exit code {done.returncode}")


# --- what is in it


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What an engine file holds: the architecture it is for, what it does, and the bytes of its constants."""

    arch: str
    script: Script
    constants: bytes


def read_engine(path: Path) -> Contents:
    """Return what is in an engine file; nothing of it is run.

    Raises:
        CorruptArtifact: if it is damaged or no engine.
    """
    try:
        content = path.read_bytes()
        library = _Library(content)
        text = library.between("edgeprune_program")
        if len(text) > PROGRAM_CAP:
            raise ValueError("its program is too long")
        script = read_script(text.decode("ascii"))
        return Contents(arch=library.arch, script=script, constants=library.between("edgeprune_constants"))
    except (OSError, ValueError, LookupError, struct.error, EdgepruneError) as error:
        raise CorruptArtifact(
            f"{path.name} is no whole engine", why=str(error), next_step="compile the model again"
        ) from error


class _Library:
    """The few parts of a 64-bit little-endian ELF file that symbols are found by (System V ABI, chapters 4 and 5)."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        if self._bytes(0, 6) != b"\x7fELF\x02\x01":
            raise ValueError("it is no shared library")
        (machine,) = struct.unpack("<H", self._bytes(18, 2))
        (sections,) = struct.unpack("<Q", self._bytes(40, 8))
        size, count = struct.unpack("<HH", self._bytes(58, 4))
        self.arch = next((name for name, number in MACHINES.items() if number == machine), f"machine {machine}")
        rows = [struct.unpack("<IIQQQQIIQQ", self._bytes(sections + k * size, 64)) for k in range(count)]
        self._sections = [(row[1], row[3], row[4], row[5], row[6]) for row in rows]  # type, address, offset, size, link
        self._symbols = self._read_symbols()

    def between(self, name: str) -> bytes:
        """Return the bytes from symbol `name` to symbol `name` + "_end"."""
        start, end = self._symbols[name], self._symbols[f"{name}_end"]
        for _, address, offset, size, _ in self._sections:
            if address and address <= start <= end <= address + size:
                return self._bytes(offset + start - address, end - start)
        raise ValueError(f"{name} lies nowhere")

    def _read_symbols(self) -> dict[str, int]:
        for kind, _, offset, size, link in self._sections:
            if kind == 11:  # SHT_DYNSYM
                table = self._bytes(offset, size)
                names = self._bytes(*self._sections[link][2:4])
                found = struct.iter_unpack("<IBBHQQ", table)
                return {_word(names, row[0]): row[4] for row in found if row[0]}
        raise ValueError("it has no symbols")

    def _bytes(self, offset: int, count: int) -> bytes:
        if offset + count > len(self._content):
            raise ValueError("it is cut short")
        return self._content[offset : offset + count]


def _word(names: bytes, place: int) -> str:
    return names[place : names.index(b"\0", place)].decode("ascii", errors="replace")
