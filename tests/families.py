"""Small nets of every family edgeprune promises to cut, with random weights and random batch norm statistics.

`FAMILIES` maps a name to a factory; `made(name)` returns the seeded module in eval mode and an example input,
`prepared(name)` also its graph and its proven structure, made once in a test session. The nets are written from the
architectures' papers, at widths that keep a test fast.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - everybody calls it F

from edgeprune.cut import proven
from edgeprune.export import export
from edgeprune.plan import Plan, Space
from edgeprune.structure import Structure, build_structure

torch.set_num_threads(1)  # threads of small operators on loaded cores mostly wait for one another

SIZE = 16
"""Height and width of the example images."""


def conv_bn(inputs: int, outputs: int, kernel: int = 3, activation: type[nn.Module] | None = nn.ReLU, **options: Any):
    """Return convolution, batch norm and, unless None, an activation; padding keeps the size of the map."""
    options = {"padding": kernel // 2, "bias": False} | options
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class Head(nn.Module):
    """Global average pooling and a linear layer."""

    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


# -- residual networks -------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """He et al. 2015, with a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        changes = stride > 1 or inputs != outputs
        self.shortcut = conv_bn(inputs, outputs, 1, None, stride=stride) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Two stages of two basic blocks."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_bn(3, width)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width))
        self.head = Head(2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))))


class OptionABlock(nn.Module):
    """The CIFAR basic block: where the shape changes, the shortcut drops every other pixel and pads the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.pad = (2 if inputs != outputs else 1), (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class OptionAResNet(nn.Module):
    """Three stages of `blocks` blocks, widths w, 2w, 4w; no parameter in any shortcut."""

    def __init__(self, blocks: int = 1, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        for stage, (inputs, outputs) in enumerate(pairwise(widths), 1):
            rest = [OptionABlock(outputs, outputs) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(OptionABlock(inputs, outputs), *rest))
        self.linear = nn.Linear(4 * width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.size()[3]).view(x.size(0), -1))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut; `groups` > 1 makes it ResNeXt's."""

    def __init__(self, inputs: int, inner: int, outputs: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        changes = stride > 1 or inputs != outputs
        self.downsample = conv_bn(inputs, outputs, 1, None, stride=stride) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += identity
        return self.relu(y)


class BottleneckResNet(nn.Module):
    """A strided stem with max pooling and three bottlenecks, the last two without a projection."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.block1 = Bottleneck(16, 16, 32, groups=groups)
        self.block2 = Bottleneck(32, 16, 32, groups=groups)
        self.block3 = Bottleneck(32, 24, 32, groups=groups)
        self.fc = Head(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        return self.fc(self.block3(self.block2(self.block1(x))))


class PreActivationBlock(nn.Module):
    """He et al. 2016: batch norm and activation come first, so the stream itself is only ever added to."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, inner, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class PreActivation(nn.Module):
    """Two pre-activation blocks whose convolutions have biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(PreActivationBlock(16, 16), PreActivationBlock(16, 24))
        self.norm = nn.BatchNorm2d(16)
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))))


class TwoBranches(nn.Module):
    """A sum of two branches without identity: either may go, never both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.left = nn.Sequential(conv_bn(16, 16), conv_bn(16, 16, 3, None))
        self.right = nn.Sequential(conv_bn(16, 24), conv_bn(24, 16, 3, None))
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.left(x) + self.right(x)))


