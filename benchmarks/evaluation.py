"""Accuracy of a ResNet-56 on 1,000 images: our evaluator against the loop one would write, in one run.

    python benchmarks/evaluation.py [--repeats 5] [--images 1000] [--out FILE.json]

The loop: eval mode, inference mode, float32, batches of 250, as the model is. Ours folds batch norms, uses channels
last and the arithmetic that is faster on this CPU; it is asked through the same `judge` a search calls, entropy left
out because the loop has none. Weights and images are random: neither side looks at them. The two are timed in turn.

The aim: at least 3 times as fast where the CPU has bf16 instructions.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import raw_results
import torch
from cifar10 import ResNet

from edgeprune.export import export
from edgeprune.quality import Evaluator
from edgeprune.structure import build_structure

BATCH = 250
BAR = 3.0


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def plain(net: torch.nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Return how many images are classified correctly."""
    with torch.inference_mode():
        return sum(int((net(x).argmax(1) == y).sum()) for x, y in batches)


def main() -> None:
    """Print seconds, the ratio, and which arithmetic was taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    net = ResNet(9).eval()
    draw = torch.randn(chosen.images, 3, 32, 32)
    labels = plain_labels(net, draw)
    batches = list(zip(draw.split(BATCH), labels.split(BATCH), strict=True))
    graph = export(net, draw[:1])
    structure = build_structure(net, draw[:1], graph, multiple=8)
    ours = Evaluator(net, structure, graph, validation=batches, calibration=[draw[:64]], entropy_images=0)
    ours.judge(net), plain(net, batches)
    taken: dict[str, list[float]] = {"plain fp32 loop": [], "evaluator": []}
    for _ in range(chosen.repeats):
        taken["plain fp32 loop"].append(seconds(lambda: plain(net, batches)))
        taken["evaluator"].append(seconds(lambda: ours.judge(net)))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    ratio = medians["plain fp32 loop"] / medians["evaluator"]
    path = str(ours.dtype).removeprefix("torch.")
    for name, value in medians.items():
        print(f"{name:16s} {value:.3f} s for {chosen.images} images")
    print(f"the evaluator took {path}: {ratio:.2f} times as fast as the loop, {torch.get_num_threads()} threads")
    print(f"agreement with the loop: {ours.judge(net).accuracy:.2%} of its answers")
    facts = {"seconds": taken, "ratio": ratio, "dtype": path, "threads": torch.get_num_threads()}
    raw_results.keep(chosen.out, {**raw_results.about(), **facts})
    raise SystemExit(int(path == "bfloat16" and ratio < BAR))


def plain_labels(net: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the net's own answers, so that agreement can be said."""
    with torch.inference_mode():
        return torch.cat([net(each).argmax(1) for each in images.split(BATCH)])


if __name__ == "__main__":
    main()
