"""Nets of three channels whose importance fits on a napkin."""

import torch
from torch import nn

from edgeprune.export import export
from edgeprune.importance import unit_importance
from edgeprune.structure import Structure, build_structure

Batch = tuple[torch.Tensor, torch.Tensor]


class Three(nn.Module):
    """A 1x1 convolution to three channels, read by a linear layer of two classes."""

    def __init__(self, makes: tuple[float, ...], reads: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1, bias=False)
        self.linear = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor(makes).view(3, 1, 1, 1))
            self.linear.weight.copy_(torch.tensor(reads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


class Pair(nn.Module):
    """Two 1x1 convolutions, a batch norm between them if its scales are given, and the mean of the map."""

    def __init__(self, filters: list[list[float]], scales: list[float] | None = None) -> None:
        super().__init__()
        inputs = len(filters[0])
        self.one = nn.Conv2d(inputs, len(filters), 1, bias=False)
        self.norm = nn.BatchNorm2d(len(filters)) if scales else nn.Identity()
        self.two = nn.Conv2d(len(filters), 2, 1, bias=False)
        with torch.no_grad():
            self.one.weight.copy_(torch.tensor(filters).view(-1, inputs, 1, 1))
            self.two.weight.fill_(1.0)
            if isinstance(self.norm, nn.BatchNorm2d) and scales:
                self.norm.weight.copy_(torch.tensor(scales))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.norm(self.one(x))).mean((2, 3))


def structure_of(module: nn.Module, channels: int = 1) -> Structure:
    """Return the structure of a toy for images of 2 x 2 pixels; toys of one class and shape are exported once."""
    known = type(module), repr(module), channels
    if known not in _STRUCTURES:
        example = torch.ones(1, channels, 2, 2)
        _STRUCTURES[known] = build_structure(module.eval(), example, export(module, example), multiple=1)
    return _STRUCTURES[known]


_STRUCTURES: dict[tuple[type, str, int], Structure] = {}


def scores(module: nn.Module, rule: str, *batches: Batch, channels: int = 1) -> tuple[float, ...]:
    """Return the importance of the units of the only group."""
    found = unit_importance(module.eval(), structure_of(module, channels), rule, batches)
    (only,) = found.values()
    return only
