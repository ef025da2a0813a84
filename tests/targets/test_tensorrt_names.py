"""Layer names as TensorRT prints them, back to the nodes of the graph."""

import pytest

from edgeprune.targets._tensorrt_names import by_graph_node

NODES = {"conv1", "relu1", "/layer1/conv/Conv", "add", "fc", "n4"}


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("conv1", "conv1"),
        ("conv1 + relu1", "conv1"),
        ("/layer1/conv/Conv + add + relu1", "/layer1/conv/Conv"),
        ("node_of_conv1 + node_of_relu1", "conv1"),
        ("PWN(PWN(relu1), add)", "relu1"),
        ("conv1 || /layer1/conv/Conv", "conv1"),
        ("{ForeignNode[add...fc]}", "add"),
        ("fc (FullyConnected)", "fc"),
        ("conv1/weight + n4", "n4"),
        ("Reformatting CopyNode for Input Tensor 0 to conv1 + relu1", None),
        ("Unnamed Layer* 7 [Shuffle]", None),
        ("", None),
    ],
)
def test_a_layer_is_the_first_node_it_names_or_keeps_its_own_name(reported: str, name: str | None) -> None:
    assert by_graph_node(NODES, {reported: 5.0}) == {reported if name is None else name: 5.0}


def test_layers_of_one_node_are_added_up() -> None:
    assert by_graph_node(NODES, {"conv1": 1.0, "conv1 + relu1": 2.0, "fc": 4.0}) == {"conv1": 3.0, "fc": 4.0}
