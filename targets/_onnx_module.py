"""An ONNX graph as a PyTorch module: one function a node, so that PyTorch can run, capture and compile what was cut.

Shapes, axes and paddings are read off the graph once, when the module is made; a forward pass is a straight line of
tensor functions, which CUDA graphs can capture and `torch.export` can trace. Semantics are those of the ONNX operator
specification, opset 18, for graphs whose shapes are static.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - everybody calls it F

Step = Callable[..., Any]
"""Tensors of a node's inputs, None for those left out → a tensor, or a sequence of them."""


class UnsupportedError(Exception):
    """The graph holds something that has no function here."""


class Node:
    """A node with its attributes and its constant inputs at hand."""

    def __init__(self, proto: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> None:
        self.name = proto.name or proto.output[0]
        self.op = proto.op_type
        self.inputs = list(proto.input)
        self.outputs = list(proto.output)
        self._attributes = {each.name: helper.get_attribute_value(each) for each in proto.attribute}
        self._constants = constants

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        value = self._attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, place: int) -> bool:
        """Return whether an input is given."""
        return place < len(self.inputs) and bool(self.inputs[place])

    def array(self, place: int) -> NDArray[Any]:
        """Return a constant input.

        Raises:
            UnsupportedError: if it is computed.
        """
        if self.inputs[place] not in self._constants:
            raise UnsupportedError(f"node {self.name} ({self.op}) computes its input {place}, which must be a constant")
        return self._constants[self.inputs[place]]

    def numbers(self, place: int, attribute: str = "") -> list[int] | None:
        """Return whole numbers of a constant input, or of an attribute in older opsets, None if neither is given."""
        if self.has(place):
            return [int(each) for each in self.array(place).ravel()]
        value = self.get(attribute)
        return None if value is None else [int(each) for each in np.ravel(value)]

    def refuse(self, what: str) -> UnsupportedError:
        """Return why this node cannot be run."""
        return UnsupportedError(f"node {self.name} ({self.op}): {what}")


class OnnxModule(nn.Module):
    """A graph that runs on tensors; inputs in the order of the graph, outputs as a tuple in theirs.

    Args:
        model: static shapes, weights inside.

    Raises:
        UnsupportedError: naming the node, if an operator or a form of it has no function here.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.inputs = [each.name for each in graph.input if each.name not in constants]
        self.outputs = [each.name for each in graph.output]
        nodes = [node for node in (Node(each, constants) for each in graph.node) if not _folded(node, constants)]
        _reorder_gates(nodes, constants)
        self.names = [each.name for each in nodes]
        self._steps = [(_step(node), node.inputs, node.outputs) for node in nodes]
        self._keep(constants)

    def _keep(self, constants: Mapping[str, NDArray[Any]]) -> None:
        """Hold the constants that some node reads as buffers, so that they move with the module."""
        read = {name for _, inputs, _ in self._steps for name in inputs} | set(self.outputs)
        self._places = {}
        for place, (name, value) in enumerate(constants.items()):
            if name in read:
                self._places[name] = f"constant{place}"
                self.register_buffer(f"constant{place}", torch.from_numpy(np.array(value)))

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs."""
        return self.each(given, lambda _, run: run())

    def each(self, given: Sequence[Tensor], around: Callable[[str, Callable[[], Any]], Any]) -> tuple[Tensor, ...]:
        """Return the outputs, every node run by `around`, which is given the node's name and what runs it."""
        values: dict[str, Any] = dict(zip(self.inputs, given, strict=True))
        values |= {name: getattr(self, place) for name, place in self._places.items()}
        for (step, inputs, outputs), name in zip(self._steps, self.names, strict=True):
            arguments = [values.get(each) if each else None for each in inputs]
            found = around(name, partial(step, *arguments))
            results = found if isinstance(found, (tuple, list)) else (found,)
            values.update(zip(outputs, results, strict=False))
        return tuple(values[name] for name in self.outputs)


