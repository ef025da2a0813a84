"""How much the model would miss each unit of each channel group: rules in a dictionary, one function each.

A rule turns one layer's weight (and its gradient) into a non-negative saliency per weight; a unit's importance is
the sum over everything that would go with it, every layer counted equally.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune.coupling import CONVOLUTIONS, Side, is_depthwise
from edgeprune.structure import Structure

Batch = tuple[Tensor, Tensor]
IMAGES_AT_ONCE = 32
"""Images whose activations are held for one backward pass: with 128 a ResNet-56 took 1 GiB."""

Rule = Callable[[nn.Module, Structure, Iterable[Batch]], NDArray[np.float64]]


def magnitude(module: nn.Module, structure: Structure, _batches: Iterable[Batch]) -> NDArray[np.float64]:
    """Return the sum of squared weights of each class (L2 group norm; DepGraph, arXiv 2301.12900, eq. 4)."""
    scores = np.zeros(structure.class_count)
    for name, parameter in _weights(module, structure):
        _add(scores, structure, module, name, parameter.detach().double() ** 2)
    return scores


def taylor(module: nn.Module, structure: Structure, batches: Iterable[Batch]) -> NDArray[np.float64]:
    """Return the squared first-order change of the loss when each class is zeroed (arXiv 1906.10771, eq. 8).

    Summed over batches and layers; needs labelled images, [N, ...] and int64 [N].
    """
    scores = np.zeros(structure.class_count)
    training = module.training
    module.eval()
    weights = _weights(module, structure)
    with torch.enable_grad():
        for images, labels in batches:
            gradients = _gradients(module, [parameter for _, parameter in weights], images, labels)
            for (name, parameter), gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    _add(scores, structure, module, name, (gradient * parameter.detach()).double(), square=True)
    module.train(training)
    return scores


def _gradients(module: nn.Module, parameters: Sequence[Tensor], images: Tensor, labels: Tensor) -> list[Tensor | None]:
    """Return the gradients of the mean loss, summed over parts of the batch: activations of one part fit in memory."""
    total: list[Tensor | None] = [None] * len(parameters)
    for start in range(0, len(labels), IMAGES_AT_ONCE):
        part = slice(start, start + IMAGES_AT_ONCE)
        loss = nn.functional.cross_entropy(module(images[part]), labels[part], reduction="sum") / len(labels)
        added = torch.autograd.grad(loss, parameters, allow_unused=True)
        total = [more if before is None else before + more for before, more in zip(total, added, strict=True)]
    return total


RULES: Mapping[str, Rule] = {"magnitude": magnitude, "taylor": taylor}


def unit_importance(
    module: nn.Module, structure: Structure, rule: str, batches: Iterable[Batch]
) -> dict[str, tuple[float, ...]]:
    """Return group → importance of each of its units, in unit order.

    Args:
        module: in eval mode; left as it was.
        structure: of that module.
        rule: a name in `RULES`.
        batches: labelled training images, for rules that need them.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(True)
    try:
        scores = RULES[rule](module, structure, batches)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return {name: tuple(float(scores[unit]) for unit in units) for name, units in structure.units.items()}


def ranking(importance: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[int, ...]]:
    """Return group → its units, most important first; ties keep their order."""
    return {name: tuple(np.argsort(-np.array(scores), kind="stable").tolist()) for name, scores in importance.items()}


def _weights(module: nn.Module, structure: Structure) -> list[tuple[str, nn.Parameter]]:
    """Return the weights and biases of every layer with channel axes, by layer name."""
    found = []
    for name, layer in module.named_modules():
        if (name, "out") in structure.classes:
            found += [(name, parameter) for parameter in layer.parameters(recurse=False)]
    return found


def _add(
    scores: NDArray[np.float64],
    structure: Structure,
    module: nn.Module,
    name: str,
    saliency: Tensor,
    *,
    square: bool = False,
) -> None:
    """Add one parameter's saliency to the classes of its channels, normalised to mean 1 over the parameter."""
    layer = module.get_submodule(name)
    for axis, side in _axes(layer, saliency.dim()):
        owners = structure.classes[name, side]
        if side == "in":
            owners = owners[: saliency.shape[axis]]
        per_channel = saliency.movedim(axis, 0).reshape(saliency.shape[axis], -1).sum(1)
        values = (per_channel**2 if square else per_channel).numpy()
        if not square:
            values = values / max(float(values.mean()), 1e-30)
        known = (owners >= 0) & (np.arange(len(owners)) < len(values))
        np.add.at(scores, owners[known], values[known[: len(values)]])


def _axes(layer: nn.Module, dimensions: int) -> tuple[tuple[int, Side], ...]:
    if dimensions == 1 or is_depthwise(layer):
        return ((0, "out"),)
    if isinstance(layer, CONVOLUTIONS) and layer.transposed:
        return ((0, "in"),) if layer.groups > 1 else ((0, "in"), (1, "out"))
    return ((0, "out"), (1, "in"))
