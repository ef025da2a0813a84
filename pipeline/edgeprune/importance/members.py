"""From numbers per channel of a layer to one number per class of coupled channels.

A class has members in several layers: the filters that make its channels, batch norms that scale them, the weights of
the layers that read them. A rule says which members it looks at, and whether they count together as a sum or a mean.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune.channels import Owners
from edgeprune.coupling import BATCH_NORMS, CONVOLUTIONS, Side, is_depthwise
from edgeprune.structure import Structure

TINY = 1e-30


class Tally:
    """Numbers of channels, collected by the class of coupled channels that each belongs to."""

    def __init__(self, classes: int) -> None:
        self.total = np.zeros(classes)
        self._members = np.zeros(classes)

    def add(self, owners: Owners, values: NDArray[np.float64]) -> None:
        """Add one number of each channel; channels without a class (-1) are passed over."""
        known = owners >= 0
        self.total += np.bincount(owners[known], weights=values[known], minlength=len(self.total))
        self._members += np.bincount(owners[known], minlength=len(self.total))

    @property
    def mean(self) -> NDArray[np.float64]:
        """Return the mean over the channels of each class; 0 where there are none."""
        return self.total / np.maximum(self._members, 1)


def levelled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values divided by their mean, so that a layer's scale does not matter; zeros stay zeros."""
    return values / max(float(values.mean()), TINY) if len(values) else values


def makers(module: nn.Module, structure: Structure) -> Iterator[tuple[Owners, Tensor]]:
    """Yield the classes of the output channels and the filters [out, ...] of every convolution and linear layer."""
    for name, layer in module.named_modules():
        if (name, "out") in structure.classes and isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
            yield structure.classes[name, "out"], filters(layer)


def filters(layer: nn.Module) -> Tensor:
    """Return what makes each output channel of a convolution or linear layer, without bias: [out, rest]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, CONVOLUTIONS) and layer.transposed:  # [in, out / groups, ...]
        inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        grouped = weight.detach().reshape(layer.groups, inputs, outputs, -1).transpose(1, 2)
        return grouped.reshape(layer.out_channels, -1)
    return weight.detach().flatten(1)


def scales(module: nn.Module, structure: Structure) -> Iterator[tuple[Owners, Tensor]]:
    """Yield the classes and the scale γ [channels] of every batch norm that has one."""
    for name, layer in module.named_modules():
        if has_scale(layer) and (name, "out") in structure.classes:
            assert isinstance(layer.weight, Tensor)
            yield structure.classes[name, "out"], layer.weight.detach()


def has_scale(layer: nn.Module) -> bool:
    """Return whether a layer is a batch norm with a trained scale."""
    return isinstance(layer, BATCH_NORMS) and getattr(layer, "weight", None) is not None


def parameters(module: nn.Module, structure: Structure) -> list[tuple[str, nn.Parameter]]:
    """Return the weights and biases of every layer with channel axes, by layer name."""
    found = []
    for name, layer in module.named_modules():
        if (name, "out") in structure.classes:
            found += [(name, parameter) for parameter in layer.parameters(recurse=False)]
    return found


def along_channels(
    module: nn.Module, structure: Structure, name: str, saliency: Tensor
) -> Iterator[tuple[Owners, NDArray[np.float64]]]:
    """Yield, for each channel axis of a parameter of layer `name`, classes and sums of its saliency over the rest."""
    for axis, side in _axes(module.get_submodule(name), saliency.dim()):
        values = saliency.movedim(axis, 0).reshape(saliency.shape[axis], -1).sum(1)
        yield structure.classes[name, side][: len(values)], numbers(values)


def _axes(layer: nn.Module, dimensions: int) -> tuple[tuple[int, Side], ...]:
    if dimensions == 1 or is_depthwise(layer):
        return ((0, "out"),)
    if isinstance(layer, CONVOLUTIONS) and layer.transposed:
        return ((0, "in"),) if layer.groups > 1 else ((0, "in"), (1, "out"))
    return ((0, "out"), (1, "in"))


def numbers(tensor: Tensor) -> NDArray[np.float64]:
    """Return a tensor's values on the CPU, float64."""
    values: NDArray[np.float64] = tensor.detach().to("cpu", torch.float64).numpy()
    return values
