"""Instructions of our kernels against ONNX Runtime's, on the emulated ARM board: counts, which say nothing about time.

    python benchmarks/board_instructions.py [--net resnet20 --net resnet56 --net mobilenetv2] [--out FILE.json]

Both runtimes run the same ONNX file on the same board and answer the same inputs alike; what is counted is one call,
after those that warm up. The aim: at most 1.0 times ONNX Runtime's instructions on ResNet-20. Weights are random; no
runtime looks at them.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import raw_results
import torch
from cifar10 import ResNet
from torch import nn
from tvm_cpu import graph_of, mobilenetv2

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.measurement import Sampling
from edgeprune.profile import load_profile
from edgeprune.target import Target, open_target

NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (lambda: ResNet(3), 32),
    "resnet56": (lambda: ResNet(9), 32),
    "mobilenetv2": (mobilenetv2, 224),
}
BARS = {"resnet20": 1.0}
TOLERANCE = 1e-4
BOARD = "arm-emulated"


def written(name: str, folder: Path) -> Artifact:
    """Return the exported net as a file."""
    make, side = NETS[name]
    graph = graph_of(make, side)
    onnx.save(graph, str(folder / f"{name}.onnx"))
    spec = TensorSpec(name=graph.graph.input[0].name, shape=(1, 3, side, side))
    return Artifact.of(folder / f"{name}.onnx", kind="onnx", inputs=[spec])


def seen_of(target: Target, graph: Artifact, image: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Return the counts of one net, and its answer."""
    engine = target.compile(graph)
    answer = next(iter(target.run(engine, {graph.inputs[0].name: image}).values()))
    seen = target.measure(engine, Sampling(reference=engine, sessions_max=2))
    calls = seen.sessions[0].candidate.elapsed
    facts = {"instructions": min(calls), "spread": max(calls) / min(calls) - 1}
    return facts | {
        name: seen.conditions[name] for name in ("cpu_model", "tvm", "onnxruntime") if name in seen.conditions
    }, answer


def compared(names: list[str], folder: Path) -> dict[str, Any]:
    """Return the counts of every net in both runtimes, and ours as a multiple of ONNX Runtime's."""
    graphs = {name: written(name, folder) for name in names}
    draw = np.random.default_rng(0).standard_normal
    images = {name: draw(graph.inputs[0].shape).astype(np.float32) for name, graph in graphs.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    answers: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for runtime in ("tvm", "onnxruntime"):
        limits = {"runtime": runtime, "time_limit_s": 600}
        with open_target(load_profile(BOARD, {"options": limits})) as target:
            for name, graph in graphs.items():
                found[name][runtime], answer = seen_of(target, graph, images[name])
                answers[name].append(answer)
    for name, (ours, theirs) in answers.items():
        assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max(), name
        found[name]["ratio"] = found[name]["tvm"]["instructions"] / found[name]["onnxruntime"]["instructions"]
    return found


def main() -> None:
    """Print the ratios, keep them if asked to, and exit with 1 if an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="append", choices=sorted(NETS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        nets = compared(chosen.net or list(NETS), Path(folder))
    for name, facts in nets.items():
        ours, theirs = (facts[each]["instructions"] / 1e6 for each in ("tvm", "onnxruntime"))
        aim = f", at most {BARS[name]} is wanted" if name in BARS else ""
        print(f"{name:12s} ours {ours:9.3f} M instructions, ONNX Runtime {theirs:9.3f} M: {facts['ratio']:.3f}{aim}")
    raw_results.keep(chosen.out, {**raw_results.about(), "metric": "emulated_instructions", "nets": nets})
    sys.exit(int(any(nets[name]["ratio"] > bar for name, bar in BARS.items() if name in nets)))


if __name__ == "__main__":
    main()
