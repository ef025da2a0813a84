"""A module becomes one graph that can be cut, or an error that says why not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from families import conv_bn, gap, prepared, run_graph, run_module
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgeprune.errors import CorruptArtifact, ModelError
from edgeprune.export import OPSET, export, load_graph


def names(graph: onnx.ModelProto) -> set[str]:
    """Return the names of the initializers."""
    return {each.name for each in graph.graph.initializer}


@pytest.mark.parametrize("name", ["resnet", "recurrent", "vit"])
def test_one_input_one_output_fixed_shapes(name: str) -> None:
    """The graph's ends have the example's shape, and every tensor inside has a static one, computed by no node."""
    family = prepared(name)
    graph = family.graph.graph
    assert [each.name for each in graph.input] == ["input"]
    assert [each.name for each in graph.output] == ["output"]
    sides = [d.dim_value for value in graph.value_info for d in value.type.tensor_type.shape.dim]
    assert sides
    assert all(sides)
    assert "Shape" not in {node.op_type for node in graph.node}
    assert family.graph.opset_import[0].version == OPSET


@pytest.mark.parametrize("name", ["resnet", "prelu", "inception", "conv1d"])
def test_parameters_keep_their_names_and_nothing_else_looks_like_one(name: str) -> None:
    """Initializers without a slash are the state dict's; every floating-point entry that forward uses is there."""
    family = prepared(name)
    state = family.net.state_dict()
    plain = {each for each in names(family.graph) if "/" not in each}
    assert plain == {each for each in state if not each.endswith("num_batches_tracked")}


def test_values_are_those_of_the_module() -> None:
    """No parameter is folded, transposed or rounded; slopes gain axes of length one."""
    family = prepared("prelu")
    state = family.net.state_dict()
    for tensor in family.graph.graph.initializer:
        if tensor.name in state:
            value = numpy_helper.to_array(tensor)
            np.testing.assert_array_equal(value.reshape(state[tensor.name].shape), state[tensor.name].numpy())
    assert list(next(each.dims for each in family.graph.graph.initializer if each.name == "act1.weight")) == [
        1,
        16,
        1,
        1,
    ]


def test_batch_norms_stand() -> None:
    """They are nodes of their own: folded, they could not be cut."""
    family = prepared("resnet")
    kinds = [node.op_type for node in family.graph.graph.node]
    assert kinds.count("BatchNormalization") == sum(isinstance(each, nn.BatchNorm2d) for each in family.net.modules())


@pytest.mark.parametrize("name", ["inception", "half_split", "unet", "prelu"])
def test_no_two_nodes_share_a_constant_that_is_no_parameter(name: str) -> None:
    """Sizes are each node's own, node names are unique, and no Constant node is left."""
    graph = prepared(name).graph.graph
    read = [each for node in graph.node for each in node.input if "/" in each]
    assert len(read) == len(set(read))
    assert len({node.name for node in graph.node}) == len(graph.node)
    assert "Constant" not in {node.op_type for node in graph.node}


def test_splits_hold_their_sizes() -> None:
    """A chunk is exported as a number of outputs; cutting needs the sizes."""
    graph = prepared("inception").graph.graph
    split = next(node for node in graph.node if node.op_type == "Split")
    sizes = next(each for each in graph.initializer if each.name == split.input[1])
    assert numpy_helper.to_array(sizes).tolist() == [16, 16]
    assert not [each for each in split.attribute if each.name == "num_outputs"]


def test_graph_tells_nothing_about_this_machine() -> None:
    """The exporter's stack traces, with the paths of its files, are gone."""
    data = prepared("resnet").graph.SerializeToString()
    for word in (str(Path(__file__).parent), torch.__file__, "site-packages", ".py"):
        assert word.encode() not in data


