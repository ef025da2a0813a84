"""Labelled images kept as compactly as they came, and normalised one batch at a time."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Augmentation = Literal["none", "flip", "flip-crop"]

EVALUATED_AT_ONCE, VALUES_AT_ONCE = 250, 250 * 3 * 32 * 32
"""Images, and values of images, at most in a batch that is only evaluated: of 224 x 224 pixels 250 would ask the system
for gigabytes of maps anew in every layer, which took two thirds of MobileNetV2's time; the maps of five are reused."""

SHIFT = 8
"""A crop shifts by up to 1/SHIFT of a side: 4 pixels of 32, as for CIFAR in He et al. 2016, section 4.2."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySet:
    """Images and labels in memory.

    Attributes:
        images: N x C x H x W, uint8 or float32.
        labels: N, int64.
        mean, std: of each channel for pixels scaled to [0, 1]; empty where the images are normalised floats.
        labelled: the labels are true ones; otherwise they are zeros or a model's answers.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def evaluation_batch(self) -> int:
        """Return how many of these images a forward pass without gradients is given at once."""
        return max(1, min(EVALUATED_AT_ONCE, VALUES_AT_ONCE // math.prod(self.shape)))

    def tensor(self, indices: Tensor | slice | Sequence[int] | None = None) -> Tensor:
        """Return normalised float32 images of these indices, all if none are given, N x C x H x W, a fresh tensor."""
        chosen = self.images if indices is None else self.images[indices]
        if self.images.dtype != torch.uint8:
            return chosen.clone()
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (self.mean, self.std))
        return chosen.float().div_(255).sub_(mean).div_(std)

    def subset(self, indices: Tensor) -> "ArraySet":
        """Return the set of these images."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def first(self, count: int | None) -> "ArraySet":
        """Return at most `count` images, in order; all if it is None. Nothing is copied."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def answered(self, labels: Tensor) -> "ArraySet":
        """Return the set with a model's answers, N int64, in place of labels."""
        return replace(self, labels=labels, labelled=False)

    def batches(
        self, size: int, *, shuffle_seed: int | None = None, augment: Augmentation = "none", start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images and labels, the last batch smaller if the size does not divide the set.

        Args:
            size: images in a batch.
            shuffle_seed: of the order and of the augmentation; None: in order, not augmented.
            augment: "flip" mirrors at random, "flip-crop" shifts at random as well.
            start: number of batches to leave out; the others are what they would have been.
        """
        order = torch.arange(len(self)) if shuffle_seed is None else _shuffled(len(self), shuffle_seed)
        for number, chosen in enumerate(torch.split(order, size)):
            if number < start:
                continue
            images = self.tensor(chosen)
            if shuffle_seed is not None:
                images = augmented(images, augment, _generator(shuffle_seed * 1_000_003 + number))
            yield images, self.labels[chosen]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of pixels, labels and normalisation."""
        made = hashlib.sha256(f"{self.images.dtype} {tuple(self.images.shape)} {self.mean} {self.std}".encode())
        made.update(self.images.contiguous().numpy().data)
        made.update(self.labels.contiguous().numpy().data)
        return made.hexdigest()


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**64)  # it takes 64 bits, and products of seeds have more


def augmented(images: Tensor, kind: Augmentation, generator: torch.Generator) -> Tensor:
    """Return the images, N x C x H x W, each mirrored and shifted by chance.

    A shifted image is filled up by repeating its border, which needs no knowledge of the normalisation.
    """
    if kind == "none":
        return images
    count, channels, height, width = images.shape
    rows, columns = torch.arange(height).expand(count, -1), torch.arange(width).expand(count, -1)
    if kind == "flip-crop":
        rows = _moved(rows, height, generator)
        columns = _moved(columns, width, generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    picked = images.gather(2, rows.view(count, 1, height, 1).expand(-1, channels, -1, width))
    return picked.gather(3, columns.view(count, 1, 1, width).expand(-1, channels, height, -1))


def _moved(places: Tensor, side: int, generator: torch.Generator) -> Tensor:
    most = side // SHIFT
    shift = torch.randint(-most, most + 1, (len(places), 1), generator=generator)
    return (places + shift).clamp(0, side - 1)


def interleaved(labels: Tensor, seed: int) -> Tensor:
    """Return an order of all images in which every beginning has the classes in proportion, within a class at random.

    The k-th of the n images of a class stands at (k + 1/2) / n of the way, so that no class gathers anywhere.
    """
    rng = np.random.default_rng(seed)
    values = labels.numpy()
    place = np.empty(len(values))
    for each in np.unique(values):
        members = np.flatnonzero(values == each)
        place[rng.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    return torch.from_numpy(np.lexsort((rng.random(len(values)), place)))


def stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of `count` images and of the rest, both ascending, with the classes in proportion.

    Largest remainders decide which class gives an image more; which images is random.
    """
    rng = np.random.default_rng(seed)
    values = labels.numpy()
    classes, sizes = np.unique(values, return_counts=True)
    exact = sizes * (count / len(values))
    quota = np.floor(exact).astype(int)
    for place in np.argsort(-(exact - quota), kind="stable")[: count - quota.sum()]:
        quota[place] += 1
    taken = [rng.permutation(np.flatnonzero(values == each))[:n] for each, n in zip(classes, quota, strict=True)]
    chosen = np.sort(np.concatenate(taken)) if taken else np.empty(0, int)
    rest = np.setdiff1d(np.arange(len(values)), chosen)
    return torch.from_numpy(chosen), torch.from_numpy(rest)
