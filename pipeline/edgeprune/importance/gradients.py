"""The rule that asks the loss."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune.errors import ConfigError
from edgeprune.held import held
from edgeprune.importance.members import Tally, along_channels, parameters
from edgeprune.importance.needs import Given
from edgeprune.structure import Structure

IMAGES_AT_ONCE = 32
"""Images whose activations are held for one backward pass: with 128 a ResNet-56 took 1 GiB."""


def taylor(module: nn.Module, structure: Structure, given: Given) -> NDArray[np.float64]:
    """Return the squared first-order change of the loss when each class is zeroed (arXiv 1906.10771, eq. 8).

    Summed over batches and over all members: the change is an estimate of a loss, the same in every layer, so nothing
    is divided. Needs labelled images. Cost: one forward and one backward pass.

    Raises:
        ConfigError: if there are no batches.
    """
    tally, seen = Tally(structure.class_count), False
    with held(module, trainable=True), torch.enable_grad():
        weights = parameters(module, structure)
        for images, labels in given.labelled or ():
            seen = True
            gradients = gradients_of(module, [parameter for _, parameter in weights], images, labels)
            for (name, parameter), gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    change = (gradient * parameter.detach()).double()
                    for owners, values in along_channels(module, structure, name, change):
                        tally.add(owners, values**2)
    if not seen:
        raise ConfigError("the taylor rule saw no images", next_step="give labelled images or choose another rule")
    return tally.total


def gradients_of(module: nn.Module, wanted: Sequence[Tensor], images: Tensor, labels: Tensor) -> list[Tensor | None]:
    """Return the gradients of the mean loss, summed over parts of the batch: activations of one part fit in memory."""
    total: list[Tensor | None] = [None] * len(wanted)
    for start in range(0, len(labels), IMAGES_AT_ONCE):
        part = slice(start, start + IMAGES_AT_ONCE)
        loss = nn.functional.cross_entropy(module(images[part]), labels[part], reduction="sum") / len(labels)
        added = torch.autograd.grad(loss, wanted, allow_unused=True)
        total = [more if before is None else before + more for before, more in zip(total, added, strict=True)]
    return total
