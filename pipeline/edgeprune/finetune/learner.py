"""What learns in a fine-tuning: a module with its optimiser, which may be exchanged for another on the way."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from edgeprune.plan import Plan

if TYPE_CHECKING:
    from edgeprune.intake.config import FinetuneConfig


class Learner(Protocol):
    """A module and how it steps; the student's own state is saved and restored by the run."""

    @property
    def student(self) -> nn.Module:
        """Return the module that learns now."""
        ...

    @property
    def settled(self) -> bool:
        """Return whether the student has the shape of the result."""
        ...

    @property
    def plan(self) -> Plan | None:
        """Return the plan the student was cut by, if that was decided here."""
        ...

    @property
    def news(self) -> str:
        """Return what to say of it beside loss and accuracy, or nothing."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        ...

    def step(self, learning_rate: float) -> bool:
        """Take one step, and return whether the student is another module from now on."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return facts that JSON can hold, and tensors."""
        ...

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned; the student's weights are restored afterwards."""
        ...


class CutLearner:
    """A module that was cut already: plain SGD with momentum.

    Args:
        module: a copy of it learns.
        settings: of the optimiser.
        momentum: parameter → buffer to begin with.
    """

    def __init__(
        self, module: nn.Module, settings: "FinetuneConfig", *, momentum: Mapping[str, Tensor] | None = None
    ) -> None:
        self._student = prepared(module)
        self._optimiser = _sgd_of(self._student, settings)
        self._give(momentum or {})

    @property
    def student(self) -> nn.Module:
        """Return the module that learns."""
        return self._student

    @property
    def settled(self) -> bool:
        """Return True: nothing is cut any more."""
        return True

    @property
    def plan(self) -> None:
        """Return None: the module came cut."""

    @property
    def news(self) -> str:
        """Return nothing."""
        return ""

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self._optimiser.zero_grad(set_to_none=True)

    def step(self, learning_rate: float) -> bool:
        """Take one step; the student stays."""
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        self._optimiser.step()
        return False

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the momentum."""
        buffers = {name: self._optimiser.state[each] for name, each in self._student.named_parameters()}
        return {}, {
            f"momentum.{name}": each["momentum_buffer"]
            for name, each in buffers.items()
            if isinstance(each.get("momentum_buffer"), Tensor)
        }

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up the momentum."""
        del facts
        self._give(part(tensors, "momentum."))

    def _give(self, momentum: Mapping[str, Tensor]) -> None:
        for name, each in self._student.named_parameters():
            if name in momentum:
                layout = torch.channels_last if each.dim() == 4 else torch.contiguous_format
                self._optimiser.state[each]["momentum_buffer"] = momentum[name].contiguous(memory_format=layout)


def prepared(module: nn.Module) -> nn.Module:
    """Return a copy laid out as the CPU's convolutions want it; all of its parameters learn."""
    return laid_out(copy.deepcopy(module), torch.channels_last).requires_grad_(True)


def laid_out(module: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Return the module itself, its tensors of four axes in this layout."""
    made: nn.Module = module.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs leave it out
    return made


def sgd(
    kernels: list[nn.Parameter], vectors: list[nn.Parameter], settings: "FinetuneConfig", *, weight_decay: float
) -> torch.optim.SGD:
    """Return SGD that decays matrices and kernels, not biases and batch norms."""
    return torch.optim.SGD(
        [{"params": kernels, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )


def _sgd_of(module: nn.Module, settings: "FinetuneConfig") -> torch.optim.SGD:
    parameters = list(module.parameters())
    kernels, vectors = ([each for each in parameters if (each.dim() > 1) == many] for many in (True, False))
    return sgd(kernels, vectors, settings, weight_decay=settings.weight_decay)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name begins with the prefix, without it."""
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
