"""What a benchmark saw, in a file: with the command, the time, the load and the versions it was seen with."""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgeprune.durable import replacing

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "onnx", "onnxruntime")


def about() -> dict[str, Any]:
    """Return with what, and when, the figures are made; folders of this machine stay out of the command."""
    script = Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix()
    return {
        "command": shlex.join(["python", script, *(_without_places(each) for each in sys.argv[1:])]),
        "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _without_places(word: str) -> str:
    """Return a word of a command, what lies outside of this repository as <path>."""
    name, equals, path = word.rpartition("=")
    if "/" not in path:
        return word
    place = Path(path).resolve()
    return name + equals + (place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else "<path>")


def keep(path: Path | None, facts: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write facts as JSON, in place of an earlier file at once or not at all.

    Args:
        path: None: nothing is written.
        facts: a mapping is indented; of a sequence every item has a line.
    """
    if path is None:
        return
    lines = "[\n" + ",\n".join(json.dumps(each) for each in facts) + "\n]"
    text = json.dumps(facts, indent=1) if isinstance(facts, Mapping) else lines
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        stream.write(text.encode() + b"\n")
