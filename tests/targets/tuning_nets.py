"""Networks whose first kernel is worth tuning, and a search among its schedules."""

from pathlib import Path

import onnx
from board_programs import HERE
from onnx import helper
from tvm_on_host import host_cpu, model_of, normal

from edgeprune.targets._tvm.cache import KernelCache
from edgeprune.targets._tvm.cpus import Cpu
from edgeprune.targets._tvm.program import Program
from edgeprune.targets._tvm.records import Records
from edgeprune.targets._tvm.schedule import Choice
from edgeprune.targets._tvm.space import choices
from edgeprune.targets._tvm.tuning import Search

GRAPH = "12" * 32


def conv(channels: int = 32, side: int = 8, kernel: int = 3, group: int = 1) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[kernel // 2] * 4, group=group),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    weight = normal(channels, channels // group, kernel, kernel)
    return model_of(nodes, {"x": (1, channels, side, side)}, ["y"], {"w": weight})


def product() -> onnx.ModelProto:
    return model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (12, 32)}, ["y"], {"w": normal(32, 48)})


def heavy(program: Program) -> str:
    """Return the name of the kernel whose first argument is the network's input."""
    return program.steps[0].kernel


def space_of(program: Program, cpu: Cpu | None = None) -> list[Choice]:
    """Return what may be tried of that kernel."""
    return [choice for choice, _ in choices(program.kernels[heavy(program)], cpu or host_cpu())]


def search_for(program: Program, folder: Path, trials: int = 4, cpu: Cpu | None = None) -> Search:
    return Search(
        program=program,
        cpu=cpu or host_cpu(),
        arch=HERE,
        records=Records(folder=folder / "records"),
        graph=GRAPH,
        trials=trials,
        kernels=KernelCache(folder=folder / "kernels"),
        folder=folder,
    )
