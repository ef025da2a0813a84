"""From an ONNX file to an engine file, on this machine: lower, compile what the kernel cache lacks, link."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edgeprune.canonical import digest
from edgeprune.errors import CompileError, CorruptArtifact

from ._tvm.cache import KernelCache  # noqa: TID251 private parts of this adapter
from ._tvm.cpus import Cpu, cpu_of  # noqa: TID251
from ._tvm.engine import script_of, write_engine  # noqa: TID251
from ._tvm.lower import lower  # noqa: TID251
from ._tvm.program import Program  # noqa: TID251
from ._tvm.records import Records  # noqa: TID251
from ._tvm.tuning import Search  # noqa: TID251
from ._tvm.winners import chosen  # noqa: TID251


def compiled(model: Mapping[str, Any], settings: Mapping[str, Any], tuning: Mapping[str, Any] | None = None) -> Path:
    """Return the engine file of a graph; the same graph and settings always give the same bytes.

    Args:
        model: "path", "sha256" and "inputs" of the ONNX file.
        settings: "arch", "cpu" and "precision" of the profile; "engines" and "kernels": folders.
        tuning: "trials" of each kernel, and "board", a name of the kind of board; what they found is used, if anything.

    Raises:
        CompileError: if the graph cannot be read or has no kernels.
        CorruptArtifact: if the file is not what it was.
        ProfileError: if no kernels are made for such a CPU.
    """
    path = Path(model["path"])
    program, cpu = _lowered(model, settings)
    if tuning:
        program = chosen(program, cpu, _records(settings, tuning), int(tuning["trials"]), model["sha256"])
    engine = Path(settings["engines"]) / _file_name(path, model["sha256"])
    kernels = KernelCache(folder=Path(settings["kernels"])).objects(program, cpu)
    write_engine(engine, script=script_of(program), constants=program.blob(), kernels=kernels, arch=settings["arch"])
    return engine


def searched(model: Mapping[str, Any], settings: Mapping[str, Any], tuning: Mapping[str, Any]) -> Search:
    """Return the search for faster kernels of a graph; arguments and errors are those of `compiled`."""
    program, cpu = _lowered(model, settings)
    return Search(
        program=program,
        cpu=cpu,
        arch=settings["arch"],
        records=_records(settings, tuning),
        graph=model["sha256"],
        trials=int(tuning["trials"]),
        kernels=KernelCache(folder=Path(settings["kernels"])),
        folder=Path(settings["engines"]),
    )


def _records(settings: Mapping[str, Any], tuning: Mapping[str, Any]) -> Records:
    return Records(folder=Path(settings["kernels"]) / "tuning" / digest(tuning["board"])[:16])


def _lowered(model: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Program, Cpu]:
    cpu = cpu_of(settings["arch"], settings["cpu"], settings["precision"])
    program = lower(_graph(Path(model["path"]), model["sha256"]), cpu)
    _check_inputs(program, model["inputs"])
    return program, cpu


def _file_name(path: Path, sha256: str) -> str:
    """Return a name that tells people which graph it is of."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", path.stem)[:40].strip("-") or "model"
    return f"{stem}-{sha256[:12]}.so"


def _graph(path: Path, sha256: str) -> onnx.ModelProto:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorruptArtifact(f"{path.name} cannot be read", why=str(error)) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CorruptArtifact(f"{path.name} changed on disk", why="its SHA-256 is not the recorded one")
    try:
        return onnx.load_from_string(content)
    except DecodeError as error:
        raise CompileError(f"{path.name} is no whole ONNX file", why=str(error) or type(error).__name__) from error


def _check_inputs(program: Program, wanted: Any) -> None:
    """Check that the graph takes what its artifact says."""
    buffers = {each.name: program.buffers[each.buffer] for each in program.inputs}
    have = {name: (buffer.dtype, buffer.shape) for name, buffer in buffers.items()}
    want = {each["name"]: (each["dtype"], tuple(each["shape"])) for each in wanted}
    if have != want:
        raise CompileError(f"the graph's inputs are {have}, not {want}")