def _folded(node: Node, constants: dict[str, NDArray[Any]]) -> bool:
    """Compute a node that reads nothing but constants, once and for all; return whether it was one."""
    if not all(each in constants for each in node.inputs if each):
        return False
    given = [torch.from_numpy(np.array(constants[each])) if each else None for each in node.inputs]
    with torch.inference_mode():
        found = _step(node)(*given)
    results = found if isinstance(found, (tuple, list)) else (found,)
    constants.update({name: each.numpy() for name, each in zip(node.outputs, results, strict=False)})
    return True


def _step(node: Node) -> Step:
    if node.op not in _STEPS:
        raise UnsupportedError(f"node {node.name}: PyTorch is not taught the operator {node.op} here")
    return _STEPS[node.op](node)


# -- convolution and pooling -----------------------------------------------------------------------------------------


def _padding(node: Node, rank: int, kernel: Sequence[int], size: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Return (before, after) of each axis."""
    mode = node.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return [(0, 0)] * rank
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        if size is None:
            raise node.refuse(f"auto_pad {mode}")
        strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
        return [_same(*each, lower=mode == "SAME_LOWER") for each in zip(size, kernel, strides, dilations, strict=True)]
    pads = node.get("pads", [0] * 2 * rank)
    return list(zip(pads[:rank], pads[rank:], strict=True))


def _same(size: int, kernel: int, stride: int, dilation: int, *, lower: bool) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    small, large = total // 2, total - total // 2
    return (large, small) if lower else (small, large)


def _torch_pads(pads: Sequence[tuple[int, int]]) -> list[int]:
    """Return the paddings as `F.pad` wants them: last axis first."""
    return [each for pair in reversed(pads) for each in pair]


def _conv(node: Node) -> Step:
    weight = node.array(1)
    rank, kernel = weight.ndim - 2, list(weight.shape[2:])
    run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    stride, dilation = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    groups = node.get("group", 1)

    def step(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        pads = _padding(node, rank, kernel, x.shape[2:])
        if all(before == after for before, after in pads):
            return run(x, w, b, stride, [before for before, _ in pads], dilation, groups)
        return run(F.pad(x, _torch_pads(pads)), w, b, stride, 0, dilation, groups)

    return step


def _conv_transpose(node: Node) -> Step:
    weight = node.array(1)
    rank = weight.ndim - 2
    if node.get("auto_pad", "NOTSET") != "NOTSET" or node.get("output_shape") is not None:
        raise node.refuse("auto_pad and output_shape")
    run = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[rank]
    pads = _padding(node, rank, weight.shape[2:])
    stride, dilation = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
    more, groups = node.get("output_padding", [0] * rank), node.get("group", 1)

    def step(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        whole = run(x, w, b, stride, 0, more, groups, dilation)
        for axis, (before, after) in enumerate(pads, 2):
            whole = whole.narrow(axis, before, whole.shape[axis] - before - after)
        return whole

    return step


def _pool(node: Node) -> Step:
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    stride, ceil = node.get("strides", [1] * rank), bool(node.get("ceil_mode", 0))
    dilation, largest = node.get("dilations", [1] * rank), node.op == "MaxPool"
    if len(node.outputs) > 1:
        raise node.refuse("indices")
    if not largest and any(each != 1 for each in dilation):
        raise node.refuse("dilations")
    counted = bool(node.get("count_include_pad", 0))
    most: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[rank]
    mean: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]

    def step(x: Tensor) -> Tensor:
        pads = _padding(node, rank, kernel, x.shape[2:])
        even = all(before == after for before, after in pads)
        both = [before for before, _ in pads] if even else [0] * rank
        if largest:
            wide = x if even else F.pad(x, _torch_pads(pads), value=float("-inf"))
            found: Tensor = most(wide, kernel, stride, both, dilation, ceil)
        elif even:
            found = mean(x, kernel, stride, both, ceil, counted)
        else:
            found = _uneven_mean(x, pads, lambda wide: mean(wide, kernel, stride, 0, ceil, True), counted)
        return found

    return step


def _uneven_mean(x: Tensor, pads: Sequence[tuple[int, int]], mean: Callable[[Tensor], Tensor], counted: bool) -> Tensor:
    """Return the mean over windows of an unevenly padded map; padding counts only if it is asked for."""
    total = mean(F.pad(x, _torch_pads(pads)))
    return total if counted else total / mean(F.pad(torch.ones_like(x), _torch_pads(pads)))


def _global_pool(node: Node) -> Step:
    largest = node.op == "GlobalMaxPool"

    def step(x: Tensor) -> Tensor:
        axes = tuple(range(2, x.ndim))
        return x.amax(axes, keepdim=True) if largest else x.mean(axes, keepdim=True)

    return step


def _resize(node: Node) -> Step:
    mode, place = node.get("mode", "nearest"), node.get("coordinate_transformation_mode", "half_pixel")
    rounding = node.get("nearest_mode", "round_prefer_floor")
    if (mode, place) not in {("nearest", "asymmetric"), ("linear", "half_pixel"), ("linear", "align_corners")}:
        raise node.refuse(f"mode {mode} with {place} coordinates")
    if mode == "nearest" and rounding != "floor":
        raise node.refuse(f"nearest_mode {rounding}")
    if node.get("antialias", 0) or node.get("axes") is not None:
        raise node.refuse("antialias and axes")
    scales = [float(each) for each in node.array(2)] if node.has(2) and node.array(2).size else None
    sizes = node.numbers(3)
    if any(each != 1 for each in (scales or [])[:2]):
        raise node.refuse("scales of batch or channels")

    def step(x: Tensor, *_: Tensor | None) -> Tensor:
        method = "nearest" if mode == "nearest" else {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
        corners = None if mode == "nearest" else place == "align_corners"
        if scales is not None:
            return F.interpolate(x, scale_factor=scales[2:], mode=method, align_corners=corners)
        return F.interpolate(x, size=sizes[2:] if sizes else None, mode=method, align_corners=corners)

    return step


# -- normalisation ---------------------------------------------------------------------------------------------------


def _batch_norm(node: Node) -> Step:
    epsilon = node.get("epsilon", 1e-5)
    return lambda x, scale, shift, mean, variance: F.batch_norm(
        x, mean, variance, scale, shift, training=False, eps=epsilon
    )


def _layer_norm(node: Node) -> Step:
    axis, epsilon = node.get("axis", -1), node.get("epsilon", 1e-5)
    return lambda x, scale, shift=None: F.layer_norm(x, x.shape[axis:], scale.expand(x.shape[axis:]), shift, epsilon)


def _instance_norm(node: Node) -> Step:
    epsilon = node.get("epsilon", 1e-5)
    return lambda x, scale, shift: F.instance_norm(x, weight=scale, bias=shift, eps=epsilon)


# -- shapes ----------------------------------------------------------------------------------------------------------


def _reshape(node: Node) -> Step:
    wanted, literal = node.numbers(1) or [], bool(node.get("allowzero", 0))

    def step(x: Tensor, _: Tensor | None = None) -> Tensor:
        shape = [x.shape[at] if each == 0 and not literal else each for at, each in enumerate(wanted)]
        return x.reshape(shape)

    return step


def _flatten(node: Node) -> Step:
    axis = node.get("axis", 1)
    return lambda x: x.reshape(int(np.prod(x.shape[:axis])), -1)


def _transpose(node: Node) -> Step:
    order = node.get("perm")
    return lambda x: x.permute(order if order is not None else tuple(reversed(range(x.ndim))))


def _concat(node: Node) -> Step:
    axis = node.get("axis")
    return lambda *parts: torch.cat(parts, axis)


def _split(node: Node) -> Step:
    axis, sizes = node.get("axis", 0), node.numbers(1, "split")

    def step(x: Tensor, _: Tensor | None = None) -> Sequence[Tensor]:
        parts = len(node.outputs)
        return torch.split(x, sizes if sizes is not None else -(-x.shape[axis] // parts), axis)

    return step


def _slice(node: Node) -> Step:
    starts, ends = node.numbers(1) or [], node.numbers(2) or []
    axes, steps = node.numbers(3) or list(range(len(starts))), node.numbers(4) or [1] * len(starts)

    def step(x: Tensor, *_: Tensor | None) -> Tensor:
        for start, end, axis, stride in zip(starts, ends, axes, steps, strict=True):
            if stride < 0:
                places = range(x.shape[axis])[start : None if end < -x.shape[axis] else end : stride]
                x = x.index_select(axis, torch.tensor(list(places), device=x.device))
            else:
                low, high, _step = slice(start, end, stride).indices(x.shape[axis])
                x = x[(slice(None),) * (axis % x.ndim) + (slice(low, max(low, high), stride),)]
        return x

    return step


def _gather(node: Node) -> Step:
    axis = node.get("axis", 0)

    def step(x: Tensor, places: Tensor) -> Tensor:
        wrapped = torch.where(places < 0, places + x.shape[axis], places)
        before, after = x.shape[:axis], x.shape[axis % x.ndim + 1 :]
        return x.index_select(axis, wrapped.reshape(-1)).reshape(*before, *places.shape, *after)

    return step


def _unsqueeze(node: Node) -> Step:
    axes = node.numbers(1, "axes") or []

    def step(x: Tensor, _: Tensor | None = None) -> Tensor:
        for axis in sorted(each % (x.ndim + len(axes)) for each in axes):
            x = x.unsqueeze(axis)
        return x

    return step


def _squeeze(node: Node) -> Step:
    axes = node.numbers(1, "axes")

    def step(x: Tensor, _: Tensor | None = None) -> Tensor:
        return x.squeeze() if axes is None else x.squeeze(tuple(axes))

    return step


def _expand(node: Node) -> Step:
    wanted = node.numbers(1) or []
    return lambda x, _=None: x.expand(np.broadcast_shapes(tuple(x.shape), tuple(wanted)))


def _pad(node: Node) -> Step:
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(node.get("mode", "constant"))
    pads = node.numbers(1, "pads") or []
    value = float(node.array(2)) if node.has(2) else float(node.get("value", 0.0))
    axes = node.numbers(3)
    if mode is None:
        raise node.refuse(f"mode {node.get('mode')}")

    def step(x: Tensor, *_: Tensor | None) -> Tensor:
        places = [each % x.ndim for each in axes] if axes is not None else list(range(x.ndim))
        half = len(pads) // 2
        amounts = {axis: (pads[at], pads[half + at]) for at, axis in enumerate(places)}
        first = 0 if mode == "constant" else min((axis for axis, each in amounts.items() if any(each)), default=x.ndim)
        if first == x.ndim:
            return x
        given = _torch_pads([amounts.get(axis, (0, 0)) for axis in range(first, x.ndim)])
        return F.pad(x, given, mode, value) if mode == "constant" else F.pad(x, given, mode)

    return step


def _shape(node: Node) -> Step:
    start, end = node.get("start", 0), node.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device)


def _constant_of_shape(node: Node) -> Step:
    fill = node.get("value")
    value = numpy_helper.to_array(fill) if fill is not None else np.zeros(1, np.float32)
    shape = node.numbers(0) or []
    return lambda given: torch.full(shape, value.item(), dtype=torch.from_numpy(value).dtype, device=given.device)


# -- arithmetic ------------------------------------------------------------------------------------------------------


def _gemm(node: Node) -> Step:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    left, right = bool(node.get("transA", 0)), bool(node.get("transB", 0))

    def step(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if left else a, b.t() if right else b
        if c is not None and alpha == beta == 1.0:
            return torch.addmm(c.expand(a.shape[0], b.shape[1]), a, b)
        product: Tensor = alpha * (a @ b)
        return product if c is None else product + beta * c

    return step


def _divide(_: Node) -> Step:
    return lambda a, b: a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _clip(node: Node) -> Step:
    low, high = (float(node.array(at)) if node.has(at) else node.get(name) for at, name in ((1, "min"), (2, "max")))
    return lambda x, *_: x if low is None and high is None else x.clamp(low, high)


def _softmax(node: Node) -> Step:
    axis, logarithm = node.get("axis", -1), node.op == "LogSoftmax"
    return lambda x: x.log_softmax(axis) if logarithm else x.softmax(axis)


def _reduce(node: Node) -> Step:
    axes, keep = node.numbers(1, "axes"), bool(node.get("keepdims", 1))
    idle = bool(node.get("noop_with_empty_axes", 0)) and not axes
    run: Callable[[Tensor, Any, bool], Tensor] = {
        "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
        "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
        "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
        "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
        "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
        "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
    }[node.op]
    return lambda x, _=None: x if idle else run(x, tuple(axes) if axes else tuple(range(x.ndim)), keep)


def _gelu(node: Node) -> Step:
    form = node.get("approximate", "none")
    return lambda x: F.gelu(x, approximate=form)


def _cast(node: Node) -> Step:
    example = np.zeros(0, helper.tensor_dtype_to_np_dtype(node.get("to")))
    try:
        kind = torch.from_numpy(example).dtype
    except TypeError as error:
        raise node.refuse(f"type {example.dtype}") from error
    return lambda x: x.to(kind)


def _constant(node: Node) -> Step:
    value = node.get("value")
    if value is None:
        raise node.refuse("a constant that is no tensor")
    array = torch.from_numpy(np.array(numpy_helper.to_array(value)))
    return lambda: array


def _prelu(_: Node) -> Step:
    return lambda x, slope: torch.where(x < 0, x * slope, x)


def _plain(run: Step) -> Callable[[Node], Step]:
    return lambda _: run


def _with(attribute: str, default: float, run: Callable[[Tensor, float], Tensor]) -> Callable[[Node], Step]:
    def make(node: Node) -> Step:
        value = float(node.get(attribute, default))
        return lambda x: run(x, value)

    return make


def _hard_sigmoid(node: Node) -> Step:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    return lambda x: (alpha * x + beta).clamp(0, 1)


# -- recurrent -------------------------------------------------------------------------------------------------------

_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""Operator → place of each of PyTorch's gates among those of ONNX: LSTM i f g o of i o f c, GRU r z n of z r h."""


def _recurrent(node: Node) -> Step:
    if node.get("layout", 0) or node.get("clip") is not None or node.has(4) or node.has(7):
        raise node.refuse("layout, clip, lengths of sequences and peepholes")
    if node.op == "GRU" and not node.get("linear_before_reset", 0):
        raise node.refuse("linear_before_reset = 0")
    usual = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}[node.op]
    direction = node.get("direction", "forward")
    count = 2 if direction == "bidirectional" else 1
    named = [each.decode() if isinstance(each, bytes) else each for each in node.get("activations") or usual * count]
    if direction == "reverse" or named != usual * count:
        raise node.refuse(f"direction {direction} with activations {named}")
    hidden = node.get("hidden_size")
    cells: Any = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN": torch.rnn_tanh}[node.op]

    def step(x: Tensor, w: Tensor, r: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        bias, _, h0, c0 = (*rest, None, None, None, None)[:4]
        zeros = x.new_zeros(count, x.shape[1], hidden)
        start = (h0 if h0 is not None else zeros), (c0 if c0 is not None else zeros)
        biases: Sequence[Any] = [()] * count if bias is None else [each.chunk(2) for each in bias]
        weights = [part for each in zip(w, r, biases, strict=True) for part in (each[0], each[1], *each[2])]
        state = start if node.op == "LSTM" else start[0]
        found = cells(x, state, weights, bias is not None, 1, 0.0, False, count == 2, False)
        steps = found[0].reshape(x.shape[0], x.shape[1], count, hidden).permute(0, 2, 1, 3)
        return (steps, *found[1:])

    return step


def _reorder_gates(nodes: Sequence[Node], constants: dict[str, NDArray[Any]]) -> None:
    """Give recurrent nodes weights and biases of their own whose gates lie as PyTorch wants them."""
    for node in nodes:
        for place in (1, 2, 3) if node.op in _GATES else ():
            if node.has(place):
                own = f"{node.name}/{place}/gates"
                constants[own] = _in_order(node.array(place), _GATES[node.op], 2 if place == 3 else 1)
                node.inputs[place] = own


def _in_order(value: NDArray[Any], gates: Sequence[int], parts: int) -> NDArray[Any]:
    """Return [directions, parts x gates x hidden, ...] with the gates of every part in another order."""
    split = value.reshape(len(value), parts, len(gates), -1, *value.shape[2:])
    return np.ascontiguousarray(split[:, :, list(gates)].reshape(value.shape))


_STEPS: dict[str, Callable[[Node], Step]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "Resize": _resize,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "InstanceNormalization": _instance_norm,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Pad": _pad,
    "Shape": _shape,
    "ConstantOfShape": _constant_of_shape,
    "Constant": _constant,
    "Gemm": _gemm,
    "MatMul": _plain(torch.matmul),
    "Add": _plain(lambda a, b: a + b),
    "Sub": _plain(lambda a, b: a - b),
    "Mul": _plain(lambda a, b: a * b),
    "Div": _divide,
    "Pow": _plain(lambda a, b: a**b),
    "Max": _plain(lambda first, *rest: _reduced(torch.maximum, first, rest)),
    "Min": _plain(lambda first, *rest: _reduced(torch.minimum, first, rest)),
    "Where": _plain(torch.where),
    "Equal": _plain(lambda a, b: a == b),
    "Greater": _plain(lambda a, b: a > b),
    "Less": _plain(lambda a, b: a < b),
    "Not": _plain(torch.logical_not),
    "And": _plain(torch.logical_and),
    "Clip": _clip,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare"), _reduce),
    "Gelu": _gelu,
    "Cast": _cast,
    "CastLike": _plain(lambda x, like: x.to(like.dtype)),
    "Identity": _plain(lambda x: x),
    "Dropout": _plain(lambda x, *_: x),
    "Relu": _plain(torch.relu),
    "PRelu": _prelu,
    "LeakyRelu": _with("alpha", 0.01, lambda x, alpha: F.leaky_relu(x, alpha)),
    "Elu": _with("alpha", 1.0, lambda x, alpha: F.elu(x, alpha)),
    "Celu": _with("alpha", 1.0, lambda x, alpha: F.celu(x, alpha)),
    "Selu": _plain(torch.selu),
    "Softplus": _plain(F.softplus),
    "Softsign": _plain(F.softsign),
    "Mish": _plain(F.mish),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(F.hardswish),
    "Sigmoid": _plain(torch.sigmoid),
    "Tanh": _plain(torch.tanh),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Log": _plain(torch.log),
    "Sqrt": _plain(torch.sqrt),
    "Reciprocal": _plain(torch.reciprocal),
    "Abs": _plain(torch.abs),
    "Neg": _plain(torch.neg),
    "Floor": _plain(torch.floor),
    "Ceil": _plain(torch.ceil),
    "Round": _plain(torch.round),
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}


def _reduced(run: Callable[[Tensor, Tensor], Tensor], first: Tensor, rest: Sequence[Tensor]) -> Tensor:
    for each in rest:
        first = run(first, each)
    return first
