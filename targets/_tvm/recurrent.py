"""Recurrent layers unrolled in time: products, sums and activations that every step of the sequence shares.

    X W' + b for all steps at once  ─▶  for each step:  + H R',  gates,  new H

The equations are those of ONNX's operators RNN, GRU and LSTM. Steps call the same kernels: their inputs lie one behind
the other, so each reads a part of the same buffer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .graph import Graph, Node, unsupported

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
DEFAULT = {"RNN": [b"Tanh"], "GRU": [b"Sigmoid", b"Tanh"], "LSTM": [b"Sigmoid", b"Tanh", b"Tanh"]}


def unrolled(graph: Graph) -> Graph:
    """Return the graph with every recurrent layer replaced by simple operators."""
    if not any(node.op in GATES for node in graph.nodes):
        return graph
    writer = _Writer(graph)
    for node in graph.nodes:
        if node.op in GATES:
            _Layer(writer, node).write()
        else:
            writer.nodes.append(node)
    return replace(graph, nodes=tuple(writer.nodes), constants=writer.constants, shapes=writer.shapes)


class _Writer:
    """Nodes, constants and shapes while they are written."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.constants, self.shapes = dict(graph.constants), dict(graph.shapes)

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Add a constant and return its name."""
        self.constants[name], self.shapes[name] = array, array.shape
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, shape: Sequence[int], **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        self.shapes[name] = tuple(shape)
        self.nodes.append(Node(op=op, name=name, inputs=tuple(inputs), outputs=(name,), attributes=attributes))
        return name

    def reshape(self, source: str, name: str, shape: Sequence[int]) -> str:
        """Add a Reshape and return its output's name."""
        return self.node("Reshape", [source, self.constant(f"{name}.shape", np.array(shape))], name, shape)


class _Layer:
    """One recurrent layer, in one direction or both."""

    def __init__(self, writer: _Writer, node: Node) -> None:
        self.writer, self.node, self.name = writer, node, node.outputs[0] or node.outputs[1]
        self.hidden = int(node.attributes["hidden_size"])
        self.gates = GATES[node.op]
        self.batch_first = bool(node.attributes.get("layout", 0))
        self._check()
        weights = [self._array(place) for place in (1, 2)]
        self.weight, self.recurrence = weights
        self.directions = self.weight.shape[0]
        given = self._array(3) if node.input(3) else np.zeros((self.directions, 2 * self.gates * self.hidden))
        self.bias = given.astype(np.float32)
        shape = writer.shapes[node.inputs[0]]
        self.batch, self.steps = (shape[0], shape[1]) if self.batch_first else (shape[1], shape[0])
        self.depth = shape[2]

    def _check(self) -> None:
        node, wanted = self.node, DEFAULT[self.node.op]
        directions = 2 if node.text("direction", "forward") == "bidirectional" else 1
        if list(node.attributes.get("activations", wanted * directions)) != wanted * directions:
            raise unsupported(node, "activations other than the usual ones")
        if node.input(7) or node.attributes.get("clip") or node.attributes.get("input_forget", 0):
            raise unsupported(node, "peepholes, clipping or coupled gates")
        if node.input(4):
            lengths = self._array(4)
            shape = self.writer.shapes[node.inputs[0]]
            if np.any(lengths != shape[1 if self.batch_first else 0]):
                raise unsupported(node, "sequences of several lengths in one batch")

    def _array(self, place: int) -> NDArray[Any]:
        if self.node.input(place) not in self.writer.constants:
            raise unsupported(self.node, f"its input {place} is computed while the network runs")
        return self.writer.constants[self.node.inputs[place]]

    def _add(self, op: str, inputs: Sequence[str], name: str, shape: Sequence[int], **attributes: Any) -> str:
        return self.writer.node(op, inputs, f"{self.name}.{name}", shape, **attributes)

    def _constant(self, name: str, array: Any) -> str:
        return self.writer.constant(f"{self.name}.{name}", np.asarray(array))

    def write(self) -> None:
        """Write the nodes of the layer; only outputs that somebody reads."""
        image = self.node.inputs[0]
        if self.batch_first:
            image = self._add("Transpose", [image], "steps", (self.steps, self.batch, self.depth), perm=[1, 0, 2])
        flat = self._reshape(image, "flat", (self.steps * self.batch, self.depth))
        reverse = self.node.text("direction", "forward") == "reverse"
        tracks = [_Track(self, flat, place, reverse=reverse or place == 1) for place in range(self.directions)]
        self._outputs(tracks)

    def _reshape(self, name: str, to: str, shape: Sequence[int]) -> str:
        return self.writer.reshape(name, f"{self.name}.{to}", shape)

    def _outputs(self, tracks: "Sequence[_Track]") -> None:
        uses = self.writer.graph.uses()
        wanted = [name if name and uses.get(name) else "" for name in (*self.node.outputs, "", "")]
        if wanted[0]:
            self._sequence(wanted[0], tracks)
        for name, last in ((wanted[1], "hidden"), (wanted[2], "cell")):
            if name:
                self._stacked([getattr(each, last) for each in tracks], name)

    def _sequence(self, name: str, tracks: "Sequence[_Track]") -> None:
        """Write Y: [steps, directions, batch, hidden], or with the batch first."""
        parts = [part for step in range(self.steps) for part in (each.seen[step] for each in tracks)]
        shape = (self.steps, self.directions, self.batch, self.hidden)
        joined = self._add("Concat", parts, "joined", (self.steps * self.directions * self.batch, self.hidden), axis=0)
        if not self.batch_first:
            self.writer.reshape(joined, name, shape)
            return
        apart = self._reshape(joined, "apart", shape)
        turned = (self.batch, self.steps, self.directions, self.hidden)
        self.writer.node("Transpose", [apart], name, turned, perm=[2, 0, 1, 3])

    def _stacked(self, parts: Sequence[str], name: str) -> None:
        """Write Y_h or Y_c: [directions, batch, hidden], or with the batch first."""
        shape = (self.directions, self.batch, self.hidden)
        joined = self.writer.node(
            "Concat", parts, f"{name}.joined", (self.directions * self.batch, self.hidden), axis=0
        )
        if not self.batch_first:
            self.writer.reshape(joined, name, shape)
            return
        apart = self.writer.reshape(joined, f"{name}.apart", shape)
        self.writer.node("Transpose", [apart], name, (self.batch, self.directions, self.hidden), perm=[1, 0, 2])


