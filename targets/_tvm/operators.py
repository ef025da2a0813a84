"""What each ONNX operator computes, as expressions over logical indices.

An element-wise operator is a function of its operands' elements. Any other gets the kernel, its node and readers of its
inputs, adds the stages it needs and returns a reader of its result.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tvm import te, tirx

from .kernel import const
from .values import Reader

Element = Callable[..., Any]


def _clip(x: Any, low: Any = None, high: Any = None) -> Any:
    x = x if low is None else te.max(x, low)
    return x if high is None else te.min(x, high)


def _sigmoid(x: Any) -> Any:
    return const(1) / (const(1) + te.exp(const(0) - x))


ELEMENTWISE: Mapping[str, Callable[[Mapping[str, Any]], Element]] = {
    "Add": lambda _: lambda a, b: a + b,
    "Sub": lambda _: lambda a, b: a - b,
    "Mul": lambda _: lambda a, b: a * b,
    "Div": lambda _: lambda a, b: a / b,
    "Max": lambda _: te.max,
    "Min": lambda _: te.min,
    "Relu": lambda _: lambda x: te.max(x, const(0)),
    "Clip": lambda _: _clip,
    "Sigmoid": lambda _: _sigmoid,
    "Tanh": lambda _: te.tanh,
    "Exp": lambda _: te.exp,
    "Erf": lambda _: te.erf,
    "Sqrt": lambda _: te.sqrt,
    "Neg": lambda _: lambda x: const(0) - x,
    "Abs": lambda _: te.abs,
    "HardSigmoid": lambda a: lambda x: te.max(
        const(0), te.min(const(1), x * const(a.get("alpha", 0.2)) + const(a.get("beta", 0.5)))
    ),
    "HardSwish": lambda _: lambda x: x * te.max(const(0), te.min(const(1), x * const(1 / 6) + const(0.5))),
    "LeakyRelu": lambda a: lambda x: tirx.Select(x > const(0), x, x * const(a.get("alpha", 0.01))),
    "Elu": lambda a: lambda x: tirx.Select(
        x > const(0), x, const(a.get("alpha", 1.0)) * (te.exp(te.min(x, const(0))) - const(1))
    ),
    "PRelu": lambda _: lambda x, slope: tirx.Select(x > const(0), x, x * slope),
    "Softplus": lambda _: lambda x: te.log(const(1) + te.exp(x)),
}
"""Operator → attributes → expression of one element from one element of each operand."""

UNSAFE = {"Div", "Sqrt"}
"""Operators whose result on a padding channel, which holds anything finite, may not be finite."""

VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "CastLike", "Cast"}
"""Operators that leave every element where it is in a plain layout."""


def unravel(flat: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Return the indices of a flat index."""
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat = flat // size
    return tuple(reversed(index))


def ravel(index: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
    """Return the flat index."""
    flat: Any = 0
    for each, size in zip(index, shape, strict=True):
        flat = flat * size + each
    return flat


def broadcast(read: Reader, shape: tuple[int, ...], wanted: tuple[int, ...]) -> Reader:
    """Return a reader with indices of the shape `wanted`, by NumPy's rules."""

    def at(*index: Any) -> Any:
        own = index[len(wanted) - len(shape) :]
        return read(*(0 if size == 1 else each for each, size in zip(own, shape, strict=True)))

    return at


def pair(values: Any, default: int) -> tuple[int, int]:
    """Return two spatial settings, the default where the node has none."""
    return (int(values[0]), int(values[1])) if values else (default, default)


def spatial_pads(attributes: Mapping[str, Any], size: Any, kernel: Any, strides: Any, dilations: Any) -> list[int]:
    """Return [top, left, bottom, right], `auto_pad` resolved."""
    auto = attributes.get("auto_pad", b"NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    if auto in ("NOTSET", ""):
        return [int(each) for each in attributes.get("pads", (0, 0, 0, 0))]
    if auto == "VALID":
        return [0, 0, 0, 0]
    total = [
        max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
        for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)
    ]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    begin, end = (small, large) if auto == "SAME_UPPER" else (large, small)
    return [*begin, *end]


def floats(array: Any) -> np.ndarray[Any, Any]:
    """Return an array as contiguous float32."""
    return np.ascontiguousarray(array, dtype=np.float32)
