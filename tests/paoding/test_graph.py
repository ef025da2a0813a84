"""What is read off a graph: what follows a dense layer, and what bounds its input; on graphs written by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.paoding.graph import Follow, Graph
from edgeprune.paoding.intervals import Bounds

WEIGHTS = {"fc1.weight": (8, 16), "fc1.bias": (8,), "fc2.weight": (6, 8), "fc3.weight": (3, 6)}
ATTRIBUTES = {"Gemm": {"transB": 1}, "MaxPool": {"kernel_shape": [4, 4]}, "AveragePool": {"kernel_shape": [4, 4]}}


def graph_of(
    nodes: str,
    *,
    shape: tuple[int, ...] = (1, 16),
    more: dict[str, tuple[int, ...]] | None = None,
    ends: tuple[float, ...] = (),
    linear: str = "fc1 fc2 fc3",
) -> Graph:
    """Return the graph of lines "output = Operator input input"; `more` weights, `ends` of a clip as low and high."""
    made = []
    for number, line in enumerate(each.split() for each in nodes.splitlines() if each.strip()):
        output, _, operator, *inputs = line
        options = ATTRIBUTES.get(operator, {})
        made.append(helper.make_node(operator, inputs, [output], name=f"node{number}", **options))
    values = {name: np.ones(size, dtype=np.float32) for name, size in {**WEIGHTS, **(more or {})}.items()}
    values |= {name: np.float32(end) for name, end in zip(("low", "high"), ends, strict=False)}
    used = {name for node in made for name in node.input}
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    return Graph(onnx.shape_inference.infer_shapes(model), linear.split())


def between(nodes: str, more: dict[str, tuple[int, ...]] | None = None) -> Follow:
    """Return what follows fc1 when these nodes lead from a to b, and fc2 reads b."""
    lines = ["a = Gemm input fc1.weight fc1.bias", *nodes.split("; "), "output = Gemm b fc2.weight"]
    return graph_of("\n".join(lines), more=more).follow("fc1")


@pytest.mark.parametrize(("operator", "name"), [("Relu", "relu"), ("Sigmoid", "sigmoid"), ("Tanh", "tanh")])
def test_known_activations_go_by_their_names(operator: str, name: str) -> None:
    """One of them between two dense layers."""
    assert between(f"b = {operator} a") == Follow(readers=("fc2",), activation=name)


def test_nothing_between_is_the_identity() -> None:
    """So is whatever moves nothing."""
    assert between("b = Identity a") == Follow(readers=("fc2",))
    assert between("c = Flatten a; b = Dropout c") == Follow(readers=("fc2",))


def test_a_batch_norm_comes_before_the_activation_or_is_in_the_way() -> None:
    """Behind it, it scales units that would have to be alike."""
    more = {f"bn.{each}": (8,) for each in ("weight", "bias", "running_mean", "running_var")}
    norm = f"BatchNormalization {{}} {' '.join(more)}"
    found = between(f"c = {norm.format('a')}; b = Relu c", more)
    assert found == Follow(readers=("fc2",), activation="relu", norm="bn")
    assert "BatchNormalization" in between(f"c = Relu a; b = {norm.format('c')}", more).obstacle


@pytest.mark.parametrize("nodes", ["b = Selu a", "c = Tanh a; b = Relu c", "b = Softmax a", "c = Gelu a; b = Relu c"])
def test_anything_else_is_an_obstacle_with_a_name(nodes: str) -> None:
    """Two activations in a row as well; the operator and its node are named."""
    found = between(nodes)
    assert found.readers == ()
    assert found.obstacle.endswith("follows it")
    assert found.obstacle.split()[0] in nodes


def test_other_readers_are_an_obstacle() -> None:
    """What they do with the units is not known."""
    assert between("b = Relu a; c = Exp a").obstacle == "Relu and Exp read it"


def test_the_last_layer_has_no_readers() -> None:
    """Its units are the model's output."""
    graph = graph_of("a = Gemm input fc1.weight\n output = Gemm a fc2.weight")
    assert graph.follow("fc2") == Follow(obstacle="it is the model's output")


