"""What weights and images say of units: which go first, how alike they are, how those that stay make up for them."""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from edgeprune import reconstruction
from edgeprune.importance import unit_importance
from edgeprune.paoding.walk import merged
from edgeprune.plan import Plan
from edgeprune.stages.prepare import Prepared

CALIBRATION_BATCH = 128

Repair = Callable[[Plan], nn.Module]
"""Plan → the module in its unpruned shapes, its kept channels making up for those that will be cut."""


def importance(prepared: Prepared) -> Mapping[str, tuple[float, ...]]:
    """Return group → importance of its units: computed once a run, for another number of threads rounds otherwise."""
    known = prepared.ledger.fact(prepared.run, "importance")
    if known is None:
        known = {name: [float(each) for each in units] for name, units in _importance(prepared).items()}
        prepared.ledger.record(prepared.run, "importance", known)
    return {name: tuple(units) for name, units in known.items()}


def _importance(prepared: Prepared) -> Mapping[str, tuple[float, ...]]:
    search = prepared.config.search
    if search.importance == "paoding":
        return _places(prepared.walk.ranking)
    batches = None if search.data_free else prepared.splits.calibration.batches(CALIBRATION_BATCH)
    return unit_importance(prepared.model.module, prepared.structure, search.importance, batches, seed=search.seed)


def _places(ranking: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[float, ...]]:
    """Return an importance with this ranking: 1 for the last to leave, less by equal steps for those before it."""
    return {
        name: tuple(1.0 - units.index(unit) / len(units) for unit in range(len(units)))
        for name, units in ranking.items()
    }


def likeness(prepared: Prepared) -> dict[str, tuple[float, ...]]:
    """Return group → clusters per unit, share in none, distance to the nearest, error at half the width; in [0, 1]."""
    seen = reconstruction.likenesses(prepared.model.module, prepared.structure)
    numbers = {
        name: (each.clusters, each.noise, min(1.0, each.nearest), min(1.0, each.residual))
        for name, each in seen.items()
    }
    return {group.name: numbers.get(group.name, UNREPAIRED) for group in prepared.structure.space.groups}


UNREPAIRED = (0.0, 1.0, 1.0, 1.0)
"""The likeness of a group that nothing can make up for: no unit is like another."""


def own_coefficients(prepared: Prepared) -> dict[str, float]:
    """Return group → the coefficient that a reconstruction has where nobody decides on one."""
    own = reconstruction.Settings().cosine_weight if prepared.config.search.reconstruction == "merge" else 1.0
    return {group.name: own for group in prepared.structure.space.groups}


def left_out(prepared: Prepared) -> str:
    """Return what a reconstruction does not make up for, or what no bound is proven for; nothing if there is none."""
    mode = prepared.config.search.reconstruction
    if mode == "pairs":
        names = prepared.walk.assumed
        return f"paoding: bounds are no proof behind {_some(names)}: what comes in there is assumed" if names else ""
    if mode == "none":
        return ""
    kept = reconstruction.unreached(prepared.model.module, prepared.structure)
    reasons = [f"{reader} of {group} ({why})" for (reader, group), why in kept.items()]
    return f"{mode}: what goes is not made up for in {_some(reasons)}" if reasons else ""


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def repairer(prepared: Prepared) -> Repair | None:
    """Return what makes up for the units that a plan cuts; None if nothing does."""
    mode, module, structure = prepared.config.search.reconstruction, prepared.model.module, prepared.structure
    if mode == "none":
        return None
    if mode == "pairs":
        return lambda plan: merged(module, structure, plan, prepared.walk)
    return lambda plan: reconstruction.repaired(module, structure, plan, mode=mode, coefficients=plan.repair)
