"""The walk through the graph, on graphs of a few nodes whose answer is known."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.channels import ChannelMap, Count, Groups, Take, tensor_shapes, trace_channels
from edgeprune.coupling import Coupling

A, B = list(range(4)), list(range(10, 14))
"""Classes of the output channels of the convolutions "a" and "b"."""


def graph(nodes: list[onnx.NodeProto], output: tuple[str, list[int]], **constants: object) -> onnx.ModelProto:
    """Return a model that starts with convolution "a" (tensor "a", [1, 4, 6, 6]) and "b" (tensor "b", the same)."""
    kernel = np.ones((4, 3, 1, 1), np.float32)
    first = [helper.make_node("Conv", ["input", f"{each}.weight"], [each], name=f"node_{each}") for each in "ab"]
    arrays = {
        "a.weight": kernel,
        "b.weight": kernel,
        **{k.replace("__", "."): np.array(v) for k, v in constants.items()},
    }
    model = helper.make_model(
        helper.make_graph(
            [*first, *nodes],
            "g",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 6, 6])],
            [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])],
            [numpy_helper.from_array(value, name) for name, value in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def coupling(**axes: list[int]) -> Coupling:
    """Return a coupling of "a", "b" and the named axes, e.g. c_in=[...], c_out=[...]."""
    none = [-1, -1, -1]
    classes = {("a", "in"): none, ("a", "out"): A, ("b", "in"): none, ("b", "out"): B}
    classes |= {tuple(name.split("_")): owners for name, owners in axes.items()}
    return Coupling(classes={axis: np.array(each) for axis, each in classes.items()}, frozen={})


def trace(model: onnx.ModelProto, **axes: list[int]) -> ChannelMap:
    """Return what the walk finds."""
    return trace_channels(model, coupling(**axes))


def owners(found: ChannelMap, tensor: str) -> list[int]:
    """Return the class of each of a tensor's channels."""
    return found.owners[tensor].tolist()


def counts(found: ChannelMap) -> dict[tuple[str, int], list[int]]:
    """Return (initializer, place) → the channels whose number is written there."""
    return {(each.initializer, each.place): each.owners.tolist() for each in found.edits if isinstance(each, Count)}


def takes(found: ChannelMap) -> dict[tuple[str, int], list[int]]:
    """Return (initializer, axis) → the channels whose slices are kept."""
    return {(each.initializer, each.axis): each.owners.tolist() for each in found.edits if isinstance(each, Take)}


def test_shapes_hold_initializers_and_unknown_sides() -> None:
    """A side that is not static is 0."""
    model = graph([helper.make_node("Relu", ["a"], ["y"])], ("y", ["n", 4, 6, 6]))
    shapes = tensor_shapes(model)
    assert shapes["a.weight"] == (4, 3, 1, 1)
    assert shapes["a"] == (1, 4, 6, 6)
    assert tensor_shapes(helper.make_model(model.graph))["y"][1:] == (4, 6, 6)


def test_concatenation_appends_and_split_takes_apart() -> None:
    """Split sizes are the channels of each part."""
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["c"], axis=1),
        helper.make_node("Split", ["c", "sizes"], ["d", "e"], axis=1),
    ]
    found = trace(graph(nodes, ("d", [1, 3, 6, 6]), sizes=[3, 5]))
    assert owners(found, "c") == A + B
    assert (owners(found, "d"), owners(found, "e")) == (A[:3], A[3:] + B)
    assert counts(found) == {("sizes", 0): A[:3], ("sizes", 1): A[3:] + B}
    assert not found.ties


def test_equal_parts_are_tied() -> None:
    """Halves that one split makes must stay equal."""
    found = trace(graph([helper.make_node("Split", ["a", "s"], ["c", "d"], axis=1)], ("c", [1, 2, 6, 6]), s=[2, 2]))
    assert [(one.tolist(), other.tolist()) for one, other in found.ties] == [([0, 1], [2, 3])]
    assert not found.conflict


@pytest.mark.parametrize(
    ("starts", "ends", "wanted", "before", "up_to"),
    [
        ([1], [3], A[1:3], A[:1], A[:3]),
        ([-3], [2**63 - 1], A[1:], A[:1], A),
        ([0], [-1], A[:3], [], A[:3]),
    ],
)
def test_slice_ends_count_what_lies_before_them(
    starts: list[int], ends: list[int], wanted: list[int], before: list[int], up_to: list[int]
) -> None:
    """Negative and open ends are counted from the front: they are written anew whatever is cut."""
    node = helper.make_node("Slice", ["a", "s", "e", "axes"], ["y"])
    found = trace(graph([node], ("y", [1, len(wanted), 6, 6]), s=starts, e=ends, axes=[1]))
    assert owners(found, "y") == wanted
    assert counts(found) == {("s", 0): before, ("e", 0): up_to}