class Nested(nn.Module):
    """A residual block inside a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.enter = conv_bn(16, 24)
        self.inner = nn.Sequential(conv_bn(24, 16), conv_bn(16, 24, 3, None))
        self.leave = conv_bn(24, 16, 3, None)
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.enter(x)
        y = F.relu(y + self.inner(y))
        return self.head(F.relu(x + self.leave(y)))


# -- plain, depthwise, grouped, gated ----------------------------------------------------------------------------


class VGG(nn.Module):
    """Convolutions, then linear layers over a 2x2 map: every channel is a block of four columns."""

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(2)
        first, second = conv_bn(3, 16, bias=True), conv_bn(16, 24, bias=True)
        self.features = nn.Sequential(first, pool, second, pool, conv_bn(24, 16), pool)
        self.classifier = nn.Sequential(nn.Linear(16 * 4, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018: expand, depthwise, project, and a shortcut where the shape allows."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([conv_bn(inputs, hidden, 1, nn.ReLU6)] if expand > 1 else []),
            conv_bn(hidden, hidden, 3, nn.ReLU6, stride=stride, groups=hidden),
            conv_bn(hidden, outputs, 1, None),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """One block without expansion, one with stride, two with shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(3, 16, 3, nn.ReLU6, stride=2),
            InvertedResidual(16, 16, 1, 1),
            InvertedResidual(16, 24, 2, 2),
            InvertedResidual(24, 24, 1, 2),
            InvertedResidual(24, 24, 1, 1),
            conv_bn(24, 32, 1, nn.ReLU6),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class SqueezeExcitation(nn.Module):
    """Hu et al. 2017: the channels of a map are scaled by what two 1x1 convolutions make of their means."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class SENet(nn.Module):
    """A residual block and a plain one, each with its squeeze and excitation, one of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.first = nn.Sequential(conv_bn(16, 32), SqueezeExcitation(32, 16), conv_bn(32, 16, 1, None))
        self.second = conv_bn(16, 32, 3, nn.Hardswish)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 32)
        self.head = Head(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.second(F.relu(x + self.first(x)))
        scale = F.hardsigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return self.head(x * scale.view(x.size(0), -1, 1, 1))


class PReLUNet(nn.Module):
    """One slope a channel, one slope for all, and leaky, gelu and silu beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.PReLU(16)
        self.conv2, self.act2 = nn.Conv2d(16, 24, 3, padding=1), nn.PReLU()
        self.conv3, self.act3 = nn.Conv2d(24, 16, 3, 2, padding=1), nn.LeakyReLU(0.1)
        self.conv4, self.act4 = nn.Conv2d(16, 16, 1), nn.GELU()
        self.conv5, self.act5 = nn.Conv2d(16, 16, 1), nn.SiLU()
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.head(self.act5(self.conv5(self.act4(self.conv4(self.act3(self.conv3(x)))))))


# -- concatenation, split, up and down ---------------------------------------------------------------------------


class DenseLayer(nn.Module):
    """Huang et al. 2016: what came before goes on beside what the layer adds."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class DenseNet(nn.Module):
    """Two dense blocks of two layers with a halving transition between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = nn.Sequential(DenseLayer(16, 16), DenseLayer(32, 16))
        self.transition = nn.Sequential(nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 24, 1), nn.AvgPool2d(2))
        self.block2 = nn.Sequential(DenseLayer(24, 16), DenseLayer(40, 16))
        self.norm = nn.BatchNorm2d(56)
        self.head = Head(56)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.block2(self.transition(self.block1(self.stem(x)))))))


class Inception(nn.Module):
    """Parallel branches concatenated, then a cross-stage block that splits in halves and joins them again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.one = conv_bn(16, 16, 1)
        self.three = nn.Sequential(conv_bn(16, 16, 1), conv_bn(16, 24))
        self.factored = nn.Sequential(
            nn.Conv2d(16, 16, (1, 3), padding=(0, 1)), nn.Conv2d(16, 16, (3, 1), padding=(1, 0)), nn.ReLU()
        )
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, padding=1), conv_bn(16, 8, 1))
        self.widen = conv_bn(64, 32)
        self.inner = nn.Sequential(conv_bn(16, 16), conv_bn(16, 16))
        self.join = conv_bn(48, 16, 1)
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.widen(torch.cat([self.one(x), self.three(x), self.factored(x), self.pool(x)], 1))
        left, right = x.chunk(2, 1)
        return self.head(self.join(torch.cat([left, right, self.inner(right)], 1)))


