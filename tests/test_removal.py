"""What is left of a graph when groups keep nothing, on graphs of a few steps."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.removal import Removal, Step, find_removal, settled, steps_of


def step(op: str, inputs: str, output: str, layer: str | None = None) -> Step:
    """Return a step that gives zeros for zeros unless it is a Sigmoid."""
    return Step(op=op, inputs=tuple(inputs.split()), outputs=(output,), layer=layer, silent_of_zeros=op != "Sigmoid")


def removal(steps: list[Step], gone: list[int], **owners: list[int]) -> Removal | None:
    """Return the removal of classes `gone`; tensors are owned as told, shapes are all alike, "end" is the output."""
    steps = [*steps, step("Relu", "y", "end")]
    names = {name for each in steps for name in (*each.inputs, *each.outputs)}
    known = {name: np.array(owners.get(name, [0])) for name in names}
    return find_removal(steps, known, dict.fromkeys(names, (1, 1)), gone, ("end",))


BLOCK = [
    step("Conv", "x", "a", "one"),
    step("BatchNormalization", "a", "b", "norm"),
    step("Relu", "b", "c"),
    step("Conv", "c", "d", "two"),
    step("Add", "d x", "y"),
]
INSIDE = {"a": [7], "b": [7], "c": [7]}


def test_residual_branch_leaves_its_shortcut() -> None:
    """The addition becomes its other operand, and every layer of the branch is dead."""
    assert removal(BLOCK, [7], **INSIDE) == Removal(aliases={"y": "x"}, dead_layers=("one", "norm", "two"))


def test_nothing_is_removed_when_no_tensor_is_emptied() -> None:
    """A class that no tensor consists of entirely silences nothing."""
    assert removal(BLOCK, [8], **INSIDE) is None
    assert removal(BLOCK, [7], a=[7, 9], b=[7, 9], c=[7, 9]) is None


def test_layers_before_the_silence_that_nobody_else_reads_are_dead() -> None:
    """Emptying the middle of a branch makes its start useless, unless something else reads it."""
    steps = [step("Conv", "x", "w", "zero"), *BLOCK]
    steps[1] = step("Conv", "w", "a", "one")
    assert removal(steps, [7], **INSIDE).dead_layers == ("zero", "one", "norm", "two")
    read = [*steps[:-1], step("Add", "d x", "e"), step("Add", "e w", "y")]
    assert removal(read, [7], **INSIDE).dead_layers == ("one", "norm", "two")


def test_silence_must_not_reach_the_output() -> None:
    """A plain chain has no shortcut to fall back on."""
    assert removal([*BLOCK[:3], step("Conv", "c", "y", "two")], [7], **INSIDE) is None


def test_addition_that_is_the_output_stays() -> None:
    """The output's name must still be made by a node: a model that ends in its only addition keeps the branch."""
    names = "abcdxy"
    known = {name: np.array(INSIDE.get(name, [0])) for name in names}
    assert find_removal(BLOCK, known, dict.fromkeys(names, (1, 1)), [7], ("y",)) is None


def test_silence_must_not_reach_what_does_not_keep_zeros() -> None:
    """Sigmoid of zero is a half; of no channels it is no channels."""
    loud = [*BLOCK[:4], step("Sigmoid", "d", "e"), step("Add", "e x", "y")]
    assert removal(loud, [7], **INSIDE) is None
    gated = [*BLOCK[:2], step("Sigmoid", "b", "c"), *BLOCK[3:]]
    assert removal(gated, [7], **INSIDE) is not None


def test_scaling_silence_keeps_it_silent() -> None:
    """A product with a silent factor is silent, whatever the other is."""
    steps = [*BLOCK[:4], step("Mul", "d x", "e"), step("Add", "e x", "y")]
    assert removal(steps, [7], **INSIDE) is not None


def test_concatenation_with_something_alive_is_refused() -> None:
    """Silence may end in an addition only."""
    steps = [*BLOCK[:4], step("Concat", "d x", "y")]
    assert removal(steps, [7], **INSIDE) is None


def test_sum_of_two_silent_branches_is_silent() -> None:
    """Both operands may go if a shortcut further out is left."""
    steps = [
        step("Conv", "x", "a", "one"),
        step("Conv", "x", "b", "two"),
        step("Conv", "a", "c", "three"),
        step("Conv", "b", "d", "four"),
        step("Add", "c d", "e"),
        step("Add", "e x", "y"),
    ]
    owners = {"a": [7], "b": [8]}
    assert removal(steps, [7], **owners).aliases == {"e": "d"}
    assert removal(steps, [7, 8], **owners).aliases == {"y": "x"}
    assert removal([*steps[:4], step("Add", "c d", "y")], [7, 8], **owners) is None


def test_shortcut_of_another_shape_is_refused() -> None:
    """Broadcasting additions cannot be read past."""
    known = {name: np.array(INSIDE.get(name, [0])) for name in "abcdexy"}
    shapes = dict.fromkeys("abcdexy", (1, 4)) | {"x": (1, 1)}
    assert find_removal([*BLOCK, step("Relu", "y", "e")], known, shapes, [7], ("e",)) is None


def test_layer_that_also_runs_elsewhere_is_kept() -> None:
    """A shared layer cannot be silent in one place and sound in another."""
    steps = [step("Conv", "z", "x", "two"), *BLOCK]
    assert removal(steps, [7], **INSIDE) is None


def test_aliases_are_followed_to_the_end() -> None:
    """Two removed blocks in a row lead back to the first one's input."""
    assert settled("y", {"y": "e", "e": "x"}) == "x"
    assert settled("z", {"y": "x"}) == "z"


@pytest.mark.parametrize(
    ("op", "constants", "answer"),
    [
        ("Relu", (), True),
        ("Sigmoid", (), False),
        ("Clip", (0.0, 6.0), True),
        ("Clip", (1.0, 6.0), False),
        ("Clip", (-6.0, -1.0), False),
        ("Add", (1.0,), False),
        ("Mul", (2.0,), True),
    ],
)
def test_which_operations_make_zeros_of_zeros(op: str, constants: tuple[float, ...], answer: bool) -> None:
    """Constants count: a clip from 1 and a sum with 1 do not."""
    names = [f"c{place}" for place in range(len(constants))]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *names], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.float32(value), name) for name, value in zip(names, constants, strict=True)],
    )
    found = steps_of(graph)[0]
    assert found.silent_of_zeros is answer
    assert found.inputs == ("x",)
    assert found.layer is None


def test_steps_know_the_layer_whose_weights_they_hold() -> None:
    """A convolution by its weight, a batch norm by its running mean, nested paths whole."""
    nodes = [
        onnx.helper.make_node("Conv", ["x", "body.0.conv.weight"], ["a"]),
        onnx.helper.make_node("BatchNormalization", ["a", "s", "b", "body.0.bn.running_mean", "v"], ["c"]),
        onnx.helper.make_node("PRelu", ["c", "node/1"], ["d"]),
    ]
    assert [each.layer for each in steps_of(helper.make_graph(nodes, "g", [], []))] == [
        "body.0.conv",
        "body.0.bn",
        None,
    ]
