"""Parameters and multiply-accumulates of graphs small enough to count by hand."""

import families
import onnx
import onnx.helper
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


class Sequences(nn.Module):
    """Two recurrent layers and a linear one over nine steps of twelve features."""

    def __init__(self, cell: type[nn.RNNBase], layers: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.cell = cell(12, 8, num_layers=layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(16 if bidirectional else 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_cost_every_gate_at_every_step(
    cell: type[nn.RNNBase], gates: int, layers: int, bidirectional: bool
) -> None:
    """Nine steps; the second layer reads what the first gives; what stands behind them has a shape."""
    graph = export(Sequences(cell, layers, bidirectional=bidirectional).eval(), torch.zeros(1, 9, 12))
    ways = 2 if bidirectional else 1
    inputs = [12, 8 * ways][:layers]
    assert cost.macs(graph) == 9 * gates * ways * sum((each + 8) * 8 for each in inputs) + 8 * ways * 5
    assert cost.uncounted(graph) == ()


def test_a_recurrent_layer_of_which_only_the_last_state_is_read_costs_the_same() -> None:
    """Its first output may have no name then."""

    class LastState(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(12, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.cell(x)[1].flatten(1)

    graph = export(LastState().eval(), torch.zeros(1, 9, 12))
    node = next(each for each in graph.graph.node if each.op_type == "GRU")
    assert cost.macs(graph) == 9 * 3 * (12 + 8) * 8
    node.output[0] = ""
    assert cost.macs(graph) == 9 * 3 * (12 + 8) * 8


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_counted_whole(family: str) -> None:
    """Nothing that edgeprune exports for them is of unknown cost."""
    assert cost.uncounted(families.prepared(family).graph) == ()


def test_products_of_unknown_cost_are_named(graph: onnx.ModelProto) -> None:
    """An operation that is not read, and one whose shape is not known, count nothing and are told."""
    odd = onnx.ModelProto()
    odd.CopyFrom(graph)
    odd.graph.node.append(onnx.helper.make_node("Einsum", ["output", "output"], ["e"], name="e", equation="ij,kj->ik"))
    odd.graph.node.append(onnx.helper.make_node("NonZero", ["output"], ["places"]))
    odd.graph.node.append(onnx.helper.make_node("Cast", ["places"], ["floats"], to=onnx.TensorProto.FLOAT))
    odd.graph.node.append(onnx.helper.make_node("Transpose", ["floats"], ["turned"]))
    odd.graph.node.append(onnx.helper.make_node("MatMul", ["floats", "turned"], ["product"], name="m"))
    odd.graph.node.append(onnx.helper.make_node("MatMul", ["output", "mystery"], ["p"], name="n"))
    odd.graph.node.append(onnx.helper.make_node("Secret", ["output"], ["s"], name="s", domain="com.example"))
    odd.graph.node.append(onnx.helper.make_node("QuantizeLinear", ["output"], ["q"], name="q", domain="com.example"))
    odd.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    assert cost.uncounted(odd) == ("Einsum (e)", "MatMul (m)", "MatMul (n)", "Secret (s)")
    assert cost.macs(odd) == cost.macs(graph)
