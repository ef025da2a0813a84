"""Where a fine-tuning is, and what came out of it."""

from dataclasses import dataclass

from torch import nn

from edgeprune.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the fine-tuning is.

    Attributes:
        step, steps: done and wanted.
        loss: of the last step; None before the first.
        accuracy: last top-1 on the validation split.
        seconds_left: estimated from this process's steps; None before the first.
        news: what else there is to say, or nothing.
    """

    step: int
    steps: int
    loss: float | None
    accuracy: float
    seconds_left: float | None
    news: str = ""

    @property
    def fraction(self) -> float:
        """Return the share that is done, 0 to 1."""
        return self.step / self.steps if self.steps else 1.0

    @property
    def note(self) -> str:
        """Return what to show beside the bar."""
        loss = "" if self.loss is None else f"loss {self.loss:.3f}, "
        return f"{loss}validation {self.accuracy:.2%}" + (f", {self.news}" if self.news else "")


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What came out.

    Attributes:
        module: the best model by validation accuracy, in eval mode, float32.
        accuracy: its top-1 on the validation split.
        accuracy_curve: (step, validation top-1), from step 0.
        steps: optimiser steps taken, earlier processes included.
        seconds: wall seconds, earlier processes included.
        precision: "fp32" or "bf16".
        resumed_at: the step this process started from.
        plan: what the module was cut by, where the fine-tuning decided it; None: by what its student was cut.
    """

    module: nn.Module
    accuracy: float
    accuracy_curve: tuple[tuple[int, float], ...]
    steps: int
    seconds: float
    precision: str
    resumed_at: int
    plan: Plan | None = None
