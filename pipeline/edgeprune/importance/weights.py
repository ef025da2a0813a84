"""Rules that need nothing but the model.

`l1`, `l2` and `geometric_median` look at the filters alone that make a channel; `group_norm` at everything that would
go with it; `batch_norm_scale` at the batch norms it passes through.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune.importance.members import Tally, along_channels, levelled, makers, numbers, parameters, scales
from edgeprune.importance.needs import Given
from edgeprune.structure import Structure


def l1(module: nn.Module, structure: Structure, _given: Given) -> NDArray[np.float64]:
    """Return the mean L1 norm of the filters that make each class (Li et al., arXiv 1608.08710, section 3.1).

    Norms are divided by the layer's mean: the numbers compare layers by shape, not by scale. Biases do not count.
    """
    return _of_filters(module, structure, lambda rows: rows.abs().sum(1))


def l2(module: nn.Module, structure: Structure, _given: Given) -> NDArray[np.float64]:
    """Return the mean L2 norm of the filters that make each class, divided by the layer's mean; no biases."""
    return _of_filters(module, structure, lambda rows: torch.linalg.vector_norm(rows, dim=1))


def geometric_median(module: nn.Module, structure: Structure, _given: Given) -> NDArray[np.float64]:
    """Return how far each filter is from all others of its layer (FPGM; He et al., arXiv 1811.00250, equation 8).

    The sum of Euclidean distances to the layer's filters, those that must stay included, divided by the layer's mean;
    then the mean over the filters that make a class. The least is nearest to the geometric median: the others can
    stand in for it. In a grouped convolution, filters are compared as they are, though they read different channels.
    """
    return _of_filters(module, structure, lambda rows: _distances(rows).sum(1))


def _of_filters(module: nn.Module, structure: Structure, norm: Callable[[Tensor], Tensor]) -> NDArray[np.float64]:
    tally = Tally(structure.class_count)
    for owners, rows in makers(module, structure):
        tally.add(owners, levelled(numbers(norm(rows.double()))))
    return tally.mean


def _distances(rows: Tensor) -> Tensor:
    """Return the Euclidean distance between any two rows, [n, n]: one matrix product, 0 on the diagonal."""
    centred = rows - rows.mean(0)  # what all filters share would only cost digits
    squares = centred.square().sum(1)
    gaps = squares[:, None] + squares - 2 * centred @ centred.T
    return gaps.clamp_min_(0).fill_diagonal_(0).sqrt_()


def batch_norm_scale(module: nn.Module, structure: Structure, _given: Given) -> NDArray[np.float64]:
    """Return the mean |γ| of the batch norms of each class (network slimming; Liu et al., arXiv 1708.06519).

    Not divided by anything: what a batch norm scales has variance 1 in every layer, so the authors compare all layers
    by one threshold. A class is also scaled by batch norms that only read it, as in pre-activation blocks.
    """
    tally = Tally(structure.class_count)
    for owners, scale in scales(module, structure):
        tally.add(owners, numbers(scale.abs()))
    return tally.mean


def random(_module: nn.Module, structure: Structure, given: Given) -> NDArray[np.float64]:
    """Return a number between 0 and 1 for each class, drawn with the seed: the control of all other rules."""
    return np.random.default_rng(given.seed).random(structure.class_count)


def group_norm(module: nn.Module, structure: Structure, _given: Given) -> NDArray[np.float64]:
    """Return the sum of squared weights of each class (L2 group norm; DepGraph, arXiv 2301.12900, eq. 4).

    Over all members: filters, biases, batch norms' scales and shifts, and the weights of the layers that read the
    class, each parameter divided by its mean over channels. DepGraph's code takes the mean over members, which within
    a group differs by a factor only: its units have equally many.
    """
    tally = Tally(structure.class_count)
    for name, parameter in parameters(module, structure):
        for owners, values in along_channels(module, structure, name, parameter.detach().double() ** 2):
            tally.add(owners, levelled(values))
    return tally.total
