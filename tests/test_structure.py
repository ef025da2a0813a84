"""Which groups a model has, and that nothing of it is passed over in silence."""

import pytest
import torch
from families import FAMILIES, SIZE, Recurrent, made, prepared
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgeprune.errors import ConfigError, PlanError
from edgeprune.export import export
from edgeprune.plan import Plan
from edgeprune.structure import Structure, build_structure, never_empty, without

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def structure_of(net: nn.Module, x: torch.Tensor, **options: object) -> Structure:
    """Return the structure of a net in eval mode, channels in fours unless the options say otherwise."""
    net.eval()
    return build_structure(net, x, export(net, x), **{"multiple": 4} | options)


def groups(structure: Structure) -> dict[str, int]:
    """Return group → width."""
    return {group.name: group.width for group in structure.space.groups}


def reasons(structure: Structure) -> dict[str, str]:
    """Return layer → the first reason why some of it stays."""
    return {each.layer: each.reason for each in reversed(structure.unprunable)}


def silent(net: nn.Module, structure: Structure) -> list[str]:
    """Return the modules and bare parameters that are in no group and not listed as staying."""
    grouped = {layer for axes in structure.members.values() for layer, _ in axes}
    listed = {each.layer for each in structure.unprunable if len(each.reason) > 10}
    found = []
    for name, module in net.named_modules():
        own = [f"{name}.{each}" if name else each for each, _ in module.named_parameters(recurse=False)]
        if own and name not in grouped | listed and not listed.issuperset(own):
            found.append(name)
    return found