class _Track:
    """One direction of a layer.

    Attributes:
        seen: the hidden state of each step, in the sequence's order.
        hidden, cell: the states after the last step.
    """

    def __init__(self, layer: _Layer, flat: str, place: int, *, reverse: bool) -> None:
        self._layer, self._place, self._name = layer, place, f"d{place}"
        self._wide = layer.gates * layer.hidden
        self.hidden, self.cell = self._initial(5, "h"), self._initial(6, "c") if layer.node.op == "LSTM" else ""
        self._project(flat)
        self.seen = [""] * layer.steps
        for step in reversed(range(layer.steps)) if reverse else range(layer.steps):
            getattr(self, f"_{layer.node.op.lower()}")(step)
            self.seen[step] = self.hidden

    def _add(self, op: str, inputs: Sequence[str], name: str, shape: Sequence[int], **attributes: Any) -> str:
        return self._layer._add(op, inputs, f"{self._name}.{name}", shape, **attributes)

    def _initial(self, place: int, name: str) -> str:
        layer, shape = self._layer, (self._layer.batch, self._layer.hidden)
        if not layer.node.input(place):
            return layer._constant(f"{self._name}.{name}", np.zeros(shape, np.float32))
        axis = 1 if layer.batch_first else 0
        part = self._part(layer.node.inputs[place], axis, self._place, 1, f"{name}.part")
        return layer._reshape(part, f"{self._name}.{name}", shape)

    def _part(self, name: str, axis: int, start: int, size: int, to: str) -> str:
        """Write a Slice of one axis."""
        shape = list(self._layer.writer.shapes[name])
        shape[axis] = size
        bounds = [
            self._layer._constant(f"{self._name}.{to}.{k}", [v])
            for k, v in (("a", start), ("b", start + size), ("x", axis))
        ]
        return self._add("Slice", [name, *bounds], to, shape)

    def _project(self, flat: str) -> None:
        """Write the inputs' share of all gates for all steps; GRU's hidden bias stays with the recurrence."""
        layer = self._layer
        first, second = np.split(layer.bias[self._place], 2)
        inner = second.copy()
        if layer.node.op == "GRU" and layer.node.attributes.get("linear_before_reset", 0):
            inner[: 2 * layer.hidden] = 0
            first = first + np.concatenate([second[: 2 * layer.hidden], np.zeros(layer.hidden, np.float32)])
        else:
            first, inner = first + second, np.zeros_like(second)
        self._inner = inner.astype(np.float32)
        weight = layer._constant(f"{self._name}.w", layer.weight[self._place])
        bias = layer._constant(f"{self._name}.b", first.astype(np.float32))
        rows = layer.steps * layer.batch
        self._projected = self._add("Gemm", [flat, weight, bias], "projected", (rows, self._wide), transB=1)

    def _share(self, step: int) -> str:
        """Write the inputs' share of one step."""
        batch = self._layer.batch
        return self._part(self._projected, 0, step * batch, batch, f"{step}.share")

    def _product(self, state: str, step: int, gates: range, name: str, bias: NDArray[Any] | None = None) -> str:
        """Write the product of a state with the recurrent weights of some gates."""
        layer, size = self._layer, self._layer.hidden
        rows = slice(gates.start * size, gates.stop * size)
        tag = f"{self._name}.r{gates.start}{gates.stop}"
        inputs = [state, layer._constant(tag, layer.recurrence[self._place][rows])]
        if bias is not None:
            inputs.append(layer._constant(f"{tag}.b", bias))
        return self._add("Gemm", inputs, f"{step}.{name}", (layer.batch, len(gates) * size), transB=1)

    def _gates(self, name: str, first: int, activations: Sequence[str], step: int) -> Iterator[str]:
        """Write the activations of neighbouring gates."""
        size, shape = self._layer.hidden, (self._layer.batch, self._layer.hidden)
        for place, activation in enumerate(activations):
            part = self._part(name, 1, (first + place) * size, size, f"{step}.gate{first + place}.in")
            yield self._add(activation, [part], f"{step}.gate{first + place}", shape)

    def _both(self, op: str, a: str, b: str, name: str, step: int) -> str:
        return self._add(op, [a, b], f"{step}.{name}", self._layer.writer.shapes[a])

    def _rnn(self, step: int) -> None:
        product = self._product(self.hidden, step, range(1), "product")
        total = self._both("Add", product, self._share(step), "total", step)
        self.hidden = self._add("Tanh", [total], f"{step}.hidden", (self._layer.batch, self._layer.hidden))

    def _lstm(self, step: int) -> None:
        product = self._product(self.hidden, step, range(4), "product")
        total = self._both("Add", product, self._share(step), "total", step)
        take, give, forget, new = self._gates(total, 0, ("Sigmoid", "Sigmoid", "Sigmoid", "Tanh"), step)
        kept = self._both("Mul", forget, self.cell, "kept", step)
        added = self._both("Mul", take, new, "added", step)
        self.cell = self._both("Add", kept, added, "cell", step)
        shape = (self._layer.batch, self._layer.hidden)
        self.hidden = self._both("Mul", give, self._add("Tanh", [self.cell], f"{step}.out", shape), "hidden", step)

    def _gru(self, step: int) -> None:
        layer, size, shape = self._layer, self._layer.hidden, (self._layer.batch, self._layer.hidden)
        share = self._share(step)
        product = self._product(self.hidden, step, range(2), "product")
        part = self._part(share, 1, 0, 2 * size, f"{step}.two")
        update, reset = self._gates(self._both("Add", product, part, "total", step), 0, ("Sigmoid", "Sigmoid"), step)
        if layer.node.attributes.get("linear_before_reset", 0):
            linear = self._product(self.hidden, step, range(2, 3), "linear", self._inner[2 * size :])
            mixed = self._both("Mul", reset, linear, "mixed", step)
        else:
            state = self._both("Mul", reset, self.hidden, "state", step)
            mixed = self._product(state, step, range(2, 3), "mixed")
        third = self._part(share, 1, 2 * size, size, f"{step}.third")
        new = self._add("Tanh", [self._both("Add", mixed, third, "sum", step)], f"{step}.new", shape)
        # (1 - z) n + z h = n + z (h - n)
        change = self._both("Mul", update, self._both("Sub", self.hidden, new, "change", step), "moved", step)
        self.hidden = self._both("Add", new, change, "hidden", step)
