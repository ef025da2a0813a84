"""Run, time and check the model of the bundle this file lies in. Needs Python 3.8, onnxruntime and numpy, no more.

    python runner.py --input x.npy [--output y.npy]      answers for every row of x.npy
    python runner.py --bench [--seconds 3] [--threads 1] milliseconds on this machine, now
    python runner.py --selftest                          every digest, and the recorded answers

Exit codes: 0 done; 1 the answers are not the recorded ones; 2 the request cannot be carried out as written;
4 the bundle is damaged; 70 a bug of this runner.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import os
import re
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

VERSION = "0.1.0"
"""Of the edgeprune this runner belongs to; it speaks as its command line does."""

WRONG_ANSWER, WRONG_REQUEST, DAMAGED, BUG = 1, 2, 4, 70
KINDS = {
    WRONG_ANSWER: ("ParityFailed", "result"),
    WRONG_REQUEST: ("UserError", "user"),
    DAMAGED: ("BundleError", "artifact"),
    BUG: ("EdgepruneError", "bug"),
}
"""Kind and blame of every exit code, in the words of edgeprune's errors."""

WARM_UP_CALLS, WARM_UP_S = 5, 0.25
CLEAN_CALLS_NEEDED = 20
ROWS_SHOWN = 8
ABSOLUTE = "absolute milliseconds of this machine under its load of now; they drift by several per cent"
RELATIVE = "for a ratio you can rely on: edgeprune measure this.onnx other.onnx"
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_PATH = re.compile(_SEGMENT + "(?:/" + _SEGMENT + "){0,4}")


class RunnerError(Exception):
    """Why this runner stops, and with which exit code."""

    def __init__(self, code: int, what: str, next_step: str = "", why: str = "") -> None:
        super().__init__(_told(what, why, next_step))
        self.code = code
        self.diagnostic = _diagnostic(*KINDS[code], what, next_step, why)


def _told(what: str, why: str, next_step: str) -> str:
    text = what + (": " + why if why else "")
    return text + ("\n  next: " + next_step if next_step else "")


def _diagnostic(kind: str, blame: str, what: str, next_step: str = "", why: str = "") -> dict[str, str]:
    return {"kind": kind, "blame": blame, "what": what, "why": why, "next": next_step}