def test_slices_of_pixels_do_not_touch_channels() -> None:
    """Striding over the map, as the option-A shortcut does, passes channels on."""
    node = helper.make_node("Slice", ["a", "s", "e", "axes", "steps"], ["y"])
    found = trace(graph([node], ("y", [1, 4, 3, 3]), s=[0, 0], e=[9, 9], axes=[2, 3], steps=[2, 2]))
    assert owners(found, "y") == A
    assert counts(found) == {}


def test_every_other_channel_freezes() -> None:
    """A stride over channels has no edit that fits every plan."""
    node = helper.make_node("Slice", ["a", "s", "e", "axes", "steps"], ["y"])
    found = trace(graph([node], ("y", [1, 2, 6, 6]), s=[0], e=[9], axes=[1], steps=[2]))
    assert set(found.frozen) == set(A)
    assert owners(found, "y") == [-1, -1]


def test_padded_zeros_join_what_they_are_added_to() -> None:
    """Two zero channels before "a" follow the first two of the wider map."""
    nodes = [
        helper.make_node("Conv", ["a", "c.weight"], ["c"], name="node_c"),
        helper.make_node("Pad", ["a", "pads"], ["p"]),
        helper.make_node("Add", ["p", "c"], ["y"]),
        helper.make_node("GlobalAveragePool", ["y"], ["z"]),
    ]
    model = graph(
        nodes, ("z", [1, 6, 1, 1]), pads=[0, 2, 0, 0, 0, 0, 0, 0], c__weight=np.ones((6, 4, 1, 1), np.float32)
    )
    found = trace(model, c_in=A, c_out=[20, 21, *A])
    assert owners(found, "p") == [20, 21, *A]
    assert counts(found) == {("pads", 1): [20, 21], ("pads", 5): []}
    assert not found.conflict


def test_padding_channels_with_ones_freezes() -> None:
    """Only zeros can be left out without changing what is computed."""
    node = helper.make_node("Pad", ["a", "pads", "value"], ["y"])
    found = trace(graph([node], ("y", [1, 5, 6, 6]), pads=[0, 1, 0, 0, 0, 0, 0, 0], value=np.float32(1)))
    assert set(found.frozen) == set(A)


def test_channels_that_meet_uncoupled_are_tied_and_reported() -> None:
    """An addition of two tensors of different classes: a conflict with torch-pruning, and four ties."""
    found = trace(graph([helper.make_node("Add", ["a", "b"], ["y"])], ("y", [1, 4, 6, 6])))
    assert found.conflict
    assert [(int(one[0]), int(other[0])) for one, other in found.ties] == list(zip(A, B, strict=True))


def test_layer_that_is_thought_to_read_nothing_is_a_conflict() -> None:
    """torch-pruning says -1 where the graph knows better; what the layer reads is frozen unless that is mended."""
    model = graph(
        [helper.make_node("Conv", ["a", "c.weight"], ["y"])], ("y", [1, 2, 6, 6]), c__weight=np.ones((2, 4, 1, 1), "f4")
    )
    found = trace(model, c_in=[-1] * 4, c_out=[30, 31])
    assert found.conflict
    assert set(A) < set(found.frozen)


