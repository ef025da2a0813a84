"""Images made from a network alone, for a search that may look at no other.

Noise is changed by gradient descent until the network's batch norms see in it what they saw in training, and until it
is sure of a class for each image, the classes in turn:

    loss = mean over batch norms of [ mean((m − μ)² / σ²) + mean((s / σ − 1)²) ] + w · cross-entropy

m and s are mean and standard deviation of what the norm reads, μ and σ its running ones. The first term is that of
ZeroQ (arXiv 2001.00281, equation 1) with each channel on its own scale, so that channels of large variance do not
decide alone; the second is DeepInversion's (arXiv 1912.08795, equation 2) without its image priors. A network without
batch norms knows nothing of its images: there (mean x² − 1)² keeps pixels x on the scale of normalised ones instead.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.errors import ModelError
from edgeprune.held import held

BATCH = 64
"""Images that are made together: statistics of fewer are noise."""

RATE = 0.1
"""Of Adam; ZeroQ's is 0.5 on unscaled terms."""

CLASS_WEIGHT = 0.1

RECIPE = 2
"""Changes whenever the same seed gives other images than before: those that were kept are no good then."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synthesise(
    module: nn.Module,
    shape: tuple[int, int, int],
    count: int,
    *,
    seed: int,
    steps: int = 80,
    advance: Callable[[float], None] | None = None,
) -> Tensor:
    """Return images that a network takes for its own kind.

    Args:
        module: with logits [N, classes]; left as it was.
        shape: C, H, W of one image.
        count: of images; fewer than there are classes leave some out.
        seed: of the noise; the same seed on the same number of threads gives the same images.
        steps: of descent.
        advance: told after each step which share of all work it was.

    Returns:
        Images [count, C, H, W], float32, on the scale of normalised ones.

    Raises:
        ModelError: if the descent leads to no finite image.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, *shape), generator=generator)
    with held(module, trainable=False), torch.enable_grad():
        parts = torch.split(noise, BATCH)
        tick = partial(advance or _unheard, 1 / (steps * len(parts)))
        begins = range(0, count, BATCH)
        return torch.cat([_descended(module, *each, steps, tick) for each in zip(parts, begins, strict=True)])


def _unheard(share: float) -> None:
    """Tell nobody."""


def _descended(module: nn.Module, noise: Tensor, first: int, steps: int, tick: Callable[[], None]) -> Tensor:
    """Return the images that noise [N, C, H, W] became; the first is for class `first`, the next for the next one."""
    images = noise.clone().requires_grad_()
    descent = torch.optim.Adam([images], lr=RATE)
    with _statistics(module) as gaps:
        for step in range(steps):
            descent.param_groups[0]["lr"] = RATE * (1 - step / steps)
            loss = _loss(module, images, first, gaps)
            descent.zero_grad()
            torch.autograd.backward(loss, inputs=[images])
            descent.step()
            tick()
    made = images.detach()
    if not bool(torch.isfinite(made).all()):
        raise ModelError(
            "no synthetic images can be made from the model",
            why="descent from noise ended in values that are not finite",
            next_step='give unlabelled images and set search.judged_by = "teacher"',
        )
    return made


def _loss(module: nn.Module, images: Tensor, first: int, gaps: list[Tensor]) -> Tensor:
    gaps.clear()
    logits = module(images)
    wanted = torch.arange(first, first + len(images)) % logits.shape[1]
    natural = torch.stack(gaps).mean() if gaps else (images.square().mean() - 1).square()
    return natural + CLASS_WEIGHT * functional.cross_entropy(logits, wanted)


@contextmanager
def _statistics(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect during the block, for each batch norm that runs, how far what it reads is from its statistics."""
    gaps: list[Tensor] = []
    hooks = [
        each.register_forward_pre_hook(_gap_into(gaps))
        for each in module.modules()
        if isinstance(each, NORMS) and each.running_mean is not None
    ]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()


def _gap_into(gaps: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(norm: nn.Module, read: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, NORMS)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        values = read[0].transpose(0, 1).flatten(1)
        deviation = (norm.running_var + norm.eps).sqrt()
        mean, spread = values.mean(1), (values.var(1, correction=0) + norm.eps).sqrt()
        gap = ((mean - norm.running_mean) / deviation).square() + (spread / deviation - 1).square()
        gaps.append(gap.mean())

    return note
