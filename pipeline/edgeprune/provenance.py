"""Where a result comes from, beside model, data and settings: the code that ran, the packages and the machine.

A run continues only where all of these are the same: a ratio measured under another runtime, or on another machine,
says nothing about this one.
"""

import inspect
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import nn

from edgeprune.canonical import digest

PACKAGES = ("edgeprune", "torch", "onnx", "onnxruntime", "onnxscript", "torch-pruning", "stable-baselines3", "numpy")


def versions() -> dict[str, str]:
    """Return package → version of everything that shapes a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return architecture, name of the CPU as far as the kernel tells, and Python's version."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))}
    return ", ".join([platform.machine(), *sorted(names), platform.python_version()])


def code_digest(module: nn.Module) -> str:
    """Return the SHA-256 of the source files that define the classes of a module and of all modules in it.

    PyTorch's own count by version. A class whose source is nowhere, as in a notebook, counts by its name.
    """
    files = {type(each).__module__ for each in module.modules()}
    return digest({name: _source(name) for name in files if name.partition(".")[0] != "torch"})


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""
