"""Does a stranger's stopwatch agree? Times the two ONNX files of a deploy with nothing of edgeprune.

    edgeprune deploy ... --json > outcome.json
    python benchmarks/agreement.py outcome.json [--seconds 20]

The unpruned model (baseline.onnx of the run's folder) and the result (model.onnx of the bundle) are called in
alternating blocks, one thread, in fresh sessions; the ratio of median times must lie in the interval that deploy
reported. The blocks are long enough for warm caches, which is what deploy times as well: called in turn, one by one,
two nets evict each other, and the smaller one loses more by it. Needs onnxruntime and numpy.
"""

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime

BLOCK_S = 0.03
"""Seconds of calls of one model before the other has its turn; the first fifth of them is not counted."""

SESSIONS = 8


def session(path: Path) -> onnxruntime.InferenceSession:
    """Return a session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def block(model: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> list[int]:
    """Return nanoseconds of the counted calls of one block."""
    taken: list[int] = []
    end = time.monotonic() + BLOCK_S
    while time.monotonic() < end or len(taken) < 5:
        began = time.perf_counter_ns()
        model.run(None, feed)
        taken.append(time.perf_counter_ns() - began)
    return taken[len(taken) // 5 :]


def ratio(result: Path, baseline: Path, seconds: float) -> float:
    """Return the ratio of median times over blocks in random order, in fresh sessions."""
    models = [session(result), session(baseline)]
    entry = models[0].get_inputs()[0]
    feed = {entry.name: np.random.default_rng(0).standard_normal(entry.shape).astype(np.float32)}
    taken: list[list[int]] = [[], []]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for place in random.sample((0, 1), 2):
            taken[place] += block(models[place], feed)
    return statistics.median(taken[0]) / statistics.median(taken[1])


def main() -> None:
    """Print both ratios, and exit with 1 if they disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outcome", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0)
    chosen = parser.parse_args()
    said = json.loads(chosen.outcome.read_text())
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    result, baseline = Path(said["bundle"]) / "model.onnx", Path(said["run_dir"]) / "baseline.onnx"
    ratios = [ratio(result, baseline, chosen.seconds / SESSIONS) for _ in range(SESSIONS)]
    seen, interval = statistics.median(ratios), said["result"]["ratio"]
    agrees = interval["low"] <= seen <= interval["high"]
    print(f"here {seen:.4f} ({min(ratios):.4f} to {max(ratios):.4f} over {SESSIONS} sessions)")
    print(f"deploy said {interval['p50']:.4f} ({interval['low']:.4f} to {interval['high']:.4f}): agrees: {agrees}")
    raise SystemExit(int(not agrees))


if __name__ == "__main__":
    main()
