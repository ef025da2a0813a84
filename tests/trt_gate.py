"""NVIDIA's own parser and builder, run without a GPU: TensorRT for RTX, through the worker of `tensorrt_local`.

It says whether a graph would be accepted, never how fast it would be: it builds for other GPUs than a Jetson's, and
nothing is executed.
"""

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgeprune.targets._typed_onnx import typed
from edgeprune.targets._worker import WatchedWorker

LIMIT_S = 120.0
"""For one graph; a small net takes 0.1 to 0.5 s."""

installed = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="NVIDIA's compiler is missing; to run the compile gate: pip install -c constraints.txt '.[trt-check]'",
)

BUILD_ONLY = {"api": "tensorrt_rtx", "gpu": None, "cuda_graph": False, "level": 3, "workspace_mib": 0, "tf32": False}
"""Settings of a worker that opens no GPU."""


class Gate:
    """Builds graphs in a process of its own.

    Args:
        folder: for the graphs and engines.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.worker = WatchedWorker("TensorRT", "_tensorrt_worker", BUILD_ONLY, limit_s=LIMIT_S)

    def build(self, graph: onnx.ModelProto, precision: str) -> Mapping[str, Any]:
        """Return what the compiler says of the graph in this precision: layers, their types, size of the engine.

        Raises:
            CompileError: if it refuses.
        """
        return self.build_bytes(typed(graph, precision).SerializeToString(), precision)

    def build_bytes(
        self, content: bytes, precision: str = "fp32", timing_cache: Path | None = None
    ) -> Mapping[str, Any]:
        """Return the same for a serialized graph, as it is."""
        path, engine = self.folder / "graph.onnx", self.folder / "graph.engine"
        path.write_bytes(content)
        model = {"path": str(path), "sha256": hashlib.sha256(content).hexdigest(), "inputs": []}
        request = {"do": "build", "model": model, "precision": precision, "engine": str(engine)}
        request |= {"timing_cache": str(timing_cache)} if timing_cache else {}
        reply, _ = self.worker.ask(request, "building graph.onnx")
        assert engine.stat().st_size == reply["bytes"] > 0
        return reply


@contextmanager
def opened(folder: Path) -> Iterator[Gate]:
    """Yield a gate whose process ends with the context."""
    gate = Gate(folder)
    try:
        yield gate
    finally:
        gate.worker.close()
