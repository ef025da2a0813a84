"""A task of a second: which quadrant of an image is brighter; and a small network for it."""

import torch
from torch import nn

from edgeprune.intake.images import ArraySet


def network(width: int, seed: int) -> nn.Module:
    """Return a small network with batch norm and dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, 4),
        ).eval()


def quadrants(count: int, seed: int) -> ArraySet:
    """Return noise with a bright patch in the quadrant that is the label."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 60
    return ArraySet(images=images, labels=labels, mean=(0.25,), std=(0.2,))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules are equal bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    return set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
