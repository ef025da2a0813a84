"""The process that holds TVM, its compiler and its RPC client, for `edgeprune.targets.tvm_rpc`.

    compile        ONNX → engine file, on this machine
    check          whether the board's ONNX Runtime takes a graph as it is
    facts          what the board is and the state it is in
    run · time · count · layers    on the board, through functions "edgeprune.*" of its server (deploy/arm/desk.h)

Engines are of two kinds: libraries that TVM compiled, and ONNX files.

A call that the board does not answer cannot be interrupted here: whoever watches this process kills it.
"""

import contextlib
import ctypes
import getpass
import hashlib
import json
import math
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import CorruptArtifact, DeviceLost, EdgepruneError, ProfileError, StorageFull

from . import _serve  # noqa: TID251 a private part of the adapters
from ._serve import RefusedError  # noqa: TID251
from ._tvm import engine as engines  # noqa: TID251

if TYPE_CHECKING:
    from ._tvm_rpc_search import Tuning  # noqa: TID251

PROTOCOL = 2
"""Of the functions of the board's server, see kProtocol in deploy/arm/desk.h."""

ANSWER_CAP = 256 << 20
"""Bytes by which one answer of a board may make this process grow."""

TEXT_CAP = 32 << 20
"""Bytes of the longest answer that is read as text: the samples of a long session are some megabytes."""

NUMBER_CAP = 1 << 63
"""No count and no time of a board is larger."""

WHY_CAP = 1000
SESSION_LIMIT_S = 300
"""The board ends a session that asks nothing for as long; the next request opens another."""

NO_ONNXRUNTIME = 'install the board\'s server again, which brings ONNX Runtime along, or set runtime = "tvm"'
BUSY_PAUSE_S = 0.25
IDLE_S = 1.0
"""After as long a pause, the session is tried before it is relied on."""

REFUSED = re.compile(r"edgeprune:([a-z]+): (.*)", re.DOTALL)

KINDS = {
    "corrupt": "lost",  # the file was whole when it left here
    "architecture": "profile",
    "compile": "compile",
    "full": "full",
    "memory": "lost",
    "busy": "busy",
    "request": "lost",
    "runtime": "profile",
    "lost": "lost",
}
"""What the board calls a refusal → what it is for us, see `_worker.REFUSALS`."""

BLAMED: Mapping[type[EdgepruneError], str] = {
    CorruptArtifact: "corrupt",
    DeviceLost: "machine",  # no memory left to compile in
    ProfileError: "profile",
    StorageFull: "full",
}
"""Error of ours → what it is called between the processes; any other is the candidate's."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """Type and shape of one input or output."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return its bytes."""
        return engines.BYTES[self.dtype] * math.prod(self.shape)


Ports = Mapping[str, Port]


@dataclass(frozen=True, kw_only=True)
class Brought:
    """An engine on the board: the name of its file there, and its ports in order."""

    name: str
    inputs: Ports
    outputs: Ports


