"""The parity ladder: masked module = cut module = cut graph in the engine, on every family and over random plans."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from families import FAMILIES, Prepared, conv_bn, gap, made, plan_of, prepared, run_graph, run_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgeprune.cut import GraphCutter, cut_module, mask_module, proven
from edgeprune.errors import ExportError, PlanError
from edgeprune.export import export
from edgeprune.plan import Plan, Space
from edgeprune.silence import Silence
from edgeprune.structure import Structure, build_structure

TOLERANCE = 1e-5
"""Largest difference of outputs, relative to the largest output: float32 sums in another order differ by about 1e-7."""


def ladder(made: Prepared, plan: Plan) -> None:
    """Fail if two rungs differ."""
    masked = run_module(mask_module(made.net, made.structure, plan), made.example)
    cut = run_module(cut_module(made.net, made.structure, plan), made.example)
    engine = run_graph(GraphCutter(made.graph, made.structure).cut(plan), made.example)
    assert gap(cut, masked) < TOLERANCE
    assert gap(engine, masked) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_unpruned_graph_agrees_with_the_module(name: str) -> None:
    """The full plan changes nothing: the engine gives what the untouched module gives."""
    family = prepared(name)
    full = family.structure.space.full()
    wanted = run_module(family.net, family.example)
    assert gap(run_graph(GraphCutter(family.graph, family.structure).cut(full), family.example), wanted) < TOLERANCE
    assert gap(run_module(cut_module(family.net, family.structure, full), family.example), wanted) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_narrowest_plan_keeps_parity(name: str) -> None:
    """Every group at its fewest channels, but none removed."""
    family = prepared(name)
    widths = {group.name: min(each for each in group.choices if each) for group in family.structure.space.groups}
    plan = plan_of(family.structure.space, widths)
    assert plan != family.structure.space.full()
    ladder(family, plan)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_plans_keep_parity(name: str, data: st.DataObject) -> None:
    """Any allowed width of any group, any of its units, removals included."""
    family = prepared(name)
    widths = {
        group.name: data.draw(st.sampled_from(group.choices), label=group.name)
        for group in family.structure.space.groups
    }
    ladder(family, plan_of(family.structure.space, widths, seed=data.draw(st.integers(0, 2**32))))


REMOVABLE = [
    "resnet",
    "option_a",
    "bottleneck",
    "resnext",
    "preactivation",
    "two_branches",
    "nested",
    "mobilenetv2",
    "senet",
    "same_padding",
    "conv1d",
]


def removable(structure: Structure) -> list[str]:
    """Return the groups that may keep nothing."""
    return [group.name for group in structure.space.groups if group.removable]


def test_residual_families_and_no_others_have_removable_branches() -> None:
    """Width 0 is offered where a residual branch would disappear, nowhere else."""
    assert [name for name in FAMILIES if removable(prepared(name).structure)] == REMOVABLE


@pytest.mark.parametrize("name", REMOVABLE)
def test_every_branch_alone_and_all_at_once_can_be_removed(name: str) -> None:
    """Removals keep parity one by one, and all together beside narrowed groups."""
    family = prepared(name)
    names = removable(family.structure)
    for one in names:
        ladder(family, plan_of(family.structure.space, {one: 0}))
    narrow = {group.name: min(each for each in group.choices if each) for group in family.structure.space.groups}
    ladder(family, plan_of(family.structure.space, narrow | dict.fromkeys(names, 0)))


@pytest.mark.parametrize("gone", [("conv1",), ("conv2",), ("conv1", "conv2")])
def test_bottleneck_disappears_whole_whichever_inner_group_goes(gone: tuple[str, ...]) -> None:
    """Without conv1 or conv2 nothing of the branch is left, in the graph or in the module; block 3 is untouched."""
    family = prepared("bottleneck")
    plan = plan_of(family.structure.space, {f"block2.{each}": 0 for each in gone})
    graph = GraphCutter(family.graph, family.structure).cut(plan)
    names = {each.name for each in graph.graph.initializer}
    assert not {name for name in names if name.startswith("block2.")}
    assert {name for name in names if name.startswith("block3.")}
    module = cut_module(family.net, family.structure, plan)
    assert [type(module.get_submodule(f"block2.conv{n}")) for n in (1, 2, 3)] == [Silence] * 3
    assert not list(module.get_submodule("block2").parameters())
    whole = plan_of(family.structure.space, {"block2.conv1": 0, "block2.conv2": 0})
    engine = run_graph(graph, family.example)
    assert gap(engine, run_module(cut_module(family.net, family.structure, whole), family.example)) < TOLERANCE


def test_removing_a_branch_is_what_the_block_without_it_computes() -> None:
    """The known answer: relu(0 + shortcut)."""
    family = prepared("resnet")
    plan = plan_of(family.structure.space, {"layer1.0.conv1": 0})
    net, x = family.net, family.example
    with torch.no_grad():
        after = net.layer1[1](F.relu(net.stem(x)))
        wanted = net.head(net.layer2(after)).numpy()
    assert gap(run_module(cut_module(net, family.structure, plan), x), wanted) < TOLERANCE
    assert gap(run_graph(GraphCutter(family.graph, family.structure).cut(plan), x), wanted) < TOLERANCE


def test_two_branches_cannot_both_go() -> None:
    """Of a sum without identity one operand is offered for removal; a plan that removes both is refused."""
    family = prepared("two_branches")
    space = family.structure.space
    assert removable(family.structure) == ["left.0.0"]
    with pytest.raises(PlanError, match=r"right\.0\.0"):
        plan_of(space, {"left.0.0": 0, "right.0.0": 0})
    careless = replace(family.structure, space=Space(groups=tuple(replace(g, removable=True) for g in space.groups)))
    both = Plan(kept={**space.full().kept, "left.0.0": (), "right.0.0": ()})
    for cut in (lambda: cut_module(family.net, careless, both), lambda: GraphCutter(family.graph, careless).cut(both)):
        with pytest.raises(PlanError, match="cannot all keep nothing"):
            cut()


def test_cut_tensors_have_the_widths_of_the_plan() -> None:
    """Weights, running statistics, group counts and the linear layer's blocks of columns follow the kept channels."""
    family = prepared("mobilenetv2")
    plan = plan_of(family.structure.space, {"features.2.conv.0.0": 12, "features.5.0": 8})
    graph = GraphCutter(family.graph, family.structure).cut(plan).graph
    shapes = {each.name: list(each.dims) for each in graph.initializer}
    assert shapes["features.2.conv.0.0.weight"] == [12, 16, 1, 1]
    assert shapes["features.2.conv.1.0.weight"] == [12, 1, 3, 3]
    assert shapes["features.2.conv.2.0.weight"] == [24, 12, 1, 1]
    assert shapes["features.2.conv.1.1.running_var"] == [12]
    assert shapes["classifier.1.weight"] == [5, 8]
    depthwise = next(node for node in graph.node if node.input[1:2] == ["features.2.conv.1.0.weight"])
    assert next(each.i for each in depthwise.attribute if each.name == "group") == 12
    vgg = prepared("vgg")
    graph = GraphCutter(vgg.graph, vgg.structure).cut(plan_of(vgg.structure.space, {"features.4.0": 4})).graph
    assert list(next(each.dims for each in graph.initializer if each.name == "classifier.0.weight")) == [32, 4 * 4]


