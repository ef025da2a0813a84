"""What a search for faster schedules brings on this CPU, and what it costs: the tuned engine against ours, in turn.

    python benchmarks/tuning.py [--trials 24] [--nets resnet20 mobilenetv2] [--sessions 12]
                                [--own-rules 48] [--out FILE.json]

The board is this machine (`board = "local"`, its server built by deploy/emulated/setup), one thread. Records start
empty, in a folder that is removed at the end. Weights are random; no kernel looks at them. Every session times both
engines in alternating blocks.

With `--own-rules N`, two pointwise convolutions of MobileNetV2 are also given to MetaSchedule's own rules for CPUs, N
trials of its evolutionary search each without a cost model, timed in this process.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import raw_results
from tvm_cpu import NETS, graph_of

from edgeprune.artifact import Artifact, TensorSpec
from edgeprune.measurement import Sampling
from edgeprune.profile import Profile, load_profile
from edgeprune.target import open_target
from edgeprune.targets._tvm.cache import library
from edgeprune.targets._tvm.cpus import Cpu, cpu_of
from edgeprune.targets._tvm.lower import lower
from edgeprune.targets._tvm.tensorir import s_tir, tvm, tvm_ffi
from edgeprune.targets._tvm_rpc_board import cache_folder
from edgeprune.targets.tvm_rpc import TvmRpc


def local(trials: int) -> Profile:
    """Return the profile of this machine as a board."""
    arch = platform.machine()
    options = {"board": "local", "cpu": "native" if arch == "x86_64" else "generic", "tune": trials}
    found = load_profile("arm-emulated", {"name": "local", "arch": arch, "options": options})
    return replace(found, options={key: value for key, value in found.options.items() if key != "pin"})


def written(name: str, folder: Path) -> Artifact:
    """Return one of the nets as an ONNX file."""
    path, side = folder / f"{name}.onnx", NETS[name][1]
    onnx.save(graph_of(*NETS[name]), str(path))
    [port] = onnx.load(str(path)).graph.input
    return Artifact.of(path, kind="onnx", inputs=[TensorSpec(name=port.name, shape=(1, 3, side, side))])


def searched(graph: Artifact, trials: int) -> tuple[Artifact, float]:
    """Return the tuned engine, and the seconds that the search took."""
    with open_target(local(trials)) as board:
        assert isinstance(board, TvmRpc)
        began = time.monotonic()
        board.tune(graph, lambda share, note: print(f"  {share:6.1%} {note}", file=sys.stderr, flush=True))
        seconds = time.monotonic() - began
        engine = board.compile(graph)
        kept = graph.path.with_suffix(".tuned.so")
        kept.write_bytes(engine.path.read_bytes())
        return replace(engine, path=kept), seconds


def compared(name: str, folder: Path, trials: int, sessions: int) -> dict[str, Any]:
    """Return what the search found for one net, and how the engines compare."""
    graph = written(name, folder)
    tuned, seconds = searched(graph, trials)
    with open_target(local(0)) as board:
        ours = board.compile(graph)
        how = Sampling(reference=ours, sessions_min=sessions, sessions_max=sessions, session_ms=300.0)
        seen = board.measure(tuned, how)
    return {"search_s": seconds, "ratio": seen.ratio().to_json(), "ours_ms": seen.reference_latency().to_json()} | {
        "tuned_ms": seen.latency().to_json(),
        "sessions": [
            {"candidate": each.candidate.elapsed, "reference": each.reference.elapsed} for each in seen.sessions
        ],
        "flags": list(seen.flags),
    }


def records(folder: Path) -> dict[str, Any]:
    """Return what was kept of every kernel and of the network."""
    return {path.stem: json.loads(path.read_bytes())["record"] for path in sorted(folder.glob("*/*.json"))}


def own_rules(nodes: Sequence[str], trials: int) -> dict[str, Any]:
    """Return the microseconds of kernels under our schedule, and the best that MetaSchedule's own rules led to."""
    cpu, found = cpu_of("x86_64", "native"), {}
    program = lower(graph_of(*NETS["mobilenetv2"]), cpu)
    for node in nodes:
        step = next(each for each in program.steps if each.node == node)
        kernel = program.kernels[step.kernel]
        arrays = [program.buffers[place] for place in step.buffers]
        tensors = [tvm_ffi.from_dlpack(_noise(each.shape)) for each in arrays]
        best = min(called_us(each, tensors) for each in _evolved(kernel.func, cpu, trials, tensors))
        found[node] = {"ours_us": called_us(library("k", kernel, cpu)["k"], tensors), "own_rules_us": best}
    return found


