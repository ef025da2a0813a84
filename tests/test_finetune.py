"""Fine-tuning learns, survives any kill without changing its result, and says when it cannot go on."""

import copy
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from quadrants import network, quadrants, same_weights
from torch import Tensor
from torch.nn import functional

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import ConfigError, CorruptArtifact, Interrupted
from edgeprune.finetune import FinetuneResult, Progress, distillation_loss, faster_precision, finetune, learning_rate
from edgeprune.intake.config import FinetuneConfig


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep every run on the same number of threads, which bit-for-bit equality needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TRAIN, VALIDATION = quadrants(200, 0), quadrants(80, 1)
SETTINGS = FinetuneConfig(
    epochs=3, batch_size=32, learning_rate=0.05, precision="fp32", augment="none", checkpoint_s=1e9, seed=3
)


def run(checkpoint: Path, settings: FinetuneConfig = SETTINGS, **changes: object) -> FinetuneResult:
    """Return the result of the standard run with these changes."""
    arguments: dict[str, object] = {
        "student": network(4, 1),
        "train": TRAIN,
        "progress": None,
        "origin": None,
    } | changes
    return finetune(
        arguments["student"],  # type: ignore[arg-type]
        network(8, 2),
        arguments["train"],  # type: ignore[arg-type]
        VALIDATION,
        settings,
        checkpoint=checkpoint,
        origin=arguments["origin"],  # type: ignore[arg-type]
        progress=arguments["progress"],  # type: ignore[arg-type]
    )


def test_it_learns_and_leaves_its_arguments_alone(tmp_path: Path) -> None:
    """Accuracy rises from chance, and the student that was passed in is the same afterwards."""
    student = network(4, 1)
    before = copy.deepcopy(student)
    result = run(tmp_path / "c", SETTINGS.model_copy(update={"epochs": 8, "distill": 0.0}), student=student)
    assert same_weights(student, before)
    assert result.accuracy_curve[0][1] < 0.5 < 0.9 < result.accuracy
    assert not result.module.training
    assert (result.steps, result.precision, result.resumed_at) == (48, "fp32", 0)


def test_the_result_is_the_best_epoch_by_validation(tmp_path: Path) -> None:
    """The curve has the start and each epoch's end; the module that is returned scores the best of them."""
    result = run(tmp_path / "c")
    assert [step for step, _ in result.accuracy_curve] == [0, 6, 12, 18]
    assert result.accuracy == max(accuracy for _, accuracy in result.accuracy_curve)
    with torch.inference_mode():
        right = (result.module(VALIDATION.tensor()).argmax(1) == VALIDATION.labels).float().mean()
    assert float(right) == pytest.approx(result.accuracy)


def test_training_that_does_harm_is_not_returned(tmp_path: Path) -> None:
    """A good student with a ruinous learning rate comes back as it was."""
    good = run(tmp_path / "a", SETTINGS.model_copy(update={"epochs": 8, "distill": 0.0})).module
    ruinous = SETTINGS.model_copy(update={"learning_rate": 30.0, "distill": 0.0, "epochs": 1})
    ruined = run(tmp_path / "b", ruinous, student=good)
    assert ruined.accuracy_curve[-1][1] < ruined.accuracy
    assert same_weights(ruined.module, good)


