"""A process of an adapter's own that holds a runtime: watched, replaced when it is lost, never waited for in vain.

    WatchedWorker ── request frame ──▶ stdin   of  python -m edgeprune.targets.<module>
                  ◀── reply frame ──── stdout  {"ok": ...} or {"refused": why, "kind": ...}

A runtime that hangs, crashes or fills the memory takes its own process with it and nothing else. `_serve` is the other
end of the pipes.
"""

import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from edgeprune.errors import (
    CompileError,
    CorruptArtifact,
    DeviceBusy,
    DeviceLost,
    EdgepruneError,
    ProfileError,
    StorageFull,
)

from . import _frames  # noqa: TID251 a private part of the adapters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Reply = tuple[dict[str, Any], dict[str, NDArray[Any]]]

START_LIMIT_S = 60.0
ALARM_AFTER_S = 5.0
"""The worker's own alarm rings this much later than the parent's, for the case that the parent is gone."""

STDERR_KEPT = 2000
"""Bytes of the end of the worker's standard error that its last line is looked for in."""

REFUSALS: Mapping[str, type[EdgepruneError]] = {
    "compile": CompileError,
    "corrupt": CorruptArtifact,
    "busy": DeviceBusy,
    "lost": DeviceLost,
    "profile": ProfileError,
    "full": StorageFull,
}
"""What a reply calls a refusal → whose turn it is. "machine", which ran short, is told apart: it ends the worker."""