def _warning(what: str, next_step: str) -> dict[str, str]:
    """Return a diagnostic of something that stops nothing, nobody to blame."""
    return _diagnostic("Warning", "", what, next_step)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks and return the exit code."""
    parser = _parser()
    request = parser.parse_args(arguments)
    if request.output and not request.input:
        parser.error("--output goes with --input")
    verb, command = _verb(request)
    try:
        report = verb(request)
    except RunnerError as error:
        return _failed(command, error, as_json=request.json)
    except Exception:  # noqa: BLE001 - without this the interpreter would exit 1, which means a wrong answer
        return _failed(command, RunnerError(BUG, "runner.py has a bug", why=traceback.format_exc()), request.json)
    notes = report.pop("diagnostics", [])
    if request.json:
        _envelope(command, "ok", report, notes)
    else:
        print(_sentence(command, report))
        for each in notes:
            print(_told(each["what"], each["why"], each["next"]), file=sys.stderr)
    return 0


def _failed(command: str, error: RunnerError, as_json: bool) -> int:
    if as_json:
        _envelope(command, "error", None, [error.diagnostic])
    else:
        print(error, file=sys.stderr)
    return error.code


def _envelope(command: str, status: str, data: dict[str, Any] | None, diagnostics: list[dict[str, str]]) -> None:
    """Print the one JSON object, with the keys that every command of edgeprune gives it."""
    value = {"version": VERSION, "command": command, "status": status, "data": data, "diagnostics": diagnostics}
    print(json.dumps(value))


def _piped() -> int:
    """Do what `main` does; a reader that has seen enough, as `head` has, is no error."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run, time and check the model of this bundle.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", action="append", metavar="[NAME=]FILE", help="rows to answer, a .npy file per input")
    what.add_argument("--bench", action="store_true", help="time the model on this machine, now")
    what.add_argument("--selftest", action="store_true", help="check every digest and the recorded answers")
    parser.add_argument("--output", metavar="FILE", help="where the answers go: .npy, or .npz for several outputs")
    parser.add_argument("--seconds", type=_positive(float), default=3.0, help="of timing with --bench (default 3)")
    parser.add_argument("--threads", type=_positive(int), help="of one inference (default: as it was measured)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    number.__name__ = "positive " + kind.__name__
    return number


def _verb(request: argparse.Namespace) -> tuple[Callable[[argparse.Namespace], dict[str, Any]], str]:
    if request.bench:
        return bench, "bench"
    return (selftest, "selftest") if request.selftest else (run, "run")


def _sentence(command: str, report: dict[str, Any]) -> str:
    if command == "bench":
        return (
            "{p50_ms:.3f} ms median ({p5_ms:.3f} to {p95_ms:.3f}, 5 to 95 % of {clean_calls} {counted}), "
            "{calls} calls, {threads} thread(s), onnxruntime {onnxruntime}".format(**report)
        )
    if command == "selftest":
        return "{name}: {files} files whole, {samples} recorded samples answered within tolerance".format(**report)
    lines = [_output_line(name, facts) for name, facts in sorted(report["outputs"].items())]
    return "\n".join([*lines, *(["written to " + report["output"]] if report["output"] else [])])


def _output_line(name: str, facts: dict[str, Any]) -> str:
    lines = [f"{name}: {facts['dtype']} {facts['shape']}"]
    lines += [json.dumps(row) for row in facts.get("values", [])[:ROWS_SHOWN]]
    more = len(facts.get("values", [])) - ROWS_SHOWN
    return "\n".join([*lines, *([f"... {more} more rows; --output FILE takes them all"] if more > 0 else [])])


# --- the three verbs


def run(request: argparse.Namespace) -> dict[str, Any]:
    """Answer every row of the given inputs."""
    manifest, model = _model()
    output = _output_place(request.output, manifest)
    given = _given(request.input, manifest)
    session = _session(model, request.threads or _threads(manifest))
    answers = _answers(session, manifest, _calls(given, manifest))
    if output is not None:
        _write(output, answers)
    outputs = {name: {"dtype": str(each.dtype), "shape": list(each.shape)} for name, each in answers.items()}
    if output is None:  # no file takes the answers, so the report does
        for name, each in answers.items():
            outputs[name]["values"] = _plain(each.tolist())
    report = {"outputs": outputs, "output": str(output) if output else None}
    return dict(report, diagnostics=[_strange(name, each) for name, each in answers.items() if _strangers(each)])


def _strangers(array: Array) -> list[int]:
    """Return the first of the rows that hold NaN or infinity."""
    numpy = _numpy()

    if array.dtype.kind not in "fc":
        return []
    rows = numpy.isfinite(array).reshape(len(array), -1).all(axis=1)
    return numpy.flatnonzero(~rows)[:ROWS_SHOWN].tolist()  # type: ignore[no-any-return]


def _strange(name: str, answer: Array) -> dict[str, str]:
    """Return the warning about an answer that is no number: the model's own doing, for its input was finite."""
    what = f"output {name!r} holds NaN or infinity, first in row {_strangers(answer)[0]}"
    return _warning(what, "scale the input as README.txt says; a model overflows on what it never saw")


def _plain(value: Any) -> Any:
    """Return nested lists of numbers with None where JSON has no word: NaN and infinity."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def bench(request: argparse.Namespace) -> dict[str, Any]:
    """Time the model on its first recorded sample; calls that were preempted are set aside."""
    numpy = _numpy()

    manifest, model = _model()
    threads = request.threads or _threads(manifest)
    session = _session(model, threads)
    sample = _recorded(manifest, "inputs")[0]
    for _ in _for(WARM_UP_S, WARM_UP_CALLS):
        session.run(None, sample)
    timed = [_timed(session, sample, threads) for _ in _for(request.seconds, 1)]
    clean = [milliseconds for milliseconds, preempted in timed if not preempted]
    enough = len(clean) >= CLEAN_CALLS_NEEDED
    kept = clean if enough else [milliseconds for milliseconds, _ in timed]
    p5, p50, p95 = (float(each) for each in numpy.percentile(kept, [5, 50, 95]))
    return {
        "p5_ms": p5,
        "p50_ms": p50,
        "p95_ms": p95,
        "calls": len(timed),
        "clean_calls": len(kept),
        "counted": "calls that were never preempted" if enough else "calls, preempted ones among them",
        "threads": threads,
        "onnxruntime": _onnxruntime().__version__,
        "diagnostics": [_warning(ABSOLUTE, RELATIVE)],
    }


def _for(seconds: float, calls: int) -> Iterator[int]:
    """Count until both the seconds and the calls are spent."""
    end, count = time.perf_counter() + seconds, 0
    while count < calls or time.perf_counter() < end:
        yield count
        count += 1


def _timed(session: Any, sample: dict[str, Array], threads: int) -> tuple[float, bool]:
    """Return the milliseconds of one call and whether it was preempted."""
    before = _switches(threads)
    start = time.perf_counter()
    session.run(None, sample)
    elapsed = time.perf_counter() - start
    return elapsed * 1000, before is None or _switches(threads) != before


def _switches(threads: int) -> int | None:
    """Return how often this process lost its CPU involuntarily, None where the system does not count that."""
    try:
        import resource
    except ImportError:
        return None
    who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF) if threads == 1 else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_nivcsw


def selftest(request: argparse.Namespace) -> dict[str, Any]:
    """Hash every file, then compare the model's answers to the recorded inputs with the recorded ones."""
    manifest = _whole()
    _, model = _model()
    session = _session(model, request.threads or _threads(manifest))
    inputs, wanted = _recorded(manifest, "inputs"), _recorded(manifest, "outputs")
    parity, worst = manifest["parity"], 0.0
    for number, (sample, answer) in enumerate((inputs[k], wanted[k]) for k in range(len(inputs))):
        got = _call(session, manifest, sample)
        for name in answer:
            worst = max(worst, _excess(got[name], answer[name], parity, f"sample {number} of {name!r}"))
    return {
        "name": manifest["name"],
        "files": len(manifest["files"]) + 1,
        "samples": len(inputs),
        "worst_of_tolerance": worst,
    }


def _excess(got: Array, wanted: Array, parity: dict[str, Any], where: str) -> float:
    """Return the largest |got - wanted| as a share of what is tolerated."""
    numpy = _numpy()

    if got.shape != wanted.shape:
        raise RunnerError(WRONG_ANSWER, f"{where}: the answer is {got.shape}, {wanted.shape} was recorded")
    mine, theirs = got.astype("float64"), wanted.astype("float64")
    with numpy.errstate(divide="ignore", invalid="ignore"):
        share = numpy.abs(mine - theirs) / (parity["atol"] + parity["rtol"] * numpy.abs(theirs))
    share = numpy.where(mine == theirs, 0.0, share)
    worst = float(numpy.where(numpy.isnan(share), numpy.inf, share).max(initial=0.0))
    if worst > 1:
        raise RunnerError(
            WRONG_ANSWER,
            f"{where}: the answer is off by {worst:.3g} times what is tolerated",
            "this onnxruntime computes something else; try the version the manifest names",
        )
    return worst


# --- the bundle


def _folder() -> Path:
    return Path(__file__).absolute().parent


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


def _model() -> tuple[dict[str, Any], bytes]:
    """Return the manifest and the bytes of the model it speaks of."""
    manifest = _manifest()
    return manifest, _checked("model.onnx", manifest)


def _checked(name: str, manifest: dict[str, Any]) -> bytes:
    """Return the bytes of one file of the bundle once its digest holds."""
    entry = next((each for each in manifest["files"] if each["path"] == name), None)
    if entry is None:
        raise RunnerError(DAMAGED, f"manifest.json does not list {name}")
    content = _read(name)
    if len(content) != entry["size"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise RunnerError(DAMAGED, f"{name} was changed: its SHA-256 is not the recorded one", "copy the bundle again")
    return content


def _read(name: str) -> bytes:
    if not _PATH.fullmatch(name):
        raise RunnerError(DAMAGED, f"{name!r} may leave the bundle", "do not trust this copy")
    try:
        return (_folder() / name).read_bytes()
    except OSError as error:
        raise RunnerError(DAMAGED, f"{name}: {error.strerror}", "copy the bundle again") from error


def _whole() -> dict[str, Any]:
    """Return the manifest once every file it lists is as it was, and nothing else lies beside them."""
    manifest = _manifest()
    listed = {each["path"] for each in manifest["files"]} | {"manifest.json"}
    present = set(_walk(_folder()))
    for name in sorted(listed ^ present):
        what = "is missing" if name in listed else "does not belong to the bundle"
        raise RunnerError(DAMAGED, f"{name!r} {what}", "move it away, or copy the bundle again")
    for name in sorted(listed - {"manifest.json"}):
        _checked(name, manifest)
    return manifest


def _walk(folder: Path, above: str = "") -> Iterator[str]:
    for each in os.scandir(folder):
        mode = each.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(folder / each.name, above + each.name + "/")
        elif stat.S_ISREG(mode):
            yield above + each.name
        else:
            raise RunnerError(DAMAGED, f"{above + each.name!r} is a link or a device", "do not trust this copy")


def _recorded(manifest: dict[str, Any], side: str) -> list[dict[str, Array]]:
    """Return the recorded "inputs" or "outputs" of each call, by name."""
    numpy = _numpy()

    count, columns = manifest["parity"]["samples"], {}
    for place, tensor in enumerate(manifest["signature"][side]):
        name = f"parity/{side[:-1]}_{place}.npy"
        rows = _array(io.BytesIO(_checked(name, manifest)), name, DAMAGED)
        columns[tensor["name"]] = numpy.split(rows, count)
    return [{name: column[number] for name, column in columns.items()} for number in range(count)]


def _threads(manifest: dict[str, Any]) -> int:
    """Return the threads of one inference when it was measured."""
    threads = manifest["profile"]["options"].get("threads", 1)
    return threads if isinstance(threads, int) and threads >= 1 else 1


# --- arrays in and out


def _array(stream: Any, name: str, blame: int) -> Array:
    """Return the array of a .npy stream in this machine's byte order, row by row; nothing is ever unpickled."""
    numpy = _numpy()

    try:
        value: Array = numpy.lib.format.read_array(stream, allow_pickle=False)
        # onnxruntime looks at the kind of number only, and would read swapped bytes as they lie there
        return numpy.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")  # type: ignore[no-any-return]
    except (ValueError, EOFError, MemoryError, OSError) as error:
        raise RunnerError(blame, f"{name} is not a plain .npy file: {error}", "numpy.save(name, array)") from error


def _given(files: list[str], manifest: dict[str, Any]) -> dict[str, Array]:
    """Return the arrays of --input by name, each checked against the model."""
    tensors = manifest["signature"]["inputs"]
    names = [tensor["name"] for tensor in tensors]
    pairs = [_named(text, names) for text in files]
    if sorted(name for name, _ in pairs) != sorted(names):
        wanted = " ".join(f"--input {name}=FILE" for name in names)
        raise RunnerError(WRONG_REQUEST, "--input does not name each input once", wanted)
    arrays = {name: _load(Path(place)) for name, place in pairs}
    for tensor in tensors:
        _check(tensor, arrays[tensor["name"]])
    return arrays


def _named(text: str, names: list[str]) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if equals and name in names:
        return name, place
    return (names[0], text) if len(names) == 1 else ("", text)


def _load(path: Path) -> Array:
    try:
        with path.open("rb") as stream:
            return _array(stream, str(path), WRONG_REQUEST)
    except OSError as error:
        raise RunnerError(WRONG_REQUEST, f"{path}: {error.strerror}", "give a .npy file") from error


def _check(tensor: dict[str, Any], array: Array) -> None:
    shape, wanted = array.shape, tensor["shape"]
    shown = "({})".format(", ".join(["N", *map(str, wanted[1:])]))
    if not _fits(shape, wanted):
        hint = _reshaping(shape, wanted) or "give it that shape"
        raise RunnerError(WRONG_REQUEST, "input {!r} is {}, {} is wanted".format(tensor["name"], shape, shown), hint)
    if array.dtype.name != tensor["dtype"]:
        raise RunnerError(
            WRONG_REQUEST,
            "input {!r} is {}, {} is wanted".format(tensor["name"], array.dtype.name, tensor["dtype"]),
            "x.astype({!r})".format(tensor["dtype"]),
        )
    if strange := _strangers(array):
        what = "input {!r} holds NaN or infinity, first in row {}".format(tensor["name"], strange[0])
        raise RunnerError(WRONG_REQUEST, what, "give finite numbers; numpy.isfinite(x) finds the others")


def _reshaping(shape: tuple[int, ...], wanted: list[Any]) -> str:
    """Return the expression that makes x fit, empty if none of the usual ones does."""
    if _fits((1, *shape), wanted):
        return "add the batch axis: x[None]"
    if len(shape) == 4 and _fits((shape[0], shape[3], *shape[1:3]), wanted):
        return "channels come before rows: x.transpose(0, 3, 1, 2)"
    if len(shape) == 3 and _fits((1, shape[2], *shape[:2]), wanted):
        return "add the batch axis, channels come before rows: x[None].transpose(0, 3, 1, 2)"
    return ""


def _fits(shape: tuple[int, ...], wanted: list[Any]) -> bool:
    """Return whether there is at least one row and every other axis that is known is as wanted."""
    if len(shape) != len(wanted) or shape[0] == 0:
        return False
    return all(not isinstance(wanted[k], int) or wanted[k] == shape[k] for k in range(1, len(shape)))


def _calls(given: dict[str, Array], manifest: dict[str, Any]) -> list[dict[str, Array]]:
    """Return the rows of each call: as many as the model takes at once, all of them where it does not mind."""
    numpy = _numpy()

    sizes = {tensor["name"]: tensor["shape"][0] for tensor in manifest["signature"]["inputs"]}
    counts = set()
    for name, size in sizes.items():
        calls, left = divmod(len(given[name]), size) if isinstance(size, int) else (1, 0)
        if left:
            raise RunnerError(WRONG_REQUEST, f"input {name!r} has {len(given[name])} rows", f"a multiple of {size}")
        counts.add(calls)
    if len(counts) != 1:
        raise RunnerError(WRONG_REQUEST, "the inputs have different numbers of rows")
    count = counts.pop()
    parts = {name: numpy.split(array, count) for name, array in given.items()}
    return [{name: part[number] for name, part in parts.items()} for number in range(count)]


def _output_place(text: str | None, manifest: dict[str, Any]) -> Path | None:
    """Return where the answers go, once that is a place for them."""
    if text is None:
        return None
    place, outputs = Path(text).absolute(), manifest["signature"]["outputs"]
    if place.suffix not in (".npy", ".npz"):
        raise RunnerError(WRONG_REQUEST, f"--output {text} is neither .npy nor .npz")
    if place.suffix == ".npy" and len(outputs) > 1:
        raise RunnerError(WRONG_REQUEST, f"the model has {len(outputs)} outputs", "--output y.npz takes them all")
    if _folder().resolve() in (place.parent.resolve() / place.name).parents:
        why = f"--output {text} lies inside the bundle, which holds only what its manifest lists"
        raise RunnerError(WRONG_REQUEST, why, "write it elsewhere, for example --output ../y.npy")
    return place


def _write(place: Path, answers: dict[str, Array]) -> None:
    numpy = _numpy()

    part = place.with_name("." + place.name + ".part")
    try:
        with part.open("wb") as stream:
            if place.suffix == ".npz":
                numpy.savez(stream, **answers)
            else:
                numpy.save(stream, next(iter(answers.values())), allow_pickle=False)
        part.replace(place)
    except OSError as error:
        if part.exists():
            part.unlink()
        raise RunnerError(WRONG_REQUEST, f"{place}: {error.strerror}", "choose another --output") from error


# --- the runtime


def _numpy() -> Any:
    return _package("numpy")


def _onnxruntime() -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it would report on its use, and disturb what is timed
    return _package("onnxruntime")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        why = f"{name} cannot be imported: {error}"
        raise RunnerError(WRONG_REQUEST, why, "pip install onnxruntime numpy") from error


def _session(model: bytes, threads: int) -> Any:
    """Return a session on the CPU, set up as it was when it was measured."""
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    try:
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class
        raise RunnerError(
            WRONG_REQUEST, f"onnxruntime {runtime.__version__} cannot load the model: {error}", "update onnxruntime"
        ) from error


def _call(session: Any, manifest: dict[str, Any], sample: dict[str, Array]) -> dict[str, Array]:
    """Return the answers of one call, by name."""
    names = [tensor["name"] for tensor in manifest["signature"]["outputs"]]
    try:
        answers = session.run(names, sample)
    except Exception as error:  # the runtime's exceptions share no base class
        raise RunnerError(WRONG_REQUEST, f"onnxruntime cannot run the model: {error}") from error
    return {name: answers[place] for place, name in enumerate(names)}


def _answers(session: Any, manifest: dict[str, Any], calls: list[dict[str, Array]]) -> dict[str, Array]:
    """Return the answers of all calls, joined along the batch."""
    numpy = _numpy()

    parts = [_call(session, manifest, sample) for sample in calls]
    return {name: numpy.concatenate([part[name] for part in parts]) for name in parts[0]}


if __name__ == "__main__":
    sys.exit(_piped())
