"""Run, time and check this bundle on a Jetson through its own trtexec. Needs Python 3.8 and nothing else.

    python3 device/edge_run.py --selftest                       every digest, an engine for this board, recorded answers
    python3 device/edge_run.py --bench [--seconds 5]            milliseconds on this board, now
    python3 device/edge_run.py --input x.npy [--output y.npy]   answers for every row of x.npy, one call a row
    python3 device/edge_run.py --engine                         the path of an engine that is good for this board

An engine is good for one TensorRT, one GPU, one release of the system and one power mode: that is its key. The bundle's
own engine is used where the key is this board's; elsewhere one is built from device/model.typed.onnx, answers the
recorded inputs as it must, and is kept under ~/.cache/edgeprune. Nothing is written into the bundle.

Exit codes: 0 done; 1 the answers are not the recorded ones; 2 the request cannot be carried out as written; 3 the board
failed; 4 the bundle is damaged; 70 a bug of this runner.
"""

from __future__ import annotations

import argparse
import array
import ast
import hashlib
import json
import math
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = "0.1.0"
"""Of the edgeprune this runner belongs to."""

WRONG_ANSWER, WRONG_REQUEST, BOARD_FAILED, DAMAGED, BUG = 1, 2, 3, 4, 70
KINDS = {
    WRONG_ANSWER: ("ParityFailed", "result"),
    WRONG_REQUEST: ("UserError", "user"),
    BOARD_FAILED: ("DeviceLost", "lab"),
    DAMAGED: ("BundleError", "artifact"),
    BUG: ("EdgepruneError", "bug"),
}
"""Kind and blame of every exit code, in the words of edgeprune's errors."""

SM_OF_SOC = {"tegra210": "53", "tegra186": "62", "tegra194": "72", "tegra234": "87", "tegra264": "110"}
BUILD_LIMIT_S, RUN_LIMIT_S, HELP_LIMIT_S = 3600, 600, 60
WARM_UP_MS = 2000
TYPES = {
    "<f4": ("f", "float32"),
    "<i4": ("i", "int32"),
    "<i8": ("q", "int64"),
    "|u1": ("B", "uint8"),
    "|i1": ("b", "int8"),
}
"""Type of a .npy file → (code of `array`, NumPy's name)."""

RAW_TYPES = {"Float": "<f4", "Int32": "<i4", "Int64": "<i8", "Int8": "|i1", "UInt8": "|u1"}
HEADER = b"\x93NUMPY"
ABSOLUTE = "absolute milliseconds of this board in its state of now"
RELATIVE = "for a ratio you can rely on: edgeprune verify THIS --target jetson"
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_PATH = re.compile(_SEGMENT + "(?:/" + _SEGMENT + "){0,4}")
_BANNER = re.compile(r"TensorRT\.trtexec \[TensorRT v(\d{4,7})\]")


class RunnerError(Exception):
    """Why this runner stops, and with which exit code."""

    def __init__(self, code: int, what: str, next_step: str = "", why: str = "") -> None:
        text = what + (": " + why if why else "")
        super().__init__(text + ("\n  next: " + next_step if next_step else ""))
        kind, blame = KINDS[code]
        self.code = code
        self.diagnostic = {"kind": kind, "blame": blame, "what": what, "why": why, "next": next_step}


class Values:
    """Numbers with a type and a shape, row by row; `numbers` is an `array.array`."""

    def __init__(self, kind: str, shape: tuple[int, ...], content: bytes) -> None:
        self.kind, self.shape = kind, shape
        self.numbers = array.array(TYPES[kind][0])
        if len(content) != math.prod(shape) * self.numbers.itemsize:
            raise ValueError(f"{len(content)} bytes are no {TYPES[kind][1]} of {shape}")
        self.numbers.frombytes(content)

    def rows(self, size: int) -> Iterator[Values]:
        """Yield parts of `size` rows."""
        each = math.prod(self.shape[1:]) * size
        for start in range(0, len(self.numbers), each):
            part = self.numbers[start : start + each]
            yield Values(self.kind, (size, *self.shape[1:]), part.tobytes())

    def npy(self) -> bytes:
        """Return the .npy file of these numbers."""
        said = {"descr": self.kind, "fortran_order": False, "shape": self.shape}
        header = "{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".format(**said)
        padded = header + " " * (63 - (len(HEADER) + 4 + len(header)) % 64) + "\n"
        return HEADER + b"\x01\x00" + struct.pack("<H", len(padded)) + padded.encode() + self.numbers.tobytes()