class WatchedWorker:
    """A worker that is started when it is first asked, and again when it was lost.

    Args:
        title: of the runtime, for messages: "ONNX Runtime".
        module: of `edgeprune.targets` that the process runs.
        settings: JSON values that the module's `main` is given, with "parent" added.
        limit_s: seconds within which a request is answered.
        environment: variables set for the process beside those of this one.
    """

    def __init__(
        self,
        title: str,
        module: str,
        settings: Mapping[str, Any],
        *,
        limit_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.title = title
        self.hello: Mapping[str, Any] = {}
        self._module, self._settings, self._limit_s = module, settings, limit_s
        self._environment = dict(environment or {})
        self._process: Process | None = None

    @property
    def pid(self) -> int | None:
        """Return the process id, None while there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process if there is none; `hello` is what it says of itself then.

        Raises:
            DeviceLost: if it does not answer.
            CompileError, ...: if it refuses to start, by the kind it names.
        """
        if self._process is not None:
            return
        self._process = Process(self._module, self._settings, self._environment)
        try:
            self.hello, _ = self._reply(START_LIMIT_S, "starting")
        except EdgepruneError:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def ask(
        self,
        request: Mapping[str, Any],
        doing: str,
        arrays: "Mapping[str, NDArray[Any]] | None" = None,
        extra_s: float = 0.0,
    ) -> "Reply":
        """Return message and arrays of the reply.

        Args:
            request: JSON values; "do" says what is wanted.
            doing: the same for people, "timing model.onnx".
            arrays: sent along.
            extra_s: seconds that this request may take beyond the limit.

        Raises:
            DeviceLost: if the process ends, hangs, breaks the protocol, or runs out of memory.
            CompileError, CorruptArtifact, DeviceBusy, ProfileError: if it refuses, by the kind it names.
        """
        self.start()
        limit_s = self._limit_s + extra_s
        return self._reply(limit_s, doing, _frames.encode({**request, "limit_s": limit_s + ALARM_AFTER_S}, arrays))

    def _reply(self, limit_s: float, doing: str, frame: Sequence[bytes] = ()) -> "Reply":
        assert self._process is not None
        try:
            message, arrays = self._process.exchange(frame, time.monotonic() + limit_s)
        except (EOFError, OSError, TimeoutError, _frames.FrameError) as error:
            why = self._process.end(error)
            self._process = None
            raise DeviceLost(
                f"the {self.title} worker was lost while {doing}",
                why=why,
                next_step="run the command again; a new worker starts by itself",
            ) from error
        except BaseException:  # an interrupted exchange leaves half a frame behind
            self.close()
            raise
        if "refused" in message:
            raise self._refusal(message, doing)
        return message["ok"], arrays

    def _refusal(self, message: Mapping[str, Any], doing: str) -> EdgepruneError:
        kind, why, next_step = str(message.get("kind")), str(message["refused"]), str(message.get("next_step", ""))
        if kind == "machine":
            self.close()  # what it holds is given back; the next call starts another
            return DeviceLost(
                f"the machine ran short while {doing}",
                why=why,
                next_step="end what else uses its memory, then run the command again",
            )
        if kind in REFUSALS:
            return REFUSALS[kind](f"{self.title} refused: {doing}", why=why, next_step=next_step)
        self.close()
        return DeviceLost(f"the {self.title} worker gave no reason it may give while {doing}", why=f"{kind}: {why}")


class Process:
    """The process and its two pipes; never waits longer than it is told to."""

    def __init__(self, module: str, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 closed with the worker
        alive = os.getpid() if _in_main_thread() else 0  # the kernel would kill it with the thread that starts it
        command = [sys.executable, "-P", "-m", f"edgeprune.targets.{module}"]
        self._process = subprocess.Popen(
            [*command, json.dumps({**settings, "parent": alive})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            cwd="/",
            env={**os.environ, **environment},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        os.set_blocking(self._requests.fileno(), False)
        os.set_blocking(self._replies.fileno(), False)

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def exchange(self, frame: Sequence[bytes], deadline: float) -> "Reply":
        """Send one request frame and return the reply; an empty frame only waits for one.

        Raises:
            TimeoutError: if there is none by `deadline`, on the monotonic clock.
            EOFError, OSError: if the worker is gone.
            FrameError: if what came back is not a frame.
        """
        for chunk in frame:
            self._write(memoryview(chunk), deadline)
        return _frames.decode(lambda count: self._read(count, deadline))

    def _write(self, chunk: memoryview, deadline: float) -> None:
        while chunk:
            _wait(self._requests, select.POLLOUT, deadline)
            with suppress(BlockingIOError):
                chunk = chunk[os.write(self._requests.fileno(), chunk) :]

    def _read(self, count: int, deadline: float) -> bytes:
        content = bytearray()
        while len(content) < count:
            _wait(self._replies, select.POLLIN, deadline)
            with suppress(BlockingIOError):
                part = os.read(self._replies.fileno(), min(count - len(content), 1 << 20))
                if not part:
                    raise EOFError("the worker closed its pipe")
                content += part
        return bytes(content)

    def end(self, error: BaseException) -> str:
        """End a worker that failed with `error`, and return why it did, as far as that is known."""
        if isinstance(error, TimeoutError):
            self.close()
            return "it did not answer in time and was killed"
        if isinstance(error, _frames.FrameError):
            self.close()
            return f"its reply is not a frame: {error}"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        why = _exit_of(self._process.returncode)
        said = self._last_words()
        self.close()
        return f"{why}; it said: {said}" if said else why

    def _last_words(self) -> str:
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - STDERR_KEPT))
        lines = self._errors.read().decode(errors="replace").splitlines()
        return next(("".join(filter(str.isprintable, line)) for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """Kill the worker, if it still runs, and free the pipes."""
        with suppress(ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.wait()
        for each in (self._requests, self._replies, self._errors):
            with suppress(OSError):
                each.close()


def _wait(pipe: IO[bytes], event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    left_ms = math.ceil((deadline - time.monotonic()) * 1000)
    if left_ms <= 0 or not poll.poll(left_ms):
        raise TimeoutError("the worker did not answer in time")


def _exit_of(code: int | None) -> str:
    if code is None:
        return "it closed its pipe but still runs"
    if code >= 0:
        return f"it ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = " (perhaps the machine ran out of memory)" if name == "SIGKILL" else ""
    return f"it was ended by {name}{hint}"


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
