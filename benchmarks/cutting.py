"""Cutting a candidate out of the exported graph against exporting the cut module again: a ResNet-56, one run.

    python benchmarks/cutting.py [--plans 5] [--out FILE.json]

Every plan is made both ways, in turn, up to the bytes a runtime loads; the outputs of the two graphs must agree. The
aim is a ratio of at least 100. Weights are random: neither way looks at them.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import raw_results
import torch
from cifar10 import ResNet
from torch import nn

from edgeprune.cut import GraphCutter, cut_module, proven
from edgeprune.export import export
from edgeprune.plan import Plan, Space
from edgeprune.structure import Structure, build_structure

BAR = 100.0
REPEATS = 20
"""Cuts of one plan; re-exporting it is timed once, it takes seconds."""

TOLERANCE = 1e-4


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def random_plan(space: Space, chooser: random.Random) -> Plan:
    """Return a plan of random allowed widths and random units."""
    kept = {
        group.name: tuple(sorted(chooser.sample(range(group.width), chooser.choice(group.choices))))
        for group in space.groups
    }
    return space.check(Plan(kept=kept))


def output(graph: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """Return what onnxruntime makes of an image."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x})[0]


def one_plan(
    cutter: GraphCutter, net: nn.Module, structure: Structure, plan: Plan, x: torch.Tensor
) -> dict[str, float]:
    """Return the seconds of both ways to the bytes of one plan's graph, and how far the two graphs are apart."""
    again = seconds(lambda: export(cut_module(net, structure, plan), x).SerializeToString())
    cut = statistics.median(seconds(lambda: cutter.cut(plan).SerializeToString()) for _ in range(REPEATS))
    one, other = output(cutter.cut(plan), x.numpy()), output(export(cut_module(net, structure, plan), x), x.numpy())
    gap = float(np.abs(one - other).max() / np.abs(other).max())
    if not gap < TOLERANCE:
        raise SystemExit(f"the two graphs differ by {gap:.1e} of the output")
    return {"cut_s": cut, "export_s": again, "ratio": again / cut, "gap": gap}


def main() -> None:
    """Print the figures, and keep them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, x = ResNet(9).eval(), torch.randn(1, 3, 32, 32)
    first = seconds(lambda: export(net, x))
    graph = export(net, x)
    built = seconds(lambda: build_structure(net, x, graph, multiple=8))
    candidate = build_structure(net, x, graph, multiple=8)
    proof = seconds(lambda: proven(net, x, candidate))
    structure = proven(net, x, candidate)
    cutter = GraphCutter(graph, structure)
    chooser = random.Random(0)
    plans = [random_plan(structure.space, chooser) for _ in range(options.plans)]
    found = [one_plan(cutter, net, structure, plan, x) for plan in plans]
    for each in found:
        print("cut {cut_s:8.4f} s   export {export_s:7.2f} s   ratio {ratio:7.0f}   gap {gap:.0e}".format(**each))
    ratio = min(each["ratio"] for each in found)
    print(
        f"\nfirst export {first:.2f} s   find groups {built:.2f} s   prove {len(structure.units)} of them {proof:.2f} s"
    )
    print(f"cutting is at least {ratio:.0f} times faster than exporting again; the bar is {BAR:.0f}")
    once = {"first_export_s": first, "structure_s": built, "proof_s": proof}
    raw_results.keep(options.out, {**raw_results.about(), "ratio": ratio, "bar": BAR, "plans": found, **once})
    if ratio < BAR:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