# -- every family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_in_a_group_or_listed_with_a_reason(name: str) -> None:
    """For each weighted layer, grouped and staying output channels add up to all it has."""
    family = prepared(name)
    structure = family.structure
    grouped = {unit for units in structure.units.values() for unit in units}
    for layer, module in family.net.named_modules():
        if not isinstance(module, WEIGHTED):
            continue
        moving = sum(owner in grouped for owner in structure.classes[layer, "out"].tolist())
        staying = [each for each in structure.unprunable if each.layer == layer]
        channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        assert moving + sum(each.channels for each in staying) == channels
        assert all(each.of == channels and len(each.reason) > 10 for each in staying)


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_with_parameters_is_in_a_group_or_listed_with_a_reason(name: str) -> None:
    """Whatever holds parameters: its channels move, or the module, or each of its own parameters, is listed."""
    family = prepared(name)
    assert silent(family.net, family.structure) == []


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_listed(cell: type[nn.RNNBase]) -> None:
    """By kind, with the features they give in both directions."""
    net = Recurrent(cell)
    structure = structure_of(net, torch.randn(1, 3, SIZE, SIZE))
    assert silent(net, structure) == []
    stays = next(each for each in structure.unprunable if each.layer == "cell")
    assert (stays.channels, stays.of) == (16, 16)
    assert stays.reason == f"edgeprune does not cut recurrent layers ({cell.__name__})"
    assert groups(structure) == {"features.0.0": 16}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_the_cost_table_are_those_of_the_module(name: str) -> None:
    """Every layer that runs is in the table, in forward order of the graph, with its own sizes."""
    family = prepared(name)
    places = {node.name: place for place, node in enumerate(family.graph.graph.node)}
    order = [places[layer.node] for layer in family.structure.layers]
    assert order == sorted(order)
    for layer in family.structure.layers:
        module = family.net.get_submodule(layer.name)
        inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        assert layer.in_channels == inputs
        assert layer.groups == getattr(module, "groups", 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_units_belong_to_one_group(name: str) -> None:
    """No class of coupled channels is in two groups, and none of a group is listed as staying."""
    structure = prepared(name).structure
    units = [unit for each in structure.units.values() for unit in each]
    assert len(units) == len(set(units))
    assert not set(units) & set(structure.reasons)


# -- known answers ---------------------------------------------------------------------------------------------------


def test_residual_stream_is_one_group_and_every_block_has_its_own_inside() -> None:
    """ResNet with projections: one stream per stage, one inner group per block."""
    structure = prepared("resnet").structure
    assert groups(structure) == {
        "stem.0": 16,
        "layer1.0.conv1": 16,
        "layer1.1.conv1": 16,
        "layer2.0.conv1": 32,
        "layer2.0.conv2": 32,
        "layer2.1.conv1": 32,
    }
    assert structure.members["layer1.0.conv1"] == (
        ("layer1.0.conv1", "out"),
        ("layer1.0.bn1", "out"),
        ("layer1.0.conv2", "in"),
    )
    assert ("layer2.0.shortcut.0", "out") in structure.members["layer2.0.conv2"]
    assert structure.coupled_by == "torch-pruning"


def test_option_a_stream_shares_channels_across_stages_by_position() -> None:
    """Sixteen channels of the stem are channels 8 to 24 of stage 2 and 24 to 40 of stage 3."""
    structure = prepared("option_a").structure
    assert groups(structure) == {"conv1": 16, "layer1.0.conv1": 16, "layer2.0.conv1": 32, "layer3.0.conv1": 64}
    stream = list(structure.units["conv1"])
    assert structure.classes["conv1", "out"].tolist() == stream
    assert structure.classes["layer1.0.conv2", "out"].tolist() == stream
    assert structure.classes["layer2.0.conv2", "out"].tolist()[8:24] == stream
    assert structure.classes["layer3.0.conv2", "out"].tolist()[24:40] == stream
    assert structure.classes["linear", "in"].tolist()[24:40] == stream


def test_channels_that_option_a_pads_stay_with_the_reason() -> None:
    """The padding is written into forward: 16 channels of stage 2 and 48 of stage 3 stay, and it is said why."""
    staying = [each for each in prepared("option_a").structure.unprunable if each.layer != "linear"]
    assert sum(each.channels for each in staying if each.layer == "layer2.0.conv2") == 16
    assert sum(each.channels for each in staying if each.layer == "layer3.0.conv2") == 48
    assert all("its forward holds fixed sizes" in each.reason for each in staying)


def test_dense_layers_reach_every_later_layer_of_their_block() -> None:
    """Growth channels are read by all that follow up to the transition; the stem is one of them."""
    members = prepared("densenet").structure.members
    assert members["block1.0.conv2"] == (
        ("block1.0.conv2", "out"),
        ("block1.1.norm1", "out"),
        ("block1.1.conv1", "in"),
        ("transition.0", "out"),
        ("transition.2", "in"),
    )
    assert members["block2.1.conv2"] == (("block2.1.conv2", "out"), ("norm", "out"), ("head.linear", "in"))
    assert len(members) == 10


def test_depthwise_channels_are_tied_to_what_they_read() -> None:
    """Expansion, depthwise and projection input are one group; a block without expansion joins its input's."""
    structure = prepared("mobilenetv2").structure
    assert groups(structure) == {
        "features.0.0": 16,
        "features.2.conv.0.0": 32,
        "features.2.conv.2.0": 24,
        "features.3.conv.0.0": 48,
        "features.5.0": 32,
    }
    hidden = structure.classes["features.3.conv.0.0", "out"].tolist()
    for axis in (("features.3.conv.1.0", "in"), ("features.3.conv.1.0", "out"), ("features.3.conv.2.0", "in")):
        assert structure.classes[axis].tolist() == hidden
    assert ("features.1.conv.0.0", "out") in structure.members["features.0.0"]


def test_grouped_convolution_takes_one_channel_of_every_group_at_once() -> None:
    """ResNeXt with four groups: a unit of conv1 and of conv2 is four channels, a multiple of 4 is one unit."""
    inner = prepared("resnext").structure.space.by_name["block3.conv1"]
    assert (inner.width, inner.unit_channels, inner.multiple) == (6, 4, 1)
    owners = prepared("resnext").structure.classes["block3.conv1", "out"].tolist()
    assert owners[:6] == owners[6:12] == owners[12:18] == owners[18:]


def test_flattened_channel_is_a_block_of_columns() -> None:
    """A channel of a 2x2 map is four columns of the linear layer that reads it."""
    structure = prepared("vgg").structure
    layer = next(each for each in structure.layers if each.name == "classifier.0")
    assert layer.in_units == {"features.4.0": 4}
    assert layer.out_units == {"classifier.0": 1}
    columns = structure.classes["classifier.0", "in"].tolist()
    assert columns[:8] == [columns[0]] * 4 + [columns[4]] * 4


def test_halves_of_a_chunk_stay_equal() -> None:
    """A unit of the tensor that is split is one channel of either half; the branches before it are groups apart."""
    structure = prepared("inception").structure
    assert structure.space.by_name["widen.0"].unit_channels == 2
    owners = structure.classes["widen.0", "out"].tolist()
    assert owners[:16] == owners[16:]
    assert {"one.0", "three.1.0", "factored.1", "pool.1.0", "inner.1.0"} <= groups(structure).keys()


def test_graph_decides_where_torch_pruning_does_not_couple_what_meets() -> None:
    """Slices of one tensor that are multiplied: torch-pruning misses it, the walk through the graph does not."""
    structure = prepared("half_split").structure
    assert structure.coupled_by == "the graph"
    assert structure.space.by_name["stem.0"].unit_channels == 2


def test_reused_convolution_ties_its_two_sides() -> None:
    """What runs on its own output has one set of channels, and its weight is cut once."""
    structure = prepared("shared").structure
    assert structure.classes["twice", "in"].tolist() == structure.classes["twice", "out"].tolist()
    takes = [each for each in structure.channels.edits if getattr(each, "initializer", "") == "twice.weight"]
    assert sorted(each.axis for each in takes) == [0, 1]


def test_se_block_scales_the_channels_it_squeezes() -> None:
    """The excitation's output is in the group it scales; the bottleneck of the squeeze is its own."""
    members = prepared("senet").structure.members
    assert ("first.1.up", "out") in members["first.0.0"]
    assert ("fc2", "out") in members["second.0"]
    assert members["first.1.down"] == (("first.1.down", "out"), ("first.1.up", "in"))


def test_layers_that_vanish_with_a_branch_know_it() -> None:
    """Both inner groups of a bottleneck take all three of its convolutions along."""
    layers = {each.name: each for each in prepared("bottleneck").structure.layers}
    for number in (1, 2, 3):
        assert layers[f"block2.conv{number}"].gone_with == ("block2.conv1", "block2.conv2")
    assert layers["block1.downsample.0"].gone_with == ()


# -- what stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("groupnorm", "conv2", "GroupNorm"),
        ("convnext", "depthwise", "LayerNorm"),
        ("convnext", "norm", "edgeprune does not cut normalisations other than batch norm (LayerNorm)"),
        ("convnext", "up", "a Linear applied to the last axis of a map (N x H x W x C), which edgeprune does not cut"),
        ("vit", "block.mlp.0", "a Linear applied to tokens (N x L x C), which edgeprune does not cut yet (node_MatMul"),
        ("vit", "block.attention", "edgeprune does not cut attention (MultiheadAttention)"),
        ("vit", "block.attention.out_proj", "edgeprune does not cut attention (MultiheadAttention)"),
        ("vit", "positions", "edgeprune does not cut embeddings (Embedding)"),
        ("vit", "token", "edgeprune does not cut parameters that VisionTransformer holds itself (1 x 1 x 16)"),
        ("prelu", "act2", "it has one slope for all channels"),
        ("recurrent", "features.1.1", "it passes through LSTM"),
        ("shufflenet", "conv1.0", "regroups channels"),
        ("hard_coded", "last.0", "its forward holds fixed sizes"),
        ("shared", "unused", "forward never uses it"),
        ("vgg", "classifier.3", "it is the model's output"),
    ],
)
def test_layers_that_stay_say_why(name: str, layer: str, reason: str) -> None:
    """The reason names the thing that stands in the way."""
    assert reason in reasons(prepared(name).structure)[layer]


