from pathlib import Path

import onnx
import pytest
from onnx import helper

from edgeprune.targets._graph_names import by_graph_node


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """conv → bn → relu → conv2 → (nameless) add."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"], "bn"),
        helper.make_node("Relu", ["n"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "w2"], ["c2"], "conv2"),
        helper.make_node("Add", ["c2", "r"], ["y"]),
    ]
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [])), str(path))
    return path


@pytest.mark.parametrize(
    ("reported", "node"),
    [
        ("conv2", "conv2"),
        ("r_nchwc", "conv"),
        ("c2_nchwc", "conv2"),
        ("y_nchwc", "Add_4"),
        ("Add_4", "Add_4"),
        ("conv2/ConvActivationFusion/", "conv2"),
        ("ReorderOutput_token_12", "ReorderOutput"),
        ("ReorderInput", "ReorderInput"),
    ],
)
def test_a_reported_name_is_traced_to_the_layer_that_does_the_work(graph: Path, reported: str, node: str) -> None:
    assert by_graph_node(graph, {reported: 5.0}) == {node: 5.0}


def test_times_of_one_node_are_added_and_none_is_lost(graph: Path) -> None:
    reported = {"r_nchwc": 5.0, "conv": 2.0, "ReorderOutput_token_1": 1.0, "ReorderOutput_token_2": 3.0}
    assert by_graph_node(graph, reported) == {"conv": 7.0, "ReorderOutput": 4.0}
