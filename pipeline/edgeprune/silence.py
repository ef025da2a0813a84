"""What is left of a layer of a removed branch: zeros of the shape it would have given."""

import torch
from torch import nn

from edgeprune.coupling import CONVOLUTIONS


class Silence(nn.Module):
    """Gives zeros in place of a convolution or a linear layer; has no parameters and looks only at its input's shape.

    Args:
        layer: what it stands for.
        channels: that come out.
    """

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.sides = _sides(layer) if isinstance(layer, CONVOLUTIONS) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros, [N, channels, ...], or [..., channels] for a linear layer."""
        if self.sides is None:
            return x.new_zeros((*x.shape[:-1], self.channels))
        return x.new_zeros(
            (x.shape[0], self.channels, *(side(n) for side, n in zip(self.sides, x.shape[2:], strict=True)))
        )

    def extra_repr(self) -> str:
        """Return what `print` shows between the brackets."""
        return f"channels={self.channels}"


class _Side:
    """The length of one spatial axis of a convolution's output (torch.nn.Conv2d, ConvTranspose2d: "Shape")."""

    def __init__(self, *, stride: int, padded: int, reach: int, added: int, transposed: bool) -> None:
        self.stride, self.padded, self.reach, self.added, self.transposed = stride, padded, reach, added, transposed

    def __call__(self, length: int) -> int:
        if self.transposed:
            return (length - 1) * self.stride - self.padded + self.reach + self.added + 1
        return (length + self.padded - self.reach - 1) // self.stride + 1


def _sides(layer: nn.Module) -> list[_Side]:
    assert isinstance(layer, CONVOLUTIONS)
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    sizes = zip(layer.stride, _padded(layer.padding, reach), reach, layer.output_padding, strict=True)
    return [_Side(stride=s, padded=p, reach=r, added=a, transposed=layer.transposed) for s, p, r, a in sizes]


def _padded(padding: str | tuple[int, ...], reach: list[int]) -> list[int]:
    """Return the padding of each spatial axis, both ends together."""
    if isinstance(padding, str):
        return list(reach) if padding == "same" else [0] * len(reach)
    return [2 * each for each in padding]