def test_neighbours_of_what_stays_are_still_prunable() -> None:
    """Group norm freezes what it reads, not what comes before or after."""
    assert groups(prepared("groupnorm").structure) == {"conv1.0": 16, "conv3.0": 16}
    assert "conv3.0" in groups(prepared("shufflenet").structure)


class Loose(nn.Module):
    """A convolution without a module: its weight is a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.body = nn.Conv2d(8, 8, 3)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.scale * F.relu(self.body(F.conv2d(self.stem(x), self.kernel))))


def test_weights_of_no_layer_are_listed_under_their_node() -> None:
    """A functional convolution is not passed over, and its neighbours know what they meet."""
    why = reasons(structure_of(Loose(), torch.randn(1, 3, 8, 8)))
    assert why["node_conv2d_1"] == "its weight belongs to no layer of the module"
    assert "parameter that belongs to no layer" in why["stem"]
    assert "parameter that belongs to no layer" in why["body"]


def test_excluded_layers_stay_and_name_the_pattern() -> None:
    """A pattern freezes the whole group of a layer it matches."""
    net, x = made("vgg")
    structure = structure_of(net, x, exclude=["features.[24].*"])
    assert groups(structure) == {"features.0.0": 16, "classifier.0": 32}
    assert reasons(structure)["features.2.0"] == "excluded by 'features.[24].*'"


def test_what_can_never_be_cut_may_be_excluded() -> None:
    """`edgeprune space` lists it by that name, so it is a layer."""
    net, x = made("recurrent")
    assert groups(structure_of(net, x, exclude=["cell"])) == {"features.0.0": 16}


def test_groups_without_a_smaller_width_are_listed() -> None:
    """Eight channels on a multiple of eight leave no choice; sixteen do."""
    net, x = made("inception")
    structure = structure_of(net, x, multiple=8)
    assert "pool.1.0" not in groups(structure)
    assert reasons(structure)["pool.1.0"] == "its 8 channels leave no smaller multiple of 8 that is allowed"
    assert structure.space.by_name["one.0"].choices == (8, 16)


def test_minimum_ratio_bounds_what_is_kept_but_not_removal() -> None:
    """At least half is kept, or nothing of a branch that may go."""
    net, x = made("resnet")
    structure = structure_of(net, x, minimum_ratio=0.5)
    assert structure.space.by_name["stem.0"].choices == (8, 12, 16)
    assert structure.space.by_name["layer1.0.conv1"].choices == (0, 8, 12, 16)


def test_one_channel_a_step_is_allowed() -> None:
    """A multiple of 1 offers every width from 1."""
    net, x = made("vgg")
    assert structure_of(net, x, multiple=1).space.by_name["features.0.0"].choices == tuple(range(1, 17))


# -- what becomes of a structure -------------------------------------------------------------------------------------


def test_alive_classes_are_those_of_the_kept_units() -> None:
    """Index -1, which stands for channels of no group, is always alive."""
    structure = prepared("vgg").structure
    plan = Plan(kept={**structure.space.full().kept, "features.0.0": (0, 5, 6, 15)})
    alive = structure.alive(plan)
    kept = alive[structure.classes["features.0.0", "out"]].nonzero()[0].tolist()
    assert kept == [0, 5, 6, 15]
    assert alive[-1]
    assert (~alive).sum() == 12


def test_an_exclusion_that_names_no_layer_is_refused() -> None:
    """A misspelled layer would be pruned in silence."""
    net, x = made("vgg")
    with pytest.raises(ConfigError, match=r"'feature\.0\.\*' names no layer"):
        structure_of(net, x, exclude=["features.0.*", "feature.0.*"])


def test_removal_of_nothing_is_nothing() -> None:
    """A plan without width 0 aliases and silences nothing."""
    structure = prepared("resnet").structure
    removal = structure.removal(structure.space.full())
    assert not removal.aliases
    assert not removal.dead_layers


def test_frozen_groups_leave_space_layers_and_removals() -> None:
    """`without` takes a group out everywhere and lists its channels with the reason."""
    structure = without(prepared("resnet").structure, {"layer1.0.conv1": "because"})
    assert "layer1.0.conv1" not in groups(structure) | structure.units | structure.members
    layer = next(each for each in structure.layers if each.name == "layer1.0.conv2")
    assert layer.in_units == {}
    assert layer.gone_with == ()
    assert reasons(structure)["layer1.0.conv1"] == "because"
    with pytest.raises(PlanError):
        structure.alive(prepared("resnet").structure.space.full())


def test_group_that_may_never_be_empty_keeps_its_other_widths() -> None:
    """Only a group that could do nothing else is frozen."""
    net, x = made("resnet")
    structure = structure_of(net, x, multiple=16)
    assert structure.space.by_name["layer1.0.conv1"].choices == (0, 16)
    kept = never_empty(structure, {"layer1.0.conv1": "it fails", "layer2.0.conv1": "it fails"})
    assert kept.space.by_name["layer2.0.conv1"].choices == (16, 32)
    assert reasons(kept)["layer1.0.conv1"] == "it fails"
