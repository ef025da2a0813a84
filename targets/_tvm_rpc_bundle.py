"""What a bundle holds for a board that TVM compiled for, and what may be run of it.

device/engine.so            the engine
device/bin/edgeprune-run    runs, times and checks it; needs the C library alone
device/board_run.py         the same from Python; needs numpy and apache-tvm-ffi
device/README.txt           how

Where ONNX Runtime is the faster one, the bundle's own model.onnx is the engine:

device/bin/edgeprune-run    runs, times and checks it
device/lib/libonnxruntime.so.VERSION
device/README.txt           how
"""

import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import __version__
from edgeprune.artifact import Artifact
from edgeprune.canonical import file_sha256
from edgeprune.errors import BundleError, CompileError, ProfileError
from edgeprune.target import Selftest

from ._tvm_rpc_board import programs, setup_command  # noqa: TID251 private parts of this adapter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

README = "README.txt"
"""The one file for a device that is read and never run."""

ENGINE = "tvm-so"
"""Kind of the artifacts that this adapter makes."""

GRAPH = "onnx"
"""Kind of those that ONNX Runtime takes as they are."""


PROGRAM_READ = 64 << 20
"""Bytes of a program that are searched for its compiler's name."""

_COMPILERS = re.compile(rb"(?:GCC: \([ -~]{1,80}?\)|clang version) [0-9][0-9.]{0,20}")


def shipped(arch: str) -> dict[str, Path]:
    """Return name below ``device/`` → file of everything but the engine.

    Raises:
        ProfileError: if the programs for `arch` are not built.
    """
    own = Path(str(files("edgeprune.device"))) / "arm"
    return {
        "bin/edgeprune-run": programs(arch) / "bin" / "edgeprune-run",
        "board_run.py": own / "board_run.py",
        README: own / "bundle-readme.txt",
    }


def with_onnxruntime(arch: str) -> dict[str, Path]:
    """Return name below ``device/`` → file of what runs a bundle's own model.

    Raises:
        ProfileError: if the programs for `arch` are not built, or without ONNX Runtime.
    """
    folder = programs(arch)
    libraries = sorted((folder / "lib").glob("libonnxruntime.so.*"))
    if not libraries:
        raise ProfileError(f"the programs of a board for {arch} are old", next_step=setup_command(arch))
    return {
        "bin/edgeprune-run": folder / "bin" / "edgeprune-run",
        f"lib/{libraries[-1].name}": libraries[-1],
        README: Path(str(files("edgeprune.device"))) / "arm" / "bundle-readme-onnxruntime.txt",
    }


def check_trust(bundle: Path, engine: Artifact, arch: str) -> None:
    """Check that a bundle would run nothing but what this edgeprune would have put there: runners and engine.

    Raises:
        BundleError: if it would.
    """
    runs = with_onnxruntime(arch) if engine.kind == GRAPH else shipped(arch)
    ours = {f"device/{name}": path for name, path in runs.items() if name != README}
    if engine.kind != GRAPH:
        ours["device/engine.so"] = engine.path
    theirs = {str(each.relative_to(bundle)) for each in (bundle / "device").rglob("*") if each.is_file()}
    names = sorted((ours.keys() | theirs) - {f"device/{README}"})
    strange = [name for name in names if not _same(bundle / name, ours.get(name))]
    if strange:
        author = json.loads((bundle / "manifest.json").read_bytes())["versions"].get("edgeprune", "?")
        versions = f"the bundle is by edgeprune {author}, this is edgeprune {__version__}"
        raise BundleError(
            f"{', '.join(strange)} of the bundle {'is' if len(strange) == 1 else 'are'} not what this edgeprune would "
            "have put there, so nothing of it was run",
            why="; ".join([*(_difference(bundle / name, ours.get(name), name) for name in strange), versions]),
            next_step="it would run on the board with your rights: if you trust whoever made the bundle, "
            "edgeprune verify --trust-runner; else run its deploy again here, or verify it where edgeprune and the "
            "compiler are those that made it",
        )


def _same(theirs: Path, ours: Path | None) -> bool:
    return ours is not None and theirs.is_file() and file_sha256(theirs) == file_sha256(ours)


def _difference(theirs: Path, ours: Path | None, name: str) -> str:
    """Return what tells a file of a bundle from ours; what it says of its compiler is its own word."""
    if ours is None:
        return f"this edgeprune puts no {name} there"
    if not theirs.is_file():
        return f"{name} is missing"
    sides = f"{name} has SHA-256 {file_sha256(theirs)[:12]}..., ours {file_sha256(ours)[:12]}..."
    if not name.startswith("device/bin/"):
        return sides
    maker, builder = compiler_of(theirs), compiler_of(ours)
    if maker == builder:
        return f"{sides}, both built by {builder}, so from other sources"
    return f"{sides}; it was built by {maker}, ours by {builder}, and another compiler gives other bytes"


def compiler_of(program: Path) -> str:
    """Return the compiler that a program says it was built by: compilers leave their name in it (ELF, .comment)."""
    with program.open("rb") as file:
        found = _COMPILERS.findall(file.read(PROGRAM_READ))
    return str(found[-1].decode("ascii")) if found else "a compiler it does not name"


def answered(bundle: Path, model: Artifact, run: "Callable[[Artifact, Arrays], Arrays]") -> Selftest:
    """Return whether the bundle's engine gives the recorded answers when `run` runs it on the board."""
    import numpy

    manifest = json.loads((bundle / "manifest.json").read_bytes())
    parity, ports = manifest["parity"], manifest["signature"]
    compiled = bundle / "device" / "engine.so"
    place, kind = (compiled, ENGINE) if compiled.is_file() else (bundle / "model.onnx", GRAPH)
    engine = Artifact.of(place, kind=kind, inputs=model.inputs)
    sides = {}
    for side in ("input", "output"):
        arrays = [
            numpy.load(bundle / "parity" / f"{side}_{place}.npy", allow_pickle=False)
            for place in range(len(ports[f"{side}s"]))
        ]
        sides[side] = [numpy.split(each, parity["samples"]) for each in arrays]
    worst = 0.0
    for sample in range(parity["samples"]):
        given = {port["name"]: each[sample] for port, each in zip(ports["inputs"], sides["input"], strict=True)}
        try:
            got = run(engine, given)
        except CompileError as error:
            return Selftest(ok=False, detail=f"{error.what}: {error.why}")
        for port, each in zip(ports["outputs"], sides["output"], strict=True):
            allowed = parity["atol"] + parity["rtol"] * numpy.abs(each[sample])
            share = numpy.abs(got[port["name"]] - each[sample]) / allowed
            worst = max(worst, float(numpy.where(numpy.isnan(share), numpy.inf, share).max(initial=0.0)))
    detail = f"its engine answered {parity['samples']} recorded samples, off by {worst:.3g} of what is tolerated"
    return Selftest(ok=worst <= 1, detail=f"{detail}; its runner was not started")
