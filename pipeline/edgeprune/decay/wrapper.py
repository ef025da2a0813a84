"""An optimiser under which the units that must go decay to nothing while all others learn.

    gradients ─▶ host looks on, units begin ─▶ host's own terms ─▶ inner step ─▶ lengths prescribed ─▶ gone, held at 0
                          ▲                                             │
                          └────── a substitute begins ◀── released ◀────┘ resists

What weight decay and penalties would do to a decaying unit is taken out of its gradient: they pull along x, where the
length is prescribed anyway, and would hide resistance.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune.decay.host import Host, Moment
from edgeprune.decay.rectify import cosine_rate, measured_rate, relative_length, resists
from edgeprune.decay.roster import Roster
from edgeprune.decay.settings import DecaySettings
from edgeprune.decay.smooth import factor, target_length
from edgeprune.decay.units import BRANCHES, Units
from edgeprune.errors import ConfigError
from edgeprune.plan import Plan
from edgeprune.structure import Structure


@dataclass(frozen=True, kw_only=True)
class _Resistance:
    """What gradients say of every unit, [count + 1]: C_len, and the cosine of −g and x where C_rate is that."""

    length: Tensor
    cosine: Tensor | None


class DecayOptimiser:
    """Wraps an optimiser of a flat module's parameters, or of its flat parts; schedulers act on the inner one.

    Whatever is not of a unit that decays or is gone is updated bit for bit as by the inner optimiser and the host
    alone. Momentum of a decaying unit is left as it is, and cleared when the unit is gone.

    Args:
        inner: made after `units`: its parameters are the module's, or `units.flat.kernels` and `.vectors`.
        units: what may go, and how many of each group must.
        host: picks among them.
        settings: how, and by when.

    Attributes:
        inner: the wrapped optimiser.
        roster: where every unit is.
        steps: taken so far.
        released: how often units were released so far.
        done: whether all that must go is gone.

    Raises:
        ConfigError: if the optimiser shrinks weights apart from their gradients, and that would count as a unit's own
            doing.
    """

    def __init__(self, inner: torch.optim.Optimizer, units: Units, host: Host, settings: DecaySettings) -> None:
        _check_measurable(inner, settings)
        self.inner, self._units, self._host, self._settings = inner, units, host, settings
        self.roster = Roster(units.nothing)
        self.steps = self.released = 0
        self.done = not units.losses
        self._losses = torch.tensor([*units.losses.values(), 0], device=units.group_of.device)
        self._round, self._short = -1, False
        self._mask: Tensor | None = None
        self._rates: tuple[tuple[float, ...], Tensor] = ((), units.nothing)  # of weight decay: of groups, of rows
        self._undone = (-1, units.nothing)  # version of the roster and what is taken off each row

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._units.flat.zero_grad()

    def step(self) -> None:
        """Take one step; the gradients are those of the loss alone."""
        self._units.flat.gather()
        if self.done:
            self.inner.step()
        else:
            self._decay()
        if self._mask is not None:
            self._units.flat.values.mul_(self._mask)
        self.steps += 1

    @property
    def news(self) -> str:
        """Return how far it is, for people."""
        gone, wanted = int(self.roster.removed.sum()), int(self._losses.sum())
        released = f", {self.released} releases" if self.released else ""
        return f"{gone} of {wanted} channel units gone{released}"

    def plan(self, structure: Structure) -> Plan:
        """Return the plan that keeps whatever is not gone.

        Raises:
            PlanError: if it is asked for before all that must go is gone.
        """
        removed = self.roster.removed.tolist()
        lost = {name: {place for place, unit in enumerate(numbers) if removed[unit]} for name, numbers in self._groups}
        kept = {
            name: tuple(place for place in range(width) if place not in lost.get(name, ()))
            for name, width in structure.full.items()
        }
        return structure.space.check(Plan(kept=kept))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a later process needs to go on: facts that JSON can hold, and tensors; the inner has its own."""
        facts = {"steps": self.steps, "released": self.released, "round": self._round, "short": self._short}
        host = {f"host.{name}": each for name, each in self._host.state().items()}
        return facts, {**{f"unit.{name}": each for name, each in self.roster.state().items()}, **host}

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned; the module's weights and the inner's momentum are restored elsewhere."""
        self.steps, self.released = facts["steps"], facts["released"]
        self._round, self._short = facts["round"], facts["short"]
        self.roster.restore(_part(tensors, "unit."))
        self._host.restore(_part(tensors, "host."))
        self._note_removed()

    # ------------------------------------------------------------------------------------------------------ a step

    def _decay(self) -> None:
        now = self._moment()
        self._host.watch(now)
        self._begin(now)
        resistance = self._resistance()
        self._host.adjust(now if now.version == self.roster.version else self._moment())
        self._undo_weight_decay()
        self.inner.step()
        self._shrink(resistance)

    def _moment(self) -> Moment:
        return Moment(
            units=self._units,
            step=self.steps,
            version=self.roster.version,
            learning_rate=_learning_rate(self.inner),
            idle=self.roster.idle,
        )

    def _undo_weight_decay(self) -> None:
        """Take the weight decay that the inner optimiser will add out of the gradients of what decays."""
        rates = tuple(group.get("weight_decay", 0.0) for group in self.inner.param_groups)
        if not any(rates):
            return
        if self._rates[0] != rates:
            groups = zip(self.inner.param_groups, rates, strict=True)
            rows = self._units.flat.per_row({each: rate for group, rate in groups for each in group["params"]})
            self._rates, self._undone = (rates, rows[self._units.rows]), (-1, rows)
        if self._undone[0] != self.roster.version:
            decaying = self.roster.decaying[self._units.owners]
            self._undone = (self.roster.version, torch.where(decaying, -self._rates[1], 0.0))
        if self.roster.busy:
            self._units.pull_rows(self._undone[1])

    def _resistance(self) -> _Resistance | None:
        """Return what the gradients say of the units, if any may still be released."""
        settings, units, roster = self._settings, self._units, self.roster
        if not settings.rectify or self.steps >= settings.closing or not roster.busy:
            return None
        gradient = units.lengths(units.flat.grads)
        mean = units.per_group(gradient * roster.there) / units.per_group(roster.there).clamp_min(1)
        cosine = None
        if settings.rate == "cosine":
            product = units.products(units.flat.values, units.flat.grads)
            cosine = cosine_rate(product, gradient, units.lengths(units.flat.values))
        return _Resistance(length=relative_length(gradient, mean[units.group_of]), cosine=cosine)

    def _shrink(self, resistance: _Resistance | None) -> None:
        """Give every decaying unit its length, unless it resists."""
        units, roster = self._units, self.roster
        if not roster.busy:
            return
        after = units.lengths(units.flat.values)
        released = torch.zeros_like(roster.decaying) if resistance is None else self._resisting(resistance, after)
        going = roster.decaying & ~released
        roster.n = roster.n + going
        target = target_length(roster.initial, roster.n, self._settings.steps)
        units.scale(torch.where(going, factor(after, target), 1.0))
        roster.length = torch.where(going, target, roster.length)
        gone = going & (roster.n >= self._settings.steps)
        if bool((released | gone).any()):
            self._note(released, gone)

    def _resisting(self, resistance: _Resistance, after: Tensor) -> Tensor:
        """Return the decaying units to be released: only where somebody of the group can take the place."""
        settings, roster = self._settings, self.roster
        rate = measured_rate(roster.length, after) if resistance.cosine is None else resistance.cosine
        if settings.rate == "per-rate":
            rate = rate / max(_learning_rate(self.inner), torch.finfo(rate.dtype).tiny)
        resisting = resists(rate, resistance.length, settings.t_rate, settings.t_len)
        resisting &= roster.decaying & (roster.releases < settings.releases)
        if bool(resisting.any()):
            resisting &= self._units.per_group(self._free().to(rate.dtype))[self._units.group_of] > 0
        return resisting

    def _note(self, released: Tensor, gone: Tensor) -> None:
        if bool(released.any()):
            pause = self._settings.steps if self._settings.cooldown is None else self._settings.cooldown
            self.roster.release(released, self.steps + 1 + pause)
            self.released += int(released.sum())
            self._short = True
        if bool(gone.any()):
            self.roster.remove(gone)
            self._note_removed()
            self._cut()
            self._units.silence_means(self.roster.removed)
            self._clear_momentum()

    def _cut(self) -> None:
        """Set what is gone to zero; who loses slices that read it and still decays gets the prescribed length back.

        Left short, it would seem to have shrunk of itself in the next step, which hides resistance.
        """
        assert self._mask is not None
        units, roster = self._units, self.roster
        units.flat.values.mul_(self._mask)
        after = units.lengths(units.flat.values)
        units.scale(torch.where(roster.decaying, factor(after, roster.length), 1.0))

    def _note_removed(self) -> None:
        removed = self.roster.removed
        self._mask = self._units.mask(removed) if bool(removed.any()) else None
        self.done = bool((self._units.per_group(removed.to(self.roster.length.dtype)) >= self._losses).all())

    def _clear_momentum(self) -> None:
        """Forget whatever the inner optimiser remembers of what is gone."""
        assert self._mask is not None
        for parameter, mask in self._units.flat.views(self._mask):
            for each in self.inner.state.get(parameter, {}).values():
                if isinstance(each, Tensor) and each.shape == parameter.shape:
                    each.mul_(mask)

    # ------------------------------------------------------------------------------------------------- who begins

    def _begin(self, now: Moment) -> None:
        """Let units begin: those that are due by now, in place of released ones, and those whose host says ready."""
        number, asking = self._settings.round(self.steps), self._host.ready(now)
        fresh = number > self._round
        if asking is None and not (fresh or self._short):
            return
        if fresh:
            self._round, self.roster.scores = number, self._host.scores(now).clone()
            self._host.chosen(now)
        free, chosen = self._free(), torch.zeros_like(self.roster.idle)
        if asking is not None and bool((asking & free).any()):
            chosen = self._lowest(self._host.scores(now), free & asking, chosen, 1.0)
        if fresh or self._short:
            share = self._settings.share(self.steps)
            chosen = chosen | self._lowest(self.roster.scores, free, chosen, share)
            self._short = bool((self._missing(chosen, share) > 0).any())
        if bool(chosen.any()):
            self.roster.begin(chosen, self._units.lengths(self._units.flat.values))

    def _lowest(self, scores: Tensor, free: Tensor, taken: Tensor, share: float) -> Tensor:
        """Return those to begin beside the ones that are taken, until this share of all that must go is under way."""
        return self._units.lowest(scores, self._missing(taken, share), free & ~taken)

    def _missing(self, taken: Tensor, share: float) -> Tensor:
        """Return how many units of each group have still to begin, [groups + 1]; below 0 where more have."""
        under_way = self._units.per_group((taken | ~self.roster.idle).to(self.roster.length.dtype))
        return (self._losses * share).ceil() - under_way

    def _free(self) -> Tensor:
        """Return who may begin: the idle; in the end also those that were released lately."""
        rested = self.roster.until <= self.steps
        return self.roster.idle if self.steps >= self._settings.closing else self.roster.idle & rested

    @property
    def _groups(self) -> Iterator[tuple[str, range]]:
        return ((name, numbers) for name, numbers in self._units.ranges.items() if name != BRANCHES)


def _learning_rate(inner: torch.optim.Optimizer) -> float:
    return max(float(group["lr"]) for group in inner.param_groups)


def _check_measurable(inner: torch.optim.Optimizer, settings: DecaySettings) -> None:
    apart = any(group.get("decoupled_weight_decay") and group.get("weight_decay") for group in inner.param_groups)
    if apart and settings.rectify and settings.rate != "cosine":
        raise ConfigError(
            f"self-rectification cannot tell a unit's own shrinking from {type(inner).__name__}'s weight decay",
            why="it acts on the weights, not through their gradients",
            next_step='choose rate = "cosine", which looks at the gradient alone, or no weight decay',
        )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