def test_kept_channels_hold_their_own_values() -> None:
    """A kept channel's weights are those it had, in the same order."""
    family = prepared("resnet")
    plan = plan_of(family.structure.space, {"layer1.0.conv1": 8}, seed=3)
    kept = list(plan.kept["layer1.0.conv1"])
    graph = GraphCutter(family.graph, family.structure).cut(plan).graph
    seen = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    weight = family.net.layer1[0].conv1.weight.detach().numpy()
    np.testing.assert_array_equal(seen["layer1.0.conv1.weight"], weight[kept])
    np.testing.assert_array_equal(seen["layer1.0.bn1.running_mean"], family.net.layer1[0].bn1.running_mean[kept])


def test_cut_graphs_pass_the_onnx_checker_and_do_not_change_the_original() -> None:
    """A cut leaves the exported graph as it was, and is itself a valid model."""
    family = prepared("bottleneck")
    before = family.graph.SerializeToString()
    cutter = GraphCutter(family.graph, family.structure)
    graph = cutter.cut(plan_of(family.structure.space, {"block2.conv1": 0, "conv1": 4}))
    onnx.checker.check_model(graph, full_check=True)
    assert family.graph.SerializeToString() == before
    assert cutter.cut(family.structure.space.full()).graph.node == family.graph.graph.node


def test_cut_and_masked_modules_share_nothing_with_the_original() -> None:
    """Training a copy does not move a weight of the original."""
    family = prepared("resnet")
    plan = plan_of(family.structure.space, {"stem.0": 8, "layer1.1.conv1": 0})
    before = {name: value.clone() for name, value in family.net.state_dict().items()}
    for copy in (cut_module(family.net, family.structure, plan), mask_module(family.net, family.structure, plan)):
        train(copy, family.example)
    for name, value in family.net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_plans_of_another_space_are_refused() -> None:
    """Every way to cut checks the plan."""
    family = prepared("vgg")
    other = prepared("resnet").structure.space.full()
    for cut in (cut_module, mask_module):
        with pytest.raises(PlanError, match="plan and space differ"):
            cut(family.net, family.structure, other)
    with pytest.raises(PlanError, match="plan and space differ"):
        GraphCutter(family.graph, family.structure).cut(other)


# -- weights put back ------------------------------------------------------------------------------------------------