class HalfSplit(nn.Module):
    """Halves taken by slices whose ends are computed from the tensor's own size, then multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32)
        self.mix = conv_bn(16, 16)
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        half = x.size(1) // 2
        return self.head(self.mix(x[:, :half] * torch.sigmoid(x[:, half:])))


class UNet(nn.Module):
    """Down twice, up by a transposed convolution and by interpolation to a size, skips concatenated; gives a map."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv_bn(3, 16), conv_bn(16, 16))
        self.down2 = conv_bn(16, 24)
        self.bottom = conv_bn(24, 32)
        self.up2 = nn.ConvTranspose2d(32, 24, 2, 2)
        self.merge2 = conv_bn(48, 24)
        self.merge1 = conv_bn(40, 16)
        self.final = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.up2(self.bottom(F.max_pool2d(second, 2)))
        y = self.merge2(torch.cat([second, y], 1))
        y = F.interpolate(y, size=first.shape[2:], mode="bilinear", align_corners=False)
        return self.final(self.merge1(torch.cat([first, y], 1)))


class GroupedTranspose(nn.Module):
    """A grouped and a depthwise transposed convolution and an upsampling by a factor; a map comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, stride=2)
        self.grouped = nn.ConvTranspose2d(16, 24, 2, 2, groups=2)
        self.depthwise = nn.ConvTranspose2d(24, 24, 3, padding=1, groups=24)
        self.final = nn.Conv2d(24, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.depthwise(F.relu(self.grouped(self.stem(x)))))
        return self.final(F.interpolate(y, scale_factor=2.0))


# -- what cannot be cut, or only in part -------------------------------------------------------------------------


class GroupNormNet(nn.Module):
    """Group norm mixes channels: what it reads must stay, what comes before and after need not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn(3, 16)
        self.conv2, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.conv3 = conv_bn(16, 16)
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv3(F.relu(self.norm(self.conv2(self.conv1(x))))))


class ConvNeXt(nn.Module):
    """Liu et al. 2022: depthwise, layer norm over the channels, two linear layers on the last axis, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, 2)
        self.depthwise = nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.after = conv_bn(16, 16)
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))) * self.scale
        return self.head(self.after(x + y.permute(0, 3, 1, 2)))


class ShuffleNet(nn.Module):
    """Zhang et al. 2017: channels are dealt out among the groups by reshape, transpose, reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.conv1 = conv_bn(16, 16, 1, groups=2)
        self.conv2 = conv_bn(16, 16, 3, None, groups=16)
        self.conv3 = conv_bn(16, 16, 1)
        self.head = Head(16)

    @staticmethod
    def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv3(self.conv2(self.shuffle(self.conv1(self.stem(x)), 2))))


class HardCoded(nn.Module):
    """Sizes written into the forward method: a split, and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32)
        self.left, self.right = conv_bn(16, 16), conv_bn(16, 16)
        self.join = conv_bn(32, 16)
        self.last = conv_bn(16, 16, stride=2)
        self.linear = nn.Linear(16 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = torch.split(self.stem(x), [16, 16], dim=1)
        x = self.last(self.join(torch.cat([self.left(left), self.right(right)], 1)))
        return self.linear(x.view(-1, 16 * 64))


class Shared(nn.Module):
    """One convolution used on two maps, and one that no forward ever runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.other = conv_bn(16, 16)
        self.unused = nn.Conv2d(16, 16, 3)
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.twice(self.stem(x)))
        return self.head(self.other(F.relu(self.twice(x))))


class SamePadding(nn.Module):
    """`padding="same"` and `"valid"` and dilation in a residual branch, reflection padding after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, padding="same")
        self.branch = nn.Sequential(
            conv_bn(16, 16, padding="same", dilation=2),
            nn.ZeroPad2d(1),
            conv_bn(16, 16, 3, None, padding="valid"),
        )
        self.reflect = nn.ReflectionPad2d((1, 2, 2, 1))
        self.even = nn.Conv2d(16, 16, 4)
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.even(self.reflect(F.relu(x + self.branch(x))))))


class PooledBranch(nn.Module):
    """A residual branch with a pooling that PyTorch refuses to run on no channels: it may be narrow, but never go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.branch = nn.Sequential(conv_bn(16, 16), nn.AvgPool2d(3, 1, 1), conv_bn(16, 16, 3, None))
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.branch(x)))


