"""The rules by name, what each needs, and what they say about the units of every group."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune.errors import ConfigError
from edgeprune.importance import activations, gradients, weights
from edgeprune.importance.members import has_scale
from edgeprune.importance.needs import Batch, Given, Needs
from edgeprune.structure import Structure


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One way to say what the model would miss.

    Attributes:
        score: (module, structure, given) → importance of each class of coupled channels, float64 [classes], at least 0.
        needs: what it cannot do without.
    """

    score: Callable[[nn.Module, Structure, Given], NDArray[np.float64]]
    needs: Needs = Needs()  # noqa: RUF009 - it has no state


RULES: Mapping[str, Rule] = {
    "l1": Rule(score=weights.l1),
    "l2": Rule(score=weights.l2),
    "geometric-median": Rule(score=weights.geometric_median),
    "group-norm": Rule(score=weights.group_norm),
    "batch-norm-scale": Rule(score=weights.batch_norm_scale, needs=Needs(batch_norms=True)),
    "activation-entropy": Rule(score=activations.activation_entropy, needs=Needs(images=True)),
    "taylor": Rule(score=gradients.taylor, needs=Needs(images=True, labels=True)),
    "random": Rule(score=weights.random),
}


def unit_importance(
    module: nn.Module,
    structure: Structure,
    rule: str,
    batches: Iterable[Batch] | None = None,
    *,
    images: Iterable[Tensor] | None = None,
    seed: int = 0,
) -> dict[str, tuple[float, ...]]:
    """Return group → importance of each of its units, in unit order.

    Args:
        module: left as it was.
        structure: of that module.
        rule: a name in `RULES`.
        batches: labelled training images, for rules that need labels; without `images`, for rules that need images.
        images: batches of images [N, ...] float32, for rules that need no labels.
        seed: of the rule that draws.

    Raises:
        ConfigError: as `check_needs`, and if there turn out to be no images in what the rule needs.
    """
    check_needs(rule, module, structure, images=images is not None or batches is not None, labels=batches is not None)
    scores = RULES[rule].score(module, structure, Given(labelled=batches, images=images, seed=seed))
    return {name: tuple(float(scores[unit]) for unit in units) for name, units in structure.units.items()}


def ranking(importance: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[int, ...]]:
    """Return group → its units, most important first; ties keep their order."""
    return {name: tuple(np.argsort(-np.array(scores), kind="stable").tolist()) for name, scores in importance.items()}


def check_needs(rule: str, module: nn.Module, structure: Structure, *, images: bool, labels: bool) -> None:
    """Refuse a rule that cannot work on this model with what is at hand, before anything is computed.

    A group that no batch norm scales is refused as well under a rule that reads scales, though other groups have
    them: another rule put in for that group alone would be a decision of ours under the name of the user's rule.

    Args:
        images, labels: whether there are any.

    Raises:
        ConfigError: as `check_at_hand`, or naming the groups and how to go on.
    """
    check_at_hand(rule, images=images, labels=labels)
    if RULES[rule].needs.batch_norms:
        _check_batch_norms(rule, module, structure)


def check_at_hand(rule: str, *, images: bool, labels: bool) -> None:
    """Refuse a rule that no model could make up for, before one is loaded.

    Args:
        images, labels: whether there are any.

    Raises:
        ConfigError: if the rule is unknown, or naming what it needs and how to go on.
    """
    if rule not in RULES:
        raise ConfigError(f"importance rule {rule!r} is unknown", next_step=f"choose one of {', '.join(RULES)}")
    needs = RULES[rule].needs
    if (needs.labels and not labels) or (needs.images and not images):
        raise _refused(rule, f"it needs {needs}, and there are none")


def _check_batch_norms(rule: str, module: nn.Module, structure: Structure) -> None:
    scaled = {name for name, layer in module.named_modules() if has_scale(layer)}
    if not scaled:
        raise _refused(rule, "it reads the scales of batch norms, and the model has none")
    without = [name for name, axes in structure.members.items() if not scaled.intersection(layer for layer, _ in axes)]
    if without:
        shown = ", ".join(without[:4]) + (", ..." if len(without) > 4 else "")
        raise _refused(
            rule,
            f"it reads the scales of batch norms, and no batch norm scales {len(without)} of {len(structure.members)} "
            f"groups ({shown})",
            instead="exclude these layers (space.exclude) or ",
        )


def _refused(rule: str, why: str, *, instead: str = "") -> ConfigError:
    free = ", ".join(name for name, each in RULES.items() if each.needs == Needs())
    next_step = f"{instead}choose a rule that needs nothing: {free}"
    return ConfigError(f"importance rule {rule!r} does not apply", why=why, next_step=next_step)
