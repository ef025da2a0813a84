"""The steps of a fine-tuning, its checkpoint, and what is best among its epochs."""

import copy
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgeprune.canonical import digest
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import ConfigError, Interrupted
from edgeprune.finetune.decaying import DecayingLearner
from edgeprune.finetune.facts import FinetuneResult, Progress
from edgeprune.finetune.interrupts import held_interrupts
from edgeprune.finetune.learner import CutLearner, Learner, laid_out, part, prepared
from edgeprune.finetune.loss import batch_loss, faster_precision, learning_rate
from edgeprune.intake.images import ArraySet
from edgeprune.intake.weights import state_sha256
from edgeprune.plan import Plan
from edgeprune.structure import Structure

if TYPE_CHECKING:
    from edgeprune.intake.config import FinetuneConfig


@dataclass(kw_only=True)
class _State:
    """Everything a checkpoint holds beside the learner's own."""

    precision: str
    step: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_accuracy: float = -1.0


def finetune(
    student: nn.Module,
    teacher: nn.Module,
    train: ArraySet,
    validation: ArraySet,
    settings: "FinetuneConfig",
    *,
    checkpoint: Path,
    origin: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> FinetuneResult:
    """Return the student after training; the modules that are passed in stay as they are.

    Args:
        student: the cut model.
        teacher: the unpruned model, with the same classes.
        train: what to learn from.
        validation: what to choose the best epoch by.
        settings: how; `method` is not looked at.
        checkpoint: a file to resume from if it exists, and to write; it stays, so that a finished run is not repeated.
        origin: a digest of what the student was made from, to know its checkpoint by; None: its own weights. They are
            no good for that where they are computed anew: another number of threads rounds them otherwise.
        progress: called before the first and after every step; it may raise `Interrupted`.

    Raises:
        ConfigError: if the loss is no longer finite, or the checkpoint belongs to another run.
        CorruptArtifact: if the checkpoint is damaged.
        StorageFull: if it cannot be written.
        Interrupted: on Ctrl-C or when `progress` says so, after a checkpoint.
    """
    task = _Task(teacher=teacher, train=train, validation=validation, settings=settings, checkpoint=checkpoint)
    known_by = origin or state_sha256(student.state_dict())
    return _carried_out(task, lambda: CutLearner(student, settings), known_by, progress)


def finetune_decaying(
    module: nn.Module,
    structure: Structure,
    plan: Plan,
    train: ArraySet,
    validation: ArraySet,
    settings: "FinetuneConfig",
    *,
    checkpoint: Path,
    origin: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> FinetuneResult:
    """Return the unpruned model after its channels decayed, it was cut and trained on; its own teacher all the while.

    Args:
        module: the unpruned model; it stays as it is.
        structure: its channel groups.
        plan: only its widths count: which channels go is found on the way, and is in the result.
        train, validation, checkpoint, progress: as for `finetune`.
        settings: how; the units decay over the first `decay.share` of the steps at most.
        origin: a digest of what all of it was made from; None: the module's weights and the plan's widths.

    Raises:
        ConfigError: as `finetune`; also if the host does not apply to the model, or there are too few steps.
        CorruptArtifact, StorageFull, Interrupted: as `finetune`.
    """
    task = _Task(teacher=module, train=train, validation=validation, settings=settings, checkpoint=checkpoint)
    known_by = digest([origin or state_sha256(module.state_dict()), plan.widths])
    steps = settings.total_steps(len(train))
    return _carried_out(task, lambda: DecayingLearner(module, structure, plan, settings, steps), known_by, progress)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What every fine-tuning is given."""

    teacher: nn.Module
    train: ArraySet
    validation: ArraySet
    settings: "FinetuneConfig"
    checkpoint: Path

    def identity(self, known_by: str) -> str:
        """Return the SHA-256 of everything that the result depends on; `known_by` stands for what learns."""
        states = [known_by, state_sha256(self.teacher.state_dict())]
        facts = self.settings.model_dump(exclude={"checkpoint_s"})
        return digest({"settings": facts, "states": states, "data": [self.train.digest, self.validation.digest]})


def _carried_out(
    task: _Task, learner: Callable[[], Learner], known_by: str, progress: Callable[[Progress], None] | None
) -> FinetuneResult:
    with held_interrupts() as interrupted:
        run = _Run(task, learner(), task.identity(known_by))
        run.train(progress or _silent, interrupted)
    return run.result()


def _silent(_: Progress) -> None:
    """Report to nobody."""


class _Run:
    """One fine-tuning: its state, its learner and its checkpoint."""

    def __init__(self, task: _Task, learner: Learner, identity: str) -> None:
        self._settings, self._train, self._validation = task.settings, task.train, task.validation
        self._checkpoint, self._identity, self._learner = task.checkpoint, identity, learner
        self._teacher = prepared(task.teacher).eval()
        self._steps = task.settings.total_steps(len(task.train))
        self._state = _State(precision=task.settings.precision)
        if not self._restore():
            self._begin()
        self._resumed_at = self._state.step
        self._mark = time.monotonic()

    # ------------------------------------------------------------------------------------------------- the loop

    def train(self, progress: Callable[[Progress], None], interrupted: threading.Event) -> None:
        """Take all steps that are left."""
        started, saved = time.monotonic(), time.monotonic()
        self._report(progress, None, started)
        if interrupted.is_set():
            self._stop()
        while self._state.step < self._steps:
            for images, labels in self._rest_of_epoch():
                loss, exchanged = self._step(images, labels)
                milestone = exchanged or self._epoch_ends()
                if milestone:
                    self._evaluate()
                if milestone or time.monotonic() - saved > self._settings.checkpoint_s:
                    self._save()
                    saved = time.monotonic()
                self._report(progress, loss, started)
                if interrupted.is_set():
                    self._stop()
                if self._state.step >= self._steps:
                    break

    def _rest_of_epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, done = divmod(self._state.step, self._per_epoch)
        size, settings = self._settings.batch_size, self._settings
        batches = self._train.batches(
            size, shuffle_seed=settings.seed * 10_007 + epoch, augment=settings.augment, start=done
        )
        whole = min(size, len(self._train))
        return ((images, labels) for images, labels in batches if len(labels) == whole)

    @property
    def _per_epoch(self) -> int:
        return max(1, len(self._train) // self._settings.batch_size)

    def _epoch_ends(self) -> bool:
        return self._state.step % self._per_epoch == 0 or self._state.step == self._steps

    def _step(self, images: Tensor, labels: Tensor) -> tuple[float, bool]:
        """Take one step, and return its loss and whether the student is another module from now on."""
        state, learner = self._state, self._learner
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._settings.seed * 1_000_003 + state.step)  # dropout is a function of the step
            loss = batch_loss(learner.student.train(), self._teacher, images, labels, state.precision, self._settings)
        value = float(loss.detach())
        if not math.isfinite(value):
            self._diverged(value)
        learner.zero_grad()
        torch.autograd.backward(loss)
        exchanged = learner.step(learning_rate(state.step, self._steps, self._settings.learning_rate))
        state.step += 1
        return value, exchanged

    def _diverged(self, loss: float) -> None:
        self._checkpoint.unlink(missing_ok=True)
        raise ConfigError(
            f"fine-tuning diverged at step {self._state.step} of {self._steps}: the loss is {loss}",
            why=f"learning rate {self._settings.learning_rate}, {self._state.precision}",
            next_step="lower finetune.learning_rate" + ('; or set finetune.precision = "fp32"' * (self._is_bf16)),
        )

    @property
    def _is_bf16(self) -> bool:
        return self._state.precision == "bf16"

    def _evaluate(self) -> None:
        """Note the accuracy, and the weights if they are the best of those that may be the result."""
        state, student = self._state, self._learner.student
        accuracy = _accuracy(student, self._validation)
        state.curve.append((state.step, accuracy))
        if self._learner.settled and accuracy >= state.best_accuracy:
            state.best_accuracy = accuracy
            state.best = {name: each.detach().clone() for name, each in student.state_dict().items()}

    def _report(self, progress: Callable[[Progress], None], loss: float | None, started: float) -> None:
        state = self._state
        done = state.step - self._resumed_at
        facts = Progress(
            step=state.step,
            steps=self._steps,
            loss=loss,
            accuracy=state.curve[-1][1],
            seconds_left=(time.monotonic() - started) / done * (self._steps - state.step) if done else None,
            news=self._learner.news,
        )
        try:
            progress(facts)
        except Interrupted:
            self._save()
            raise
        except KeyboardInterrupt:
            self._stop()

    def _stop(self) -> None:
        self._save()
        raise Interrupted(
            f"fine-tuning stopped at step {self._state.step} of {self._steps}",
            next_step="run the same command again to continue",
        )

    def result(self) -> FinetuneResult:
        """Return the best model."""
        state = self._state
        module = laid_out(copy.deepcopy(self._learner.student), torch.contiguous_format)
        module.load_state_dict(state.best)
        return FinetuneResult(
            module=module.eval(),
            accuracy=state.best_accuracy,
            accuracy_curve=tuple(state.curve),
            steps=state.step,
            seconds=self._elapsed(),
            precision=state.precision,
            resumed_at=self._resumed_at,
            plan=self._learner.plan,
        )

    def _elapsed(self) -> float:
        now = time.monotonic()
        self._state.seconds += now - self._mark
        self._mark = now
        return self._state.seconds

    # ------------------------------------------------------------------------------------------ begin, save, restore

    def _begin(self) -> None:
        self._mark = time.monotonic()
        if self._state.precision == "auto":
            self._state.precision = faster_precision(self._learner.student, self._teacher, self._train, self._settings)
        self._evaluate()

    def _save(self) -> None:
        state, (learned, tensors) = self._state, self._learner.state()
        facts = {
            "step": state.step,
            "seconds": self._elapsed(),
            "curve": state.curve,
            "precision": state.precision,
            "best_accuracy": state.best_accuracy,
            "learner": learned,
        }
        tensors |= {f"student.{name}": each for name, each in self._learner.student.state_dict().items()}
        tensors |= {f"best.{name}": each for name, each in state.best.items()}
        Checkpoint(identity=self._identity, facts=facts, tensors=tensors).write(self._checkpoint)

    def _restore(self) -> bool:
        """Return whether there was a checkpoint to continue from."""
        if not self._checkpoint.exists():
            return False
        saved = Checkpoint.read(self._checkpoint, self._identity)
        facts, tensors, state = saved.facts, saved.tensors, self._state
        self._learner.restore(facts["learner"], tensors)
        self._learner.student.load_state_dict(part(tensors, "student."))
        state.step, state.seconds, state.precision = facts["step"], facts["seconds"], facts["precision"]
        state.curve = [(step, accuracy) for step, accuracy in facts["curve"]]
        state.best, state.best_accuracy = part(tensors, "best."), facts["best_accuracy"]
        return True


@torch.inference_mode()
def _accuracy(module: nn.Module, images: ArraySet) -> float:
    """Return top-1 in float32."""
    module.eval()
    right = 0
    for pixels, labels in images.batches(images.evaluation_batch):
        right += int((module(pixels.contiguous(memory_format=torch.channels_last)).argmax(1) == labels).sum())
    return right / len(images)
