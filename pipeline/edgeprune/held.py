"""A module held still while it is looked at: in eval mode, and as it was afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def held(module: nn.Module, *, trainable: bool | None = None) -> Iterator[None]:
    """Keep a module in eval mode, its parameters with or without gradients; afterwards every flag is as it was.

    Args:
        module: gradients that its parameters have already are neither read nor written.
        trainable: whether parameters require gradients during the block; None: those that did before.
    """
    modes = [(each, each.training) for each in module.modules()]
    flags = [(each, each.requires_grad) for each in module.parameters()]
    module.eval()
    if trainable is not None:
        module.requires_grad_(trainable)
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
