"""Fine-tuning by decay ends in the widths that were asked for, and goes on from any kill without a difference."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from quadrants import network, quadrants, same_weights
from torch import nn
from torch.nn import functional

from edgeprune.cut import cut_module
from edgeprune.decay.hosts import HostName
from edgeprune.errors import ConfigError
from edgeprune.export import export
from edgeprune.finetune import FinetuneResult, Progress, check_decaying, finetune, finetune_decaying
from edgeprune.finetune.decaying import DecayingLearner
from edgeprune.intake.config import DecayConfig, FinetuneConfig
from edgeprune.plan import Plan
from edgeprune.structure import Structure, build_structure

TRAIN, VALIDATION = quadrants(200, 0), quadrants(80, 1)
HOSTS: tuple[HostName, ...] = ("group-norm", "gates", "half-space")


def settings(host: HostName = "group-norm", *, decay: dict[str, Any] | None = None, **changes: Any) -> FinetuneConfig:
    """Return 24 steps, 6 an epoch; the first 11 at most decay: 2 rounds, at steps 3 and 4, each unit over 3."""
    chosen = {"host": host, "steps": 3, "share": 11 / 24, "rounds": 2, "lead": 0.3, "sparsity": 1e-3} | (decay or {})
    given = {"epochs": 4, "batch_size": 32, "learning_rate": 0.05, "precision": "fp32", "augment": "none"}
    given |= {"checkpoint_s": 1e9, "seed": 3, "method": "decay", "decay": DecayConfig(**chosen)}
    return FinetuneConfig(**(given | changes))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep every run on the same number of threads, which bit-for-bit equality needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def unpruned() -> tuple[nn.Module, Structure]:
    """Return a network that knows the task, and its structure."""
    plain = FinetuneConfig(epochs=8, batch_size=32, learning_rate=0.05, precision="fp32", augment="none", distill=0.0)
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "c"
        net = finetune(network(16, 2), network(16, 2), TRAIN, VALIDATION, plain, checkpoint=checkpoint).module
    x = torch.randn(1, 1, 8, 8)
    return net, build_structure(net, x, export(net, x), multiple=4)


def half() -> Plan:
    """Return the plan that keeps the first half of every group."""
    return Plan(kept={group.name: tuple(range(group.width // 2)) for group in unpruned()[1].space.groups})


def run(checkpoint: Path, given: FinetuneConfig, progress: Callable[[Progress], None] | None = None) -> FinetuneResult:
    """Return the result of the standard run."""
    net, structure = unpruned()
    return finetune_decaying(
        net, structure, half(), TRAIN, VALIDATION, given, checkpoint=checkpoint, origin="a", progress=progress
    )


@pytest.mark.parametrize("host", HOSTS)
def test_it_ends_in_the_widths_that_were_asked_for(tmp_path: Path, host: HostName) -> None:
    """The module is the unpruned one cut by the plan it comes with, still knows the task, and is none of the passed."""
    net, structure = unpruned()
    before = {name: each.clone() for name, each in net.state_dict().items()}
    result = run(tmp_path / "c", settings(host))
    assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())
    assert result.plan is not None
    assert result.plan.widths == half().widths
    shapes = {name: each.shape for name, each in cut_module(net, structure, result.plan).state_dict().items()}
    assert {name: each.shape for name, each in result.module.state_dict().items()} == shapes
    assert result.accuracy > 0.8
    assert result.steps == 24


def test_the_unpruned_model_is_never_the_result(tmp_path: Path) -> None:
    """The curve starts with it; the best is looked for from the cut on, where the curve has a point of its own."""
    result = run(tmp_path / "c", settings())
    steps = [step for step, _ in result.accuracy_curve]
    assert steps[0] == 0
    assert steps[-1] == 24
    cut = next(step for step in steps if step % 6 != 0)
    assert 7 <= cut <= 11
    assert result.accuracy == max(accuracy for step, accuracy in result.accuracy_curve if step >= cut)
    with torch.inference_mode():
        right = (result.module(VALIDATION.tensor()).argmax(1) == VALIDATION.labels).float().mean()
    assert float(right) == pytest.approx(result.accuracy)


class KilledError(Exception):
    """Stands for the end of the process."""


def killed_at(step: int) -> Callable[[Progress], None]:
    """Return a progress that ends the run after this step."""

    def progress(facts: Progress) -> None:
        if facts.step == step:
            raise KilledError

    return progress


@pytest.mark.parametrize("host", HOSTS)
def test_a_run_killed_in_any_phase_ends_where_an_undisturbed_one_ends(tmp_path: Path, host: HostName) -> None:
    """Before anything decays, while channels decay, at the cut, after it; bit for bit, with the same plan."""
    eager = settings(host, checkpoint_s=1e-9, augment="flip-crop")
    whole = run(tmp_path / "whole", eager)
    cut = next(step for step, _ in whole.accuracy_curve if step % 6 != 0)
    for step in (1, 4, cut - 1, cut, cut + 2):
        with pytest.raises(KilledError):
            run(tmp_path / f"{step}", eager, progress=killed_at(step))
        resumed = run(tmp_path / f"{step}", eager)
        assert resumed.resumed_at == step
        assert resumed.plan == whole.plan
        assert same_weights(resumed.module, whole.module), step
        assert resumed.accuracy_curve == whole.accuracy_curve


def test_a_kill_between_two_checkpoints_repeats_what_was_lost(tmp_path: Path) -> None:
    """Only the ends of epochs and the cut are kept: nothing is different at the end."""
    whole = run(tmp_path / "whole", settings())
    cut = next(step for step, _ in whole.accuracy_curve if step % 6 != 0)
    for step, kept in ((5, 0), (cut - 1, 6), (cut + 1, cut)):
        with pytest.raises(KilledError):
            run(tmp_path / f"{step}", settings(), progress=killed_at(step))
        resumed = run(tmp_path / f"{step}", settings())
        assert resumed.resumed_at == kept
        assert same_weights(resumed.module, whole.module)


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    """The second call takes no step and returns the same module and plan."""
    first = run(tmp_path / "c", settings())
    seen: list[Progress] = []
    second = run(tmp_path / "c", settings(), progress=seen.append)
    assert (second.resumed_at, len(seen)) == (24, 1)
    assert same_weights(first.module, second.module)
    assert first.plan == second.plan


def test_a_checkpoint_of_other_widths_or_settings_is_refused(tmp_path: Path) -> None:
    """What it depends on is in its identity."""
    run(tmp_path / "c", settings())
    with pytest.raises(ConfigError, match="belongs to another run"):
        run(tmp_path / "c", settings(decay={"t_len": 1.5}))
    net, structure = unpruned()
    other = Plan(kept={**half().kept, "0": tuple(range(4))})
    with pytest.raises(ConfigError, match="belongs to another run"):
        finetune_decaying(net, structure, other, TRAIN, VALIDATION, settings(), checkpoint=tmp_path / "c", origin="a")


def test_progress_says_how_far_the_decay_is(tmp_path: Path) -> None:
    """While it lasts."""
    seen: list[Progress] = []
    run(tmp_path / "c", settings(), progress=seen.append)
    wanted = sum(group.width - half().widths[group.name] for group in unpruned()[1].space.groups)
    assert seen[3].note.endswith(f"0 of {wanted} channel units gone") or "releases" in seen[3].note
    assert seen[-1].news == ""


def test_the_cut_model_goes_on_as_the_zeroed_one_would_have() -> None:
    """Same answers to 1e-5 at the cut, and after five more steps of both the same weights: momentum is cut as well."""
    net, structure = unpruned()
    learner = DecayingLearner(net, structure, half(), settings(decay={"sparsity": None}), 24)
    images, labels = TRAIN.tensor(slice(64)), TRAIN.labels[:64]
    exchanged = False
    while not exchanged:
        exchanged = step(learner, learner.student, images, labels)
    whole, optimiser, plan = learner._whole, learner._optimiser, learner.plan
    assert plan is not None
    with torch.inference_mode():
        assert torch.allclose(learner.student.eval()(images), whole.eval()(images), atol=1e-5)
    for _ in range(5):
        step(learner, learner.student, images, labels)
        optimiser.zero_grad()
        torch.autograd.backward(functional.cross_entropy(awake(whole)(images), labels))
        optimiser.step()
    for name, each in cut_module(whole, structure, plan).state_dict().items():
        assert torch.allclose(learner.student.state_dict()[name].float(), each.float(), atol=1e-4), name


def step(learner: DecayingLearner, student: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> bool:
    """Take one step without dropout; return whether the student was exchanged."""
    learner.zero_grad()
    torch.autograd.backward(functional.cross_entropy(awake(student)(images), labels))
    return learner.step(0.01)


def awake(net: nn.Module) -> nn.Module:
    """Return the net in training mode but for its dropout."""
    for layer in net.train().modules():
        layer.training = layer.training and not isinstance(layer, nn.Dropout)
    return net


def test_sparsity_learning_takes_the_place_of_weight_decay() -> None:
    """Of the group-norm host alone, and only if it is asked for."""
    net, structure = unpruned()
    cases: tuple[tuple[HostName, float | None, float], ...] = (
        ("group-norm", 1e-3, 0.0), ("group-norm", 0.0, 5e-4), ("group-norm", None, 5e-4), ("gates", 1e-3, 5e-4),
    )  # fmt: skip
    for host, sparsity, wanted in cases:
        learner = DecayingLearner(net, structure, half(), settings(host, decay={"sparsity": sparsity}), 24)
        assert learner._optimiser.inner.param_groups[0]["weight_decay"] == wanted


def test_what_cannot_be_done_is_known_beforehand() -> None:
    """Too few steps for one decay; a host that does not apply, with all the groups to exclude."""
    net, structure = unpruned()
    check_decaying(net, structure, settings(), len(TRAIN))
    with pytest.raises(ConfigError, match="cannot decay over 20 steps within 11") as caught:
        check_decaying(net, structure, settings(decay={"steps": 20}), len(TRAIN))
    assert "finetune.decay.share" in caught.value.next_step
    plain = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    ).eval()
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(ConfigError, match="gates host") as caught:
        check_decaying(plain, build_structure(plain, x, export(plain, x), multiple=4), settings("gates"), 200)
    assert '"0", "2"' in caught.value.next_step
