"""Train the cut model further, with the unpruned model as its teacher; any kill costs at most half a minute.

    loss = (1 − a) · cross-entropy(student, labels) + a · T² · KL(softmax(teacher / T) ‖ softmax(student / T))

(Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2.) The optimiser is SGD with Nesterov
momentum; the learning rate warms up over the first twentieth of the steps and falls along a cosine to zero.

What is returned is the best model by the validation split among the starting point and the end of every epoch, the
later of equals. The test split is not here to be looked at.

Everything random is a function of the seed and the step, so a run that was killed and resumed ends, in float32 and on
the same number of threads, bit for bit where the undisturbed run ends.
"""

import copy
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.canonical import digest
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import ConfigError, Interrupted
from edgeprune.intake.images import ArraySet
from edgeprune.intake.weights import state_sha256

if TYPE_CHECKING:
    from edgeprune.intake.config import FinetuneConfig

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises."""

BF16_GAIN = 1.1
"""bf16 is taken only where a step is faster than in float32 by at least this factor."""

PROBE_IMAGES = 32
"""Images in a step that is timed to choose the precision."""

EVALUATION_BATCH = 250


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the fine-tuning is.

    Attributes:
        step, steps: done and wanted.
        loss: of the last step; None before the first.
        accuracy: last top-1 on the validation split.
        seconds_left: estimated from this process's steps; None before the first.
    """

    step: int
    steps: int
    loss: float | None
    accuracy: float
    seconds_left: float | None

    @property
    def fraction(self) -> float:
        """Return the share that is done, 0 to 1."""
        return self.step / self.steps if self.steps else 1.0

    @property
    def note(self) -> str:
        """Return what to show beside the bar."""
        loss = "" if self.loss is None else f"loss {self.loss:.3f}, "
        return f"{loss}validation {self.accuracy:.2%}"


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
    """

    module: nn.Module
    accuracy: float
    accuracy_curve: tuple[tuple[int, float], ...]
    steps: int
    seconds: float
    precision: str
    resumed_at: int


@dataclass(kw_only=True)
class _State:
    """Everything a checkpoint holds beside the optimiser's momentum."""

    student: nn.Module
    best: dict[str, Tensor]
    precision: str
    step: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best_accuracy(self) -> float:
        """Return the accuracy of `best`."""
        return max(accuracy for _, accuracy in self.curve)


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
    with _held_interrupts() as interrupted:
        known_by = origin or state_sha256(student.state_dict())
        identity = _identity(known_by, teacher, train, validation, settings)
        run = _Run(student, teacher, train, validation, settings, checkpoint, identity)
        run.train(progress or _silent, interrupted)
    return run.result()


def _silent(_: Progress) -> None:
    """Report to nobody."""