def train(net: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    """Take a few SGD steps in training mode, so that weights and running statistics move."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    batch = torch.cat([x, x.flip(-1), -x])
    for _ in range(steps):
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
    net.eval()


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("resnet", {"stem.0": 8, "layer1.0.conv1": 0, "layer2.1.conv1": 12}),
        ("bottleneck", {"block2.conv1": 0, "block3.conv2": 0, "block1.conv1": 8}),
        ("mobilenetv2", {"features.3.conv.0.0": 0, "features.0.0": 8}),
        ("prelu", {"conv1": 8, "conv4": 4}),
        ("senet", {"first.0.0": 0, "fc1": 8}),
        ("grouped_transpose", {"grouped": 6}),
    ],
)
def test_assembled_graph_holds_the_fine_tuned_weights(name: str, widths: dict[str, int]) -> None:
    """After SGD on the cut module, the cut graph filled with its state dict computes what it computes."""
    family = prepared(name)
    plan = plan_of(family.structure.space, widths)
    module = cut_module(family.net, family.structure, plan)
    before = run_module(module, family.example)
    train(module, family.example)
    after = run_module(module, family.example)
    graph = GraphCutter(family.graph, family.structure).assemble(plan, module.state_dict())
    assert gap(after, before) > 100 * TOLERANCE
    assert gap(run_graph(graph, family.example), after) < TOLERANCE


def test_assemble_refuses_weights_that_lack_something_or_do_not_fit() -> None:
    """A missing entry and a wrong shape are named."""
    family = prepared("resnet")
    cutter = GraphCutter(family.graph, family.structure)
    plan = plan_of(family.structure.space, {"layer1.0.conv1": 8})
    state = cut_module(family.net, family.structure, plan).state_dict()
    with pytest.raises(ExportError, match=r"lack 'layer1\.0\.bn1\.running_mean'"):
        cutter.assemble(plan, {name: value for name, value in state.items() if name != "layer1.0.bn1.running_mean"})
    with pytest.raises(ExportError, match=r"layer1\.0\.conv1\.weight is \(16, 16, 3, 3\)"):
        cutter.assemble(plan, family.net.state_dict())


@pytest.mark.parametrize("name", ["resnet", "prelu"])
def test_cutter_with_other_weights_cuts_those(name: str) -> None:
    """`with_weights` is what exporting the other module would give; the first cutter keeps its own."""
    family = prepared(name)
    other, x = made(name, seed=1)
    cutter = GraphCutter(family.graph, family.structure)
    plan = plan_of(family.structure.space, {family.structure.space.groups[0].name: 8})
    wanted = run_module(cut_module(other, family.structure, plan), x)
    assert gap(run_graph(cutter.with_weights(other.state_dict()).cut(plan), x), wanted) < TOLERANCE
    assert gap(run_graph(cutter.cut(plan), x), wanted) > 100 * TOLERANCE


# -- the proof -------------------------------------------------------------------------------------------------------


def structure_of(net: nn.Module, x: torch.Tensor) -> Structure:
    """Return the proven structure of a net, channels in fours."""
    return proven(net, x, build_structure(net, x, export(net, x), multiple=4))


def test_sizes_written_into_forward_are_found_and_named() -> None:
    """The groups whose sizes the forward method holds stay, with the reason; their neighbours are still prunable."""
    structure = prepared("hard_coded").structure
    assert [group.name for group in structure.space.groups] == ["left.0", "right.0", "join.0"]
    why = {each.layer: each.reason for each in structure.unprunable}
    assert "fixed sizes (split_with_sizes expects" in why["stem.0"]
    assert "fixed sizes (shape '[-1, 1024]' is invalid" in why["last.0"]


def test_branch_that_cannot_run_on_nothing_stays_prunable() -> None:
    """A pooling refuses a map without channels: width 0 is off the list, the other widths are not."""
    structure = prepared("pooled_branch").structure
    group = structure.space.by_name["branch.0.0"]
    assert group.choices == (4, 8, 12, 16)
    assert not any(layer.gone_with for layer in structure.layers)


class OneHalf(nn.Module):
    """Reads one half of two concatenated maps: right only as long as both are equally wide."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = conv_bn(3, 16), conv_bn(3, 16), conv_bn(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([self.left(x), self.right(x)], 1)
        return self.last(y[:, : y.size(1) // 2])


def test_groups_that_survive_only_when_cut_alike_are_found() -> None:
    """Two groups that must stay equally wide, which no dependency tells: at least one of them stays whole."""
    structure = structure_of(OneHalf().eval(), torch.randn(1, 3, 8, 8))
    assert [group.name for group in structure.space.groups] in (["left.0"], ["right.0"], [])


class Normalized(nn.Module):
    """A weight that is computed when the layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3))
        self.last = nn.Conv2d(16, 8, 3)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.last(F.relu(self.stem(x)))))


def test_computed_weights_stay() -> None:
    """A weight-normalised convolution is listed as unprunable; the rest of the net is prunable."""
    structure = structure_of(Normalized().eval(), torch.randn(1, 3, 8, 8))
    assert [group.name for group in structure.space.groups] == ["last"]
    assert {each.layer for each in structure.unprunable} >= {"stem", "head"}


def test_proof_leaves_the_module_as_it_was() -> None:
    """Neither a weight nor a flag moves."""
    net, x = made("option_a")
    net.linear.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    structure_of(net, x)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [name for name, each in net.named_parameters() if not each.requires_grad] == ["linear.weight"]
    assert not net.training
