"""What merges in a chain of dense layers can do to its output: sound bounds over the whole box of inputs.

After merging, every unit k of the original network is answered for by a unit r(k) that is left: itself, or the one it
was merged into, or the one that was merged into later. The columns of the weights add up, so what the next layer reads
in place of h_k is the present value of r(k), and its pre-activation has moved by

    Σ_k a_k · ( (h_r(k) − h_k) + δ_r(k) )

with h the original activations, bounded over the box, δ_k how far unit k's activation has moved because of merges in
the layers before, and a_k the original weights. From there the change passes activation and layers as in `intervals`.
The two terms of the authors' accumulated impact, (h_i − h_j) · a_j for each merge, come out of it for single merges;
for chains of them this is tighter. Likewise h_i − h_j is not bounded by the difference of two intervals alone: their
pre-activations share their inputs, so that equal units are 0 apart.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from edgeprune.paoding.intervals import ACTIVATIONS, Array, Bounds, affine, around, point
from edgeprune.paoding.network import Chain

Places = NDArray[np.int64]
Representatives = Sequence[Places]
"""For each layer of a chain but the last: row → the row that answers for it."""

NUMBERS_AT_ONCE = 1 << 17
"""Elements of a temporary array: 1 MiB, which stays in the cache, however many pairs are asked about."""


class Propagation:
    """Bounds of the original chain over its box, and of what merges change of its output.

    Nothing in it changes; the merges made so far are given with every call, and every representative answers for
    itself.
    """

    def __init__(self, chain: Chain) -> None:
        self._layers = chain.layers
        self._activations = [ACTIVATIONS[layer.activation] for layer in chain.layers]
        # Products with sparse matrices copy what is not contiguous, every time.
        self._columns = [np.ascontiguousarray(layer.weight.T) for layer in chain.layers]
        self._reach = [np.abs(each) for each in self._columns]
        self._inputs = [chain.box]
        self._before: list[Bounds] = []
        for layer, activation in zip(chain.layers, self._activations, strict=True):
            self._before.append(affine(self._inputs[-1], layer.weight, layer.bias))
            self._inputs.append(activation.values(self._before[-1]))

    def untouched(self) -> list[Places]:
        """Return the representatives of a network without merges: every row its own."""
        return [np.arange(len(layer.weight)) for layer in self._layers[:-1]]

    def incoming(self, merged: Representatives, layer: int) -> Array:
        """Return what a layer's rows read with now, [out, in]: columns of what is gone are added up and then zero."""
        weight = self._layers[layer].weight
        return weight if layer == 0 else np.asarray(weight @ _indicator(merged[layer - 1]))

    def outgoing(self, merged: Representatives, layer: int) -> Array:
        """Return what those units of the next layer that are left read each unit with now, [units, left]."""
        columns = self.incoming(merged, layer + 1).T
        return columns if layer + 2 == len(self._layers) else columns[:, np.unique(merged[layer + 1])]

    def apart(self, layer: int, keep: Places, drop: Places) -> Bounds:
        """Return the bounds of h_keep − h_drop in the original network, [pairs]."""
        weight, bias = self._layers[layer].weight, self._layers[layer].bias
        inputs = self._inputs[layer]
        centre, radius = np.empty(len(keep)), np.empty(len(keep))
        for part in _parts(len(keep), weight.shape[1]):
            difference = weight[keep[part]] - weight[drop[part]]
            centre[part], radius[part] = difference @ inputs.centre, np.abs(difference) @ inputs.radius
        if bias is not None:
            centre = centre + (bias[keep] - bias[drop])
        tied = self._activations[layer].change(around(centre, radius), self._before[layer].at(drop))
        values = self._inputs[layer + 1]
        return tied & (values.at(keep) - values.at(drop))

    def change(self, merged: Representatives) -> Bounds:
        """Return the bounds of how far merges move the output, [outputs]."""
        moved = self._moved(merged, len(self._layers) - 2)
        return self._onward(merged, len(self._layers) - 2, moved)

    def impacts(self, merged: Representatives, layer: int, keep: Places, drop: Places) -> Bounds:
        """Return the bounds of how far the output moves when to the merges so far each of these is added.

        Args:
            merged: so far.
            layer: of the pairs; any but the last.
            keep, drop: [pairs], rows that are their own representatives; no pair holds a row twice.

        Returns:
            [pairs, outputs].
        """
        moved = self._moved(merged, layer)
        answered = self._answered(merged, layer, moved)
        widest = max(len(each.weight) for each in self._layers)
        found = [
            self._impacts(merged, layer, keep[part], drop[part], moved, answered) for part in _parts(len(keep), widest)
        ]
        return Bounds(low=np.concatenate([b.low for b in found]), high=np.concatenate([b.high for b in found]))

    def _impacts(
        self, merged: Representatives, layer: int, keep: Places, drop: Places, moved: Bounds, answered: Bounds
    ) -> Bounds:
        pair, row = _members(merged[layer], drop)
        new = self.apart(layer, keep[pair], row) + moved.at(keep[pair])
        shape = (len(keep), len(merged[layer]))
        shifted = csr_array((new.centre - answered.centre[row], (pair, row)), shape=shape) @ self._columns[layer + 1]
        widened = csr_array((new.radius - answered.radius[row], (pair, row)), shape=shape) @ self._reach[layer + 1]
        base = affine(answered, self._layers[layer + 1].weight)
        change = around(base.centre + shifted, np.maximum(base.radius + widened, 0))
        if layer + 2 == len(self._layers):
            return change
        return self._onward(merged, layer + 1, self._through(layer + 1, change))

    def _moved(self, merged: Representatives, layer: int) -> Bounds:
        """Return how far a layer's activations have moved because of merges in the layers before it."""
        moved = point(np.zeros(len(merged[0])))
        for each in range(layer):
            answered = self._answered(merged, each, moved)
            moved = self._through(each + 1, affine(answered, self._layers[each + 1].weight))
        return moved

    def _onward(self, merged: Representatives, layer: int, moved: Bounds) -> Bounds:
        """Return how far the output moves, given how far a layer's activations have: [..., outputs] of [..., rows]."""
        for each in range(layer, len(self._layers) - 1):
            answered = self._answered(merged, each, moved)
            change = affine(answered, self._layers[each + 1].weight)
            if each + 2 < len(self._layers):
                moved = self._through(each + 1, change)
        return change

    def _answered(self, merged: Representatives, layer: int, moved: Bounds) -> Bounds:
        """Return how far what is read in place of each row is from the row's original activation, [..., rows]."""
        instead = merged[layer]
        gone = np.flatnonzero(instead != np.arange(len(instead)))
        if not len(gone):
            return moved
        apart = Bounds(low=np.zeros(len(instead)), high=np.zeros(len(instead)))
        found = self.apart(layer, instead[gone], gone)
        apart.low[gone], apart.high[gone] = found.low, found.high
        return moved.at(instead) + apart

    def _through(self, layer: int, change: Bounds) -> Bounds:
        return self._activations[layer].change(change, self._before[layer])


def _indicator(instead: Places) -> Any:
    """Return the matrix that adds up the columns of everything a row answers for."""
    size = len(instead)
    return csr_array((np.ones(size), (np.arange(size), instead)), shape=(size, size))


def _members(instead: Places, rows: Places) -> tuple[Places, Places]:
    """Return (place among `rows`, member) of everything that each of `rows` answers for."""
    order = np.argsort(instead, kind="stable")
    first = np.searchsorted(instead[order], rows)
    count = np.searchsorted(instead[order], rows, "right") - first
    place = np.repeat(np.arange(len(rows)), count)
    within = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count)
    return place, order[first[place] + within]


def _parts(count: int, numbers: int) -> Iterator[slice]:
    size = max(1, NUMBERS_AT_ONCE // max(1, numbers))
    for start in range(0, max(count, 1), size):
        yield slice(start, start + size)
