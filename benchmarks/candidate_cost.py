"""CPU seconds from a plan to a running engine, on each target that can be opened here: a ResNet-56, one process.

    python benchmarks/candidate_cost.py [--target host --target arm-emulated] [--out FILE.json]

Three candidates in turn: the first on a target just opened whose caches are empty (cold), one that changes the width
of two groups of it (two layers), and the same again (warm). Each is cut, compiled and run once. CPU seconds are those
of this process and of the workers below it; an emulated board's own are left out, they say nothing about a board. The
aim for TVM: a candidate that changes two layers costs under 1 s.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import raw_results
import torch
from cifar10 import ResNet

from edgeprune.artifact import TensorSpec
from edgeprune.cut import GraphCutter, proven
from edgeprune.evaluate import write_graph
from edgeprune.export import export
from edgeprune.plan import Plan, Space
from edgeprune.profile import load_profile
from edgeprune.structure import build_structure
from edgeprune.target import Target, open_target

TARGETS = ("host", "arm-emulated")
BAR_S = {"arm-emulated": 1.0}
EMULATOR = "qemu"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> Iterator[int]:
    """Yield a process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from family(int(child))


def cpu_seconds() -> float:
    """Return the CPU seconds so far of this process, its children that ended, and the workers that live."""
    total = 0.0
    for pid in family(os.getpid()):
        name, _, fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")
        if EMULATOR not in name:
            total += sum(int(each) for each in fields.split()[11:15]) * TICK_S
    return total


def wide(space: Space, share: float) -> dict[str, int]:
    """Return the widest choice of every group that keeps at most `share` of it, or the narrowest."""
    return {
        group.name: max([each for each in group.choices if each <= share * group.width], default=group.choices[0])
        for group in space.groups
    }


def plan(space: Space, widths: dict[str, int]) -> Plan:
    """Return the plan that keeps the first units."""
    return space.check(Plan(kept={name: tuple(range(width)) for name, width in widths.items()}))


def changed(space: Space, widths: dict[str, int]) -> dict[str, int]:
    """Return the widths with two groups, that other layers do not share, at their narrowest but one choice."""
    free = [group for group in space.groups if len(group.choices) > 2][:2]
    return widths | {group.name: group.choices[0] for group in free}


class Bench:
    """A ResNet-56, exported and ready to be cut."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        net, example = ResNet(9).eval(), torch.zeros(1, 3, 32, 32)
        graph = export(net, example)
        self.structure = proven(net, torch.zeros(2, 3, 32, 32), build_structure(net, example, graph, multiple=8))
        self.cutter = GraphCutter(graph, self.structure)
        self.folder = folder
        self.inputs = (TensorSpec(name="input", shape=(1, 3, 32, 32)),)

    def running(self, target: Target, candidate: Plan) -> None:
        """Take a plan all the way to an answer of its engine."""
        graph = write_graph(self.cutter.cut(candidate), self.folder / f"{candidate.digest[:16]}.onnx", self.inputs)
        engine = target.compile(graph)
        target.run(engine, {"input": np.zeros((1, 3, 32, 32), np.float32)})

    def costs(self, name: str) -> dict[str, float]:
        """Return CPU seconds of each candidate on one target."""
        space = self.structure.space
        widths = wide(space, 0.75)
        first, other = plan(space, widths), plan(space, changed(space, widths))
        found = {}
        with open_target(load_profile(name)) as target:
            for what, candidate in (("cold", first), ("two layers", other), ("warm", first)):
                before = cpu_seconds()
                self.running(target, candidate)
                found[what] = cpu_seconds() - before
        return found


@contextmanager
def empty_caches() -> Iterator[Path]:
    """Yield a folder for what adapters keep between connections; the programs of a board stay where they are."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeprune" / "emulated"
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "edgeprune"
        own.mkdir()
        (own / "emulated").symlink_to(usual)
        os.environ["XDG_CACHE_HOME"] = folder
        yield Path(folder)


def main() -> None:
    """Print the figures, keep them if asked to, and exit with 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with empty_caches() as folder:
        bench = Bench(folder)
        found = {name: bench.costs(name) for name in options.target or TARGETS}
    for name, costs in found.items():
        print(f"{name:14s}" + "".join(f"   {what} {seconds:6.2f} s of CPU" for what, seconds in costs.items()))
    raw_results.keep(options.out, {**raw_results.about(), "cpu_seconds": found, "bar": BAR_S})
    if any(found[name]["two layers"] > bar for name, bar in BAR_S.items() if name in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
