"""Which nodes become one kernel: an operator and the element-wise ones after it that only it feeds."""

from collections.abc import Sequence

from .elementwise import COSTLY, ELEMENTWISE
from .graph import Graph, Node

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "CastLike", "Cast"})
"""Operators that leave every element where it is in a plain layout."""

HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators that an element-wise one joins rather than any other that feeds it."""

MOST_COSTLY = 2
"""Polynomials in one kernel: each further one makes TVM twenty times slower."""


def groups(graph: Graph) -> list[tuple[Node, ...]]:
    """Return the groups in an order in which they can run; in each, every node but the first reads the one before."""
    grouper = _Grouper(graph)
    for node in graph.nodes:
        grouper.take(node)
    return grouper.ordered()


class _Grouper:
    """Walks the nodes and puts each into a group."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._uses = graph, graph.uses()
        self._group_of: dict[str, list[Node]] = {}
        self._groups: list[list[Node]] = []
        self._place = {node.outputs: number for number, node in enumerate(graph.nodes)}

    def take(self, node: Node) -> None:
        """Put a node into the group of one of its operands, or into one of its own."""
        group = self._host(node)
        if group is None:
            group = []
            self._groups.append(group)
        group.append(node)
        self._group_of.update(dict.fromkeys(node.outputs, group))

    def ordered(self) -> list[tuple[Node, ...]]:
        """Return the groups by their last nodes."""
        return [tuple(each) for each in sorted(self._groups, key=self._last)]

    def _last(self, group: Sequence[Node]) -> int:
        return self._place[group[-1].outputs]

    def _host(self, node: Node) -> list[Node] | None:
        if node.op not in ELEMENTWISE:
            return None
        hosts = [self._group_of[name] for name in node.inputs if self._may_host(name, node)]
        heavy = [each for each in hosts if each[0].op in HEAVY]
        return max(heavy or hosts, key=self._last, default=None)

    def _may_host(self, name: str, node: Node) -> bool:
        group, shapes = self._group_of.get(name), self._graph.shapes
        return (
            group is not None
            and self._uses[name] == 1
            and name not in self._graph.outputs
            and shapes[name] == shapes[node.outputs[0]]
            and group[0].op not in VIEWS
            and group[-1].outputs[0] == name
            and len(group[0].outputs) == 1
            and sum(each.op in COSTLY for each in (*group, node)) <= MOST_COSTLY
        )
