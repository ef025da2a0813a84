"""A board that lies: speaks TVM RPC as a real one does, and answers what it was told to.

    python lying_board.py '{"facts": "...", "load": "...", ...}'     prints its port; one process a session

An answer that begins with "raise " is raised; "long" is an answer of 33 MiB. Tests run it, with what they want to see
survived.
"""

import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable

import tvm
import tvm_ffi

MAGIC = 0xFF271


def lie(answer: str) -> Callable[..., bytes]:
    """Return a function that answers this, whatever it is asked."""

    def told(*_: object) -> bytes:
        if answer.startswith("raise "):
            raise RuntimeError(answer.removeprefix("raise "))
        return bytes(33 << 20) if answer == "long" else answer.encode()

    return told


def main(answers: dict[str, str]) -> None:
    """Serve until killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            client, _ = listener.accept()
            if os.fork():
                client.close()
                continue
            _, length = struct.unpack("<ii", client.recv(8, socket.MSG_WAITALL))
            client.recv(length, socket.MSG_WAITALL)
            client.sendall(struct.pack("<ii", MAGIC, 6) + b"server")
            for name, answer in answers.items():
                tvm_ffi.register_global_func(f"edgeprune.{name}", lie(answer), override=True)
            tvm_ffi.register_global_func("tvm.rpc.server.upload", lambda *_: None, override=True)
            tvm.get_global_func("rpc.ServerLoop")(client.detach())
            os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
