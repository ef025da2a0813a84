"""What `edgeprune --help` costs: CPU seconds of its process, and heavy packages it must not import.

    python benchmarks/startup.py [--runs 9] [--out FILE.json]

The aims: under 0.35 s of CPU, a small part of what importing torch costs, and no torch, onnxruntime or numpy.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import raw_results

BAR_S = 0.35
HEAVY = ("torch", "onnxruntime", "numpy", "onnx", "pydantic", "sqlalchemy", "stable_baselines3")
HELP = "import runpy, sys; sys.argv = ['edgeprune', '--help']; runpy.run_module('edgeprune', run_name='__main__')"


def cpu_seconds(code: str) -> float:
    """Return user and system seconds of a Python process that runs `code`."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def imported() -> list[str]:
    """Return the heavy packages that help imports."""
    code = f"import atexit, sys; atexit.register(lambda: print('|'.join(sys.modules), file=sys.stderr)); {HELP}"
    seen = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    return sorted(set(HEAVY) & set(seen.strip().split("|")))


def main() -> None:
    """Run both in turn, print the ratio, and exit with 1 if help is too slow or imports too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    cases = {"bare python": "pass", "edgeprune --help": HELP, "import torch": "import torch"}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(chosen.runs):
        for name, code in cases.items():
            seconds[name].append(cpu_seconds(code))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    heavy = imported()
    for name, value in medians.items():
        print(f"{name:18s} {value:.3f} s of CPU, {value / medians['import torch']:.3f} of importing torch")
    print(f"heavy imports of edgeprune --help: {', '.join(heavy) or 'none'}")
    raw_results.keep(chosen.out, {**raw_results.about(), "seconds": seconds, "heavy": heavy})
    sys.exit(int(medians["edgeprune --help"] > BAR_S or bool(heavy)))


if __name__ == "__main__":
    main()
