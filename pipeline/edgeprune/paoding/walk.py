"""The walk: units leave a network step by step, weak filters on their own, dense units into a partner.

    walk    for each group, who leaves when; for each dense unit, who answers for it
    width w the first W − w that leave are gone, those of dense units are merged; other groups may stand elsewhere

The walk is made once, from weights alone, and goes on until one unit of each group is left; a plan then says how far
each group follows it. After Meng et al. (arXiv 2405.00074, 2204.00783): saliency, pools, score and acceptance are
theirs. Ours are the bounds (see `propagation`), the rounding (see `schedule`), ln(1 + x) in the score where they have a
sigmoid (an option), that the last score a stochastic walk took is remembered from step to step, and that the order of
filters is taken once and not again after every step.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from edgeprune.errors import ConfigError, ModelError, PlanError
from edgeprune.paoding import pairs, selection
from edgeprune.paoding.graph import ASSUMED, NAMES
from edgeprune.paoding.intervals import Array
from edgeprune.paoding.network import Chain, Network
from edgeprune.paoding.propagation import Places, Propagation
from edgeprune.paoding.schedule import SLACK, STEP, width_after, widths
from edgeprune.plan import Plan
from edgeprune.structure import Structure

Mode = Literal["auto", "saliency", "impact", "stochastic", "scale"]
"""How dense units leave: by saliency alone (the authors' baseline), by impact among the least salient, by chance, by
magnitude without a partner. "auto": by impact where units can be merged, else by magnitude."""

Taken = Literal["saliency", "impact", "stochastic", "scale"]

STEEP_ALPHA, FLAT_ALPHA = 0.75, 0.05
"""Weight of L in the score: for ReLU, and for activations that level off (the authors' settings)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the walk goes.

    Attributes:
        mode: of dense units.
        step: share of each layer that a step takes, in (0, 1].
        alpha: weight of the output's spread against its entropy, 0 to 1; None: 0.75 for chains of ReLU, else 0.05.
        squash: a name in `pairs.SQUASHES`.
        pool: by impact, so many times the quota of pairs are judged, the least salient ones. With 3 perceptrons kept
            more than with the authors' 2, and a CNN less; from 6 the worst case, which is what impact is, chose worse
            than saliency alone.
        seed: of the stochastic mode.
    """

    mode: Mode = "auto"
    step: float = STEP
    alpha: float | None = None
    squash: str = "log1p"
    pool: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ConfigError(f"a step of {self.step}", why="it is a share of a layer, above 0 and at most 1")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}", why="it is a weight between 0 and 1")
        if self.pool < 1:
            raise ConfigError(f"a pool of {self.pool} times the quota", next_step="give 1 or more")
        if self.squash not in pairs.SQUASHES:
            raise ConfigError(f"unknown squash {self.squash!r}", next_step=f"one of {', '.join(pairs.SQUASHES)}")
        if self.squash == "rank" and self.mode == "stochastic":
            raise ConfigError(
                "the stochastic mode cannot use ranks",
                why="it compares scores of different moments, and a rank is among those of one",
                next_step="choose log1p or sigmoid",
            )


_MAPPINGS = ("taken", "removed", "partners", "worths", "schedule", "obstacles")


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Who leaves when.

    Attributes:
        settings: how it was made.
        taken: group → the mode it was walked in.
        removed: group → its units in the order in which they leave, all but the last one.
        partners: group of dense units that are merged → the unit that each of `removed` is merged into.
        worths: group → what each unit, in unit order, was worth when it left: mean |w| of a filter, saliency of a pair
            (the unit that stays: as much as the dearest).
        dense: groups of units that one linear layer makes.
        schedule: group → its width after no step, one step, two and so on, down to 1.
        assumed: names of chains' first layers whose box is assumed, not known: bounds there are no proof.
        obstacles: group of dense units that is not merged → what is in the way.
    """

    settings: Settings
    taken: Mapping[str, Taken]
    removed: Mapping[str, tuple[int, ...]]
    partners: Mapping[str, tuple[int, ...]]
    worths: Mapping[str, tuple[float, ...]]
    dense: tuple[str, ...]
    schedule: Mapping[str, tuple[int, ...]]
    assumed: tuple[str, ...] = ()
    obstacles: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in _MAPPINGS:
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @cached_property
    def importance(self) -> dict[str, tuple[float, ...]]:
        """Return group → importance of each unit, in unit order, compared within the group only.

        What a unit was worth, and more than whatever left before it: ordered by it, units stand as in `ranking`.
        """
        return {name: _rising(self.worths[name], units) for name, units in self.ranking.items()}

    @cached_property
    def ranking(self) -> dict[str, tuple[int, ...]]:
        """Return group → its units, last to leave first: what a searcher keeps a prefix of."""
        return {name: _last_first(units) for name, units in self.removed.items()}

    def widths(self, ratio: float) -> dict[str, int]:
        """Return group → its width after the first step at which a share `ratio`, 0 to 1, of the dense units is gone.

        Of the filters where there are no dense units; next to dense units more filters than that are left, their steps
        compound.
        """
        counted = self.dense or tuple(self.schedule)
        full = sum(self.schedule[name][0] for name in counted)
        now: dict[str, int] = {}
        for step in range(max(map(len, self.schedule.values()), default=0)):
            now = {name: widths[min(step, len(widths) - 1)] for name, widths in self.schedule.items()}
            if sum(now[name] for name in counted) <= full * (1 - ratio) + SLACK:
                break
        return now

    def to_json(self) -> dict[str, Any]:
        """Return the walk as JSON values."""
        return {
            "settings": asdict(self.settings),
            **{name: dict(getattr(self, name)) for name in _MAPPINGS},
            "dense": list(self.dense),
            "assumed": list(self.assumed),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Walk":
        """Return the walk that `to_json` wrote."""
        found: dict[str, Any] = {name: tuple(value[name]) for name in ("dense", "assumed")}
        for name in _MAPPINGS:
            found[name] = {group: _frozen(each) for group, each in value[name].items()}
        return cls(settings=Settings(**value["settings"]), **found)

    def plan(self, widths: Mapping[str, int]) -> Plan:
        """Return the plan that follows the walk to these widths, whether or not the space allows them."""
        return Plan(kept={name: tuple(sorted(self.ranking[name][:width])) for name, width in widths.items()})

    def representatives(self, name: str, width: int) -> dict[int, int]:
        """Return unit that is gone at this width → the unit that is left and answers for it; empty without pairs."""
        gone = len(self.removed[name]) + 1 - width
        instead: dict[int, int] = {}
        left = zip(self.removed[name][:gone], self.partners.get(name, ()), strict=False)
        for unit, partner in reversed(list(left)):  # a partner that leaves later is resolved already
            instead[unit] = instead.get(partner, partner)
        return instead


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _rising(worths: Sequence[float], ranking: Sequence[int]) -> tuple[float, ...]:
    """Return the worths, each raised above those of all units that rank lower."""
    raised, last = list(worths), -math.inf
    for unit in reversed(ranking):
        last = raised[unit] = max(worths[unit], math.nextafter(last, math.inf))
    return tuple(raised)


def _last_first(removed: Sequence[int]) -> tuple[int, ...]:
    stays = set(range(len(removed) + 1)).difference(removed)
    return (*stays, *reversed(removed))


# -- making it -------------------------------------------------------------------------------------------------------


def walk(network: Network, settings: Settings | None = None) -> Walk:
    """Return the walk through a network; the same network and settings give the same walk.

    Raises:
        ConfigError: if the mode is one of pairs and there are no dense units to pair.
        ModelError: if the mode is one of pairs and what follows a dense layer is not known.
    """
    settings = settings or Settings()
    mode = _mode(network, settings.mode)
    removed = {name: tuple(np.argsort(scale, kind="stable")[:-1].tolist()) for name, scale in network.scale.items()}
    worths = {name: tuple(scale.tolist()) for name, scale in network.scale.items()}
    partners: dict[str, tuple[int, ...]] = {}
    for number, chain in enumerate(network.chains if mode != "scale" else ()):
        for name, record in _ChainWalk(chain, settings, mode, number).run().items():
            removed[name], partners[name], worths[name] = tuple(record.removed), tuple(record.partners), record.worths()
    dense = {*network.pairs, *network.obstacles}
    return Walk(
        settings=settings,
        taken={name: mode if name in partners else "scale" for name in removed},
        removed=removed,
        partners=partners,
        worths=worths,
        dense=tuple(name for name in network.scale if name in dense),
        schedule={n: tuple(widths(len(s), settings.step, dense=n in dense)) for n, s in network.scale.items()},
        assumed=tuple(chain.layers[0].name for chain in network.chains if partners and chain.box_source == ASSUMED),
        obstacles=network.obstacles,
    )


def _mode(network: Network, wished: Mode) -> Taken:
    """Return the mode to take for dense units.

    Raises:
        ConfigError, ModelError: if it cannot be the wished one.
    """
    if wished == "auto":
        return "impact" if network.pairs else "scale"
    if wished == "scale":
        return wished
    for name, obstacle in network.obstacles.items():
        raise ModelError(
            f"the units of {name!r} cannot be merged in pairs",
            why=f"{obstacle}; only {', '.join(NAMES)} and batch norms are known between dense layers",
            next_step='choose mode "auto", which goes by magnitude there, or "scale"',
        )
    if not network.pairs:
        raise ConfigError(
            f"mode {wished!r} merges units of dense layers in pairs, and there is no dense layer to merge in",
            why="none is made by one linear layer and read by linear layers alone",
            next_step='choose mode "auto" or "scale", which go by the magnitude of filters',
        )
    return wished


@dataclass(kw_only=True)
class _Record:
    """What happened to one group: units gone and their partners, in order, and the saliency of each merge.

    `last_score` is that of the pair which the stochastic mode took last.
    """

    width: int
    removed: list[int] = field(default_factory=list)
    partners: list[int] = field(default_factory=list)
    saliency: list[float] = field(default_factory=list)
    last_score: float = math.inf

    def worths(self) -> tuple[float, ...]:
        """Return what each unit, in unit order, was worth."""
        worths = np.full(self.width, max(self.saliency))
        worths[self.removed] = self.saliency
        return tuple(worths.tolist())


class _ChainWalk:
    """One chain, while its units leave."""

    def __init__(self, chain: Chain, settings: Settings, mode: Taken, number: int) -> None:
        self._layers, self._settings, self._mode, self._number = chain.layers, settings, mode, number
        self._propagation = Propagation(chain)
        self._merged = self._propagation.untouched()
        self._alpha = _alpha(chain) if settings.alpha is None else settings.alpha
        self._records = {
            place: _Record(width=len(layer.rows)) for place, layer in enumerate(chain.layers) if layer.group is not None
        }

    def run(self) -> dict[str, _Record]:
        """Return group → its record, when one unit of each is left."""
        step = 0
        while any(len(each.removed) + 1 < each.width for each in self._records.values()):
            for place, record in self._records.items():
                left = record.width - len(record.removed)
                count = left - width_after(record.width, self._settings.step, step + 1, dense=True)
                if count:
                    self._step(place, count, step)
            step += 1
        return {str(self._layers[place].group): record for place, record in self._records.items()}

    def _step(self, place: int, count: int, step: int) -> None:
        record, rows, merged = self._records[place], self._layers[place].rows, self._merged[place]
        unit = np.setdiff1d(np.arange(record.width), record.removed)
        row = rows[unit]
        saliency = self._saliency(place, row)

        def merge(keep: int, drop: int) -> None:
            merged[merged == row[drop]] = row[keep]
            record.removed.append(int(unit[drop]))
            record.partners.append(int(unit[keep]))
            record.saliency.append(float(saliency[keep, drop]))

        def judge(keep: Places, drop: Places) -> Array:
            impacts = self._propagation.impacts(self._merged, place, row[keep], row[drop])
            return pairs.score(impacts, self._alpha, self._settings.squash)

        if self._mode == "saliency":
            selection.by_saliency(saliency, count, merge)
        elif self._mode == "impact":
            selection.by_impact(saliency, count, merge, judge, pool=self._settings.pool)
        else:
            rng = np.random.default_rng([self._settings.seed, self._number, place, step])
            record.last_score = selection.by_chance(
                saliency,
                count,
                merge,
                judge,
                heat=selection.Heat(merged=len(record.removed), width=record.width, last=record.last_score),
                rng=rng,
            )

    def _saliency(self, place: int, row: Places) -> Array:
        """Return the saliency of every pair of these rows as the chain is now, infinite on the diagonal."""
        incoming = self._propagation.incoming(self._merged, place)[row]
        outgoing = self._propagation.outgoing(self._merged, place)[row]
        bias = self._layers[place].bias
        saliency = pairs.saliency(incoming, outgoing, None if bias is None else bias[row])
        np.fill_diagonal(saliency, np.inf)
        return saliency


def _alpha(chain: Chain) -> float:
    steep = all(layer.activation in ("relu", "identity") for layer in chain.layers)
    return STEEP_ALPHA if steep else FLAT_ALPHA


# -- following it ----------------------------------------------------------------------------------------------------


def merged(module: nn.Module, structure: Structure, plan: Plan, walk: Walk) -> nn.Module:
    """Return a copy of a module, in its unpruned shapes, whose kept dense units answer for those a plan removes.

    Cutting it by the same plan gives the candidate; filters have no partner and are as they were.

    Args:
        module: that the structure is of; left as it is.
        plan: follows the walk in every group of dense units.
        walk: through that module.

    Raises:
        PlanError: if the plan removes other units than the walk does at these widths.
    """
    result = copy.deepcopy(module)
    for name in walk.partners:
        kept = plan.kept.get(name, ())
        if kept != tuple(sorted(walk.ranking[name][: len(kept)])):
            raise PlanError(
                f"the plan keeps other units of {name!r} than the walk leaves at a width of {len(kept)}",
                next_step="make plans from the ranking of the walk",
            )
        if kept:
            _hand_over(result, structure, name, walk.representatives(name, len(kept)))
    return result


@torch.no_grad()
def _hand_over(module: nn.Module, structure: Structure, name: str, instead: Mapping[int, int]) -> None:
    """Add what each reader multiplies units with that are gone to what it multiplies their representatives with."""
    units = structure.units[name]
    for reader, side in structure.members[name]:
        if side == "in":
            weight = module.get_submodule(reader).weight
            assert isinstance(weight, nn.Parameter)
            column = {owner: place for place, owner in enumerate(structure.classes[reader, "in"].tolist())}
            gone = torch.tensor([column[units[each]] for each in instead], dtype=torch.int64)
            kept = torch.tensor([column[units[each]] for each in instead.values()], dtype=torch.int64)
            exact = weight.detach().double()
            weight.copy_(exact.index_add(1, kept.to(weight.device), exact[:, gone.to(weight.device)]))