def test_several_dense_readers_are_all_named() -> None:
    """In the order of the graph."""
    nodes = """
        a = Gemm input fc1.weight
        b = Relu a
        c = Gemm b fc2.weight
        d = Gemm b fc4.weight
        output = Add c d
    """
    assert graph_of(nodes, more={"fc4.weight": (6, 8)}, linear="fc1 fc2 fc4").follow("fc1").readers == ("fc2", "fc4")


def test_a_weight_that_is_used_twice_is_an_obstacle_on_either_side() -> None:
    """Its units are made, or read, in two places at once."""
    nodes = """
        a = Gemm input fc1.weight
        b = Relu a
        c = Gemm b square.weight
        d = Relu c
        output = Gemm d square.weight
    """
    graph = graph_of(nodes, more={"square.weight": (8, 8)}, linear="fc1 square")
    assert "Gemm" in graph.follow("fc1").obstacle
    assert graph.follow("square").obstacle == "2 operators share its weight"


# -- boxes -----------------------------------------------------------------------------------------------------------

PIXELS = Bounds(low=np.array([-1.0, 0.5]), high=np.array([2.0, 3.0]))
FILTER = {"conv.weight": (2, 2, 1, 1)}


def box(
    nodes: str, size: int, *, inputs: Bounds | None = PIXELS, ends: tuple[float, ...] = ()
) -> tuple[list[float], list[float], str]:
    """Return low, high and source of what fc5 reads when these nodes lead from the input, two maps, to a."""
    lines = [*nodes.split("; "), "b = Flatten a", "output = Gemm b fc5.weight"]
    more = FILTER | {"fc5.weight": (3, size)}
    graph = graph_of("\n".join(lines), shape=(1, 2, 4, 4), more=more, ends=ends, linear="fc5")
    bounds, source = graph.box("fc5", inputs, (0.0, 1.0))
    return bounds.low.tolist(), bounds.high.tolist(), source


def test_valid_pixels_bound_a_chain_that_reads_the_input() -> None:
    """Each channel by its own ends, as often as it has pixels."""
    assert box("a = Identity input", 32) == ([-1] * 16 + [0.5] * 16, [2] * 16 + [3] * 16, "the input")


def test_bounds_pass_what_cannot_leave_them() -> None:
    """ReLU lifts the lower end; a maximum and a mean are within; padding of a mean counts as zeros."""
    assert box("a = MaxPool input", 2)[:2] == ([-1, 0.5], [2, 3])
    assert box("c = Relu input; a = GlobalAveragePool c", 2)[:2] == ([0, 0.5], [2, 3])
    assert box("a = AveragePool input", 2)[:2] == ([-1, 0], [2, 3])


@pytest.mark.parametrize(
    ("operator", "ends"), [("Sigmoid", (0, 1)), ("Tanh", (-1, 1)), ("HardSigmoid", (0, 1)), ("Softsign", (-1, 1))]
)
def test_a_bounded_activation_bounds_whatever_it_reads(operator: str, ends: tuple[float, float]) -> None:
    """A convolution of unknown inputs, too."""
    found = box(f"c = Conv input conv.weight; a = {operator} c", 32, inputs=None)
    assert found == ([ends[0]] * 32, [ends[1]] * 32, operator)


def test_a_clip_bounds_by_its_constants() -> None:
    """As ReLU6 is exported; with one end only it bounds nothing."""
    assert box("a = Clip input low high", 32, inputs=None, ends=(0, 6)) == ([0] * 32, [6] * 32, "Clip")
    assert box("a = Clip input low", 32, inputs=None, ends=(0,))[2] == "assumed"


def test_where_nothing_is_known_the_box_is_assumed() -> None:
    """A convolution; an input without a range."""
    assert box("a = Conv input conv.weight", 32)[2] == "assumed"
    assert box("a = Identity input", 32, inputs=None) == ([0] * 32, [1] * 32, "assumed")
