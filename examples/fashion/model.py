"""A small residual CNN for 28 x 28 grey images: three stages of two blocks, widths 32, 64, 128.

    image 1x28x28 ── stem 32 ── stage1 32x28x28 ── stage2 64x14x14 ── stage3 128x7x7 ── mean ── 10 logits

The first block of stages 2 and 3 halves the map and doubles the channels; its shortcut is a strided 1 x 1 convolution.
Every other shortcut is the identity.
"""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016, "Deep Residual Learning", figure 5 left)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if into == out and stride == 1 else projection(into, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, N x out x H/stride x W/stride."""
        inside = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inside)) + self.shortcut(x))


def projection(into: int, out: int, stride: int) -> nn.Module:
    """Return a shortcut that changes width and resolution."""
    return nn.Sequential(nn.Conv2d(into, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))


class FashionNet(nn.Module):
    """Stem, three stages, mean over the map, one linear layer."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        for number, (into, out) in enumerate(zip((widths[0], *widths), widths, strict=False), start=1):
            first = Block(into, out, stride=1 if number == 1 else 2)
            rest = [Block(out, out, stride=1) for _ in range(blocks - 1)]
            self.stages.add_module(f"stage{number}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits N x classes for normalised images N x 1 x 28 x 28."""
        maps = self.stages(torch.relu(self.bn(self.conv(x))))
        return self.linear(maps.mean((2, 3)))


def fashion_net() -> nn.Module:
    """Return the untrained network; `edgeprune.toml` names this function."""
    return FashionNet()
