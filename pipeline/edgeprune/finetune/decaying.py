"""The unpruned model, whose channels decay over the first steps until it can be cut without changing an answer.

unpruned ── units decay ── all are gone ── cut ── the rest of the steps, on the smaller model
                                            │
                              plan: as wide as asked for, of the channels that turned out to matter least
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgeprune.cut import cut_module
from edgeprune.decay.hosts import check_host, open_host
from edgeprune.decay.settings import DecaySettings
from edgeprune.decay.wrapper import DecayOptimiser
from edgeprune.finetune.learner import CutLearner, prepared, sgd
from edgeprune.plan import Plan
from edgeprune.structure import Structure

if TYPE_CHECKING:
    from edgeprune.intake.config import FinetuneConfig


def check_decaying(module: nn.Module, structure: Structure, settings: "FinetuneConfig", images: int) -> None:
    """Return if any plan of the structure can be carried out by decay in the time that the settings give.

    Raises:
        ConfigError: if the host does not apply to one of the groups, or units would need more steps than there are.
    """
    check_host(settings.decay.host, module, structure)
    decay_settings(settings, settings.total_steps(images))


def decay_settings(settings: "FinetuneConfig", steps: int) -> DecaySettings:
    """Return how units decay in a fine-tuning of so many steps.

    Raises:
        ConfigError: if units would need more steps than the phase has.
    """
    decay = settings.decay
    phase = round(decay.share * steps)
    return DecaySettings(
        phase=phase,
        steps=decay.steps,
        lead=round(decay.lead * phase),
        rounds=decay.rounds,
        rectify=decay.rectify,
        t_rate=decay.t_rate,
        t_len=decay.t_len,
        rate=decay.rate,
        releases=decay.releases,
        cooldown=decay.cooldown,
    )


class DecayingLearner:
    """First the unpruned model under a `DecayOptimiser`, then the model cut by what was found.

    Momentum is cut as the weights are, so the cut model goes on as the zeroed one would have.

    Args:
        module: the unpruned model; a copy of it learns.
        structure: its channel groups.
        plan: only its widths count.
        settings: of the fine-tuning.
        steps: of the whole fine-tuning.

    Raises:
        ConfigError: if the host does not apply, or units would need more steps than there are.
    """

    def __init__(
        self, module: nn.Module, structure: Structure, plan: Plan, settings: "FinetuneConfig", steps: int
    ) -> None:
        self._module, self._structure, self._settings = module, structure, settings
        self._whole = prepared(module)
        decay = settings.decay
        units, host = open_host(decay.host, self._whole, structure, plan, sparsity=decay.sparsity)
        self._flat = units.flat
        learns_sparsity = decay.host == "group-norm" and bool(decay.sparsity)  # it takes the place of weight decay
        inner = sgd(
            [units.flat.kernels],
            [units.flat.vectors],
            settings,
            weight_decay=0.0 if learns_sparsity else settings.weight_decay,
        )
        self._optimiser = DecayOptimiser(inner, units, host, decay_settings(settings, steps))
        self._plan: Plan | None = None
        self._rest: CutLearner | None = None

    @property
    def student(self) -> nn.Module:
        """Return the module that learns now."""
        return self._whole if self._rest is None else self._rest.student

    @property
    def settled(self) -> bool:
        """Return whether the model is cut."""
        return self._rest is not None

    @property
    def plan(self) -> Plan | None:
        """Return the plan the model was cut by, None before."""
        return self._plan

    @property
    def news(self) -> str:
        """Return how far the decay is, while it lasts."""
        return "" if self._rest is not None else self._optimiser.news

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        (self._optimiser if self._rest is None else self._rest).zero_grad()

    def step(self, learning_rate: float) -> bool:
        """Take one step; when the last unit is gone, cut the model."""
        if self._rest is not None:
            return self._rest.step(learning_rate)
        for group in self._optimiser.inner.param_groups:
            group["lr"] = learning_rate
        self._optimiser.step()
        if self._optimiser.done:
            self._cut(self._optimiser.plan(self._structure))
        return self._optimiser.done

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the state of the decay, or the plan and the momentum of the cut model."""
        if self._rest is not None and self._plan is not None:
            return {"plan": self._plan.to_json()}, self._rest.state()[1]
        facts, tensors = self._optimiser.state()
        momentum = self._momentum()
        return {"decay": facts}, {**tensors, **({"momentum": momentum} if momentum is not None else {})}

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on decaying, or with the cut model."""
        if "plan" in facts:
            self._plan = Plan.from_json(facts["plan"])
            self._rest = CutLearner(cut_module(self._module, self._structure, self._plan), self._settings)
            self._rest.restore({}, tensors)
            return
        self._optimiser.restore(facts["decay"], tensors)
        if "momentum" in tensors:
            split = self._flat.kernels.numel()
            state = self._optimiser.inner.state
            state[self._flat.kernels]["momentum_buffer"] = tensors["momentum"][:split].clone()
            state[self._flat.vectors]["momentum_buffer"] = tensors["momentum"][split:].clone()

    def _momentum(self) -> Tensor | None:
        """Return the momentum of all parameters, flat; None if there is none."""
        parts = (self._flat.kernels, self._flat.vectors)
        buffers = [self._optimiser.inner.state.get(each, {}).get("momentum_buffer") for each in parts]
        found = [each for each in buffers if isinstance(each, Tensor)]
        return torch.cat(found) if len(found) == len(parts) else None

    def _cut(self, plan: Plan) -> None:
        momentum, shadow = self._momentum(), copy.deepcopy(self._whole)
        if momentum is not None:
            with torch.no_grad():
                for name, place in self._flat.places.items():
                    shadow.get_parameter(name).copy_(place.of(momentum))
        buffers = dict(cut_module(shadow, self._structure, plan).named_parameters()) if momentum is not None else {}
        self._rest = CutLearner(
            cut_module(self._whole, self._structure, plan),
            self._settings,
            momentum={name: each.detach() for name, each in buffers.items()},
        )
        self._plan = plan