class Line:
    """The session on a board: opened when it is needed, and again when it has ended between two requests."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._door: tuple[int, str] | None = None
        self._brought: dict[str, Brought] = {}
        self._used = 0.0
        self._names = 0

    def open(self, door: Mapping[str, Any], busy_wait_s: float) -> dict[str, Any]:
        """Make sure there is a session through `door`, and return what the board says of itself."""
        wanted = (int(door["port"]), str(door["key"]))
        if self._session is not None and (wanted != self._door or not self._alive()):
            self.close()
        if self._session is None:
            self._connect(wanted, busy_wait_s)
        return self.facts()

    def facts(self) -> dict[str, Any]:
        """Return what the board says of itself.

        Raises:
            RefusedError: if it speaks another protocol.
        """
        facts = self.told("facts")
        if facts.get("protocol") != PROTOCOL:
            raise RefusedError(
                f"the board's server speaks protocol {facts.get('protocol')!r}, {PROTOCOL} is wanted",
                "profile",
                "install the server of this edgeprune on the board again",
            )
        return facts

    def told(self, function: str, *arguments: Any) -> dict[str, Any]:
        """Return the JSON object that a function of the board answers."""
        answer = self.call(function, *arguments)
        if len(answer) > TEXT_CAP:
            raise self._lost(f"an answer of {len(answer)} bytes")
        try:
            value = plain(json.loads(answer.decode("utf-8", errors="replace")))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self._lost("an answer that is no JSON object of plain values")
        return value

    def call(self, function: str, *arguments: Any) -> bytes:
        """Return the bytes that a function of the board answers."""
        return bytes(self._asked(f"edgeprune.{function}", *arguments))

    def _asked(self, function: str, *arguments: Any) -> Any:
        session = self._session
        if session is None:
            raise RefusedError("there is no session", "lost")
        return self._guarded(lambda: session.call(function, *arguments))

    def bring(self, engine: Mapping[str, Any]) -> Brought:
        """Return where the board has this engine, which is brought there if it has not."""
        sha256 = str(engine["sha256"])
        if sha256 in self._brought:
            return self._brought[sha256]
        content = _engine_bytes(Path(engine["path"]), sha256)
        self._names += 1
        suffix = ".onnx" if engine["kind"] == "onnx" else ".so"
        name = f"{sha256[:16]}-{self._names}{suffix}"  # a name that is in use must not be written again
        self._asked("tvm.rpc.server.upload", name, bytearray(content))
        told = self.told("load", name, sha256)
        try:
            brought = Brought(name=name, inputs=_ports(told["inputs"]), outputs=_ports(told["outputs"]))
        except (LookupError, TypeError, ValueError) as error:
            raise self._lost("inputs and outputs that are none") from error
        self._brought[sha256] = brought
        return brought

    def forget(self, sha256: str) -> None:
        """Remove an engine from the board."""
        brought = self._brought.pop(sha256, None)
        if brought is not None:
            self._asked("tvm.rpc.server.remove", brought.name)

    def close(self) -> None:
        """End the session, if the board still listens."""
        session, self._session, self._brought = self._session, None, {}
        if session is not None:
            with contextlib.suppress(Exception), _bounded():
                session.close()

    def _connect(self, door: tuple[int, str], busy_wait_s: float) -> None:
        patience = time.monotonic() + busy_wait_s
        while True:
            self._door = door
            try:
                self._session = self._guarded(lambda: Session(*door), connecting=True)
                self.facts()
                return
            except RefusedError as error:
                self.close()
                if error.kind != "busy" or time.monotonic() > patience:
                    raise
            time.sleep(BUSY_PAUSE_S)

    def _alive(self) -> bool:
        if time.monotonic() - self._used < IDLE_S:
            return True
        try:
            self.facts()
        except RefusedError:
            return False
        return True

    def _guarded(self, work: Callable[[], Any], *, connecting: bool = False) -> Any:
        """Return what `work` does over the session; what it raises becomes a refusal."""
        try:
            with _bounded():
                done = work()
        except Exception as error:
            raise self._refusal(error, connecting) from error
        self._used = time.monotonic()
        return done

    def _refusal(self, error: Exception, connecting: bool) -> RefusedError:
        found = REFUSED.search(str(error))
        if found is not None:
            kind, why = KINDS.get(found[1], "lost"), readable(found[2])
            return RefusedError(why, kind, _next_step(found[1]))
        if connecting:
            return RefusedError(f"no session: {first_line(error)}", "lost", _install_command())
        return self._lost(first_line(error))

    def _lost(self, why: str) -> RefusedError:
        """Return why the session is lost: what the board says of it, if it still answers, else what was seen here."""
        self.close()
        end = self._last_end()
        if "Illegal instruction" in end:
            return RefusedError(
                f"the board's CPU does not know the engine's instructions: {end}",
                "profile",
                "set the profile's option cpu to what the board has",
            )
        return RefusedError(f"the session broke: {end or why}", "lost")

    def _last_end(self) -> str:
        """Return how the board says that the session before ended, empty if it cannot be asked at once."""
        if self._door is None:
            return ""
        time.sleep(2 * BUSY_PAUSE_S)  # its supervisor looks five times a second
        try:
            with _bounded():
                session = Session(*self._door)
                answer = bytes(session.call("edgeprune.facts"))
                session.close()
            return readable(str(json.loads(answer).get("last_end", "")))
        except Exception:  # noqa: BLE001 it is gone, which is what was to be reported
            return ""


class Session:
    """A session of TVM RPC, without the rest of TVM: its runtime alone is loaded for it."""

    def __init__(self, port: int, key: str) -> None:
        words = f"{key} -holder={_holder()} -timeout={SESSION_LIMIT_S}"
        self._module = _runtime()("127.0.0.1", port, words, False)

    def call(self, function: str, *arguments: Any) -> Any:
        """Return what a global function of the board answers."""
        return self._module.get_function(function)(*arguments)

    def close(self) -> None:
        """End the session; dropping it is not enough, because functions of it may be kept somewhere."""
        self._module.get_function("CloseRPCConnection")()


@cache
def _runtime() -> Callable[..., Any]:
    """Return TVM's function that opens a session, its runtime loaded as the package itself would load it."""
    import tvm_ffi

    place = find_spec("tvm")
    assert place is not None
    assert place.origin is not None
    ctypes.CDLL(str(Path(place.origin).parent / "lib" / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
    found: Callable[..., Any] = tvm_ffi.get_global_func("rpc.Connect")
    return found


def _install_command() -> str:
    """Return the command that installs and starts the server of a board."""
    return f"see whether its server runs, or install it: sh {files('edgeprune.device') / 'arm' / 'install'} user@board"


def _holder() -> str:
    """Return who holds the board, for those who find it busy."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return re.sub(r"[^A-Za-z0-9._@-]", "?", f"{user}@{socket.gethostname()}-{os.getppid()}")[:100]


def _next_step(kind: str) -> str:
    return {
        "full": "free space on the board, or raise the server's --upload-mib",
        "busy": "wait until it is free",
        "architecture": "set the profile's arch to what the board is",
        "memory": "a smaller model, or a board with more memory",
        "runtime": NO_ONNXRUNTIME,
    }.get(kind, "")


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Let this process grow by no more than an answer may be, so that a board cannot fill this machine's memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ANSWER_CAP
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft < 0 else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def readable(text: str) -> str:
    """Return text from a board as one short line that does nothing to a terminal."""
    return "".join(filter(str.isprintable, text.split("\n")[0]))[:WHY_CAP]


def plain(value: Any) -> Any:
    """Return a JSON value from a board with every text in it made readable.

    Raises:
        ValueError: if a number in it is infinite, none, or too large for any count.
    """
    if isinstance(value, str):
        return readable(value)
    if type(value) in (int, float) and not abs(value) <= NUMBER_CAP:
        raise ValueError("a number that is none")
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {readable(str(name)): plain(each) for name, each in value.items()}
    return value


def first_line(error: Exception) -> str:
    """Return what TVM's error says, without the trace it carries."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return readable(lines[-1] if lines else type(error).__name__)


def _engine_bytes(path: Path, sha256: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{path.name}: {error.strerror}", "corrupt", "compile the model again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RefusedError(f"{path.name} changed on disk: its SHA-256 is not the recorded one", "corrupt")
    return content


# --- requests


class Worker:
    """Serves requests one at a time.

    Args:
        settings: "arch", "cpu", "lanes" and "precision" of the profile; "engines" and "kernels": folders.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._line = Line()
        self._tuning: Tuning | None = None
        self._verbs = {
            "facts": self.facts,
            "time": self.time,
            "count": self.count,
            "layers": self.layers,
            "compile": self.compile,
            "check": self.check,
            "bring": self.bring,
            "tune": self.tune,
        }

    def answer(
        self, request: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> tuple[Mapping[str, Any], Mapping[str, NDArray[Any]]]:
        """Return message and arrays of the reply to one request."""
        try:
            if request["do"] == "run":
                return {}, self.run(request, arrays)
            return self._verbs[request["do"]](request), {}
        except EdgepruneError as error:
            kind = next((name for known, name in BLAMED.items() if isinstance(error, known)), "compile")
            raise RefusedError(
                f"{error.what}: {error.why}" if error.why else error.what, kind, error.next_step
            ) from error
        except MemoryError as error:
            raise RefusedError("no memory left", "machine") from error

    def compile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write the engine of a graph and return where it lies."""
        from ._tvm_rpc_compile import compiled  # noqa: TID251 brings all of TVM along

        return {"path": str(compiled(request["model"], self._settings, request.get("tuning")))}

    def tune(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what is told of the task before, and return the next one of the search for faster kernels of a graph."""
        from ._tvm_rpc_compile import searched  # noqa: TID251 brings all of TVM along
        from ._tvm_rpc_search import Tuning  # noqa: TID251

        if self._tuning is None or "told" not in request:
            self._tuning = Tuning(searched(request["model"], self._settings, request["tuning"]))
        return self._tuning.next(request.get("told"))

    def check(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load a graph into the board's ONNX Runtime."""
        self._open(request)
        have = self._line.bring(request["engine"]).inputs
        wanted = {each["name"]: Port(dtype=each["dtype"], shape=tuple(each["shape"])) for each in request["inputs"]}
        if dict(have) != wanted:
            raise RefusedError(f"the graph's inputs are {_shown(have)}, not {_shown(wanted)}")
        return {}

    def facts(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the board says of itself."""
        return self._open(request)

    def run(self, request: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the outputs for the given inputs, by name."""
        self._open(request)
        brought = self._line.bring(request["engine"])
        answer = self._line.call("run", brought.name, _in_order(brought.inputs, arrays))
        self._line.forget(str(request["engine"]["sha256"]))
        return _outputs(brought.outputs, answer)

    def bring(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Bring engines to the board, where each is run once."""
        self._open(request)
        for each in request["engines"]:
            self._line.bring(each)
        return {}

    def time(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the samples of one session of candidate and reference."""
        self._open(request)
        names = [self._line.bring(request[which]).name for which in ("candidate", "reference")]
        wanted = [float(request["session_ms"]), float(request["block_ms"]), int(request["dropped_calls"])]
        how = [str(request["seed"]), int(request["pin"]), str(request["priority"])]
        return self._line.told("time", *names, *wanted, *how)

    def count(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the instructions of several calls of an engine."""
        self._open(request)
        return self._line.told("count", self._line.bring(request["engine"]).name)

    def layers(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return node → what it costs in one call, and what that counts."""
        path = Path(request["engine"]["path"])
        self._open(request)
        told = self._line.told("steps", self._line.bring(request["engine"]).name, int(request["pin"]))
        if request["engine"]["kind"] == "onnx":
            from ._graph_names import by_graph_node  # noqa: TID251 brings ONNX along

            return {"metric": told.get("metric"), "costs": by_graph_node(path, _spent(told.get("nodes"), told))}
        layers = [call.layer for call in engines.read_engine(path).script.calls]
        return {"metric": told.get("metric"), "costs": _spent(layers, told)}

    def _open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        for each in request.get("forget", ()):
            self._line.forget(str(each))
        return self._line.open(request["door"], float(request["busy_wait_s"]))


def _ports(told: Any) -> Ports:
    """Return the ports that the board lists, by name and in order; their names are percent-encoded.

    Raises:
        LookupError, TypeError, ValueError: if it lists none.
    """
    return {
        unquote(str(each["name"]), errors="strict"): Port(
            dtype=_dtype(each["dtype"]), shape=tuple(_size(size) for size in each["shape"])
        )
        for each in told
    }


def _dtype(name: Any) -> str:
    if name not in engines.BYTES:
        raise ValueError(name)
    return str(name)


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _spent(layers: Any, told: Mapping[str, Any]) -> dict[str, float]:
    """Return name → what it cost in all, from names and the costs that the board told in the same order."""
    costs: Any = told.get("costs")
    numbers = isinstance(costs, list) and all(type(each) in (int, float) and each >= 0 for each in costs)
    if not numbers or not isinstance(layers, list) or len(costs) != len(layers):
        raise RefusedError("the board answered for another engine", "lost")
    spent: dict[str, float] = {}
    for layer, cost in zip(layers, costs, strict=True):
        spent[str(layer)] = spent.get(str(layer), 0.0) + float(cost)
    return spent


def _shown(ports: Ports) -> str:
    return ", ".join(f"{name} {port.dtype} {list(port.shape)}" for name, port in ports.items()) or "none"


def _in_order(wanted: Ports, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the bytes of all inputs, in the engine's order."""
    if set(wanted) != set(arrays):
        raise RefusedError(f"the engine's inputs are {sorted(wanted)}, not {sorted(arrays)}")
    for name, port in wanted.items():
        if arrays[name].shape != port.shape or arrays[name].dtype.name != port.dtype:
            had = f"{arrays[name].dtype.name} {list(arrays[name].shape)}"
            raise RefusedError(f"input {name!r} is {port.dtype} {list(port.shape)}, not {had}")
    return b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in wanted)


def _outputs(ports: Ports, answer: bytes) -> dict[str, NDArray[Any]]:
    wanted = sum(port.size for port in ports.values())
    if len(answer) != wanted:
        raise RefusedError(f"the board answered {len(answer)} bytes, {wanted} are wanted", "lost")
    found, start = {}, 0
    for name, port in ports.items():
        found[name] = np.frombuffer(answer[start : start + port.size], port.dtype).reshape(port.shape)
        start += port.size
    return found


def main(settings: Mapping[str, Any]) -> None:
    """Serve until the input ends."""

    def start() -> tuple[Mapping[str, Any], _serve.Answer]:
        return {"tvm": version("apache-tvm"), "pid": os.getpid()}, Worker(settings).answer

    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # TVM takes it along if it is there: 2 s for nothing
    _serve.serve(int(settings["parent"]), start)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
