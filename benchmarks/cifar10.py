"""CIFAR-10 and the ResNets of He et al. 2016, section 4.2, with parameter-free shortcuts; read from $EDGEPRUNE_DATA.

The data and weights are not part of edgeprune: the folder must hold cifar10.npz (x_train_1..5, y_train, x_test, y_test)
and cifar10_resnet20.pt or cifar10_resnet56.pt (flat state dicts).
"""

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pad, relu

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def folder() -> Path:
    """Return the folder that holds data and weights.

    Raises:
        SystemExit: with what to set, if it is not there.
    """
    found = Path(os.environ.get("EDGEPRUNE_DATA", ""))
    if not (found / "cifar10.npz").is_file():
        raise SystemExit("set EDGEPRUNE_DATA to the folder with cifar10.npz and cifar10_resnet56.pt")
    return found


class Block(nn.Module):
    """Two convolutions and a shortcut that pads missing channels with zeros (option A)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.missing = (out - into) // 2 if stride != 1 or into != out else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [N, out, H / stride, W / stride]."""
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.missing is not None:
            x = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.missing, self.missing))
        return relu(y + x)


class ResNet(nn.Module):
    """Three stages of `blocks` blocks, 16, 32 and 64 channels wide."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(into: int, out: int, blocks: int, stride: int) -> nn.Sequential:
        return nn.Sequential(Block(into, out, stride), *(Block(out, out, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, [N, 10], of images [N, 3, 32, 32]."""
        x = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(x))))))
        return self.linear(adaptive_avg_pool2d(x, 1).flatten(1))


def _trained(depth: int) -> ResNet:
    net = ResNet((depth - 2) // 6)
    path = folder() / f"cifar10_resnet{depth}.pt"
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval()


def resnet20() -> ResNet:
    """Return the trained ResNet-20."""
    return _trained(20)


def resnet56() -> ResNet:
    """Return the trained ResNet-56."""
    return _trained(56)


@cache
def data() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return 50,000 training and 10,000 test images, uint8 N x H x W x C, with labels."""
    with np.load(folder() / "cifar10.npz", allow_pickle=False) as arrays:
        train = np.concatenate([arrays[f"x_train_{number}"] for number in range(1, 6)])
        return {"train": (train, arrays["y_train"]), "test": (arrays["x_test"], arrays["y_test"])}
