"""Trained networks with their images: the embedded example; and ResNet-56, a thin VGG-16 and MobileNetV2.

All but the example are read from $EDGEPRUNE_DATA. The folder must hold cifar10.npz and cifar10_resnet56.pt,
cifar10_vgg16_thin.pt, or imagenet_mobilenetv2.pt and imagenet_sample_1000.zip; none of it is part of edgeprune. The
sample's images seem to be training images: accuracy on them is good for comparisons only.
"""

import io
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

sys.path.append(str(Path(__file__).parents[1]))

import cifar10

from edgeprune.intake.config import load_config
from edgeprune.intake.data import load_data
from edgeprune.intake.model import load_model

EXAMPLE = Path(__file__).parents[2] / "examples/fashion/edgeprune.toml"

Net = TypeVar("Net", bound=nn.Module)

VGG_WIDTHS = (17, 46, 0, 57, 71, 0, 73, 60, 32, 0, 51, 51, 51, 0, 51, 51, 51, 0)
"""Of the thin VGG-16's convolutions; 0: maximum over 2 x 2 pixels."""

MOBILE_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, output channels, blocks and first stride of each stage (Sandler et al. 2018, table 2)."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network in eval mode, labelled test images, and images of the training set (or others) for statistics."""

    net: nn.Module
    images: Tensor
    labels: Tensor
    calibration: Tensor


class VGG(nn.Module):
    """Convolution, batch norm and ReLU thirteen times, and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        into = 3
        for width in VGG_WIDTHS:
            if width:
                layers += [nn.Conv2d(into, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                into = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(into, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, [N, 10], of images [N, 3, 32, 32]."""
        return self.classifier(self.features(x).flatten(1))


class Convolution(nn.Sequential):
    """Convolution, batch norm and ReLU6; where it strides it pads right and below, as TensorFlow does."""

    def __init__(self, into: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = 0 if stride == 2 else kernel // 2
        convolution = nn.Conv2d(into, out, kernel, stride, padding, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(out), nn.ReLU6())
        self.strides = stride == 2

    def forward(self, x: Tensor) -> Tensor:
        """Return the map, [N, out, H / stride, W / stride]."""
        return super().forward(pad(x, (0, 1, 0, 1)) if self.strides else x)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project, with a shortcut where the shape stays."""

    def __init__(self, into: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = into * expansion
        self.adds = stride == 1 and into == out
        self.conv = nn.Sequential(
            *([Convolution(into, inner, 1)] if expansion > 1 else []),
            Convolution(inner, inner, 3, stride, groups=inner),
            nn.Conv2d(inner, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the map, [N, out, H / stride, W / stride]."""
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, width 1.0; parameters are named as torchvision names them."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [Convolution(3, 32, 3, 2)]
        into = 32
        for expansion, out, blocks, stride in MOBILE_STAGES:
            for place in range(blocks):
                layers.append(InvertedResidual(into, out, 1 if place else stride, expansion))
                into = out
        self.features = nn.Sequential(*layers, Convolution(into, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, [N, 1000], of images [N, 3, 224, 224]."""
        return self.classifier(self.features(x).mean((2, 3)))


def vgg16_thin_net() -> VGG:
    """Return the thin VGG-16, trained on CIFAR-10; it is the result of pruning a VGG-16, so it has little to spare."""
    return _loaded(VGG(), "cifar10_vgg16_thin.pt")


def mobilenetv2_net() -> MobileNetV2:
    """Return MobileNetV2, trained on ImageNet."""
    return _loaded(MobileNetV2(), "imagenet_mobilenetv2.pt")


def _loaded(net: Net, file: str) -> Net:
    net.load_state_dict(torch.load(cifar10.folder() / file, map_location="cpu", weights_only=True))
    return net.eval()


def _normalised(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return images [N, H, W, C] uint8 as [N, C, H, W] float32."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def _on_cifar(net: nn.Module, images: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Trained:
    """Return a network with the first `images` test images, and 512 training images drawn with seed 0."""
    data = cifar10.data()
    drawn = np.sort(np.random.default_rng(0).permutation(len(data["train"][0]))[:512])
    return Trained(
        net=net,
        images=_normalised(data["test"][0][:images], mean, std),
        labels=torch.from_numpy(data["test"][1][:images]).long(),
        calibration=_normalised(data["train"][0][drawn], mean, std),
    )


def resnet56(images: int) -> Trained:
    """Return ResNet-56 on CIFAR-10."""
    return _on_cifar(cifar10.resnet56(), images, cifar10.MEAN, cifar10.STD)


def vgg16_thin(images: int) -> Trained:
    """Return the thin VGG-16 on CIFAR-10."""
    return _on_cifar(vgg16_thin_net(), images, (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))


def mobilenetv2(images: int) -> Trained:
    """Return MobileNetV2 on the ImageNet sample: every so many images are tested, 128 others calibrate."""
    pixels, labels = _imagenet_sample()
    tested = np.unique(np.linspace(0, len(pixels) - 1, min(images, len(pixels) - 128)).astype(int))
    others = np.setdiff1d(np.arange(len(pixels)), tested)
    x = _normalised(pixels, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Trained(
        net=mobilenetv2_net(),
        images=x[tested],
        labels=torch.from_numpy(labels[tested]),
        calibration=x[others[np.linspace(0, len(others) - 1, 128).astype(int)]],
    )


def fashion(images: int) -> Trained:
    """Return the embedded example on its own part of Fashion-MNIST; needs no other data."""
    config = load_config(EXAMPLE)
    assert config.data is not None
    data = load_data(config.data)
    net = load_model(config.model, input_shape=data.input_shape).module
    test = data.open_test()
    chosen = slice(0, images)
    return Trained(
        net=net, images=test.tensor(chosen), labels=test.labels[chosen], calibration=data.train.tensor(slice(0, 512))
    )


def imagenet_data() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the ImageNet sample as two sets, uint8 N x H x W x C, with labels: every second image is a test image."""
    pixels, labels = _imagenet_sample()
    return {"train": (pixels[::2], labels[::2]), "test": (pixels[1::2], labels[1::2])}


def cifar_data() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return CIFAR-10, see `cifar10.data`."""
    return cifar10.data()


def resnet56_net() -> nn.Module:
    """Return ResNet-56, trained on CIFAR-10."""
    return cifar10.resnet56()


def _imagenet_sample() -> tuple[np.ndarray, np.ndarray]:
    """Return 1,000 images [N, 224, 224, 3] uint8, one a class, and their labels."""
    with zipfile.ZipFile(cifar10.folder() / "imagenet_sample_1000.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        pixels = np.stack([_centre(archive.read(name)) for name in names])
    return pixels, np.array([int(Path(name).name[:4]) for name in names])


def _centre(raw: bytes) -> np.ndarray:
    """Return the middle 224 x 224 pixels of an image of 256 x 256, uint8."""
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))[16:240, 16:240]


NETWORKS: dict[str, Callable[[int], Trained]] = {
    "resnet56": resnet56,
    "vgg16_thin": vgg16_thin,
    "mobilenetv2": mobilenetv2,
    "fashion": fashion,
}