class _Run:
    """One fine-tuning: its state, its optimiser and its checkpoint."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        train: ArraySet,
        validation: ArraySet,
        settings: "FinetuneConfig",
        checkpoint: Path,
        identity: str,
    ) -> None:
        self._settings, self._train, self._validation, self._checkpoint = settings, train, validation, checkpoint
        self._teacher = _prepared(teacher).eval()
        self._identity = identity
        self._steps = settings.total_steps(len(train))
        fresh = _prepared(student)
        self._state = _State(student=fresh, best={}, precision=settings.precision)
        self._optimiser = _optimiser(fresh, settings)
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
                loss = self._step(images, labels)
                if self._epoch_ends():
                    self._evaluate()
                if self._epoch_ends() or time.monotonic() - saved > self._settings.checkpoint_s:
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

    def _step(self, images: Tensor, labels: Tensor) -> float:
        state = self._state
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(state.step, self._steps, self._settings.learning_rate)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._settings.seed * 1_000_003 + state.step)  # dropout is a function of the step
            loss = _loss(state.student.train(), self._teacher, images, labels, state.precision, self._settings)
        value = float(loss.detach())
        if not math.isfinite(value):
            self._diverged(value)
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._optimiser.step()
        state.step += 1
        return value

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
        state = self._state
        accuracy = _accuracy(state.student, self._validation)
        better = not state.curve or accuracy >= state.best_accuracy
        state.curve.append((state.step, accuracy))
        if better:
            state.best = {name: each.detach().clone() for name, each in state.student.state_dict().items()}

    def _report(self, progress: Callable[[Progress], None], loss: float | None, started: float) -> None:
        state = self._state
        done = state.step - self._resumed_at
        left = (time.monotonic() - started) / done * (self._steps - state.step) if done else None
        facts = Progress(step=state.step, steps=self._steps, loss=loss, accuracy=state.curve[-1][1], seconds_left=left)
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
        module = _laid_out(copy.deepcopy(state.student), torch.contiguous_format)
        module.load_state_dict(state.best)
        return FinetuneResult(
            module=module.eval(),
            accuracy=state.best_accuracy,
            accuracy_curve=tuple(state.curve),
            steps=state.step,
            seconds=self._elapsed(),
            precision=state.precision,
            resumed_at=self._resumed_at,
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
            self._state.precision = faster_precision(self._state.student, self._teacher, self._train, self._settings)
        self._evaluate()

    def _save(self) -> None:
        state = self._state
        facts = {"step": state.step, "seconds": self._elapsed(), "curve": state.curve, "precision": state.precision}
        tensors = {f"student.{name}": each for name, each in state.student.state_dict().items()}
        tensors |= {f"best.{name}": each for name, each in state.best.items()}
        tensors |= {f"momentum.{name}": each for name, each in self._momentum().items()}
        Checkpoint(identity=self._identity, facts=facts, tensors=tensors).write(self._checkpoint)

    def _momentum(self) -> dict[str, Tensor]:
        buffers = {name: self._optimiser.state[each] for name, each in self._state.student.named_parameters()}
        return {
            name: each["momentum_buffer"]
            for name, each in buffers.items()
            if isinstance(each.get("momentum_buffer"), Tensor)
        }

    def _restore(self) -> bool:
        """Return whether there was a checkpoint to continue from."""
        if not self._checkpoint.exists():
            return False
        saved = Checkpoint.read(self._checkpoint, self._identity)
        facts, tensors, state = saved.facts, saved.tensors, self._state
        state.student.load_state_dict(_part(tensors, "student."))
        state.best = _part(tensors, "best.")
        state.step, state.seconds, state.precision = facts["step"], facts["seconds"], facts["precision"]
        state.curve = [(step, accuracy) for step, accuracy in facts["curve"]]
        momentum = _part(tensors, "momentum.")
        for name, each in state.student.named_parameters():
            if name in momentum:
                self._optimiser.state[each]["momentum_buffer"] = momentum[name].contiguous(
                    memory_format=torch.channels_last if each.dim() == 4 else torch.contiguous_format
                )
        return True


def _prepared(module: nn.Module) -> nn.Module:
    """Return a copy laid out as the CPU's convolutions want it; all of its parameters learn."""
    return _laid_out(copy.deepcopy(module), torch.channels_last).requires_grad_(True)


def _laid_out(module: nn.Module, layout: torch.memory_format) -> nn.Module:
    made: nn.Module = module.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs leave it out
    return made


def _optimiser(module: nn.Module, settings: "FinetuneConfig") -> torch.optim.SGD:
    """Return SGD that decays matrices and kernels, not biases and batch norms."""
    parameters = list(module.parameters())
    return torch.optim.SGD(
        [
            {"params": [each for each in parameters if each.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [each for each in parameters if each.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )


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


def _loss(
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
            torch.autograd.backward(_loss(probe, teacher, images, labels, precision, settings))
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[1:])

    with torch.random.fork_rng(devices=[]):
        return "bf16" if seconds("fp32") > BF16_GAIN * seconds("bf16") else "fp32"


@torch.inference_mode()
def _accuracy(module: nn.Module, images: ArraySet) -> float:
    """Return top-1 in float32."""
    module.eval()
    right = 0
    for pixels, labels in images.batches(EVALUATION_BATCH):
        right += int((module(pixels.contiguous(memory_format=torch.channels_last)).argmax(1) == labels).sum())
    return right / len(images)


def _identity(
    student: str, teacher: nn.Module, train: ArraySet, validation: ArraySet, settings: "FinetuneConfig"
) -> str:
    """Return the SHA-256 of everything that the result depends on; `student` is a digest."""
    states = [student, state_sha256(teacher.state_dict())]
    facts = settings.model_dump(exclude={"checkpoint_s"})
    return digest({"settings": facts, "states": states, "data": [train.digest, validation.digest]})


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


@contextmanager
def _held_interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no step is cut in half; the second acts at once.

    Nothing is changed outside the main thread, which never sees one, or where the program has a handler of its own: it
    stops the run by raising `Interrupted` from its progress.
    """
    interrupted = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield interrupted
        return

    def note(_signal: int, _frame: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