def _evolved(func: Any, cpu: Cpu, trials: int, tensors: Sequence[Any]) -> Iterator[Any]:
    """Yield the kernels that MetaSchedule proposes, each timed for it as it is yielded."""
    meta, target = s_tir.meta_schedule, tvm.target.Target({**cpu.target(), "num-cores": 1})
    strategy = meta.search_strategy.EvolutionarySearch(
        population_size=64, init_min_unmeasured=16, genetic_num_iters=2, max_fail_count=5
    )
    context = meta.TuneContext(
        tvm.IRModule({"main": func}), target=target, space_generator="post-order-apply", search_strategy=strategy,
        task_name="k", rand_state=3, num_threads=1,
    )  # fmt: skip
    context.pre_tuning(
        max_trials=trials,
        num_trials_per_iter=16,
        design_spaces=context.generate_design_space(),
        database=meta.database.MemoryDatabase(),
        cost_model=meta.cost_model.RandomModel(),
    )
    while (candidates := context.generate_measure_candidates()) is not None:
        results = []
        for each in candidates:
            plain = s_tir.transform.RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(each.sch.mod)["main"]
            made = tvm.compile(tvm.IRModule({"k": plain.with_attr("global_symbol", "k")}), target).mod["k"]
            results.append(meta.runner.RunnerResult([called_us(made, tensors) / 1e6], None))
            yield made
        context.notify_runner_results(candidates, results)


def _noise(shape: Sequence[int]) -> np.ndarray:
    whole = np.empty(math.prod(shape) + 16, np.float32)
    start = -whole.ctypes.data % 64 // 4
    part = whole[start : start + math.prod(shape)].reshape(shape)
    part[...] = np.random.default_rng(0).standard_normal(shape)
    return part


def called_us(function: Any, tensors: Sequence[Any], calls: int = 15) -> float:
    """Return the median microseconds of a call."""
    function(*tensors)
    took = []
    for _ in range(calls):
        began = time.perf_counter_ns()
        function(*tensors)
        took.append((time.perf_counter_ns() - began) / 1000)
    return statistics.median(took)


def main() -> None:
    """Search, compare, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["resnet20", "mobilenetv2"])
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--own-rules", type=int, default=0, help="trials of MetaSchedule's own rules for CPUs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    chosen = parser.parse_args()
    built, nets = cache_folder() / "emulated", {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "edgeprune").mkdir()
        (folder / "edgeprune" / "emulated").symlink_to(built)
        os.environ["XDG_CACHE_HOME"] = name
        for net in chosen.nets:
            before = records(folder / "edgeprune" / "tvm" / "tuning")
            nets[net] = compared(net, folder, chosen.trials, chosen.sessions)
            found = records(folder / "edgeprune" / "tvm" / "tuning")
            own = {key: each for key, each in found.items() if key not in before}
            nets[net]["kernels"] = own
            verdicts = {key: each["verdicts"][str(chosen.trials)] for key, each in own.items()}
            taken = any(each["trial"] is not None for key, each in verdicts.items() if key.startswith("graph-"))
            faster = sum(each["trial"] is not None for key, each in verdicts.items() if key.startswith("k"))
            ratio, kernels = nets[net]["ratio"], sum(key.startswith("k") for key in own)
            outcome = f"{faster} of {kernels} kernels faster, {'taken' if taken else 'not taken'}"
            print(
                f"{net:12s} {ratio['p50']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] of our time; "
                f"{outcome}; {nets[net]['search_s']:.0f} s",
                flush=True,
            )
    if chosen.out:
        report: dict[str, Any] = {**raw_results.about(), "trials": chosen.trials}
        if chosen.own_rules:
            report["own_rules"] = own_rules(("node_conv2d_3", "node_conv2d_12"), chosen.own_rules)
            print(report["own_rules"])
        raw_results.keep(chosen.out, {**report, "nets": nets})


if __name__ == "__main__":
    main()
