"""The worker's end of the pipes that `_worker` watches: one request at a time, until the input ends.

It ends when its input ends, when its parent dies, and when a request overruns its time.
"""

import ctypes
import gc
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, BinaryIO

from numpy.typing import NDArray

from . import _frames  # noqa: TID251 a private part of the adapters

Arrays = Mapping[str, NDArray[Any]]
Answer = Callable[[Mapping[str, Any], Arrays], tuple[Mapping[str, Any], Arrays]]

_PR_SET_PDEATHSIG = 1


class RefusedError(Exception):
    """A request that cannot be served, for a reason its sender should know.

    Args:
        why: one clause.
        kind: whose turn it is, one of `_worker.REFUSALS`, or "machine" if this machine ran short.
        next_step: what the user can do.
    """

    def __init__(self, why: str, kind: str = "compile", next_step: str = "") -> None:
        super().__init__(why)
        self.kind = kind
        self.next_step = next_step


def serve(parent: int, start: Callable[[], tuple[Mapping[str, Any], Answer]]) -> None:
    """Serve until the input ends.

    Args:
        parent: the process that must stay alive, 0: do not watch it.
        start: returns what to say first, and what answers a request (message, arrays) or raises RefusedError.
    """
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted user wants the current measurement finished
    requests, replies = _own_pipes()
    try:
        hello, answer = start()
    except RefusedError as error:
        replies.write(b"".join(_refusal(error)))
        return
    reply = _frames.encode({"ok": hello})
    gc.collect()
    gc.freeze()
    with suppress(EOFError, BrokenPipeError):
        while True:
            replies.write(b"".join(reply))
            replies.flush()
            request, arrays = _frames.decode(_exactly(requests))
            signal.setitimer(signal.ITIMER_REAL, request["limit_s"])  # the default action ends a call that hangs
            reply = _answered(answer, request, arrays)
            signal.setitimer(signal.ITIMER_REAL, 0)


def _answered(answer: Answer, request: Mapping[str, Any], arrays: Arrays) -> list[bytes]:
    try:
        message, outputs = answer(request, arrays)
    except RefusedError as error:
        return _refusal(error)
    return _frames.encode({"ok": message}, outputs)


def _refusal(error: RefusedError) -> list[bytes]:
    return _frames.encode({"refused": str(error), "kind": error.kind, "next_step": error.next_step})


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; 0: do not."""
    if not parent:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        raise SystemExit(0)


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return the protocol's pipes, out of reach of anything that prints."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def _exactly(stream: BinaryIO) -> Callable[[int], bytes]:
    def read(count: int) -> bytes:
        content = stream.read(count)
        if len(content) != count:
            raise EOFError
        return content

    return read
