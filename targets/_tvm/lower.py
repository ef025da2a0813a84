"""From an ONNX graph to kernels and a program that calls them in order."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, shape_inference
from tvm import te, tirx

from .kernel import Kernel, const
from .operators import ELEMENTWISE, UNSAFE, VIEWS, broadcast, pair, ravel, spatial_pads, unravel
from .values import Reader, Value


@dataclass(frozen=True)
class Node:
    """One operator."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass
class Graph:
    """A graph with static shapes and its constants."""

    nodes: list[Node]
    constants: dict[str, NDArray[Any]]
    shapes: dict[str, tuple[int, ...]]
    inputs: list[str]
    outputs: list[str]


@dataclass
class Step:
    """One call: what is read, constants, what is written, and the function."""

    kind: str
    reads: list[Value]
    constants: list[NDArray[Any]]
    writes: Value
    func: Any
    name: str


@dataclass
class Lowered:
    """All steps, and which value another one lies in."""

    steps: list[Step] = field(default_factory=list)
    alias: dict[str, str] = field(default_factory=dict)


def read_graph(model: onnx.ModelProto) -> Graph:
    """Return the graph, constants folded into one table and batch norms into the convolutions before them."""
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(attributes["value"])
            continue
        nodes.append(Node(node.op_type, node.name, tuple(node.input), tuple(node.output), attributes))
    infos = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    shapes = {each.name: tuple(d.dim_value for d in each.type.tensor_type.shape.dim) for each in infos}
    shapes |= {name: array.shape for name, array in constants.items()}
    graph = Graph(
        nodes, constants, shapes, [i.name for i in model.graph.input if i.name not in constants], [o.name for o in model.graph.output]
    )
    return fold_constants(fold_batch_norms(graph))


