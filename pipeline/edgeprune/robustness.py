"""How many answers of a model survive images changed on purpose: FGSM and PGD within an L-infinity ball.

    FGSM    x + ε · sign(∂ loss / ∂ x)                                    Goodfellow et al., arXiv 1412.6572, eq. in 3
    PGD     from a random point of the ball, so many smaller such steps,  Madry et al., arXiv 1706.06083, section 2.1
            each back into the ball

ε is in units of pixels scaled to [0, 1]; each channel's is divided by the standard deviation it was normalised with,
and no pixel leaves [0, 1]. The gradient is the model's own: what is measured is a white-box attack on the very model
that is judged.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.errors import ConfigError
from edgeprune.held import held

OVERSHOOT = 2.5
"""PGD's steps together reach so many times ε (Madry et al.): from any point to any other, and some more."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How pixels in [0, 1] became what the model reads: (pixel − mean) / std, of each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def scaled(self, epsilon: float, images: Tensor) -> Tensor:
        """Return ε in the units of the images, to be broadcast over them."""
        return epsilon / self._spread(self.std, images)

    def valid(self, images: Tensor) -> Tensor:
        """Return images [N, C, ...] with what lies outside of [0, 1] brought back to the nearer end."""
        mean, std = self._spread(self.mean, images), self._spread(self.std, images)
        return images.clamp(-mean / std, (1 - mean) / std)

    @staticmethod
    def _spread(values: tuple[float, ...], images: Tensor) -> Tensor:
        made = torch.tensor(values, dtype=images.dtype, device=images.device)
        return made.view(1, -1, *[1] * (images.dim() - 2))


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One way of changing images.

    Attributes:
        kind: "fgsm" or "pgd".
        epsilon: radius of the ball, pixels in [0, 1].
        steps: of PGD.
        seed: of the points PGD starts from.
    """

    kind: Literal["fgsm", "pgd"]
    epsilon: float
    steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise ConfigError(f"epsilon is {self.epsilon}", why="pixels are between 0 and 1", next_step="say 8 / 255")
        if self.steps < 1:
            raise ConfigError(f"an attack of {self.steps} steps", next_step="give 1 or more")

    @property
    def name(self) -> str:
        """Return what to call it in a table."""
        steps = f"-{self.steps}" if self.kind == "pgd" else ""
        return f"{self.kind}{steps} {self.epsilon:g}"


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """What is left of a model under one attack; counts of `images`.

    Attributes:
        right: classified correctly as they are.
        right_attacked: classified correctly after the attack.
        unchanged: classified after the attack as before it, right or wrong (the measure of Meng et al., 2405.00074).
    """

    images: int
    right: int
    right_attacked: int
    unchanged: int


def fgsm(module: nn.Module, images: Tensor, labels: Tensor, epsilon: float, pixels: Pixels) -> Tensor:
    """Return the images one signed gradient step away from the labels; valid pixels, at most ε from what they were.

    Args:
        module: in the mode it is to be judged in; answers [N, classes].
        images: [N, C, ...], normalised.
        labels: int64 [N].
        epsilon: in pixels of [0, 1].
    """
    with _gradients():
        start = images.detach().clone()
        return pixels.valid(start + pixels.scaled(epsilon, start) * _uphill(module, start, labels))


def pgd(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    pixels: Pixels,
    *,
    steps: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the images after several signed gradient steps of 2.5 · ε / steps, each back into the ball.

    Args:
        generator: draws where in the ball to start; None: from the images.

    Others as for `fgsm`.
    """
    with _gradients():
        start = images.detach().clone()
        ball = pixels.scaled(epsilon, start)
        moved = start
        if generator is not None:
            drawn = torch.rand(start.shape, generator=generator, dtype=start.dtype).to(start.device)
            moved = pixels.valid(start + ball * (2 * drawn - 1))
        for _ in range(steps):
            moved = moved + (OVERSHOOT / steps) * ball * _uphill(module, moved, labels)
            moved = pixels.valid(torch.minimum(torch.maximum(moved, start - ball), start + ball))
        return moved


def robustness(
    module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], attacks: Sequence[Attack], pixels: Pixels
) -> dict[str, Robustness]:
    """Return attack name → what is left of a module under it.

    Args:
        module: judged in eval mode and left as it was found.
        batches: normalised images [N, C, ...] and labels int64 [N]; gone through once.
        attacks: no two of one name.
        pixels: how the images were normalised.
    """
    generators = {each.name: torch.Generator().manual_seed(each.seed) for each in attacks}
    counts = {each.name: [0, 0, 0, 0] for each in attacks}
    with held(module):
        for images, labels in batches:
            before = _answers(module, images)
            for attack in attacks:
                after = _answers(module, _attacked(module, images, labels, attack, pixels, generators[attack.name]))
                found = (
                    len(labels),
                    *(int(each.sum()) for each in (before == labels, after == labels, after == before)),
                )
                counts[attack.name] = [one + more for one, more in zip(counts[attack.name], found, strict=True)]
    return {
        name: Robustness(images=images, right=right, right_attacked=attacked, unchanged=unchanged)
        for name, (images, right, attacked, unchanged) in counts.items()
    }


def _attacked(
    module: nn.Module, images: Tensor, labels: Tensor, attack: Attack, pixels: Pixels, generator: torch.Generator
) -> Tensor:
    if attack.kind == "fgsm":
        return fgsm(module, images, labels, attack.epsilon, pixels)
    return pgd(module, images, labels, attack.epsilon, pixels, steps=attack.steps, generator=generator)


def _uphill(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the sign of the loss's gradient by the images; the gradients of the parameters stay as they are."""
    images = images.detach().requires_grad_(True)
    loss = functional.cross_entropy(module(images), labels.clone(), reduction="sum")
    return torch.autograd.grad(loss, images)[0].sign()


@torch.no_grad()
def _answers(module: nn.Module, images: Tensor) -> Tensor:
    answers: Tensor = module(images).argmax(1)
    return answers


@contextmanager
def _gradients() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield
