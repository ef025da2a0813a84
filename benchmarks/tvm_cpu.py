"""Our TVM schedules against ONNX Runtime and against TVM's own, on this CPU: one thread, one process, in turn.

    python benchmarks/tvm_cpu.py [--rounds 15] [--default-calls 3] [--skip-default] [--out FILE.json]

Seconds are CPU seconds of the calling thread, so that neighbours on the machine count less. Every round times a block
of calls of each runtime; a ratio is the median of the rounds' own ratios of medians. The aims: at most 1.25 times
ONNX Runtime's time on each net, a tenth of what TVM's `zero` pipeline takes, and under 1 s of CPU for a candidate that
changes two layers. Weights are random; no runtime looks at them. Outputs must agree.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import raw_results
import torch
from cifar10 import ResNet
from torch import nn

from edgeprune.export import export
from edgeprune.targets._tvm.cache import KernelCache, library
from edgeprune.targets._tvm.cpus import Cpu, cpu_of
from edgeprune.targets._tvm.host import OnHost
from edgeprune.targets._tvm.lower import lower

BAR, DEFAULT_BAR, CANDIDATE_BAR_S = 1.25, 10.0, 1.0
TOLERANCE = 1e-4
BLOCK_S = 0.1
"""CPU seconds that each runtime is called for in a round, at least twice."""


def conv_bn(
    into: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type | None = nn.ReLU
) -> nn.Module:
    """Return a convolution, a batch norm and an activation."""
    conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), act() if act else nn.Identity())


class Basic(nn.Module):
    """He et al. 2016: two convolutions beside a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(into, out, 3, stride), conv_bn(out, out, act=None))
        same = into == out and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(into, out, 1, stride, act=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Inverted(nn.Module):
    """Sandler et al. 2018: widened, depthwise, narrowed, beside a shortcut where shapes allow one."""

    def __init__(self, into: int, out: int, stride: int, times: int) -> None:
        super().__init__()
        wide = into * times
        first = [conv_bn(into, wide, 1, act=nn.ReLU6)] if times > 1 else []
        depthwise = conv_bn(wide, wide, 3, stride, wide, act=nn.ReLU6)
        self.body, self.same = (
            nn.Sequential(*first, depthwise, conv_bn(wide, out, 1, act=None)),
            into == out and stride == 1,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.same else self.body(x)


def resnet18() -> nn.Module:
    """Return ResNet-18 for 224 x 224."""
    layers: list[nn.Module] = [conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    into = 64
    for out in (64, 128, 256, 512):
        layers += [Basic(into, out, 1 if out == 64 else 2), Basic(out, out, 1)]
        into = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def mobilenetv2() -> nn.Module:
    """Return MobileNetV2 for 224 x 224."""
    layers, into = [conv_bn(3, 32, 3, 2, act=nn.ReLU6)], 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for times, out, count, stride in stages:
        for place in range(count):
            layers.append(Inverted(into, out, 1 if place else stride, times))
            into = out
    return nn.Sequential(
        *layers, conv_bn(320, 1280, 1, act=nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)
    )


def thin_vgg16() -> nn.Module:
    """Return VGG-16 for 32 x 32 with half the channels."""
    layers, into = [], 3
    for out, count in ((32, 2), (64, 2), (128, 3), (256, 3), (256, 3)):
        for _ in range(count):
            layers.append(conv_bn(into, out))
            into = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (lambda: ResNet(3), 32),
    "resnet18": (resnet18, 224),
    "mobilenetv2": (mobilenetv2, 224),
    "vgg16_thin": (thin_vgg16, 32),
}


def graph_of(make: Callable[[], nn.Module], side: int, seed: int = 0) -> onnx.ModelProto:
    """Return the exported net with random weights and statistics."""
    torch.manual_seed(seed)
    net = make().eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return export(net, torch.randn(1, 3, side, side))


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of this process that a call took, and what it returned."""
    began = time.process_time()
    value = work()
    return time.process_time() - began, value


def called(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of this thread that one call took."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def ours(graph: onnx.ModelProto, cpu: Cpu) -> OnHost:
    """Return the net lowered and compiled by us."""
    program = lower(graph, cpu)
    return OnHost(program, {name: library(name, kernel, cpu)[name] for name, kernel in program.kernels.items()})


def default(graph: onnx.ModelProto, cpu: Cpu, x: np.ndarray) -> tuple[Callable[[], Any], Callable[[], np.ndarray]]:
    """Return a call of what TVM makes of the graph by itself, and its answer."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    target, device = tvm.target.Target(cpu.target()), tvm.cpu(0)
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        relax.get_pipeline("zero"),
    ]
    with target:
        module = tvm.transform.Sequential(passes)(from_onnx(graph))
    machine = relax.VirtualMachine(tvm.compile(module, target), device)
    image = tvm.runtime.tensor(x, device)
    return lambda: machine["main"](image), lambda: machine["main"](image).numpy()


def session_of(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return ONNX Runtime's session, one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the median seconds of each round's block of calls."""
    blocks = {name: max(2, round(BLOCK_S / max(called(work), 1e-6))) for name, work in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls) if number % 2 else list(calls)[::-1]:
            called(calls[name])  # caches are another runtime's
            seconds[name].append(statistics.median(called(calls[name]) for _ in range(blocks[name])))
    return seconds


def compared(name: str, cpu: Cpu, rounds: int, default_calls: int) -> dict[str, Any]:
    """Return the times of one net in every runtime."""
    graph = graph_of(*NETS[name])
    x = np.random.default_rng(0).standard_normal((1, 3, NETS[name][1], NETS[name][1])).astype(np.float32)
    [port], session = [each.name for each in graph.graph.input], session_of(graph)
    compile_s, network = cpu_seconds(lambda: ours(graph, cpu))
    wanted = session.run(None, {port: x})[0]
    [seen] = network.outputs({port: x}).values()
    assert np.abs(seen - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    seconds = in_turn({"ours": network.run, "onnxruntime": lambda: session.run(None, {port: x})}, rounds)
    facts: dict[str, Any] = {"compile_cpu_s": compile_s, "ms": {k: [s * 1e3 for s in v] for k, v in seconds.items()}}
    facts["ratio"] = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["onnxruntime"], strict=True))
    if default_calls:
        call, answer = default(graph, cpu, x)
        assert np.abs(answer() - wanted).max() <= TOLERANCE * np.abs(wanted).max()
        facts["ms"]["tvm_zero"] = [called(call) * 1e3 for _ in range(default_calls)]
        facts["faster_than_default"] = min(facts["ms"]["tvm_zero"]) / statistics.median(facts["ms"]["ours"])
    return facts


def candidate_cost(cpu: Cpu, folder: Path) -> dict[str, Any]:
    """Return CPU seconds of lowering and compiling a ResNet, cold, cached, and with one block's width changed."""
    results = {}
    for blocks in (3, 9):
        net = ResNet(blocks)
        whole = graph_of(lambda net=net: net, 32)
        narrow = ResNet(blocks)
        block = narrow.layer2[1]
        block.conv1, block.bn1 = nn.Conv2d(32, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        block.conv2 = nn.Conv2d(16, 32, 3, 1, 1, bias=False)
        changed = graph_of(lambda net=narrow: net, 32)
        kernels = KernelCache(folder=folder / str(blocks))
        lowering_s, program = cpu_seconds(lambda graph=whole: lower(graph, cpu))
        cold_s, _ = cpu_seconds(lambda made=program, to=kernels: to.objects(made, cpu))
        cached_s, _ = cpu_seconds(lambda graph=whole, to=kernels: to.objects(lower(graph, cpu), cpu))
        before = kernels.compiled
        candidate_s, _ = cpu_seconds(lambda graph=changed, to=kernels: to.objects(lower(graph, cpu), cpu))
        results[f"resnet{6 * blocks + 2}"] = {
            "kernels": before,
            "lowering_s": lowering_s,
            "cold_s": cold_s,
            "per_kernel_s": cold_s / before,
            "cached_s": cached_s,
            "two_layers_s": candidate_s,
            "two_layers_kernels": kernels.compiled - before,
        }
    return results


def net_line(name: str, facts: dict[str, Any]) -> str:
    """Return the comparison of one net as a line."""
    middle = {key: statistics.median(values) for key, values in facts["ms"].items()}
    line = f"{name:12s} ours {middle['ours']:8.3f} ms, ONNX Runtime {middle['onnxruntime']:8.3f} ms"
    line = f"{line}: {facts['ratio']:.2f}; {facts['compile_cpu_s']:.1f} s of CPU to compile"
    if "tvm_zero" not in middle:
        return line
    return f"{line}; TVM's own {middle['tvm_zero']:9.2f} ms: {facts['faster_than_default']:.0f} times ours"


def cost_line(name: str, facts: dict[str, Any]) -> str:
    """Return what compiling one net cost as a line."""
    cold = f"{facts['kernels']} kernels in {facts['cold_s']:.2f} s ({facts['per_kernel_s']:.2f} s each)"
    again = f"two layers changed {facts['two_layers_s']:.2f} s ({facts['two_layers_kernels']} kernels)"
    return (
        f"{name:12s} lowered in {facts['lowering_s']:.2f} s of CPU, {cold}; cached {facts['cached_s']:.2f} s; {again}"
    )


def missed(nets: dict[str, Any], cost: dict[str, Any]) -> bool:
    """Return whether an aim is missed."""
    slow = any(each["ratio"] > BAR for each in nets.values())
    default_near = any(each.get("faster_than_default", DEFAULT_BAR) < DEFAULT_BAR for each in nets.values())
    return slow or default_near or any(each["two_layers_s"] > CANDIDATE_BAR_S for each in cost.values())


def main() -> None:
    """Run all of it, print the ratios, and exit with 1 if an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--default-calls", type=int, default=3, help="of TVM's own schedules, which take seconds")
    parser.add_argument("--skip-default", action="store_true", help="do not compile TVM's own schedules")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TVM_NUM_THREADS"] = "1"
    cpu, nets = cpu_of("x86_64", "native"), {}
    for name in NETS:
        nets[name] = compared(name, cpu, chosen.rounds, 0 if chosen.skip_default else chosen.default_calls)
        print(net_line(name, nets[name]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cost = candidate_cost(cpu, Path(folder))
    for name, facts in cost.items():
        print(cost_line(name, facts))
    machine = {"machine": platform.machine(), "mcpu": cpu.mcpu, "lanes": cpu.lanes}
    raw_results.keep(chosen.out, {**raw_results.about(), "machine": machine, "nets": nets, "candidate": cost})
    sys.exit(int(missed(nets, cost)))


if __name__ == "__main__":
    main()
