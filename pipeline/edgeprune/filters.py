"""The units of a channel group as linear filters, batch norms folded: what every rule of reconstruction compares.

Where something reads a group, the value of its unit j is, activations passed over, `f_j · x + c_j` of whatever the
group's producers read: `f_j = (γ_j / σ_j) vec(W_j)` and `c_j = β_j − γ_j μ_j / σ_j` after one convolution and its
batch norm. The rules ask for inner products of filters only, so their Gram matrix is what is kept: producers that are
added (a residual stream) read different things, so their Gram matrices add up; scales multiply its rows and columns;
a depthwise layer after a filter makes the outer product of the two, whose Gram matrix is the elementwise product.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

Array = NDArray[np.float64]

NOISE = -1
"""Label of a unit that is similar to no other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Filters:
    """The filters of one group's units; one row of each array a channel of the unit (one, unless layers are grouped).

    Attributes:
        grams: inner products of filters, [channels, units, units], float64.
        constants: what the units are where everything read is zero, [channels, units], float64.
        means: what they are on average over the training data: a batch norm's β. Without one nothing is known of the
            data, and it is taken to have mean 0 and variance 1.
        variances: how they vary over the training data, likewise: a batch norm's γ².
        normed: whether a batch norm is folded into them.
    """

    grams: Array
    constants: Array
    means: Array
    variances: Array
    normed: bool = False

    @classmethod
    def of(cls, filters: Array, constants: Array) -> "Filters":
        """Return the description of plain filters, [channels, units, features], and constants, [channels, units]."""
        return cls(
            grams=filters @ filters.swapaxes(1, 2),
            constants=constants,
            means=constants,
            variances=(filters**2).sum(2),
        )

    @classmethod
    def silent(cls, channels: int, units: int) -> "Filters":
        """Return the description of zeros."""
        zeros = np.zeros((channels, units))
        return cls(grams=np.zeros((channels, units, units)), constants=zeros, means=zeros, variances=zeros)

    @property
    def channels(self) -> int:
        """Return the channels of one unit."""
        return len(self.constants)

    def __add__(self, other: "Filters") -> "Filters":
        """Return the filters of sums of what two producers make of different things."""
        return Filters(
            grams=self.grams + other.grams,
            constants=self.constants + other.constants,
            means=self.means + other.means,
            variances=self.variances + other.variances,
            normed=self.normed or other.normed,
        )

    def beside(self, other: "Filters") -> "Filters":
        """Return the filters of units that have the channels of both."""
        return Filters(
            grams=np.concatenate([self.grams, other.grams]),
            constants=np.concatenate([self.constants, other.constants]),
            means=np.concatenate([self.means, other.means]),
            variances=np.concatenate([self.variances, other.variances]),
            normed=self.normed or other.normed,
        )

    def repeated(self, times: int) -> "Filters":
        """Return the filters of units of which each channel is `times` channels, side by side: a flattened map."""
        return replace(
            self,
            grams=self.grams.repeat(times, 0),
            constants=self.constants.repeat(times, 0),
            means=self.means.repeat(times, 0),
            variances=self.variances.repeat(times, 0),
        )

    def normalised(self, scales: Array, shifts: Array, *, means: Array, spreads: Array) -> "Filters":
        """Return the filters behind a batch norm that is `scales * x + shifts`; all [channels, units].

        Args:
            scales, shifts: γ / σ and β − γ μ / σ.
            means, spreads: β and γ, what its outputs are over the training data.
        """
        grams = self.grams * scales[:, :, None] * scales[:, None, :]
        constants = self.constants * scales + shifts
        return Filters(grams=grams, constants=constants, means=means, variances=spreads**2, normed=True)

    def convolved(self, kernels: Array, biases: Array) -> "Filters":
        """Return the filters behind a depthwise layer, [channels, units, places of the kernel] and [channels, units].

        Constant and mean are those of a pixel whose neighbours are all inside the map; its pixels vary independently.
        """
        total = kernels.sum(2)
        return replace(
            self,
            grams=self.grams * (kernels @ kernels.swapaxes(1, 2)),
            constants=self.constants * total + biases,
            means=self.means * total + biases,
            variances=self.variances * (kernels**2).sum(2),
        )

    @cached_property
    def products(self) -> Array:
        """Return the inner products of whole units, [units, units]."""
        whole: Array = self.grams.sum(0)
        return whole

    @cached_property
    def constant_products(self) -> Array:
        """Return the products of the units' constants, summed over their channels, [units, units]."""
        return self.constants.T @ self.constants

    @cached_property
    def norms(self) -> Array:
        """Return the lengths of the units' filters, [units]."""
        lengths: Array = np.sqrt(self.products.diagonal())
        return lengths

    @cached_property
    def cosines(self) -> Array:
        """Return the cosines between the units' filters, [units, units]; 0 beside a filter of zeros."""
        return cosines(self.products)


def cosines(products: Array) -> Array:
    """Return the cosines that belong to a Gram matrix, at most 1; 0 beside a vector of zeros."""
    lengths = np.sqrt(products.diagonal())
    lengths = np.where(lengths > 0, lengths, np.inf)
    return np.clip(products / lengths[:, None] / lengths[None, :], -1.0, 1.0)


def cluster(similarity: Array, distance: float) -> NDArray[np.int64]:
    """Return the cluster of each unit, numbered in the order of their first units; `NOISE` for those in none.

    These are the clusters of DBSCAN (Ester et al. 1996) with minPts 2 under the cosine distance. With minPts 2 a unit
    with any neighbour is a core point, no border point is left to dispute, and the clusters are exactly the connected
    components of the graph that joins units at most `distance` apart; a unit alone is noise.

    Args:
        similarity: cosines, [units, units].
        distance: largest cosine distance, 1 − cosine, of neighbours (DBSCAN's eps).
    """
    _, labels = connected_components(1.0 - similarity <= distance, directed=False)
    sizes = np.bincount(labels)
    numbers = np.where(sizes > 1, np.cumsum(sizes > 1) - 1, NOISE)
    return np.asarray(numbers[labels], dtype=np.int64)