def test_invented_biases_are_dropped_and_real_ones_kept() -> None:
    """A convolution without bias has two inputs, even if the module's own bias is all zeros it stays."""

    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1)
            nn.init.zeros_(self.two.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    graph = export(Zeros().eval(), torch.randn(1, 3, 4, 4))
    assert [len(node.input) for node in graph.graph.node] == [2, 3]


def test_shared_slopes_and_views_keep_parity() -> None:
    """One PReLU used on two maps of different rank cannot take on axes: its views stay in the graph."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.linear = nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.linear(self.act(self.conv(x)).mean((2, 3))))

    net, x = Shared().eval(), torch.randn(1, 3, 6, 6)
    nn.init.uniform_(net.act.weight)
    assert gap(run_graph(export(net, x), x), run_module(net, x)) < 1e-5


def test_training_flags_are_restored_one_by_one() -> None:
    """A frozen batch norm inside a module in training mode stays frozen."""
    net = nn.Sequential(conv_bn(3, 4), nn.Conv2d(4, 2, 1)).train()
    net[0][1].eval()
    export(net, torch.randn(1, 3, 6, 6))
    assert net.training
    assert net[1].training
    assert not net[0][1].training


# -- refusals --------------------------------------------------------------------------------------------------------


class Undecided(nn.Module):
    """Which path it takes depends on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if x.mean() > 0 else self.two(x)


class Fickle(nn.Module):
    """The size of what it gives depends on what it sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x[x > 0].tolist()[0] * x)


class Raising(nn.Module):
    """A forward with a fault of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("net", "line"),
    [
        (Undecided(), "return self.one(x) if x.mean() > 0 else self.two(x)"),
        (Fickle(), "return F.relu(x[x > 0].tolist()[0] * x)"),
    ],
)
def test_modules_that_branch_on_values_are_refused_with_the_line(
    net: nn.Module, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is the user's model that has to change, where it is said, and the exporter's dump is kept from them."""
    with pytest.raises(ModelError, match="cannot be exported") as refusal:
        export(net, torch.randn(1, 3, 4, 4))
    assert "depends on the values it is given" in refusal.value.why
    assert f"{Path(__file__).name}, line " in refusal.value.why
    assert line in refusal.value.why
    assert "\n" not in refusal.value.why
    assert "torch.where" in refusal.value.next_step
    assert capfd.readouterr() == ("", "")


def test_modules_that_do_not_run_are_refused_with_the_cause() -> None:
    """The reason is the fault itself, not the exporter's advice around it."""
    with pytest.raises(ModelError, match="does not run on an input of 1 x 3 x 4 x 4") as refusal:
        export(Raising(), torch.randn(1, 3, 4, 4))
    assert refusal.value.why.startswith("KeyError: 'no such thing' (test_export.py, line ")
    assert "eval mode" in refusal.value.next_step


class Untranslated(nn.Module):
    """An operation that ONNX lacks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x).real


def test_modules_that_run_and_cannot_be_translated_say_what_to_make_work() -> None:
    """The exporter's own call is the shortest way to see more of it."""
    with pytest.raises(ModelError, match="cannot be exported") as refusal:
        export(Untranslated(), torch.randn(1, 3, 4, 4))
    assert "dynamo=True" in refusal.value.next_step


@pytest.mark.parametrize(
    ("shape", "step"),
    [
        ((1, 32, 32, 3), "float arrays are taken as N x C x H x W: transpose(0, 3, 1, 2)"),
        ((1, 5, 32, 32), "the model is called in eval mode"),
    ],
)
def test_images_with_their_channels_last_are_told_so(shape: tuple[int, ...], step: str) -> None:
    """Where the shape looks like it; five channels are another mistake."""
    with pytest.raises(ModelError, match="expected input") as refusal:
        export(nn.Conv2d(3, 8, 3), torch.zeros(shape))
    assert step in refusal.value.next_step


class TwoHeads(nn.Module):
    """A detector's way of answering."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(x), self.two(x)


class TwoImages(nn.Module):
    """A pair is compared."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x - y


@pytest.mark.parametrize(("net", "what"), [(TwoHeads(), "output"), (TwoImages(), "input")])
def test_modules_with_two_ends_are_refused(net: nn.Module, what: str) -> None:
    """edgeprune cuts one tensor to one tensor, and says how to get there."""
    with pytest.raises(ModelError, match=f"2 {what}s") as refusal:
        export(net, torch.randn(1, 3, 4, 4))
    assert refusal.value.next_step == f"wrap the model in a module with one {what}"


# -- files -----------------------------------------------------------------------------------------------------------


def test_written_graph_is_read_back(tmp_path: Path) -> None:
    """What is loaded is what was exported."""
    graph = prepared("vgg").graph
    (tmp_path / "m.onnx").write_bytes(graph.SerializeToString())
    assert load_graph(tmp_path / "m.onnx") == graph


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_graphs_are_refused(tmp_path: Path, part: float) -> None:
    """A copy that stopped on the way, wherever it stopped."""
    data = prepared("vgg").graph.SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CorruptArtifact, match=r"m\.onnx is not a whole ONNX graph"):
        load_graph(tmp_path / "m.onnx")


@pytest.mark.parametrize("data", [b"PK\x03\x04 an archive", b"import torch\n", b"\x80\x02}q\x00."])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    """An archive, a script and a pickle are none."""
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(CorruptArtifact):
        load_graph(tmp_path / "m.onnx")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """Named, with the system's reason."""
    with pytest.raises(CorruptArtifact, match="No such file"):
        load_graph(tmp_path / "m.onnx")


def test_strides_of_an_axis_of_one_element_leave_no_trace() -> None:
    """Grey images stored N x H x W x 1 and permuted are contiguous, with strides that are not those of their shape."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    plain = torch.randn(1, 1, 8, 8)
    odd = plain.as_strided((1, 1, 8, 8), (64, 1, 8, 1))
    assert odd.is_contiguous()
    assert odd.stride() != plain.stride()
    assert [node.op_type for node in export(net, odd).graph.node] == [
        node.op_type for node in export(net, plain).graph.node
    ]