def values_from_npy(content: bytes, name: str, blame: int) -> Values:
    """Return the numbers of a .npy file; nothing in it is ever executed."""
    try:
        if content[:6] != HEADER or content[6] not in (1, 2):
            raise ValueError("it does not begin as one")
        wide = 2 if content[6] == 1 else 4
        length = int.from_bytes(content[8 : 8 + wide], "little")
        facts = ast.literal_eval(content[8 + wide : 8 + wide + length].decode("latin-1"))
        if facts["fortran_order"] or facts["descr"] not in TYPES:
            raise ValueError("numbers of {} column by column, or of another type".format(facts["descr"]))
        return Values(facts["descr"], tuple(int(each) for each in facts["shape"]), content[8 + wide + length :])
    except (ValueError, KeyError, TypeError, SyntaxError, IndexError, MemoryError, RecursionError) as error:
        raise RunnerError(blame, f"{name} is not a plain .npy file: {error}", "numpy.save(name, array)") from None


# -- the command line -----------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks and return the exit code."""
    request = _parser().parse_args(arguments)
    command = next(name for name in ("input", "bench", "selftest", "engine") if getattr(request, name))
    try:
        with tempfile.TemporaryDirectory(prefix="edge-run-") as folder:
            report = {"input": run, "bench": bench, "selftest": selftest, "engine": engine}[command](
                request, Board(request), Path(folder)
            )
    except RunnerError as error:
        return _failed(command, error, request.json)
    except Exception:  # noqa: BLE001 - without this the interpreter would exit 1, which means a wrong answer
        return _failed(command, RunnerError(BUG, "edge_run.py has a bug", why=traceback.format_exc()), request.json)
    if request.json:
        _envelope(command, "ok", report, [])
    else:
        print(_sentence(command, report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run, time and check this bundle on a Jetson.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", action="append", metavar="[NAME=]FILE", help="rows to answer, a .npy file per input")
    what.add_argument("--bench", action="store_true", help="time the model on this board, now")
    what.add_argument("--selftest", action="store_true", help="check every digest and the recorded answers")
    what.add_argument("--engine", action="store_true", help="print the path of an engine for this board")
    parser.add_argument("--output", metavar="FILE", help="where the answers go, a .npy file per output")
    parser.add_argument("--seconds", type=int, default=5, help="of timing with --bench (default 5)")
    parser.add_argument("--rebuild", action="store_true", help="build an engine, from the graph alone")
    parser.add_argument("--cache", metavar="FOLDER", help="where engines are kept (default ~/.cache/edgeprune/bundles)")
    parser.add_argument("--trtexec", metavar="FILE", help="the trtexec to use (default: the board's)")
    parser.add_argument("--sysroot", default="", metavar="FOLDER", help="root of the board's files, for labs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _failed(command: str, error: RunnerError, as_json: bool) -> int:
    if as_json:
        _envelope(command, "error", None, [error.diagnostic])
    else:
        print(error, file=sys.stderr)
    return error.code


def _envelope(command: str, status: str, data: dict[str, Any] | None, diagnostics: list[dict[str, str]]) -> None:
    value = {"version": VERSION, "command": command, "status": status, "data": data, "diagnostics": diagnostics}
    print(json.dumps(value))


def _sentence(command: str, report: dict[str, Any]) -> str:
    if command == "engine":
        return str(report["engine"])
    where = "engine {made} for {key}".format(**report)
    if command == "bench":
        line = "{p50_ms:.3f} ms median ({p5_ms:.3f} to {p95_ms:.3f}, 5 to 95 %), {calls} calls".format(**report)
        return f"{line}; {where}\n{ABSOLUTE}; {RELATIVE}"
    if command == "selftest":
        return "{name}: {files} files whole, {samples} recorded samples answered within tolerance; {where}".format(
            **dict(report, where=where)
        )
    return "\n".join("{}: {} {}".format(name, *facts) for name, facts in sorted(report["outputs"].items()))


# -- the verbs ------------------------------------------------------------------------------------------------------


def run(request: argparse.Namespace, board: Board, folder: Path) -> dict[str, Any]:
    """Answer every row of the given inputs."""
    manifest = _manifest()
    given = _given(request.input, manifest)
    sizes = {each["name"]: _batch(each) for each in manifest["signature"]["inputs"]}
    columns = {name: list(values.rows(sizes[name])) for name, values in given.items()}
    if len({len(each) for each in columns.values()}) != 1:
        raise RunnerError(WRONG_REQUEST, "the inputs have different numbers of rows")
    ready = board.ready(manifest, folder)
    calls = [dict(zip(columns, each)) for each in zip(*columns.values())]  # noqa: B905 - Python 3.8 has no strict
    answers = [ready.answer(each, folder) for each in calls]
    outputs = {}
    for tensor in manifest["signature"]["outputs"]:
        name = tensor["name"]
        parts = [each[name] for each in answers]
        whole = Values(parts[0].kind, (len(parts) * parts[0].shape[0], *parts[0].shape[1:]),
                       b"".join(each.numbers.tobytes() for each in parts))  # fmt: skip
        outputs[name] = [TYPES[whole.kind][1], list(whole.shape)]
        if request.output:
            _write(_output_place(request.output, name, len(manifest["signature"]["outputs"])), whole)
    return dict(ready.told(), outputs=outputs, output=request.output)


def bench(request: argparse.Namespace, board: Board, folder: Path) -> dict[str, Any]:
    """Time the model on this board."""
    ready = board.ready(_manifest(), folder)
    times = sorted(ready.time(request.seconds, folder))
    count = len(times)
    p5, p50, p95 = (times[min(count - 1, int(share * count))] for share in (0.05, 0.5, 0.95))
    return dict(ready.told(), p5_ms=p5, p50_ms=p50, p95_ms=p95, calls=count)


def selftest(_: argparse.Namespace, board: Board, folder: Path) -> dict[str, Any]:
    """Hash every file, then compare the engine's answers to the recorded inputs with the recorded ones."""
    manifest = _whole()
    ready = board.ready(manifest, folder)
    worst = ready.worst if ready.worst is not None else _worst(ready, manifest, folder)
    samples = manifest["parity"]["samples"]
    files = len(manifest["files"]) + 1
    return dict(ready.told(), name=manifest["name"], files=files, samples=samples, worst_of_tolerance=worst)


def engine(_: argparse.Namespace, board: Board, folder: Path) -> dict[str, Any]:
    """Say where an engine for this board is."""
    return board.ready(_manifest(), folder).told()


# -- the board ------------------------------------------------------------------------------------------------------


class Board:
    """What the board is, and its trtexec."""

    def __init__(self, request: argparse.Namespace) -> None:
        self._request = request
        self.trtexec = _find_trtexec(request.trtexec)
        said = _call([self.trtexec, "--help"], Path("/"), HELP_LIMIT_S).stdout
        found = _BANNER.search(said)
        if found is None:
            raise RunnerError(BOARD_FAILED, self.trtexec + " names no TensorRT version", _INSTALL)
        number = int(found.group(1))
        base = 1000 if number < 10000 else 10000
        self.version = (number // base, number % base // 100, number % 100)
        self.flags = set(re.findall(r"(?<![\w-])--([A-Za-z][A-Za-z0-9]*)", said))
        self.key = _key(self.version, request.sysroot)

    def ready(self, manifest: dict[str, Any], folder: Path) -> Engine:
        """Return an engine for this board: the bundle's, one kept from before, or a new one that answers as it must."""
        typed = _checked("device/model.typed.onnx", manifest)
        facts = json.loads(_checked("device/engine.json", manifest).decode("ascii"))
        mine = Engine(self, manifest, _folder() / "device/model.engine", "of the bundle", facts)
        listed = any(each["path"] == "device/model.engine" for each in manifest["files"])
        if listed and facts["key"] == self.key and not self._request.rebuild:
            _checked("device/model.engine", manifest)
            if mine.loads(folder):
                return mine
        place = self._cache() / hashlib.sha256(typed).hexdigest()[:32] / self.key
        kept = Engine(self, manifest, place / "model.engine", "kept from before", facts)
        if not self._request.rebuild and _still_whole(place) and kept.loads(folder):
            return kept
        return self._build(manifest, place, facts, folder)

    def _cache(self) -> Path:
        if self._request.cache:
            return Path(self._request.cache)
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(home) / "edgeprune" / "bundles"

    def _build(self, manifest: dict[str, Any], place: Path, facts: dict[str, Any], folder: Path) -> Engine:
        part = folder / "model.engine"
        cache = folder / "timing.cache"
        known = facts["key"] == self.key and not self._request.rebuild
        if known and any(each["path"] == "device/timing.cache" for each in manifest["files"]):
            cache.write_bytes(_checked("device/timing.cache", manifest))
        source = str(_folder() / "device/model.typed.onnx")
        command = [self.trtexec, *self._build_flags(source, str(part), str(cache), facts)]
        _judged(_call(command, folder, BUILD_LIMIT_S), "building an engine")
        made = Engine(self, manifest, part, "built now", facts)
        made.worst = _worst(made, manifest, folder)
        _keep(part, place)
        made.path = place / "model.engine"
        return made

    def _build_flags(self, source: str, engine: str, cache: str, facts: dict[str, Any]) -> list[str]:
        workspace, level, precision = int(facts["workspace_mib"]), int(facts["level"]), str(facts["precision"])
        flags = ["--onnx=" + source, "--saveEngine=" + engine, "--timingCacheFile=" + cache]
        new = "memPoolSize" in self.flags
        flags.append(("--memPoolSize=workspace:{}" if new else "--workspace={}").format(workspace))
        flags += self.offered(f"builderOptimizationLevel={level}")
        flags += self.offered("skipInference") or self.offered("buildOnly")
        if self.version[0] == 10:
            flags += self.offered("stronglyTyped")
        if self.version[0] < 10 and precision in ("fp16", "int8"):
            flags.append("--" + precision)
        return flags

    def offered(self, *flags: str) -> list[str]:
        """Return those of the flags, values and all, that this trtexec takes."""
        return ["--" + each for each in flags if each.partition("=")[0] in self.flags]


class Engine:
    """An engine on this board."""

    def __init__(self, board: Board, manifest: dict[str, Any], path: Path, made: str, facts: dict[str, Any]) -> None:
        self.board, self.path, self.made = board, path, made
        self.worst: float | None = None
        self._manifest, self._facts = manifest, facts

    def told(self) -> dict[str, Any]:
        """Return what a report says of it."""
        tensorrt = ".".join(map(str, self.board.version))
        return {"engine": str(self.path), "made": self.made, "key": self.board.key, "tensorrt": tensorrt}

    def loads(self, folder: Path) -> bool:
        """Return whether this TensorRT can load and run it."""
        command = [self.board.trtexec, "--loadEngine=" + str(self.path), "--iterations=1", "--duration=0", "--warmUp=0"]
        done = _call(command, folder, RUN_LIMIT_S)
        return done.returncode == 0 and "&&&& PASSED" in done.stdout

    def time(self, seconds: int, folder: Path) -> list[float]:
        """Return milliseconds of every call."""
        command = [self.board.trtexec, "--loadEngine=" + str(self.path), f"--warmUp={WARM_UP_MS}"]
        command += [f"--duration={max(1, seconds)}", "--iterations=50", "--exportTimes=times.json"]
        if self.board.version[0] < 11:
            command += self.board.offered("useCudaGraph", "useSpinWait", "noDataTransfers")
        _judged(_call(command, folder, RUN_LIMIT_S + seconds), "timing")
        rows = json.loads((folder / "times.json").read_text())
        return [float(each["computeMs"]) for each in rows]

    def answer(self, given: dict[str, Values], folder: Path) -> dict[str, Values]:
        """Return the outputs of one call, by name."""
        with tempfile.TemporaryDirectory(dir=str(folder)) as name:
            job = Path(name)
            for place, each in enumerate(given.values()):
                (job / f"in{place}.bin").write_bytes(self._bytes(each))
            files = ",".join(f"'{name}':in{place}.bin" for place, name in enumerate(given))
            raw = "dumpRawBindingsToFile" in self.board.flags
            how = "--dumpRawBindingsToFile" if raw else "--exportOutput=out.json"
            command = [
                self.board.trtexec,
                "--loadEngine=" + str(self.path),
                "--iterations=1",
                "--duration=0",
                "--warmUp=0",
            ]
            command += ["--loadInputs=" + files, how, *self.board.offered("includeDataTransfers")]
            _judged(_call(command, job, RUN_LIMIT_S), "running")
            found = _raw_outputs(job) if raw else _json_outputs(job / "out.json")
        names = [each["name"] for each in self._manifest["signature"]["outputs"]]
        return {name: _named_output(found, name) for name in names}

    def _bytes(self, values: Values) -> bytes:
        """Return an input as the engine takes it; before TensorRT 10 there is no int64."""
        if values.kind == "<i8" and self.board.version[0] < 10:
            return array.array("i", values.numbers).tobytes()
        return values.numbers.tobytes()


_INSTALL = "sudo apt-get install libnvinfer-bin"


def _find_trtexec(wanted: str | None) -> str:
    for each in (wanted, shutil.which("trtexec"), "/usr/src/tensorrt/bin/trtexec"):
        if each and os.access(each, os.X_OK):
            return str(Path(each).absolute())
        if wanted:
            raise RunnerError(WRONG_REQUEST, "there is no trtexec at " + wanted)
    raise RunnerError(WRONG_REQUEST, "there is no trtexec on this board", _INSTALL)


def _key(version: tuple[int, ...], sysroot: str) -> str:
    """Return what an engine of this board in this state belongs to."""
    soc = re.findall(r"tegra\d+", _text(sysroot + "/proc/device-tree/compatible"))
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(sysroot + "/etc/nv_tegra_release"))
    mode = ""
    if shutil.which("nvpmodel"):
        said = _call(["nvpmodel", "-q"], Path("/"), HELP_LIMIT_S).stdout
        mode = next(iter(re.findall(r"NV Power Mode: *([A-Za-z0-9_.-]{1,40})", said)), "")
    facts = [
        "trt" + ".".join(map(str, version)),
        "sm" + SM_OF_SOC.get(soc[0] if soc else "", "?"),
        "l4t" + (".".join(release.groups()) if release else "?"),
        _text(sysroot + "/proc/device-tree/model").strip("\0\n ") or "?",
        mode or "?",
    ]
    return re.sub(r"[^A-Za-z0-9.]+", "_", "-".join(facts))[:150]


def _text(path: str) -> str:
    try:
        with open(path, "rb") as stream:  # noqa: PTH123 - a path under /proc, read as it is
            return stream.read(300).decode("utf-8", "replace")
    except OSError:
        return ""


def _call(command: list[str], folder: Path, limit_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=str(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunnerError(BOARD_FAILED, f"{Path(command[0]).name} did not run: {error}") from None


def _judged(done: subprocess.CompletedProcess[str], doing: str) -> None:
    if done.returncode == 0 and "&&&& PASSED" in done.stdout:
        return
    errors = re.findall(r"\[E\] ?(.*)", done.stdout)
    said = "".join(filter(str.isprintable, errors[0]))[:300] if errors else f"exit status {done.returncode}"
    raise RunnerError(BOARD_FAILED, "trtexec failed while " + doing, "see sudo dmesg | tail, and free -m", said)


# -- engines that are kept ------------------------------------------------------------------------------------------


def _still_whole(place: Path) -> bool:
    try:
        wanted = (place / "model.engine.sha256").read_text().strip()
        return hashlib.sha256((place / "model.engine").read_bytes()).hexdigest() == wanted
    except OSError:
        return False


def _keep(part: Path, place: Path) -> None:
    """Put an engine and its digest into their place; the digest last, because it says that the engine is whole."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        digest = place / "model.engine.sha256"
        if digest.exists():
            digest.unlink()
        content = part.read_bytes()
        for target, what in ((place / "model.engine", content), (digest, hashlib.sha256(content).hexdigest().encode())):
            new = target.with_name(target.name + ".part")
            with new.open("wb") as stream:
                stream.write(what)
                stream.flush()
                os.fsync(stream.fileno())
            new.replace(target)
    except OSError as error:
        raise RunnerError(BOARD_FAILED, f"the engine cannot be kept: {error}", "free some space") from None


# -- answers --------------------------------------------------------------------------------------------------------


def _raw_outputs(job: Path) -> dict[str, Values]:
    found = {}
    for file in job.glob("*.output.*raw"):
        told = re.match(r"(.*)\.output\.((?:\d+\.)*)([A-Za-z0-9]+)\.raw$", file.name)
        if told is None or told.group(3) not in RAW_TYPES:
            raise RunnerError(BOARD_FAILED, "trtexec wrote " + repr(file.name) + ", which is no output")
        shape = tuple(int(each) for each in told.group(2).split(".") if each)
        found[told.group(1)] = Values(RAW_TYPES[told.group(3)], shape, file.read_bytes())
    return found


def _json_outputs(file: Path) -> dict[str, Values]:
    words = {"nan": "NaN", "inf": "Infinity"}
    text = re.sub(r"(?<=[\s,\[])(-?)(nan|inf)(?=[\s,\]])", lambda m: m.group(1) + words[m.group(2)], file.read_text())
    found = {}
    for each in json.loads(text):
        shape = tuple(int(size) for size in re.findall(r"\d+", each["dimensions"]))
        found[each["name"]] = Values("<f4", shape, array.array("f", each["values"]).tobytes())
    return found


def _named_output(found: dict[str, Values], name: str) -> Values:
    safe = "".join(each if (each.isalnum() and ord(each) < 128) or each in "._-," else "_" for each in name)
    if name not in found and safe not in found:
        raise RunnerError(BOARD_FAILED, f"trtexec wrote no output {name!r}")
    return found[name] if name in found else found[safe]


def _worst(ready: Engine, manifest: dict[str, Any], folder: Path) -> float:
    """Return the largest difference from the recorded answers, as a share of what is tolerated."""
    inputs, wanted, worst = _recorded(manifest, "inputs"), _recorded(manifest, "outputs"), 0.0
    for number, sample in enumerate(inputs):
        got = ready.answer(sample, folder)
        for name, answer in wanted[number].items():
            share = _excess(got[name], answer, manifest["parity"])
            if share > 1:
                raise RunnerError(
                    WRONG_ANSWER,
                    f"sample {number} of {name!r}: the answer is off by {share:.3g} times what is tolerated",
                    "build again with --rebuild; if it stays so, this TensorRT computes something else",
                )
            worst = max(worst, share)
    return worst


def _excess(got: Values, wanted: Values, parity: dict[str, Any]) -> float:
    if len(got.numbers) != len(wanted.numbers):
        return math.inf
    worst = 0.0
    for place, want in enumerate(wanted.numbers):
        mine = got.numbers[place]
        if mine == want or (mine != mine and want != want):
            continue
        share = abs(mine - want) / (parity["atol"] + parity["rtol"] * abs(want))
        worst = max(worst, share if share == share else math.inf)
    return worst


def _recorded(manifest: dict[str, Any], side: str) -> list[dict[str, Values]]:
    """Return the recorded "inputs" or "outputs" of each call, by name."""
    count = manifest["parity"]["samples"]
    calls: list[dict[str, Values]] = [{} for _ in range(count)]
    for place, tensor in enumerate(manifest["signature"][side]):
        name = f"parity/{side[:-1]}_{place}.npy"
        whole = values_from_npy(_checked(name, manifest), name, DAMAGED)
        for number, part in enumerate(whole.rows(whole.shape[0] // count)):
            calls[number][tensor["name"]] = part
    return calls


# -- the bundle -----------------------------------------------------------------------------------------------------


def _folder() -> Path:
    return Path(__file__).absolute().parent.parent


def _manifest() -> dict[str, Any]:
    """Return the manifest once its spelling and its own digest hold."""
    content = _read("manifest.json")
    try:
        value: dict[str, Any] = json.loads(content.decode("ascii"))
        claimed = value.pop("manifest_sha256")
        whole = hashlib.sha256(_spelled(value)).hexdigest() == claimed
        same = _spelled(dict(value, manifest_sha256=claimed)) + b"\n" == content
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise RunnerError(DAMAGED, "manifest.json cannot be read", "copy the bundle again") from None
    if not (whole and same):
        raise RunnerError(DAMAGED, "manifest.json was changed: its own digest does not hold", "copy the bundle again")
    if value.get("format") != "edgeprune-bundle" or value.get("schema_version") != 2:
        raise RunnerError(DAMAGED, "manifest.json is not of a bundle this runner knows")
    return value


def _spelled(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _checked(name: str, manifest: dict[str, Any]) -> bytes:
    """Return the bytes of one file of the bundle once its digest holds."""
    entry = next((each for each in manifest["files"] if each["path"] == name), None)
    if entry is None:
        raise RunnerError(DAMAGED, "manifest.json does not list " + name)
    content = _read(name)
    if len(content) != entry["size"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise RunnerError(DAMAGED, name + " was changed: its SHA-256 is not the recorded one", "copy the bundle again")
    return content


def _read(name: str) -> bytes:
    if not _PATH.fullmatch(name):
        raise RunnerError(DAMAGED, repr(name) + " may leave the bundle", "do not trust this copy")
    path = _folder() / name
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise RunnerError(DAMAGED, name + " is not a plain file", "do not trust this copy")
        return path.read_bytes()
    except OSError as error:
        raise RunnerError(DAMAGED, f"{name} cannot be read: {error.strerror}", "copy the bundle again") from None


def _whole() -> dict[str, Any]:
    """Return the manifest once every file it lists is whole."""
    manifest = _manifest()
    for each in manifest["files"]:
        _checked(each["path"], manifest)
    return manifest


# -- arrays in and out ----------------------------------------------------------------------------------------------


def _given(files: list[str], manifest: dict[str, Any]) -> dict[str, Values]:
    """Return the values of --input by name, each checked against the model."""
    tensors = manifest["signature"]["inputs"]
    names = [tensor["name"] for tensor in tensors]
    given = {}
    for text in files:
        name, equals, place = text.partition("=")
        if not (equals and name in names):
            name, place = (names[0], text) if len(names) == 1 else ("", text)
        try:
            given[name] = values_from_npy(Path(place).read_bytes(), place, WRONG_REQUEST)
        except OSError as error:
            raise RunnerError(WRONG_REQUEST, f"{place}: {error.strerror}", "give a .npy file") from None
    if sorted(given) != sorted(names) or len(files) != len(names):
        wanted = " ".join(f"--input {name}=FILE" for name in names)
        raise RunnerError(WRONG_REQUEST, "--input does not name each input once", wanted)
    for tensor in tensors:
        _fits(tensor, given[tensor["name"]])
    return given


def _batch(tensor: dict[str, Any]) -> int:
    """Return how many rows one call takes."""
    return tensor["shape"][0] if isinstance(tensor["shape"][0], int) else 1


def _fits(tensor: dict[str, Any], values: Values) -> None:
    shape, wanted = values.shape, tensor["shape"]
    rest = len(shape) == len(wanted) and all(shape[k] == wanted[k] for k in range(1, len(shape)))
    if not rest or not shape or shape[0] == 0 or shape[0] % _batch(tensor) or TYPES[values.kind][1] != tensor["dtype"]:
        raise RunnerError(
            WRONG_REQUEST,
            "input {!r} is {} {}".format(tensor["name"], TYPES[values.kind][1], list(shape)),
            "give {} of shape {}, or several of it along the first axis".format(tensor["dtype"], wanted),
        )


def _output_place(text: str, name: str, count: int) -> Path:
    """Return where one output goes: y.npy, or y.NAME.npy where there are several."""
    place = Path(text).absolute()
    if place.suffix != ".npy":
        raise RunnerError(WRONG_REQUEST, f"--output {text} does not end in .npy")
    if _folder().resolve() in (place.parent.resolve() / place.name).parents:
        raise RunnerError(WRONG_REQUEST, "--output lies inside the bundle", "write it elsewhere")
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return place if count == 1 else place.with_name(f"{place.stem}.{safe}.npy")


def _write(place: Path, values: Values) -> None:
    part = place.with_name("." + place.name + ".part")
    try:
        part.write_bytes(values.npy())
        part.replace(place)
    except OSError as error:
        raise RunnerError(WRONG_REQUEST, f"{place}: {error.strerror}", "choose another --output") from None


if __name__ == "__main__":
    sys.exit(main())
