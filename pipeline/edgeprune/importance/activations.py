"""The rule that looks at what the channels carry.

    image ─▶ ... ─▶ activation ─▶ reader (convolution or linear layer)
                        └─ quantised to Q levels ─▶ counts [channels, Q] ─▶ entropy of each class

A channel is seen where it is read: there every batch norm, activation function and addition is behind it, also those
that a forward method writes as functions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune.channels import Owners
from edgeprune.entropy import quantise
from edgeprune.errors import ConfigError
from edgeprune.held import held
from edgeprune.importance.members import Tally
from edgeprune.importance.needs import Given
from edgeprune.structure import Structure

LEVELS = 32
IMAGES_AT_ONCE = 64
"""Images whose activations are counted at once: 64 of a ResNet-56 are 64 KiB to 4 MiB for each layer."""


def activation_entropy(module: nn.Module, structure: Structure, given: Given) -> NDArray[np.float64]:
    """Return the entropy of what each class carries, nats, between 0 and ln 32 (after arXiv 1706.05791, re-derived).

    Luo and Wu pool each activation map to one number and take the entropy of its histogram over images. Here every
    pixel counts, which a few hundred images are enough for, and the 32 levels cut the range of the whole layer on the
    first images: in a range of its own, a channel that hardly moves would look as rich as any. Blocks of columns that
    a flattened channel becomes count as one channel; the mean over the layers that read the class is returned, not
    divided by anything: an entropy means the same in every layer. A constant channel has 0.

    Needs images, no labels and no gradients. Cost: one forward pass and the counting.

    Raises:
        ConfigError: if there are no images, or no layer that reads a group was called on them.
    """
    with held(module, trainable=False), _readers(module, structure) as readers, torch.inference_mode():
        for images in given.unlabelled():
            for part in torch.split(images, IMAGES_AT_ONCE):
                module(part)
    tally = Tally(structure.class_count)
    for reader in readers.values():
        owners, counts = reader.counts_by_class()
        tally.add(owners, _entropy(counts))
    _insist_seen(structure, readers)
    return tally.mean


class _Reader:
    """Counts of the levels that one layer read, by channel."""

    def __init__(self, layer: nn.Module, owners: Owners) -> None:
        self._last = isinstance(layer, nn.Linear)
        self.owners = owners
        self.counts = torch.zeros(len(owners), LEVELS, dtype=torch.int64)
        self._range: tuple[float, float] | None = None

    def read(self, activation: Tensor) -> None:
        """Count the levels of one batch of activations; the first one gives the range."""
        if self._range is None:
            low, high = torch.aminmax(activation)
            self._range = float(low), float(high)
        first = torch.arange(0, self.counts.numel(), LEVELS, dtype=torch.int32)
        place = quantise(activation, *self._range, LEVELS)
        place += first if self._last else first.view(-1, *[1] * (activation.dim() - 2))
        self.counts += torch.bincount(place.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def counts_by_class(self) -> tuple[Owners, NDArray[np.float64]]:
        """Return the classes that the layer reads, -1 left out, and the counts of each [classes, Q]."""
        classes, place = np.unique(self.owners, return_inverse=True)
        counts = np.zeros((len(classes), LEVELS))
        np.add.at(counts, place, self.counts.numpy())
        return classes[classes >= 0], counts[classes >= 0]


@contextmanager
def _readers(module: nn.Module, structure: Structure) -> Iterator[dict[str, _Reader]]:
    """Yield layer name → what it reads while the block runs."""
    readers, handles = {}, []
    for name, layer in module.named_modules():
        if (name, "in") in structure.classes:
            readers[name] = _Reader(layer, structure.classes[name, "in"])
            handles.append(layer.register_forward_pre_hook(_listening(readers[name])))
    try:
        yield readers
    finally:
        for handle in handles:
            handle.remove()


def _listening(reader: _Reader) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _layer, inputs: reader.read(inputs[0])


def _entropy(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entropy of each row of counts, nats; 0 for a row of zeros."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    entropies: NDArray[np.float64] = np.sum(shares * -np.log(np.where(shares > 0, shares, 1)), axis=1)
    return entropies


def _insist_seen(structure: Structure, readers: dict[str, _Reader]) -> None:
    seen = {owner for each in readers.values() if int(each.counts.sum()) for owner in each.owners.tolist()}
    for name, units in structure.units.items():
        if not seen.issuperset(units):
            raise ConfigError(
                f"the activations of group {name!r} were not seen",
                why="there were no images" if not seen else "no layer that reads it is called in the forward pass",
                next_step="give images" if not seen else "choose a rule that reads weights, such as l2",
            )
