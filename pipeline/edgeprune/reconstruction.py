"""Kept channels take over what removed ones did, from the weights alone: no image is read, nothing is trained.

    removed unit p ≈ Σ s_pk · kept unit k     ⟹     every reader:  W'[:, k] = W[:, k] + Σ_p s_pk W[:, p]

A rule finds the shares s from the units' folded filters (`edgeprune.filters`) as each reader sees them. A reader's
weights are its own, so each is repaired by itself: a residual stream, a concatenation or a gate puts nothing at risk,
and a reader of which nothing is known keeps its weights, which is plain pruning. Readers are repaired in forward
order, and the filters of a layer are those it has after its own repair, over the inputs it keeps.

Exact where a removed filter is a positive multiple of kept ones behind activations that keep a scale (ReLU, leaky
ReLU), with any pooling. Shares may be negative unless `Settings.nonnegative`: a ReLU or a maximum then answers them
only approximately; docs/methods/reconstruction.md says what was lost with and without them.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeprune.errors import ConfigError, PlanError
from edgeprune.filter_flow import follow
from edgeprune.filters import Array, Filters, cluster, cosines
from edgeprune.plan import Plan
from edgeprune.structure import Structure

Units = NDArray[np.int64]
"""Numbers of units, ascending."""

PROJECTIONS = 200
"""Rounds of the accelerated projected gradient behind `Settings.nonnegative`."""

TWINS = 1e-9
"""Cosine distance up to which two units are multiples of each other: their filters differ by some 5e-5 of them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the rules weigh.

    Attributes:
        neighbours: kept units that share a removed one whose cluster keeps none (local-ridge).
        distance: cosine distance up to which two units are similar: DBSCAN's eps (local-ridge).
        bias_weight: λ1, how much a difference of means counts beside one of what varies (ridges).
        ridge: λ2 > 0, penalty on squared shares, relative to the mean variance of the group's units (ridges); exact
            duplicates are carried whatever it is.
        nonnegative: no share is negative (ridges).
        cosine_weight: λ, how much direction counts beside the constant where a batch norm is folded (merge).
        threshold: least cosine of a merge behind a batch norm.
        plain_threshold: least cosine of a merge without one.
    """

    neighbours: int = 5
    distance: float = 0.6
    bias_weight: float = 1.0
    ridge: float = 1e-6
    nonnegative: bool = False
    cosine_weight: float = 0.85
    threshold: float = 0.1
    plain_threshold: float = 0.45

    def __post_init__(self) -> None:
        if self.neighbours < 1 or not self.ridge > 0:
            raise ConfigError(
                f"reconstruction cannot use {self.neighbours} neighbours and a ridge of {self.ridge}",
                why="it needs at least one neighbour and a positive ridge",
            )


Rule = Callable[[Filters, Units, Units, float | None, Settings], Array]
"""Filters of a group, kept units, removed units (both at least one), coefficient → shares, [removed, kept]."""


def repaired(
    module: nn.Module,
    structure: Structure,
    plan: Plan,
    *,
    mode: str,
    coefficients: Mapping[str, float] | None = None,
    settings: Settings | None = None,
) -> nn.Module:
    """Return a copy of the unpruned module whose kept channels carry what a plan's removed ones did; then cut it.

        candidate = cut_module(repaired(module, structure, plan, mode="local-ridge"), structure, plan)

    Batch norm statistics are left as they are. Groups of width 0 are not repaired: what they belong to is gone.

    Args:
        module: the unpruned model, eval mode; left as it is.
        structure: of that model.
        plan: which units stay.
        mode: a name in `MODES`.
        coefficients: group → a number in [0, 1], for groups where the mode's own is not wanted. For "merge" it is the
            weight λ of direction against constant; for the ridges the part of the shares that is applied, 0 being
            plain pruning. That, and not the logarithm of λ2, because it reaches plain pruning within the range and
            its effect is alike in every group.
        settings: of the rules.

    Raises:
        ConfigError: if there is no such mode.
        PlanError: if the plan does not fit the space, or a coefficient is out of range or of no group.
    """
    rule, chosen = _rule(mode), settings or Settings()
    given = _checked(coefficients or {}, structure)
    kept = {name: np.array(units, dtype=np.int64) for name, units in plan.kept.items()}

    def shares(_reader: str, group: str, filters: Filters) -> Array | None:
        lost = np.delete(np.arange(structure.full[group]), kept[group])
        if not len(lost) or not len(kept[group]):
            return None
        return rule(filters, kept[group], lost, given.get(group), chosen)

    flow = follow(module, structure, plan, shares)
    result = copy.deepcopy(module)
    with torch.no_grad():
        for name, weight in flow.changed.items():
            result.get_submodule(name).get_parameter("weight").copy_(torch.from_numpy(weight))
    return result


def unreached(module: nn.Module, structure: Structure) -> dict[tuple[str, str], str]:
    """Return (reader, group) → why the reader keeps its weights when the group is pruned; every other is repaired."""
    return follow(module, structure, structure.space.full(), lambda *_: None).kept_as_they_are


def _rule(mode: str) -> Rule:
    if mode not in MODES:
        raise ConfigError(f"there is no reconstruction {mode!r}", next_step=f"choose one of {', '.join(MODES)}")
    return MODES[mode]


def _checked(coefficients: Mapping[str, float], structure: Structure) -> Mapping[str, float]:
    for name, value in coefficients.items():
        if name not in structure.full:
            raise PlanError(f"a reconstruction coefficient is for {name!r}", why="the space has no such group")
        if not 0 <= value <= 1:
            raise PlanError(f"the reconstruction coefficient of {name!r} is {value}", why="it is not in 0..1")
    return coefficients


# -- the rules -------------------------------------------------------------------------------------------------------


def none(
    _filters: Filters, kept: Units, lost: Units, _coefficient: float | None = None, _settings: Settings | None = None
) -> Array:
    """Return no shares: plain pruning."""
    return np.zeros((len(lost), len(kept)))


def merge(filters: Filters, kept: Units, lost: Units, coefficient: float | None, settings: Settings) -> Array:
    """Return shares that give each removed unit to one kept unit (after Neuron Merging, Kim et al. 2020).

    The scale is the ratio of lengths, S = ‖f_p‖ / ‖f_k‖, and what stays over is the constant B = c_p − S c_k. Without
    a batch norm the constant is appended to the filter and the best cosine wins. Behind one, the k wins whose λ times
    cosine distance plus (1 − λ) times |B| / |S|, scaled to [0, 1] over the kept units, is least. A unit whose best
    cosine is below the threshold is dropped as in plain pruning. Re-derived on folded filters: γ enters with its
    sign, σ is the standard deviation.
    """
    products = filters.products if filters.normed else filters.products + filters.constant_products
    pairs = cosines(products)[np.ix_(lost, kept)]
    lengths = np.sqrt(products.diagonal())
    scales = lengths[lost, None] / np.where(lengths[kept] > 0, lengths[kept], np.inf)
    cost = 1 - pairs
    if filters.normed:
        weight = settings.cosine_weight if coefficient is None else coefficient
        cost = weight * cost + (1 - weight) * _constant_gaps(filters.constants, kept, lost, scales)
    rows, best = np.arange(len(lost)), cost.argmin(1)
    accepted = pairs[rows, best] >= (settings.threshold if filters.normed else settings.plain_threshold)
    shares = np.zeros_like(pairs)
    shares[rows, best] = np.where(accepted, scales[rows, best], 0.0)
    return shares


def _constant_gaps(constants: Array, kept: Units, lost: Units, scales: Array) -> Array:
    """Return |B| / |S| of every pair, [removed, kept], scaled to [0, 1] in each row; all zero where a row is even."""
    left = constants[:, lost, None] - scales * constants[:, None, kept]
    gaps = np.linalg.norm(left, axis=0) / np.where(scales > 0, scales, np.inf)
    lowest = gaps.min(1, keepdims=True)
    spread = gaps.max(1, keepdims=True) - lowest
    scaled: Array = (gaps - lowest) / np.where(spread > 0, spread, 1.0)
    return scaled


def ridge(filters: Filters, kept: Units, lost: Units, coefficient: float | None, settings: Settings) -> Array:
    """Return shares of each removed unit in all kept ones (after LBYL, arXiv 2502.08474, re-derived).

    s_p = argmin v ‖f_p − Σ s_k f_k‖² + λ1 (m_p − Σ s_k m_k)² + λ2 mean γ² ‖s‖², in closed form. With λ1 = 1 and λ2 = 0
    that is the expected squared error over inputs that vary by v and independently of one another. Two choices are
    ours: m is the unit's mean over the training data, which a batch norm keeps as β, and not the constant c that is
    left when the inputs are zero, and v = mean γ² / mean ‖f‖² puts both terms in one unit. On networks whose inputs
    are far from zero mean the constant says little (a trial is in docs/methods/reconstruction.md).
    """
    system = _system(filters, settings)
    shares = _solved(system[np.ix_(kept, kept)], system[np.ix_(kept, lost)], settings).T
    return _with_twins(shares, system, kept, lost) * (1.0 if coefficient is None else coefficient)


def local_ridge(filters: Filters, kept: Units, lost: Units, coefficient: float | None, settings: Settings) -> Array:
    """Return shares of each removed unit in the kept ones that are similar to it (after AutoDFP, arXiv 2403.08204).

    The equation of `ridge`, over the kept units of p's cluster, or, where there are none, over the `neighbours` kept
    units of largest cosine. Re-derived: the paper's own equation was not at hand, its premise (similar kept channels
    carry a removed one; DBSCAN says which are similar) is kept.
    """
    system = _system(filters, settings)
    labels = cluster(filters.cosines, settings.distance)
    shares = np.zeros((len(lost), len(kept)))
    alone = np.ones(len(lost), dtype=np.bool_)
    for label in np.intersect1d(labels[lost][labels[lost] >= 0], labels[kept]):
        mine, theirs = np.flatnonzero(labels[lost] == label), np.flatnonzero(labels[kept] == label)
        inner = system[np.ix_(kept[theirs], kept[theirs])]
        found = _solved(inner, system[np.ix_(kept[theirs], lost[mine])], settings)
        shares[np.ix_(mine, theirs)] = found.T
        alone[mine] = False
    _share_with_nearest(
        shares, np.flatnonzero(alone), system, filters.cosines[np.ix_(lost, kept)], kept, lost, settings
    )
    return _with_twins(shares, system, kept, lost) * (1.0 if coefficient is None else coefficient)


def _share_with_nearest(
    shares: Array, alone: Units, system: Array, similarity: Array, kept: Units, lost: Units, settings: Settings
) -> None:
    """Fill in the rows of removed units whose cluster keeps none, all of them in one batch of small systems."""
    count = min(settings.neighbours, len(kept))
    nearest = np.argpartition(-similarity[alone], count - 1, axis=1)[:, :count]
    units = kept[nearest]
    inner = system[units[:, :, None], units[:, None, :]]
    targets = system[units, lost[alone][:, None]]
    shares[alone[:, None], nearest] = _solved(inner, targets[:, :, None], settings)[:, :, 0]


MODES: Mapping[str, Rule] = {"none": none, "merge": merge, "ridge": ridge, "local-ridge": local_ridge}


def _with_twins(shares: Array, system: Array, kept: Units, lost: Units) -> Array:
    """Return the shares with each removed unit that is a positive multiple of a kept one given to that one alone.

    Where more units are kept than their filters have dimensions, other combinations make the same filter. Behind a
    ReLU only the twin makes the same unit. λ2 has no say in it, on purpose: what is carried exactly costs nothing, so
    at λ2 → ∞ a ridge is plain pruning but for twins.
    """
    pairs = cosines(system)[np.ix_(lost, kept)]
    best = pairs.argmax(1)
    twins = np.flatnonzero(1 - pairs[np.arange(len(lost)), best] <= TWINS)
    lengths = np.sqrt(system.diagonal())
    shares[twins] = 0.0
    shares[twins, best[twins]] = lengths[lost[twins]] / lengths[kept[best[twins]]]
    return shares


def _system(filters: Filters, settings: Settings) -> Array:
    """Return F Fᵀ / mean ‖f‖² + λ1 m mᵀ / mean γ², [units, units]."""
    length, spread = filters.products.diagonal().mean(), filters.variances.sum(0).mean()
    means = filters.means / np.sqrt(spread if spread > 0 else 1.0)
    varying: Array = filters.products / (length if length > 0 else 1.0)
    whole: Array = varying + settings.bias_weight * means.T @ means
    return whole


def _solved(inner: Array, targets: Array, settings: Settings) -> Array:
    """Return the shares of ridge systems, [..., kept, kept] and [..., kept, removed] → [..., kept, removed]."""
    inner = inner + settings.ridge * np.eye(inner.shape[-1])
    shares = np.asarray(np.linalg.solve(inner, targets), dtype=np.float64)
    return _projected(inner, targets, shares) if settings.nonnegative else shares


def _projected(inner: Array, targets: Array, shares: Array) -> Array:
    """Return the least squares with no negative share, by accelerated projected gradient (Beck and Teboulle 2009)."""
    step = 1.0 / np.abs(inner).sum(-1).max(-1)[..., None, None]
    best = ahead = np.maximum(shares, 0.0)
    pace = 1.0
    for _ in range(PROJECTIONS):
        found = np.maximum(ahead - step * (inner @ ahead - targets), 0.0)
        faster = (1 + np.sqrt(1 + 4 * pace**2)) / 2
        ahead = found + (pace - 1) / faster * (found - best)
        best, pace = found, faster
    return best


# -- how alike the units of a group are --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Likeness:
    """How alike the units of one group are, where the last layer that can be repaired reads them.

    Attributes:
        labels: cluster of each unit, −1: similar to no other.
        clusters: clusters per unit.
        noise: share of units in no cluster.
        nearest: mean cosine distance of a unit to its nearest, 0 to 2.
        residual: length of what local-ridge cannot express of the shorter half of the filters, relative to their
            length, 0 to 1.
    """

    labels: NDArray[np.int64]
    clusters: float
    noise: float
    nearest: float
    residual: float


def likenesses(module: nn.Module, structure: Structure, settings: Settings | None = None) -> dict[str, Likeness]:
    """Return group → how alike its units are; groups that no layer can be repaired for are absent.

    Args:
        module: the unpruned model.
        structure: of that model.
        settings: of local-ridge.
    """
    seen: dict[str, Filters] = {}

    def note(_reader: str, group: str, filters: Filters) -> None:
        seen[group] = filters

    follow(module, structure, structure.space.full(), note)
    return {group: likeness(filters, settings or Settings()) for group, filters in seen.items()}


def likeness(filters: Filters, settings: Settings) -> Likeness:
    """Return how alike the units of a group of at least two are."""
    labels = cluster(filters.cosines, settings.distance)
    distances = 1.0 - filters.cosines
    np.fill_diagonal(distances, np.inf)
    return Likeness(
        labels=labels,
        clusters=(int(labels.max()) + 1) / len(labels),
        noise=float((labels < 0).mean()),
        nearest=float(distances.min(1).mean()),
        residual=_half_residual(filters, settings),
    )


def _half_residual(filters: Filters, settings: Settings) -> float:
    order = np.argsort(-filters.norms, kind="stable")
    kept, lost = np.sort(order[: (len(order) + 1) // 2]), np.sort(order[(len(order) + 1) // 2 :])
    shares = local_ridge(filters, kept, lost, None, settings)
    products = filters.products
    whole = products[lost, lost].sum()
    left = whole - 2 * (shares * products[np.ix_(lost, kept)]).sum()
    left += (shares @ products[np.ix_(kept, kept)] * shares).sum()
    return float(np.sqrt(np.clip(left / whole, 0.0, 1.0))) if whole > 0 else 0.0
