"""One command on a board and the local ssh client that carries it, under a dead-man switch.

host                                   board
────                                   ─────
script, then a line every second  ──▶  bash: runs the job in a process group of its own, and beside it a reader of
                                       those lines; no line for `silence_s`, or the end of input: the group is killed
EDGEPRUNE_OUT <nonce>             ◀──  what a login prints before this line is dropped
output of the job                 ◀──
EDGEPRUNE_RC=<status> <nonce>     ◀──  the only exit status that is believed
"""

import base64
import math
import os
import re
import select
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from edgeprune.errors import ProfileError

BEAT_S = 1.0
"""Seconds between two lines to the board."""

TURN_S = 0.1
"""Seconds after which a loop looks whether it was asked to end."""

SILENCE_S = 3.5
"""Seconds without a line after which the board ends a job; together with `GRACE_S` less than five."""

GRACE_S = 1.0
"""Seconds between the polite and the final signal."""

CLOSE_S = 5.0
"""Seconds that a client is given to end by itself."""

INPUT_CAP = 1 << 20
"""Bytes of input of a job, which travel inside its script; anything larger is a file."""

_ESCAPE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])|\x9b[0-?]*[ -/]*[@-~]"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

_SCRIPT = """main() {{
printf 'EDGEPRUNE_OUT %s\\n' {nonce}; printf 'EDGEPRUNE_OUT %s\\n' {nonce} >&2
set -m
set -- {arguments}
exec 3<&0
"$@" < {stdin} 3<&- & job=$!
{{ end=$((SECONDS + {limit}))
while ((SECONDS < end)) && IFS= read -r -t {silence} -u 3 _; do :; done
kill -TERM -- -$job; sleep {grace}; kill -KILL -- -$job; }} > /dev/null 2>&1 & watch=$!
exec 4>&2 2> /dev/null
wait $job; rc=$?
kill -KILL -- -$watch; kill -KILL -- -$job
printf '\\nEDGEPRUNE_END %s\\n' {nonce} >&4
printf '\\nEDGEPRUNE_RC=%s %s\\n' $rc {nonce}
exit 0
}}; main
"""


def job_script(argv: Sequence[str], *, nonce: str, limit_s: float, silence_s: float, stdin: bytes = b"") -> bytes:
    """Return what bash on the board reads to run `argv`, every argument quoted.

    Raises:
        ProfileError: if an argument cannot be one, or the input is too long.
    """
    if not argv or any("\0" in each for each in argv):
        raise ProfileError("a command for a board holds a NUL byte or nothing at all")
    if len(stdin) > INPUT_CAP:
        raise ProfileError(f"{len(stdin)} bytes of input for {argv[0]}", why=f"at most {INPUT_CAP} travel that way")
    encoded = base64.b64encode(stdin).decode("ascii")
    script = _SCRIPT.format(
        nonce=nonce,
        arguments=shlex.join(argv),
        stdin=f"<(base64 -d <<< {encoded})" if stdin else "/dev/null",
        limit=math.ceil(limit_s),
        silence=silence_s,
        grace=GRACE_S,
    )
    return script.encode("utf-8", "surrogateescape")


def plain(text: str) -> str:
    """Return `text` without escape sequences and control characters; line ends and tabs stay."""
    bare = _CONTROL.sub("", _ESCAPE.sub("", text))
    return bare if bare.isascii() else "".join(each for each in bare if each in "\n\t" or each.isprintable())


@dataclass(frozen=True, kw_only=True)
class Done:
    """A job that ended by itself: its exit status and what it said, without escape codes."""

    rc: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        """Return the last line of its errors, else of its output, for a message."""
        return last_line(self.stderr) or last_line(self.stdout) or f"exit status {self.rc}"


def last_line(text: str) -> str:
    """Return the last line that is not blank, cut to what fits a message; empty if there is none."""
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")


