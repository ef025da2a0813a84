"""Bounds of numbers, and how far they can move through a dense layer and its activation; NumPy, float64.

Two kinds of thing are bounded: the *values* of units over a box of inputs, and the *change* of those values when a
network is altered. A change passes an affine layer without its bias, and an activation as f(z + d) − f(z), where z is
what the unaltered network feeds it. All arrays broadcast over leading axes: [..., units].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """Every number lies between `low` and `high`, ends included; two arrays of one shape, low ≤ high."""

    low: Array
    high: Array

    @property
    def centre(self) -> Array:
        """Return the middles."""
        return (self.low + self.high) / 2

    @property
    def radius(self) -> Array:
        """Return half of the widths."""
        return (self.high - self.low) / 2

    @property
    def width(self) -> Array:
        """Return high − low."""
        return self.high - self.low

    def at(self, places: NDArray[np.int64]) -> "Bounds":
        """Return the bounds at these places of the last axis."""
        return Bounds(low=self.low[..., places], high=self.high[..., places])

    def __add__(self, other: "Bounds") -> "Bounds":
        return Bounds(low=self.low + other.low, high=self.high + other.high)

    def __sub__(self, other: "Bounds") -> "Bounds":
        """Return the bounds of a − b for any a and b within the two: what is known when nothing ties them."""
        return Bounds(low=self.low - other.high, high=self.high - other.low)

    def __and__(self, other: "Bounds") -> "Bounds":
        """Return what both bounds allow; where rounding leaves nothing between them, the number they agree on."""
        low, high = np.maximum(self.low, other.low), np.minimum(self.high, other.high)
        return Bounds(low=np.minimum(low, high), high=np.maximum(low, high))


def around(centre: Array, radius: Array) -> Bounds:
    """Return centre ± radius."""
    return Bounds(low=centre - radius, high=centre + radius)


def point(value: Array) -> Bounds:
    """Return the bounds of a number that is known."""
    return Bounds(low=value, high=value)


def affine(bounds: Bounds, weight: Array, bias: Array | None = None) -> Bounds:
    """Return the bounds [..., out] of weight · x + bias for x within `bounds` [..., in]; exact for each output alone.

    Args:
        weight: [out, in].
        bias: [out]; none for a change.
    """
    centre = bounds.centre @ weight.T
    return around(centre if bias is None else centre + bias, bounds.radius @ np.abs(weight).T)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A non-decreasing function that acts on each unit alone.

    Attributes:
        function: elementwise.
        symmetric: its slope is even and falls on both sides of 0 (an S); otherwise the function is convex.
        steepest: largest slope.
    """

    function: Callable[[Array], Array]
    symmetric: bool = False
    steepest: float = 1.0

    def values(self, bounds: Bounds) -> Bounds:
        """Return the bounds of f(z)."""
        return Bounds(low=self.function(bounds.low), high=self.function(bounds.high))

    def change(self, change: Bounds, at: Bounds | None = None) -> Bounds:
        """Return the bounds of f(z + d) − f(z) for d within `change` and z within `at`.

        Without `at` z may be anything: for ReLU [min(0, low), max(0, high)]. With it no bounds are tighter: f(z + d) −
        f(z) never falls in d, so its ends are at the ends of d, and there the place of z is known. Of a convex f it
        never falls in z where d > 0 and never rises where d < 0. Of an S it is furthest from 0 where z and z + d are
        mirror images, at z = −d / 2, and comes nearer to 0 on both sides.
        """
        if at is None:
            low, high = np.minimum(0, change.low), np.maximum(0, change.high)
            return Bounds(low=self.steepest * low, high=self.steepest * high)
        if self.symmetric:
            return Bounds(low=-self._largest(-change.low, _mirrored(at)), high=self._largest(change.high, at))
        low = self._moved(change.low, np.where(change.low < 0, at.high, at.low))
        return Bounds(low=low, high=self._moved(change.high, np.where(change.high > 0, at.high, at.low)))

    def _moved(self, by: Array, at: Array) -> Array:
        return self.function(at + by) - self.function(at)

    def _largest(self, by: Array, at: Bounds) -> Array:
        """Return the largest f(z + by) − f(z) of an S over z within `at`."""
        up = self._moved(by, np.clip(-by / 2, at.low, at.high))
        return np.where(by > 0, up, np.maximum(self._moved(by, at.low), self._moved(by, at.high)))


def _mirrored(bounds: Bounds) -> Bounds:
    """Return the bounds of −z: for an S f(z + d) − f(z) = −(f(−z − d) − f(−z))."""
    return Bounds(low=-bounds.high, high=-bounds.low)


def _relu(values: Array) -> Array:
    return np.maximum(values, 0.0)


def _identity(values: Array) -> Array:
    return values


ACTIVATIONS: Mapping[str, Activation] = {
    "identity": Activation(function=_identity),
    "relu": Activation(function=_relu),
    "sigmoid": Activation(function=expit, symmetric=True, steepest=0.25),
    "tanh": Activation(function=np.tanh, symmetric=True),
}
"""What may follow a dense layer, by name."""