def fold_constants(graph: Graph) -> Graph:
    """Evaluate nodes that read constants alone with ONNX's reference implementation."""
    from onnx.reference import ReferenceEvaluator

    kept = []
    for node in graph.nodes:
        if node.inputs and all(name in graph.constants or not name for name in node.inputs):
            proto = onnx.helper.make_node(node.op, list(node.inputs), list(node.outputs), **node.attributes)
            feeds = {name: graph.constants[name] for name in node.inputs if name}
            g = onnx.helper.make_graph(
                [proto],
                "g",
                [onnx.helper.make_tensor_value_info(k, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()],
                [onnx.helper.make_empty_tensor_value_info(o) for o in node.outputs],
            )
            m = onnx.helper.make_model(g, opset_imports=[onnx.helper.make_opsetid("", 18)])
            for name, value in zip(node.outputs, ReferenceEvaluator(m).run(None, feeds), strict=True):
                graph.constants[name] = np.asarray(value)
                graph.shapes[name] = graph.constants[name].shape
        else:
            kept.append(node)
    graph.nodes = kept
    return graph


def fold_batch_norms(graph: Graph) -> Graph:
    """Multiply batch norms into the convolution before them; others become a product and a sum."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    readers: dict[str, int] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    replaced: dict[str, Node] = {}
    kept: list[Node] = []
    for node in graph.nodes:
        if node.op != "BatchNormalization":
            kept.append(node)
            continue
        gain, shift, mean, variance = (graph.constants[name].astype(np.float64) for name in node.inputs[1:5])
        scale = gain / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
        offset = shift - mean * scale
        before = makers.get(node.inputs[0])
        before = replaced.get(before.outputs[0], before) if before else None
        if before and before.op == "Conv" and readers[node.inputs[0]] == 1 and node.inputs[0] not in graph.outputs:
            weight = graph.constants[before.inputs[1]]
            bias = graph.constants[before.inputs[2]] if len(before.inputs) > 2 and before.inputs[2] else 0.0
            w, b = f"{node.name or node.outputs[0]}.w", f"{node.name or node.outputs[0]}.b"
            graph.constants[w] = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
            graph.constants[b] = (bias * scale + offset).astype(np.float32)
            merged = Node("Conv", before.name, (before.inputs[0], w, b), node.outputs, before.attributes)
            kept[kept.index(before)] = merged
            makers[node.outputs[0]] = merged
            continue
        rank = len(graph.shapes[node.inputs[0]])
        tail = (-1, *[1] * (rank - 2))
        s, o, m = (f"{node.name or node.outputs[0]}.{x}" for x in ("scale", "offset", "scaled"))
        graph.constants[s], graph.constants[o] = scale.reshape(tail).astype(np.float32), offset.reshape(tail).astype(np.float32)
        graph.shapes[m] = graph.shapes[node.inputs[0]]
        kept.append(Node("Mul", node.name + ".scale", (node.inputs[0], s), (m,), {}))
        kept.append(Node("Add", node.name + ".offset", (m, o), node.outputs, {}))
    graph.nodes = kept
    for name, array in graph.constants.items():
        graph.shapes[name] = array.shape
    return graph


BLOCKED = {
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Concat", "Slice", "Split", "Pad", "Resize",
} | set(ELEMENTWISE)


class Lowering:
    """Turns one graph into steps."""

    def __init__(self, graph: Graph, block: int) -> None:
        self.graph, self.block = graph, block
        self.values: dict[str, Value] = {}
        self.result = Lowered()
        self.uses: dict[str, int] = {name: 1 for name in graph.outputs}
        for node in graph.nodes:
            for name in node.inputs:
                self.uses[name] = self.uses.get(name, 0) + 1

    def run(self) -> Lowered:
        """Return the steps of the whole graph."""
        for name in self.graph.inputs:
            self.values[name] = Value(name, self.graph.shapes[name])
        for nodes in self.groups():
            self.lower(nodes)
        return self.result

    # -- groups

    def groups(self) -> list[list[Node]]:
        """Return nodes that become one kernel, in the order of their last node."""
        group_of: dict[str, list[Node]] = {}
        groups: list[list[Node]] = []
        for node in self.graph.nodes:
            host = self._host(node, group_of)
            if host is None:
                host = []
                groups.append(host)
            host.append(node)
            for name in node.outputs:
                group_of[name] = host
        place = {id(node): number for number, node in enumerate(self.graph.nodes)}
        return sorted(groups, key=lambda each: place[id(each[-1])])

    def _host(self, node: Node, group_of: Mapping[str, list[Node]]) -> list[Node] | None:
        if node.op not in ELEMENTWISE:
            return None
        shape = self.graph.shapes[node.outputs[0]]
        hosts = []
        for name in node.inputs:
            group = group_of.get(name)
            if (
                group is not None
                and self.uses[name] == 1
                and name not in self.graph.outputs
                and self.graph.shapes[name] == shape
                and group[0].op not in VIEWS
                and len(group[-1].outputs) == 1
                and not self._fallback(group[0])
            ):
                hosts.append(group)
        order = {id(each): number for number, each in enumerate(self.graph.nodes)}
        heavy = [each for each in hosts if each[0].op in ("Conv", "Gemm", "MatMul", "ConvTranspose")]
        return max(heavy or hosts, key=lambda each: order[id(each[-1])], default=None)

    # -- one group

    def lower(self, nodes: Sequence[Node]) -> None:
        first = nodes[0]
        if first.op in VIEWS and self._try_alias(first):
            return
        if self._fallback(first):
            from .fallback import lower_with_relax

            lower_with_relax(self, first)
            return
        for place, name in enumerate(first.outputs):
            if name and (len(first.outputs) == 1 or self.uses.get(name)):
                self._kernel(nodes, place)

    def _fallback(self, node: Node) -> bool:
        if node.op in ELEMENTWISE or node.op in VIEWS:
            return False
        known = getattr(self, f"_{node.op.lower()}", None)
        return known is None or not self._supported(node)

    def _supported(self, node: Node) -> bool:
        shapes = self.graph.shapes
        if node.op == "MatMul":
            return node.inputs[1] in self.graph.constants and len(shapes[node.inputs[1]]) == 2
        if node.op == "Gemm":
            return node.inputs[1] in self.graph.constants
        if node.op in ("Conv", "ConvTranspose"):
            return len(shapes[node.inputs[0]]) == 4 and node.inputs[1] in self.graph.constants
        if node.op == "Resize":
            return _nearest_factors(self, node) is not None
        if node.op in ("Slice", "Pad"):
            return all(name in self.graph.constants for name in node.inputs[1:] if name)
        return True

    def value_of(self, name: str, nodes: Sequence[Node]) -> Value:
        """Return the layout a new value gets."""
        shape = self.graph.shapes[name]
        blocked = len(shape) == 4 and shape[1] * 2 > self.block and name not in self.graph.outputs
        blocked = blocked and all(each.op in BLOCKED for each in nodes)
        if blocked and shape[1] % self.block and any(each.op in UNSAFE for each in nodes):
            blocked = False
        if blocked and nodes[0].op not in ("Conv", "ConvTranspose"):
            inputs = [self.values[n] for n in nodes[0].inputs if n in self.values]
            blocked = any(each.block for each in inputs)
        return Value(name, shape, self.block if blocked else 0)

    def _kernel(self, nodes: Sequence[Node], place: int) -> None:
        kernel = Kernel()
        name = nodes[-1].outputs[place if len(nodes) == 1 else 0]
        out = self.value_of(name, nodes)
        env: dict[str, Reader] = {}
        self.kernel, self.out, self.env, self.output_place = kernel, out, env, place
        for node in nodes:
            if node.op in ELEMENTWISE:
                env[node.outputs[0]] = self._elementwise(node)
            elif node.op in VIEWS:
                env[node.outputs[0]] = self._view(node)
            else:
                env[node.outputs[place]] = getattr(self, f"_{node.op.lower()}")(node)
        func = kernel.finish(out, env[name])
        self.result.steps.append(Step(kernel.kind, kernel.reads, kernel.constants, out, func, nodes[0].name or name))
        self.values[name] = out

    # -- reading

    def source(self, name: str) -> Reader:
        """Return a reader of a value or a constant, at its own logical indices."""
        if name in self.env:
            return self.env[name]
        if name in self.graph.constants:
            return self._constant(self.graph.constants[name])
        value = self.values[name]
        read = self.kernel.read(value)
        if self.out.block and self.out.shape[1] % self.out.block and not value.block and len(value.shape) == 4:
            last = value.shape[1] - 1
            return lambda n, c, *maps: read(n, tirx.min(c, last), *maps)
        return read

    def _constant(self, array: NDArray[Any]) -> Reader:
        if array.size == 1:
            literal = const(array.reshape(()).item())
            return lambda *_: literal
        rank = len(self.out.shape)
        per_channel = self.out.block and array.ndim in (3, 4) and array.size == array.shape[-3] == self.out.shape[1]
        if per_channel and rank == 4:
            return self._channel_constant(array.reshape(-1))
        tensor = self.kernel.constant(array)
        return lambda *index: tensor[index]

    def _channel_constant(self, array: NDArray[Any]) -> Reader:
        """Return a reader of a vector over channels, at the last four logical indices."""
        if not self.out.block:
            tensor = self.kernel.constant(array)
            return lambda *index: tensor[index[-3]]
        block = self.out.block
        tensor = self.kernel.constant(np.pad(array, (0, -len(array) % block)).reshape(-1, block))
        return lambda *index: tensor[index[-3] // block, index[-3] % block]

    def operand(self, name: str) -> Reader:
        """Return a reader at the indices of the kernel's output."""
        return broadcast(self.source(name), self.graph.shapes[name], self.out.shape)

    # -- operators

    def _elementwise(self, node: Node) -> Reader:
        element = ELEMENTWISE[node.op](node.attributes)
        operands = [self._element_operand(name) for name in node.inputs]
        return lambda *index: element(*(None if each is None else each(*index) for each in operands))

    def _element_operand(self, name: str) -> Reader | None:
        if not name:
            return None
        if name in self.graph.constants:
            array = self.graph.constants[name]
            read = self._constant(array)
            if array.size == 1:
                return read
            if self.out.block and array.ndim in (3, 4) and array.size == array.shape[-3] == self.out.shape[1]:
                return read
            return broadcast(read, array.shape, self.out.shape)
        return self.operand(name)

    def _try_alias(self, node: Node) -> bool:
        name = node.inputs[0]
        if name not in self.values or node.outputs[0] in self.graph.outputs or name in self.graph.inputs:
            return False
        value = self.values[name]
        flat = all(each == 1 for each in value.shape[2:]) and value.shape[0] == 1
        if value.block and not flat:
            return False
        self.values[node.outputs[0]] = Value(node.outputs[0], self.graph.shapes[node.outputs[0]])
        self.result.alias[node.outputs[0]] = self.result.alias.get(name, name)
        return True

    def _view(self, node: Node) -> Reader:
        source, shape, own = self.source(node.inputs[0]), self.out.shape, self.graph.shapes[node.inputs[0]]
        return lambda *index: source(*unravel(ravel(index, shape), own))

    def _padded(self, name: str, pads: Sequence[int], fill: float) -> tuple[Reader, Value]:
        """Return a reader of a map with a border, and the layout it is read in."""
        value = self.values[name]
        read = self.kernel.read(value)
        top, left, bottom, right = pads
        if not any(pads):
            return read, value
        n, c, h, w = value.shape
        padded = Value(value.name + ".padded", (n, c, h + top + bottom, w + left + right), value.block)

        def body(n_: Any, c_: Any, y: Any, x: Any) -> Any:
            inside = [y >= top] if top else []
            inside += [y < top + h] if bottom else []
            inside += [x >= left] if left else []
            inside += [x < left + w] if right else []
            return tirx.if_then_else(tirx.all(*inside), read(n_, c_, y - top, x - left), const(fill))

        return self.kernel.stage("pad", padded, body), padded

    def _conv(self, node: Node) -> Reader:
        weight = self.graph.constants[node.inputs[1]].astype(np.float32)
        kernel = weight.shape[2:]
        strides = pair(node.attributes.get("strides"), 1)
        dilations = pair(node.attributes.get("dilations"), 1)
        size = self.graph.shapes[node.inputs[0]][2:]
        pads = spatial_pads(node.attributes, size, kernel, strides, dilations)
        image, layout = self._padded(node.inputs[0], pads, 0.0)
        groups = int(node.attributes.get("group", 1))
        return self._convolve(node, image, layout, weight, strides, dilations, groups)

    def _convolve(self, node, image, layout, weight, strides, dilations, groups) -> Reader:
        block = self.out.block
        assert block or not self.out.block
        co, ci, kh, kw = weight.shape
        (sy, sx), (dy, dx) = strides, dilations
        lanes = block or 1
        blocks = -(-co // lanes)
        ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
        result = Value("sum", (1, co, *self.graph.shapes[node.outputs[0]][2:]), block)
        padded = np.pad(weight, ((0, blocks * lanes - co), (0, 0), (0, 0), (0, 0)))
        if groups > 1 and ci == 1 and co == groups:
            self.kernel.kind = "depthwise"
            packed = self.kernel.constant(padded.reshape(blocks, lanes, kh, kw).transpose(0, 2, 3, 1))
            total = self.kernel.stage(
                "sum",
                result,
                lambda n, c, y, x: te.sum(
                    image(n, c, y * sy + ry * dy, x * sx + rx * dx) * packed[c // lanes, ry, rx, c % lanes], axis=[ry, rx]
                ),
            )
        else:
            self.kernel.kind = "conv"
            inner = layout.block if layout.block and (groups == 1 or ci % layout.block == 0) else 1
            outer = -(-ci // inner)
            rc, ri = te.reduce_axis((0, outer), "rc"), te.reduce_axis((0, inner), "ri")
            padded = np.pad(padded, ((0, 0), (0, outer * inner - ci), (0, 0), (0, 0)))
            packed = self.kernel.constant(
                padded.reshape(blocks, lanes, outer, inner, kh, kw).transpose(0, 2, 4, 5, 3, 1)
            )
            per_group = co // groups

            def channel(c: Any) -> Any:
                if groups == 1:
                    return rc * inner + ri
                group = (c // lanes) // (per_group // lanes) if per_group % lanes == 0 else c // per_group
                return group * ci + rc * inner + ri

            total = self.kernel.stage(
                "sum",
                result,
                lambda n, c, y, x: te.sum(
                    image(n, channel(c), y * sy + ry * dy, x * sx + rx * dx)
                    * packed[c // lanes, rc, ry, rx, ri, c % lanes],
                    axis=[rc, ry, rx, ri],
                ),
            )
            if groups > 1 and per_group % lanes:
                self.kernel.kind = "gathered"
        if len(node.inputs) > 2 and node.inputs[2]:
            bias = self._channel_constant(self.graph.constants[node.inputs[2]])
            return lambda *index: total(*index) + bias(*index)
        return total

    def _convtranspose(self, node: Node) -> Reader:
        weight = self.graph.constants[node.inputs[1]].astype(np.float32)
        groups = int(node.attributes.get("group", 1))
        ci, per, kh, kw = weight.shape
        sy, sx = pair(node.attributes.get("strides"), 1)
        dy, dx = pair(node.attributes.get("dilations"), 1)
        pads = [int(each) for each in node.attributes.get("pads", (0, 0, 0, 0))]
        value = self.values[node.inputs[0]]
        read = self.kernel.read(value)
        n, c, h, w = value.shape
        oh, ow = self.graph.shapes[node.outputs[0]][2:]
        top, left = (kh - 1) * dy - pads[0], (kw - 1) * dx - pads[1]
        spread = Value(value.name + ".spread", (n, c, oh + (kh - 1) * dy, ow + (kw - 1) * dx), value.block)

        def body(n_: Any, c_: Any, y: Any, x: Any) -> Any:
            y, x = y - top, x - left
            inside = tirx.all(y >= 0, x >= 0, y < h * sy, x < w * sx, y % sy == 0, x % sx == 0)
            return tirx.if_then_else(inside, read(n_, c_, y // sy, x // sx), const(0))

        image = self.kernel.stage("pad", spread, body)
        turned = weight[:, :, ::-1, ::-1].reshape(groups, ci // groups, per, kh, kw).transpose(0, 2, 1, 3, 4)
        turned = turned.reshape(groups * per, ci // groups, kh, kw)
        return self._convolve(node, image, spread, turned, (1, 1), (dy, dx), groups)

    def _pool(self, node: Node, largest: bool) -> Reader:
        kernel = [int(each) for each in node.attributes["kernel_shape"]]
        strides, dilations = pair(node.attributes.get("strides"), 1), pair(node.attributes.get("dilations"), 1)
        n, c, h, w = self.graph.shapes[node.inputs[0]]
        pads = spatial_pads(node.attributes, (h, w), kernel, strides, dilations)
        oh, ow = self.graph.shapes[node.outputs[0]][2:]
        needed = [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip((oh, ow), strides, kernel, dilations, strict=True)]
        reach = [max(pads[0] + pads[2], needed[0] - h), max(pads[1] + pads[3], needed[1] - w)]
        border = [pads[0], pads[1], reach[0] - pads[0], reach[1] - pads[1]]
        image, _ = self._padded(node.inputs[0], border, float(np.finfo(np.float32).min) if largest else 0.0)
        ry, rx = te.reduce_axis((0, kernel[0]), "ry"), te.reduce_axis((0, kernel[1]), "rx")
        reduce = te.max if largest else te.sum
        self.kernel.kind = "reduce"
        result = Value("sum", self.graph.shapes[node.outputs[0]], self.out.block)
        total = self.kernel.stage(
            "sum",
            result,
            lambda n_, c_, y, x: reduce(
                image(n_, c_, y * strides[0] + ry * dilations[0], x * strides[1] + rx * dilations[1]), axis=[ry, rx]
            ),
        )
        if largest:
            return total
        inside = np.ones((h, w))
        if node.attributes.get("count_include_pad", 0):
            inside = np.pad(inside, ((pads[0], pads[2]), (pads[1], pads[3])), constant_values=1)
            extra = [max(0, border[2] - pads[2]), max(0, border[3] - pads[3])]
            inside = np.pad(inside, ((0, extra[0]), (0, extra[1])))
        else:
            inside = np.pad(inside, ((border[0], border[2]), (border[1], border[3])))
        counts = np.array(
            [
                [
                    inside[
                        y * strides[0] : y * strides[0] + (kernel[0] - 1) * dilations[0] + 1 : dilations[0],
                        x * strides[1] : x * strides[1] + (kernel[1] - 1) * dilations[1] + 1 : dilations[1],
                    ].sum()
                    for x in range(ow)
                ]
                for y in range(oh)
            ]
        )
        if np.ptp(counts) == 0:
            share = const(1 / counts.flat[0])
            return lambda *index: total(*index) * share
        shares = self.kernel.constant(1 / counts)
        return lambda n_, c_, y, x: total(n_, c_, y, x) * shares[y, x]

    def _maxpool(self, node: Node) -> Reader:
        return self._pool(node, largest=True)

    def _averagepool(self, node: Node) -> Reader:
        return self._pool(node, largest=False)

    def _globalaveragepool(self, node: Node) -> Reader:
        rank = len(self.graph.shapes[node.inputs[0]])
        return self._mean(node, tuple(range(2, rank)), keep=True)

    def _reducemean(self, node: Node) -> Reader:
        rank = len(self.graph.shapes[node.inputs[0]])
        if len(node.inputs) > 1 and node.inputs[1]:
            axes = [int(each) for each in self.graph.constants[node.inputs[1]].reshape(-1)]
        else:
            axes = [int(each) for each in node.attributes.get("axes", range(rank))]
        return self._mean(node, tuple(sorted(each % rank for each in axes)), keep=bool(node.attributes.get("keepdims", 1)))

    def _mean(self, node: Node, axes: tuple[int, ...], *, keep: bool) -> Reader:
        shape = self.graph.shapes[node.inputs[0]]
        source = self.source(node.inputs[0])
        reduced = {axis: te.reduce_axis((0, shape[axis]), f"r{axis}") for axis in axes}
        self.kernel.kind = "reduce"
        result = Value("sum", self.graph.shapes[node.outputs[0]], self.out.block)

        def body(*index: Any) -> Any:
            rest = iter(index)
            full = []
            for axis in range(len(shape)):
                if axis in reduced:
                    full.append(reduced[axis])
                    if keep:
                        next(rest)
                else:
                    full.append(next(rest))
            return te.sum(source(*full), axis=list(reduced.values()))

        total = self.kernel.stage("sum", result, body)
        share = const(1 / math.prod(shape[axis] for axis in axes))
        return lambda *index: total(*index) * share

    def _gemm(self, node: Node) -> Reader:
        attributes = node.attributes
        weight = self.graph.constants[node.inputs[1]] * attributes.get("alpha", 1.0)
        weight = weight.T if attributes.get("transB", 0) else weight
        product = self._product(node, weight, transposed=bool(attributes.get("transA", 0)))
        if len(node.inputs) > 2 and node.inputs[2]:
            bias = self.graph.constants[node.inputs[2]] * attributes.get("beta", 1.0)
            read = broadcast(self._constant(bias), bias.shape, self.out.shape) if bias.size > 1 else self._constant(bias)
            return lambda *index: product(*index) + read(*index)
        return product

    def _matmul(self, node: Node) -> Reader:
        return self._product(node, self.graph.constants[node.inputs[1]])

    def _product(self, node: Node, weight: NDArray[Any], *, transposed: bool = False) -> Reader:
        """Rows of the input times a constant matrix, whose columns are packed by lanes."""
        depth, columns = weight.shape
        lanes, shape = self.block, self.graph.shapes[node.inputs[0]]
        source = self.source(node.inputs[0])
        packed = self.kernel.constant(
            np.pad(weight, ((0, 0), (0, -columns % lanes))).reshape(depth, -1, lanes).transpose(1, 0, 2)
        )
        lead = self.graph.shapes[node.outputs[0]][:-1]
        k = te.reduce_axis((0, depth), "rk")
        self.kernel.kind = "gemm"

        def body(*place: Any) -> Any:
            *row, outer, inner = place
            element = source(k, *row) if transposed else source(*row, k)
            return te.sum(element * packed[outer, k, inner], axis=[k])

        tensor = te.compute((*lead, -(-columns // lanes), lanes), body, "sum")
        return lambda *index: tensor[(*index[:-1], index[-1] // lanes, index[-1] % lanes)]

    def _concat(self, node: Node) -> Reader:
        axis = int(node.attributes["axis"]) % len(self.out.shape)
        parts = [(self.source(name), self.graph.shapes[name]) for name in node.inputs]
        starts = np.cumsum([0, *(shape[axis] for _, shape in parts)]).tolist()

        def body(*index: Any) -> Any:
            result = None
            for (read, shape), start in reversed(list(zip(parts, starts, strict=False))):
                at = index[axis] - start
                inside = tirx.max(0, tirx.min(at, shape[axis] - 1)) if self.out.block and shape[axis] % self.block else at
                element = read(*index[:axis], inside, *index[axis + 1 :])
                whole = index[axis] >= start
                result = element if result is None else tirx.if_then_else(index[axis] < start + shape[axis], element, result)
                del whole
            return result

        return body

    def _transpose(self, node: Node) -> Reader:
        rank = len(self.out.shape)
        order = [int(each) for each in node.attributes.get("perm", range(rank)[::-1])]
        source = self.source(node.inputs[0])
        back = [order.index(axis) for axis in range(rank)]
        return lambda *index: source(*(index[each] for each in back))

    def _split(self, node: Node) -> Reader:
        shape = self.graph.shapes[node.inputs[0]]
        axis = int(node.attributes.get("axis", 0)) % len(shape)
        sizes = [self.graph.shapes[name][axis] for name in node.outputs]
        start, source = sum(sizes[: self.output_place]), self.source(node.inputs[0])
        return lambda *index: source(*index[:axis], index[axis] + start, *index[axis + 1 :])

    def _slice(self, node: Node) -> Reader:
        shape = self.graph.shapes[node.inputs[0]]
        given = [self.graph.constants[name].reshape(-1).tolist() if name else None for name in node.inputs[1:]]
        starts, _, axes, steps = [*given, None, None][:4]
        axes = [each % len(shape) for each in axes] if axes else list(range(len(starts)))
        steps = steps or [1] * len(starts)
        begin, stride = [0] * len(shape), [1] * len(shape)
        for axis, start, step in zip(axes, starts, steps, strict=True):
            begin[axis], stride[axis] = slice(start, None, step).indices(shape[axis])[0], step
        source = self.source(node.inputs[0])
        return lambda *index: source(*(each * s + b for each, s, b in zip(index, stride, begin, strict=True)))

    def _pad(self, node: Node) -> Reader:
        shape = self.graph.shapes[node.inputs[0]]
        pads = self.graph.constants[node.inputs[1]].reshape(-1).tolist()
        axes = (
            [each % len(shape) for each in self.graph.constants[node.inputs[3]].reshape(-1).tolist()]
            if len(node.inputs) > 3 and node.inputs[3]
            else list(range(len(shape)))
        )
        begin = [0] * len(shape)
        for axis, first in zip(axes, pads[: len(axes)], strict=True):
            begin[axis] = first
        fill = float(self.graph.constants[node.inputs[2]].item()) if len(node.inputs) > 2 and node.inputs[2] else 0.0
        source = self.source(node.inputs[0])

        def body(*index: Any) -> Any:
            own = [each - b for each, b in zip(index, begin, strict=True)]
            inside = []
            for place, (each, size, whole) in enumerate(zip(own, shape, self.out.shape, strict=True)):
                if size != whole:
                    inside += [each >= 0, each < size]
                    own[place] = tirx.max(0, tirx.min(each, size - 1)) if place == 1 else each
            return tirx.if_then_else(tirx.all(*inside), source(*own), const(fill)) if inside else source(*own)

        return body

    def _resize(self, node: Node) -> Reader:
        fy, fx = _nearest_factors(self, node)  # type: ignore[misc]
        source = self.source(node.inputs[0])
        return lambda n, c, y, x: source(n, c, y // fy, x // fx)


def _nearest_factors(lowering: Lowering, node: Node) -> tuple[int, int] | None:
    """Return the whole factors of a nearest enlargement that repeats pixels, None for any other resize."""
    before, after = lowering.graph.shapes[node.inputs[0]], lowering.graph.shapes[node.outputs[0]]
    mode = node.attributes.get("mode", b"nearest")
    if mode != b"nearest" or len(before) != 4 or before[:2] != after[:2]:
        return None
    if any(big % small for big, small in zip(after[2:], before[2:], strict=True)):
        return None
    factors = tuple(big // small for big, small in zip(after[2:], before[2:], strict=True))
    how = node.attributes.get("coordinate_transformation_mode", b"half_pixel")
    rounding = node.attributes.get("nearest_mode", b"round_prefer_floor")
    repeats = (how == b"asymmetric" and rounding == b"floor") or (
        how in (b"half_pixel", b"pytorch_half_pixel") and rounding in (b"round_prefer_floor", b"round_prefer_ceil", b"floor")
    )
    if how == b"half_pixel" and rounding == b"floor" and factors != (1, 1):
        repeats = False
    return factors if repeats else None  # type: ignore[return-value]