class Job:
    """A command on the board, as long as its client lives.

    Args:
        client: the ssh client, its three pipes ours.
        script: what it is to read first.
        cap: bytes of each output stream that are kept.
        tail: keep the last `cap` bytes; otherwise a longer stream makes the job `flooded` and ends it.
        on_close: called once when it is closed.
    """

    def __init__(
        self,
        client: "subprocess.Popen[bytes]",
        *,
        nonce: str,
        script: bytes,
        cap: int,
        tail: bool,
        on_close: "Callable[[Job], None]",
    ) -> None:
        self.client, self.cap, self.flooded = client, cap, False
        self._nonce, self._tail, self._on_close = nonce, tail, on_close
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stderr is not None
        self._to, self._from = client.stdin, (client.stdout, client.stderr)
        self._unsent = memoryview(script)
        self._seen = (bytearray(), bytearray())
        self._open = {each.fileno(): which for which, each in enumerate(self._from)}
        self._next_beat = time.monotonic() + BEAT_S
        self._closing = threading.Event()
        self._feeder: threading.Thread | None = None
        for each in (self._to, *self._from):
            os.set_blocking(each.fileno(), False)

    @property
    def rc(self) -> int | None:
        """Return the exit status that the board vouched for, None while there is none."""
        found = re.search(rb"\nEDGEPRUNE_RC=(\d{1,3}) %b\n" % self._nonce.encode(), self._seen[0][-4096:])
        return int(found[1]) if found else None

    @property
    def ended(self) -> bool:
        """Return whether both streams were read to their ends and the exit status is known."""
        return self.rc is not None and f"\nEDGEPRUNE_END {self._nonce}\n".encode() in self._seen[1][-4096:]

    @property
    def stdout(self) -> str:
        """Return what it printed so far."""
        return self._own(0).partition(f"\nEDGEPRUNE_RC={self.rc} {self._nonce}\n")[0]

    @property
    def stderr(self) -> str:
        """Return what it printed to its errors so far."""
        return self._own(1).partition(f"\nEDGEPRUNE_END {self._nonce}\n")[0]

    @property
    def client_words(self) -> str:
        """Return the last words of the client itself, or of the login."""
        lines = self._text(1).splitlines()
        return last_line("\n".join(each for each in lines if not each.startswith("EDGEPRUNE_")))

    @property
    def alive(self) -> bool:
        """Return whether it runs, as far as is known here."""
        return self.client.poll() is None and self.rc is None

    def _text(self, which: int) -> str:
        return plain(bytes(self._seen[which]).decode("utf-8", "replace"))

    def _own(self, which: int) -> str:
        before, marker, own = self._text(which).partition(f"EDGEPRUNE_OUT {self._nonce}\n")
        return own if marker else (before if self._tail else "")

    def pump(self, deadline: float) -> bool:
        """Feed the dead-man switch and drain both streams until the job ends; return False if time was up before.

        Args:
            deadline: on the monotonic clock.
        """
        while self._open and not self.ended and not self.flooded and not self._closing.is_set():
            left_s = min(deadline, self._next_beat) - time.monotonic()
            if time.monotonic() >= deadline:
                return False
            self._turn(max(0.0, min(left_s, TURN_S)))
        return True

    def _turn(self, timeout_s: float) -> None:
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_S
            self._unsent = self._unsent or memoryview(b"\n")
        poll = select.poll()
        for number in self._open:
            poll.register(number, select.POLLIN)
        if self._unsent:
            poll.register(self._to.fileno(), select.POLLOUT)
        for number, _ in poll.poll(math.ceil(timeout_s * 1000)):
            if number in self._open:
                self._read(number)
            else:
                self._write()

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._to.fileno(), self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # the client is gone; its end shows on the streams that are read
            self._unsent = memoryview(b"")

    def _read(self, number: int) -> None:
        with suppress(BlockingIOError):
            part, seen = os.read(number, 1 << 16), self._seen[self._open[number]]
            if not part:
                del self._open[number]
            seen += part
            if len(seen) > self.cap and self._tail:
                del seen[: len(seen) - self.cap]
            self.flooded = self.flooded or len(seen) > self.cap

    def feed(self) -> None:
        """Have a thread do what `pump` does, until it ends or is closed."""
        self._feeder = threading.Thread(target=self.pump, args=(math.inf,), name="edgeprune-board-job", daemon=True)
        self._feeder.start()

    def wait_for(self, text: str, limit_s: float) -> bool:
        """Return whether a fed job prints `text` before it ends and before the time is up."""
        end = time.monotonic() + limit_s
        while text not in self.stdout:
            if not self.alive or time.monotonic() > end:
                return text in self.stdout
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Let go of the dead-man switch, so that the board ends the job, and free everything here."""
        self._closing.set()
        if self._feeder is not None:
            self._feeder.join()
        with suppress(OSError):
            self._to.close()
        self._drain()
        reap(self.client)
        for each in self._from:
            each.close()
        if self._on_close is not None:
            done, self._on_close = self._on_close, _nothing
            done(self)

    def _drain(self) -> None:
        """Read on for a while: a client whose output nobody takes cannot end."""
        end = time.monotonic() + CLOSE_S
        while self._open and not self.flooded and not self.ended and time.monotonic() < end:
            self._unsent = memoryview(b"")
            poll = select.poll()
            for number in self._open:
                poll.register(number, select.POLLIN)
            for number, _ in poll.poll(100):
                self._read(number)


def _nothing(_: Job) -> None:
    pass


def reap(process: "subprocess.Popen[bytes]", patience_s: float = 1.0) -> None:
    """Wait a moment for a client to end, then kill it and whatever it started."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def close_quietly(*pipes: "IO[bytes] | None") -> None:
    """Close pipes, some of which may be broken."""
    for each in pipes:
        with suppress(OSError):
            if each is not None:
                each.close()
