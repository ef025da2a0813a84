"""What a search of a ResNet-56 costs beside measuring and judging accuracy, and the memory it takes.

    python benchmarks/search_overhead.py [--trials 24] [--long 500] [--out FILE.json]

share    wall seconds of a search with each agent that are neither measuring nor accuracy, at the default settings
memory   peak resident size of all its processes together
growth   resident size after 100 and after all of a long random search with short measurements and few images

Weights and images are random: time and memory do not depend on them. The aims: under 15 %, under 2 GiB, no growth.
"""

import argparse
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import raw_results

from edgeprune.intake.config import load_config
from edgeprune.progress import Lines
from edgeprune.stages.baseline import start_bench
from edgeprune.stages.look import look, pose
from edgeprune.stages.prepare import Prepared, Request, prepare
from edgeprune.target import Target, open_target

SHARE_BAR, MEMORY_BAR_GIB, GROWTH_BAR_MIB = 0.15, 2.0, 16.0
EARLY = 100
"""Trials after which allocators have settled."""

CONFIG = """
[model]
factory = "net:net"
[data]
arrays = "images.npz"
calibration = 512
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
[budget]
latency = "0.5x"
[search]
trials = {trials}
strategy = "{strategy}"
validation_images = {images}
[measure]
{measure}
"""
SHORT = "sessions_min = 1\nsessions_max = 1\nsession_ms = 10.0"


@dataclass(frozen=True)
class Sizes:
    """Resident sizes of the processes of a search, in MiB."""

    main: float
    worker: float

    @property
    def total(self) -> float:
        """Return their sum."""
        return self.main + self.worker


def sizes(worker: int | None, field: str = "VmRSS") -> Sizes:
    """Return the sizes now, or with VmHWM the largest so far."""

    def of(pid: int | str) -> float:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition(f"{field}:")[2].split()[0]) / 1024

    return Sizes(of("self"), of(worker) if worker else 0.0)


def write_project(folder: Path, strategy: str, trials: int, *, images: int, measure: str = "") -> Path:
    """Write a configuration, a random ResNet-56 and random images; return the configuration's path."""
    folder.mkdir(parents=True)
    here = str(Path(__file__).parent)
    net = f"import sys; sys.path.insert(0, {here!r})\nimport torch\nfrom cifar10 import ResNet\n"
    (folder / "net.py").write_text(net + "def net():\n    torch.manual_seed(0)\n    return ResNet(9)\n")
    draw = np.random.default_rng(0)
    parts = {"train": 1024, "validation": images, "test": 16}
    arrays: dict[str, Any] = {}
    for part, count in parts.items():
        arrays[f"{part}_images"] = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count) % 10
    np.savez(folder / "images.npz", **arrays)
    text = CONFIG.format(trials=trials, strategy=strategy, images=images, measure=measure)
    (folder / "edgeprune.toml").write_text(text)
    return folder / "edgeprune.toml"


def searched(config: Path, watch: Any = None) -> tuple[list[Any], float, Sizes]:
    """Run one search; return its trials, its wall seconds and the peak sizes."""
    with ExitStack() as stack:
        request = Request(
            config=load_config(config),
            target="host",
            out=config.parent / "dist",
            progress=Lines(),
            stop=watch or (lambda: None),
        )
        prepared: Prepared = prepare(request, stack)
        target: Target = stack.enter_context(open_target(prepared.profile))
        bench, timing = start_bench(prepared, target)
        problem = pose(prepared, bench, timing)
        if watch is not None:
            watch.worker = target.worker_pid
        began = time.perf_counter()
        trials = look(prepared, bench, problem)
        return trials, time.perf_counter() - began, sizes(target.worker_pid, "VmHWM")


def share(folder: Path, strategy: str, trials: int) -> dict[str, Any]:
    """Return where the time of a search with default settings goes."""
    config = write_project(folder, strategy, trials, images=1000)
    made, wall, peak = searched(config)
    spent = {part: sum(each.seconds.get(part, 0.0) for each in made) for part in ("ask", "cut", "measure", "quality")}
    other = 1 - (spent["measure"] + spent["quality"]) / wall
    facts = {"trials": trials, "wall_s": wall, "spent_s": spent, "other": other, "peak_mib": peak.total}
    print(
        f"{strategy:5s} {wall / len(made):.2f} s a trial: measuring {spent['measure'] / wall:.1%}, "
        f"accuracy {spent['quality'] / wall:.1%}, everything else {other:.1%}; peak {peak.total / 1024:.2f} GiB",
        flush=True,
    )
    return facts


class Watch:
    """Called between trials: notes the resident size."""

    def __init__(self) -> None:
        self.worker: int | None = None
        self.seen: list[float] = []

    def __call__(self) -> None:
        """Note the size now."""
        self.seen.append(sizes(self.worker).total)


def growth(folder: Path, trials: int) -> dict[str, Any]:
    """Return resident sizes of a long search."""
    watch = Watch()
    _, wall, _ = searched(write_project(folder, "random", trials, images=50, measure=SHORT), watch)
    early = float(np.median(watch.seen[EARLY - 10 : EARLY + 10]))
    late = float(np.median(watch.seen[-20:]))
    print(f"random {trials} trials: {early:.0f} MiB after {EARLY}, {late:.0f} MiB at the end: {late - early:+.1f} MiB")
    return {"trials": trials, "wall_s": wall, "mib_early": early, "mib_late": late, "mib": watch.seen[::10]}


def main() -> None:
    """Run all and exit with 1 if an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--long", type=int, default=500)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shares = {each: share(Path(name) / each, each, chosen.trials) for each in ("ddpg", "sac", "random")}
        grown = growth(Path(name) / "long", chosen.long)
    raw_results.keep(chosen.out, {**raw_results.about(), "share": shares, "growth": grown})
    missed = [name for name, each in shares.items() if each["other"] > SHARE_BAR]
    missed += [name for name, each in shares.items() if each["peak_mib"] > MEMORY_BAR_GIB * 1024]
    missed += ["growth"] if grown["mib_late"] - grown["mib_early"] > GROWTH_BAR_MIB else []
    raise SystemExit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
