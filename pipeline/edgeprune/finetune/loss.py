"""What is learned from, how fast, and in which arithmetic."""

import copy
import math
import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.intake.images import ArraySet

if TYPE_CHECKING:
    from edgeprune.intake.config import FinetuneConfig

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises."""

BF16_GAIN = 1.1
"""bf16 is taken only where a step is faster than in float32 by at least this factor."""

PROBE_IMAGES = 32
"""Images in a step that is timed to choose the precision."""


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of 0-based `step`: a linear warm-up to `peak`, then a half cosine to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def distillation_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, weight: float, temperature: float
) -> Tensor:
    """Return the mean loss over the batch; see the module's first formula.

    Args:
        student, teacher: logits N x classes, float32; no teacher stands for weight 0.
        labels: N, int64.
        weight: a, the teacher's share.
        temperature: T.
    """
    if teacher is None:
        return functional.cross_entropy(student, labels)
    soft = functional.kl_div(
        functional.log_softmax(student / temperature, 1),
        functional.log_softmax(teacher / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * functional.cross_entropy(student, labels) + weight * temperature**2 * soft


def batch_loss(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, precision: str, settings: "FinetuneConfig"
) -> Tensor:
    images = images.contiguous(memory_format=torch.channels_last)
    wanted = None
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        if settings.distill > 0:
            with torch.no_grad():
                wanted = teacher(images).float()
        logits = student(images).float()
    return distillation_loss(logits, wanted, labels, settings.distill, settings.temperature)


def faster_precision(student: nn.Module, teacher: nn.Module, train: ArraySet, settings: "FinetuneConfig") -> str:
    """Return "bf16" if a training step is clearly faster with bf16 products on this CPU, else "fp32".

    Times three steps each way, after one that is thrown away, on a copy of the student.
    """
    probe = copy.deepcopy(student).train()
    images, labels = train.tensor(slice(PROBE_IMAGES)), train.labels[:PROBE_IMAGES]
    if len(labels) < 2:
        return "fp32"

    def seconds(precision: str) -> float:
        taken = []
        for _ in range(4):
            started = time.perf_counter()
            torch.autograd.backward(batch_loss(probe, teacher, images, labels, precision, settings))
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[1:])

    with torch.random.fork_rng(devices=[]):
        return "bf16" if seconds("fp32") > BF16_GAIN * seconds("bf16") else "fp32"
