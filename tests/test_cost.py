"""Parameters and multiply-accumulates of graphs small enough to count by hand."""

import families
import onnx
import pytest
import torch
from torch import nn

from edgeprune import cost
from edgeprune.cut import GraphCutter, cut_module
from edgeprune.export import export


class Net(nn.Module):
    """A strided, a depthwise, a grouped and a transposed convolution, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 4, 1, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.linear = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.up(self.grouped(self.depthwise(self.first(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return export(Net(), torch.zeros(1, 3, 16, 16))


def test_every_kind_of_layer_costs_what_arithmetic_says(graph: onnx.ModelProto) -> None:
    """Outputs of 8x8 pixels, then 16x16 after the transposed convolution, whose cost is counted at its input."""
    first = 8 * 8 * 8 * (3 * 9)
    depthwise = 8 * 8 * 8 * 9
    grouped = 8 * 8 * 4 * (8 // 2)
    up = 8 * 8 * 4 * (6 * 4)
    assert cost.macs(graph) == first + depthwise + grouped + up + 6 * 10


def test_parameters_are_those_of_the_module(graph: onnx.ModelProto) -> None:
    """Whole numbers that hold shapes are not parameters."""
    assert cost.parameters(graph) == sum(each.numel() for each in Net().parameters())


@pytest.mark.parametrize("family", ["resnet", "mobilenetv2"])
def test_a_cut_graph_costs_what_the_cut_module_holds(family: str) -> None:
    """Statistics and constants are not parameters; at the narrowest plan that removes nothing."""
    made = families.prepared(family)
    space = made.structure.space
    plan = families.plan_of(space, {each.name: min(filter(None, each.choices)) for each in space.groups})
    module = cut_module(made.net, made.structure, plan)
    graph = GraphCutter(made.graph, made.structure).cut(plan)
    assert cost.parameters(graph) == sum(each.numel() for each in module.parameters())
    assert cost.macs(graph) < cost.macs(made.graph)