class Conv1d(nn.Module):
    """Rows as sequences: one-dimensional convolutions, a residual block, batch norm after a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv1d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv1d(24, 16, 3, padding=1))
        self.hidden = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32, affine=False), nn.ReLU())
        self.last = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.flatten(2))
        return self.last(self.hidden(F.relu(x + self.inner(x)).mean(2)))


# -- recurrent, attention ----------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A CRNN: convolutions read the image, a recurrent layer its columns."""

    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 16, stride=2))
        self.cell = cell(16 * 4, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = self.features(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.cell(columns)[0][:, -1])


class AttentionBlock(nn.Module):
    """Dosovitskiy et al. 2020: attention and a two-layer perceptron, normalised first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A convolutional stem, patches, a class token, learned positions and one embedding, one block."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.patch = conv_bn(3, 16), nn.Conv2d(16, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Embedding(17, width)
        self.register_buffer("places", torch.arange(17), persistent=False)
        self.block, self.norm, self.head = AttentionBlock(width), nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(self.stem(x)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions(self.places)
        return self.head(self.norm(self.block(x))[:, 0])


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet,
    "option_a": OptionAResNet,
    "bottleneck": BottleneckResNet,
    "resnext": lambda: BottleneckResNet(groups=4),
    "preactivation": PreActivation,
    "two_branches": TwoBranches,
    "nested": Nested,
    "vgg": VGG,
    "mobilenetv2": MobileNetV2,
    "senet": SENet,
    "prelu": PReLUNet,
    "densenet": DenseNet,
    "inception": Inception,
    "half_split": HalfSplit,
    "unet": UNet,
    "grouped_transpose": GroupedTranspose,
    "groupnorm": GroupNormNet,
    "convnext": ConvNeXt,
    "shufflenet": ShuffleNet,
    "hard_coded": HardCoded,
    "shared": Shared,
    "same_padding": SamePadding,
    "pooled_branch": PooledBranch,
    "conv1d": Conv1d,
    "recurrent": Recurrent,
    "vit": VisionTransformer,
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """Return the family's net in eval mode, with weights and statistics of this seed, and an example input."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = FAMILIES[name]().eval()
        randomize(net)
        return net, torch.randn(1, 3, SIZE, SIZE)


def randomize(net: nn.Module) -> None:
    """Give batch norms random statistics and scales, and per-channel slopes random values: nothing is neutral."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 1.5)
                for scale in [layer.weight] if layer.affine else []:
                    scale.uniform_(0.5, 1.5)
                    layer.bias.normal_(0, 0.3)
            elif isinstance(layer, nn.PReLU | nn.GroupNorm | nn.LayerNorm):
                layer.weight.uniform_(0.1, 0.9)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A net, its example input, its graph and its proven structure."""

    net: nn.Module
    example: torch.Tensor
    graph: onnx.ModelProto
    structure: Structure


@cache
def prepared(name: str) -> Prepared:
    """Return the family, exported once in a test session; channels move in fours. Treat it as read-only."""
    net, example = made(name)
    graph = export(net, example)
    structure = build_structure(net, example, graph, multiple=4)
    return Prepared(net=net, example=example, graph=graph, structure=proven(net, example, structure))


def plan_of(space: Space, widths: dict[str, int], seed: int = 0) -> Plan:
    """Return the plan that keeps random units of the named groups at these widths, and everything of the others."""
    chooser = random.Random(seed)
    kept = {
        group.name: tuple(sorted(chooser.sample(range(group.width), widths.get(group.name, group.width))))
        for group in space.groups
    }
    return space.check(Plan(kept=kept))


def run_graph(graph: onnx.ModelProto, x: torch.Tensor) -> np.ndarray:
    """Return the graph's output in onnxruntime, one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x.numpy()})[0]


def run_module(net: nn.Module, x: torch.Tensor) -> np.ndarray:
    """Return the module's output."""
    with torch.no_grad():
        return net(x).numpy()


def gap(seen: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference, relative to the largest wanted value."""
    assert seen.shape == wanted.shape
    return float(np.abs(seen - wanted).max() / np.abs(wanted).max())
