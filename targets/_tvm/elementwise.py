"""Operators that work element by element, as expressions; they are fused into the kernel that makes their operand.

A transcendental is a polynomial here: the C library's functions take one lane at a time, and kernels that call nothing
need nothing on the board. Single precision everywhere, also where the network runs in half.
"""

from collections.abc import Callable, Mapping
from functools import reduce
from math import log2, sqrt
from typing import Any

from .tensorir import te, tirx

Element = Callable[..., Any]
Attributes = Mapping[str, Any]
Number = Callable[[float], Any]
"""A literal in the kernel's own precision."""


def bound(value: Any, body: Callable[[Any], Any]) -> Any:
    """Return `body` of a value that is computed once, however often `body` reads it.

    An expression may stand in one place only, since it may bind values itself.
    """
    variable = tirx.Var("v", value.ty)
    return tirx.Let(variable, value, body(variable))


def literal(number: float) -> Any:
    """Return a float32 literal."""
    return tirx.const(float(number), "float32")


def _horner(x: Any, coefficients: tuple[float, ...]) -> Any:
    total = literal(coefficients[0])
    for each in coefficients[1:]:
        total = total * x + literal(each)
    return total


def exp(x: Any) -> Any:
    """Return e^x within 2e-7 of its value: range reduction and polynomial of Cephes' `expf` (S. Moshier, 1992)."""
    inside = te.max(te.min(x, literal(88.0)), literal(-87.0))

    def scaled(y: Any, n: Any) -> Any:
        rest = y - n * literal(0.693359375) - n * literal(-2.12194440e-4)
        terms = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
        power = tirx.reinterpret("float32", (tirx.Cast("int32", n) + 127) << 23)
        return bound(rest, lambda r: (_horner(r, terms) * r * r + r + literal(1)) * power)

    return bound(
        inside, lambda y: bound(te.floor(y * literal(log2(2.718281828459045)) + literal(0.5)), lambda n: scaled(y, n))
    )


def log(x: Any) -> Any:
    """Return ln x of a positive normal x within 2e-7 of its value: Cephes' `logf`."""
    terms = (
        7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    )  # fmt: skip

    def reduced(bits: Any) -> Any:
        fraction = tirx.reinterpret("float32", (bits & 0x007FFFFF) | 0x3F000000)
        exponent = tirx.Cast("float32", (bits >> 23) - 126)
        return bound(fraction, lambda m: bound(exponent, lambda e: centred(m, e)))

    def centred(m: Any, e: Any) -> Any:
        low = m < literal(sqrt(0.5))
        shifted = tirx.Select(low, m + m, m) - literal(1)
        return bound(shifted, lambda f: series(f, tirx.Select(low, e - literal(1), e)))

    def series(f: Any, e: Any) -> Any:
        return bound(
            f * f,
            lambda z: (
                f
                + (_horner(f, terms) * f * z + e * literal(-2.12194440e-4) - z * literal(0.5))
                + e * literal(0.693359375)
            ),
        )

    return bound(tirx.reinterpret("int32", x), reduced)


def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + e^-x)."""
    return literal(1) / (literal(1) + exp(literal(0) - x))


def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent within 2e-7."""
    return literal(1) - literal(2) / (literal(1) + exp(x * literal(2)))


def erf(x: Any) -> Any:
    """Return the error function within 2e-7: Abramowitz and Stegun 7.1.26."""
    terms = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0)

    def positive(y: Any) -> Any:
        part = literal(1) / (literal(1) + literal(0.3275911) * y)
        return literal(1) - bound(part, lambda t: _horner(t, terms)) * exp(literal(0) - y * y)

    def signed(value: Any) -> Any:
        size = bound(te.abs(value), positive)
        return bound(size, lambda s: tirx.Select(value < literal(0), literal(0) - s, s))

    return bound(x, signed)


def softplus(x: Any) -> Any:
    """Return ln(1 + e^x) without overflow."""
    return bound(x, lambda v: te.max(v, literal(0)) + log(literal(1) + exp(literal(0) - te.abs(v))))


def mish(x: Any) -> Any:
    """Return x tanh(ln(1 + e^x)), which is x n / (n + 2) with n = e^x (e^x + 2), and x from 20 on."""

    def factor(power: Any) -> Any:
        return bound(power * (power + literal(2)), lambda n: n / (n + literal(2)))

    return bound(x, lambda v: v * bound(exp(te.min(v, literal(20))), factor))


def _alone(function: Callable[[Any], Any]) -> Callable[[Attributes], Element]:
    return lambda _: function


def _gelu(attributes: Attributes) -> Element:
    if attributes.get("approximate", b"none") == b"tanh":
        inner = (sqrt(2 / 3.141592653589793), 0.044715)
        return lambda x: bound(
            x, lambda v: v * literal(0.5) * (literal(1) + tanh(literal(inner[0]) * (v + literal(inner[1]) * v * v * v)))
        )
    return lambda x: bound(x, lambda v: v * literal(0.5) * (literal(1) + erf(v * literal(sqrt(0.5)))))