def test_broadcast_operand_does_not_couple() -> None:
    """A map of one channel scales all of them; per-channel constants are cut along, scalars are not."""
    nodes = [
        helper.make_node("ReduceMean", ["b", "axes"], ["m"], keepdims=1),
        helper.make_node("Mul", ["a", "scale"], ["c"]),
        helper.make_node("Add", ["half", "c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["y"]),
    ]
    scale = np.ones((4, 1, 1), np.float32)
    found = trace(graph(nodes, ("y", [1, 4, 1, 1]), axes=[2, 3], scale=scale, half=np.float32(0.5)))
    assert owners(found, "d") == A
    assert owners(found, "m") == B
    assert takes(found)["scale", 0] == A
    assert ("half", 0) not in takes(found)


def test_mean_over_channels_freezes() -> None:
    """A mean counts its channels: fewer of them would change it."""
    found = trace(graph([helper.make_node("ReduceMean", ["a", "axes"], ["y"])], ("y", [1, 1, 6, 6]), axes=[1]))
    assert "mixes channels" in found.frozen[0]


def test_resize_to_a_size_writes_its_channels() -> None:
    """Sizes hold the channel count; factors hold a one."""
    node = helper.make_node("Resize", ["a", "", "", "sizes"], ["y"], mode="nearest")
    found = trace(graph([node], ("y", [1, 4, 12, 12]), sizes=[1, 4, 12, 12]))
    assert counts(found) == {("sizes", 1): A}


def test_flatten_repeats_each_channel_for_its_pixels() -> None:
    """The linear layer reads 36 columns a channel; the target shape holds their number."""
    nodes = [
        helper.make_node("Reshape", ["a", "shape"], ["f"]),
        helper.make_node("Gemm", ["f", "c.weight"], ["y"], transB=1),
    ]
    columns = [each for each in A for _ in range(36)]
    model = graph(nodes, ("y", [1, 2]), shape=[1, 144], c__weight=np.ones((2, 144), np.float32))
    found = trace(model, c_in=columns, c_out=[40, 41])
    assert owners(found, "f") == columns
    assert counts(found) == {("shape", 1): columns}
    assert takes(found)["c.weight", 1] == columns
    assert found.frozen == {40: "it is the model's output", 41: "it is the model's output"}


def test_reshape_that_regroups_channels_freezes() -> None:
    """Channel shuffle has no slices to keep."""
    found = trace(graph([helper.make_node("Reshape", ["a", "s"], ["y"])], ("y", [1, 2, 2, 6, 6]), s=[1, 2, 2, 6, 6]))
    assert all("regroups channels" in found.frozen[each] for each in A)


def test_depthwise_layer_counts_its_groups() -> None:
    """The "group" attribute follows the channels, and so does the weight's first axis."""
    node = helper.make_node("Conv", ["a", "c.weight"], ["y"], name="node_c", group=4)
    found = trace(graph([node], ("y", [1, 4, 6, 6]), c__weight=np.ones((4, 1, 1, 1), "f4")), c_in=A, c_out=A)
    assert [(each.node, each.owners.tolist()) for each in found.edits if isinstance(each, Groups)] == [("node_c", A)]
    assert takes(found)["c.weight", 0] == A
    assert ("c.weight", 1) not in takes(found)


def test_weight_of_two_nodes_is_cut_once() -> None:
    """A layer that runs twice is one slice an axis, or the second would find nothing left."""
    nodes = [
        helper.make_node("Conv", ["a", "c.weight"], ["d"], name="node_c"),
        helper.make_node("Conv", ["d", "c.weight"], ["e"], name="node_d"),
        helper.make_node("GlobalAveragePool", ["e"], ["y"]),
    ]
    found = trace(graph(nodes, ("y", [1, 4, 1, 1]), c__weight=np.ones((4, 4, 1, 1), "f4")), c_in=A, c_out=A)
    assert [each.axis for each in found.edits if isinstance(each, Take) and each.initializer == "c.weight"] == [0, 1]
    assert found.nodes["c"] == "node_c"


def test_unknown_operations_freeze_what_they_read_and_the_walk_goes_on() -> None:
    """Softmax over channels: named in the reason; the layer after it still has its own channels."""
    nodes = [
        helper.make_node("Softmax", ["a"], ["s"], name="soft", axis=1),
        helper.make_node("Conv", ["s", "c.weight"], ["c"], name="node_c"),
        helper.make_node("GlobalAveragePool", ["c"], ["y"]),
    ]
    model = graph(nodes, ("y", [1, 5, 1, 1]), c__weight=np.ones((5, 4, 1, 1), "f4"))
    found = trace(model, c_in=A, c_out=[50, 51, 52, 53, 54])
    assert found.frozen[0] == "it passes through Softmax (soft), which edgeprune cannot cut"
    assert owners(found, "c") == [50, 51, 52, 53, 54]


def test_layers_the_graph_lacks_are_told() -> None:
    """A layer whose weight is nowhere in the graph is unseen, and its channels stay."""
    found = trace(graph([helper.make_node("Relu", ["a"], ["y"])], ("y", [1, 4, 6, 6])), c_in=B, c_out=[60])
    assert "forward never uses it" in found.unseen["c"]
    assert "forward never uses it" in found.frozen[60]


def test_computed_sizes_freeze() -> None:
    """A target shape that the graph computes cannot be written by a plan."""
    nodes = [
        helper.make_node("Shape", ["a"], ["shape"]),
        helper.make_node("Reshape", ["b", "shape"], ["y"], name="again"),
    ]
    found = trace(graph(nodes, ("y", [1, 4, 6, 6])))
    assert all("again" in found.frozen[each] or "Shape" in found.frozen[each] for each in B)