def test_nothing_random_is_global(tmp_path: Path) -> None:
    """Another state of the global generator gives the same weights, and the state is left as it was."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = run(tmp_path / "a").module
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_weights(run(tmp_path / "b").module, one)
    assert not same_weights(run(tmp_path / "c", SETTINGS.model_copy(update={"seed": 4})).module, one)


class KilledError(Exception):
    """Stands for the end of the process."""


def killed_at(step: int) -> Callable[[Progress], None]:
    """Return a progress that ends the run after this step."""

    def progress(facts: Progress) -> None:
        if facts.step == step:
            raise KilledError

    return progress


@pytest.mark.parametrize("step", [2, 6, 8, 17])
def test_a_killed_run_ends_where_an_undisturbed_one_ends(tmp_path: Path, step: int) -> None:
    """Whenever it is killed, and wherever the last checkpoint was: within an epoch or at its end."""
    eager = SETTINGS.model_copy(update={"checkpoint_s": 1e-9 if step % 2 == 0 else 1e9, "augment": "flip-crop"})
    whole = run(tmp_path / "whole", eager)
    with pytest.raises(KilledError):
        run(tmp_path / "c", eager, progress=killed_at(step))
    resumed = run(tmp_path / "c", eager)
    assert resumed.resumed_at == (step if step % 2 == 0 else 12)
    assert same_weights(resumed.module, whole.module)
    assert resumed.accuracy_curve == whole.accuracy_curve


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    """The second call takes no step and returns the same module."""
    first = run(tmp_path / "c")
    seen: list[Progress] = []
    second = run(tmp_path / "c", progress=seen.append)
    assert (second.resumed_at, len(seen)) == (18, 1)
    assert same_weights(first.module, second.module)


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import importlib.util
spec = importlib.util.spec_from_file_location("t", sys.argv[2])
t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
import torch
torch.set_num_threads(1)
slow = t.SETTINGS.model_copy(update={"checkpoint_s": 1e-9})
t.run(Path(sys.argv[3]), slow, progress=lambda facts: (print(facts.step, flush=True), time.sleep(0.05)))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_real_signal_loses_nothing(tmp_path: Path, how: signal.Signals) -> None:
    """A process killed in the middle of its work leaves a checkpoint from which the same result is reached."""
    checkpoint = tmp_path / "c"
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), __file__, str(checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for line in child.stdout:
            if int(line) == 7:
                os.kill(child.pid, how)
                break
        child.stdout.read()
        complaint = child.stderr.read()
    assert child.returncode != 0
    assert how == signal.SIGKILL or "Interrupted: fine-tuning stopped at step" in complaint
    resumed = run(checkpoint)
    assert 6 <= resumed.resumed_at <= 10
    assert same_weights(resumed.module, run(tmp_path / "whole").module)


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), Interrupted("step 4 of 18", next_step="same command")])
def test_an_interrupt_is_kept_in_a_checkpoint(tmp_path: Path, cause: BaseException) -> None:
    """Ctrl-C while progress is drawn, or a caller that wants to stop: the step is saved."""

    def progress(facts: Progress) -> None:
        if facts.step == 4:
            raise cause

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="step 4 of 18") as caught:
        run(tmp_path / "c", progress=progress)
    assert "same command" in caught.value.next_step
    assert signal.getsignal(signal.SIGINT) is before
    assert run(tmp_path / "c").resumed_at == 4


def test_a_changed_bit_is_refused(tmp_path: Path) -> None:
    """Wherever it is; the file is left for whoever wants to look at it."""
    run(tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    for place in (0, 30, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (tmp_path / "c").write_bytes(damaged)
        with pytest.raises(CorruptArtifact, match="cannot be read"):
            run(tmp_path / "c")
    (tmp_path / "c").write_bytes(whole[:-9])
    with pytest.raises(CorruptArtifact):
        run(tmp_path / "c")


@pytest.mark.parametrize("change", ["settings", "student", "data"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: str) -> None:
    """Other settings, another student, other data; how often to save does not count."""
    run(tmp_path / "c")
    run(tmp_path / "c", SETTINGS.model_copy(update={"checkpoint_s": 5.0}))
    settings = SETTINGS.model_copy(update={"momentum": 0.5}) if change == "settings" else SETTINGS
    changes = {"student": {"student": network(4, 9)}, "data": {"train": quadrants(200, 5)}}.get(change, {})
    with pytest.raises(ConfigError, match="belongs to another run"):
        run(tmp_path / "c", settings, **changes)


def test_a_student_made_anew_of_the_same_origin_continues(tmp_path: Path) -> None:
    """Its weights were computed again, with other threads, and differ in their last bits; the finished run counts."""
    student = network(4, 1)
    first = run(tmp_path / "c", student=student, origin="a")
    rounded = copy.deepcopy(student)
    with torch.no_grad():
        next(iter(rounded.parameters())).mul_(1 + 1e-6)
    again = run(tmp_path / "c", student=rounded, origin="a")
    assert same_weights(again.module, first.module)
    with pytest.raises(ConfigError, match="belongs to another run"):
        run(tmp_path / "c", student=student, origin="b")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The checkpoint's place is checked when it is written."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        run(tmp_path / "file" / "c")


def test_divergence_is_an_error_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    """A loss that is not finite names the step and the setting to change."""
    with pytest.raises(ConfigError, match="diverged at step") as caught:
        run(tmp_path / "c", SETTINGS.model_copy(update={"learning_rate": 1e30}))
    assert "lower finetune.learning_rate" in caught.value.next_step
    assert not (tmp_path / "c").exists()


def test_progress_counts_up_and_the_time_left_down(tmp_path: Path) -> None:
    """One report before the first step and one after each."""
    seen: list[Progress] = []
    run(tmp_path / "c", progress=seen.append)
    assert [each.step for each in seen] == list(range(19))
    assert seen[0].seconds_left is None
    assert seen[0].fraction == 0
    assert (seen[-1].fraction, seen[-1].seconds_left) == (1, 0)
    assert all(each.loss is not None and each.loss > 0 for each in seen[1:])
    assert seen[0].note.startswith("validation ")
    assert seen[-1].note.startswith(f"loss {seen[-1].loss:.3f}, validation ")


def test_a_program_s_own_handler_is_left_in_charge(tmp_path: Path) -> None:
    """A Ctrl-C goes to the handler that was there, and the fine-tuning goes on until it is told to stop."""
    heard: list[int] = []

    def progress(facts: Progress) -> None:
        if facts.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        assert run(tmp_path / "c", progress=progress).steps == 18
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]


def test_no_steps_return_the_student(tmp_path: Path) -> None:
    """Zero epochs are allowed."""
    student = network(4, 1)
    result = run(tmp_path / "c", SETTINGS.model_copy(update={"epochs": 0}), student=student)
    assert same_weights(result.module, student)
    assert len(result.accuracy_curve) == 1


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_bf16_learns_in_float32_weights(tmp_path: Path, precision: str) -> None:
    """Whichever precision is taken is reported, and the weights stay float32."""
    result = run(tmp_path / "c", SETTINGS.model_copy(update={"precision": precision, "epochs": 8, "distill": 0.0}))
    assert result.precision in ({"fp32", "bf16"} if precision == "auto" else {"bf16"})
    assert {each.dtype for each in result.module.parameters()} == {torch.float32}
    assert result.accuracy > 0.8


def test_choosing_the_precision_changes_nothing() -> None:
    """The steps that are timed are taken on a copy."""
    student, state = network(4, 1), torch.get_rng_state()
    before = copy.deepcopy(student)
    assert faster_precision(student, network(8, 2), TRAIN, SETTINGS) in {"fp32", "bf16"}
    assert same_weights(student, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_biases_and_batch_norms_do_not_decay(tmp_path: Path) -> None:
    """Under a huge decay without gradients only kernels and matrices shrink."""
    student = network(4, 1)
    with torch.no_grad():
        for each in student.parameters():
            each.fill_(1.0)
    settings = SETTINGS.model_copy(update={"steps": 1, "epochs": None, "weight_decay": 10.0, "learning_rate": 1e-6})
    run(tmp_path / "c", settings, student=student)
    checkpoint_of = {
        name: tensor
        for name, tensor in _tensors(tmp_path / "c").items()
        if name.startswith("student.") and "running" not in name and "tracked" not in name
    }
    for name, tensor in checkpoint_of.items():
        shrunk = float((1 - tensor).abs().mean()) > 1e-5
        assert shrunk == (tensor.dim() > 1), name


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


# ---------------------------------------------------------------------------------------------------------- formulas


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    """Linear over a twentieth, then a half cosine: hand-computed points."""
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert learning_rate(5 + 95 // 2, 100, 2.0) == pytest.approx(1 + math.cos(math.pi * 47 / 95))
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(0, 1, 0.3) == 0.3


def test_the_loss_is_the_formula() -> None:
    """Two classes, computed by hand: a = 0.25, T = 2."""
    student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    p = 1 / (1 + math.exp(-2.0))  # teacher's second class at T = 2
    q = 1 / (1 + math.exp(1.0))  # student's second class at T = 2
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    expected = 0.75 * math.log(1 + math.exp(-2.0)) + 0.25 * 4 * kl
    loss = distillation_loss(student, teacher, torch.tensor([0]), weight=0.25, temperature=2.0)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_without_a_teacher_the_loss_is_cross_entropy() -> None:
    """No teacher stands for a weight of zero."""
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    loss = distillation_loss(logits, None, labels, weight=0.9, temperature=3.0)
    assert torch.equal(loss, functional.cross_entropy(logits, labels))


def test_a_teacher_that_agrees_teaches_nothing() -> None:
    """With a = 1 the loss is zero where student and teacher are equal, and so is its gradient."""
    logits = torch.randn(4, 3, requires_grad=True)
    loss = distillation_loss(logits, logits.detach(), torch.zeros(4, dtype=torch.int64), weight=1.0, temperature=4.0)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


def test_a_checkpoint_keeps_what_it_was_given(tmp_path: Path) -> None:
    """Facts and tensors come back, and a later write replaces the file whole."""
    path = tmp_path / "deep" / "c"
    for step in (1, 2):
        facts, tensors = {"step": step, "curve": [[0, 0.5]]}, {"a": torch.full((2, 2), float(step))}
        Checkpoint(identity="x", facts=facts, tensors=tensors).write(path)
    back = Checkpoint.read(path, "x")
    assert back.facts == {"step": 2, "curve": [[0, 0.5]]}
    assert torch.equal(back.tensors["a"], torch.full((2, 2), 2.0))
    assert [each.name for each in path.parent.iterdir()] == ["c"]