def _selu(a: Attributes) -> Element:
    alpha, gamma = a.get("alpha", 1.6732632423543772), a.get("gamma", 1.0507009873554805)
    return lambda x: bound(x, lambda v: literal(gamma) * _expm(v, alpha, 1.0))


def _expm(x: Any, alpha: float, width: float) -> Any:
    """Return x where positive, else alpha (e^(x / width) - 1)."""
    below = literal(alpha) * (exp(te.min(x, literal(0)) * literal(1 / width)) - literal(1))
    return tirx.Select(x > literal(0), x, below)


SINGLE: Mapping[str, Callable[[Attributes], Element]] = {
    "Sigmoid": _alone(sigmoid),
    "Tanh": _alone(tanh),
    "Exp": _alone(exp),
    "Log": _alone(log),
    "Erf": _alone(erf),
    "Softplus": _alone(softplus),
    "Gelu": _gelu,
    "Mish": _alone(mish),
    "Swish": lambda a: lambda x: bound(x, lambda v: v * sigmoid(v * literal(a.get("alpha", 1.0)))),
    "Elu": lambda a: lambda x: bound(x, lambda v: _expm(v, a.get("alpha", 1.0), 1.0)),
    "Celu": lambda a: lambda x: bound(x, lambda v: _expm(v, a.get("alpha", 1.0), a.get("alpha", 1.0))),
    "Selu": _selu,
    "Sqrt": _alone(te.sqrt),
    "Reciprocal": _alone(lambda x: literal(1) / x),
    "Div": lambda _: lambda a, b: a / b,
    "Pow": lambda _: lambda a, b: exp(b * log(a)),
}
"""Operators that are always computed in single precision: attributes → expression of the operands' elements."""


def _clip(x: Any, low: Any = None, high: Any = None) -> Any:
    x = x if low is None else te.max(x, low)
    return x if high is None else te.min(x, high)


def _between(x: Any, number: Number) -> Any:
    return te.max(number(0), te.min(number(1), x))


def _many(function: Callable[[Any, Any], Any]) -> Callable[[Attributes, Number], Element]:
    return lambda *_: lambda *operands: reduce(function, operands)


NATIVE: Mapping[str, Callable[[Attributes, Number], Element]] = {
    "Add": _many(lambda a, b: a + b),
    "Sum": _many(lambda a, b: a + b),
    "Sub": _many(lambda a, b: a - b),
    "Mul": _many(lambda a, b: a * b),
    "Max": _many(te.max),
    "Min": _many(te.min),
    "Mean": lambda _, n: lambda *each: reduce(lambda a, b: a + b, each) * n(1 / len(each)),
    "Relu": lambda _, n: lambda x: te.max(x, n(0)),
    "Clip": lambda *_: _clip,
    "Neg": lambda _, n: lambda x: n(0) - x,
    "Abs": lambda *_: te.abs,
    "Floor": lambda *_: te.floor,
    "Ceil": lambda *_: te.ceil,
    "HardSigmoid": lambda a, n: lambda x: _between(x * n(a.get("alpha", 0.2)) + n(a.get("beta", 0.5)), n),
    "HardSwish": lambda _, n: lambda x: bound(x, lambda v: v * _between(v * n(1 / 6) + n(0.5), n)),
    "LeakyRelu": lambda a, n: lambda x: bound(x, lambda v: tirx.Select(v > n(0), v, v * n(a.get("alpha", 0.01)))),
    "ThresholdedRelu": lambda a, n: lambda x: bound(x, lambda v: tirx.Select(v > n(a.get("alpha", 1.0)), v, n(0))),
    "PRelu": lambda _, n: lambda x, slope: bound(x, lambda v: tirx.Select(v > n(0), v, v * slope)),
    "Softsign": lambda _, n: lambda x: bound(x, lambda v: v / (n(1) + te.abs(v))),
    "Identity": lambda *_: lambda x: x,
}
"""Operators computed in the kernel's own precision: attributes, literal → expression of the operands' elements."""

ELEMENTWISE = frozenset(SINGLE) | frozenset(NATIVE) - {"Identity"}

COSTLY = frozenset(SINGLE) - {"Sqrt", "Reciprocal", "Div"}
"""Operators whose polynomials multiply when they are nested, since TVM writes out what is bound: few in a kernel."""

UNSAFE = {"Div", "Sqrt", "Reciprocal", "Log", "Pow", "Exp"}
"""Operators whose result may not be finite on a lane beyond the last channel."""


def element(op: str, attributes: Attributes, dtype: str) -> Element:
    """Return the operator as a function of one element of each operand, all of `dtype`, as is the result."""
    if op in NATIVE:
        return NATIVE[op](attributes, lambda number: tirx.const(float(number), dtype))
    function = SINGLE[op](attributes)
    if dtype == "float32":
        return function
    return lambda *operands: function(*(each.astype("float32") for each in operands)).astype(dtype)
