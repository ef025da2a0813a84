"""How many answers of the unpruned and the final model survive images changed on purpose, counted at the very end."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from edgeprune.errors import ConfigError
from edgeprune.intake.config import Config
from edgeprune.intake.data import Splits
from edgeprune.intake.data_free import DataFree
from edgeprune.intake.images import ArraySet, interleaved
from edgeprune.progress import Stage
from edgeprune.robustness import Attack, Pixels, robustness

BATCH = 125
"""Images attacked at once, at most."""


@dataclass(frozen=True, kw_only=True)
class Attacks:
    """What the models go through.

    Attributes:
        chosen: by the configuration, or by its method; empty: none.
        pixels: how they became what the model reads.
        images: at most so many of the test images, the classes in proportion.
    """

    chosen: tuple[Attack, ...]
    pixels: Pixels
    images: int

    def part(self, test: ArraySet) -> ArraySet:
        """Return the test images that are attacked."""
        return test.subset(interleaved(test.labels, seed=0)[: self.images])

    def survived(self, module: nn.Module, test: ArraySet, stage: Stage) -> Mapping[str, float]:
        """Return attack → share of the images that are classified rightly after it; `stage` counts images."""
        found = robustness(
            module, _counted(test.batches(min(BATCH, test.evaluation_batch)), stage), self.chosen, self.pixels
        )
        return {name: each.right_attacked / each.images for name, each in found.items()}


def _counted(batches: Iterable[tuple[Tensor, Tensor]], stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in batches:
        yield images, labels
        stage.advance(len(labels))


def attacks(config: Config, splits: Splits | DataFree) -> Attacks:
    """Return the attacks of a configuration; where it says nothing, those of its method if pixels are known.

    Raises:
        ConfigError: if attacks are asked for and what a valid pixel is cannot be known.
    """
    wanted, (mean, std) = config.robustness, splits.normalisation
    own: tuple[Literal["fgsm", "pgd"], ...] = ("fgsm", "pgd") if config.search.method == "paoding" and mean else ()
    kinds = own if wanted.attacks is None else wanted.attacks
    if kinds and not mean:
        raise ConfigError(
            "robustness.attacks cannot be carried out",
            why="an attack changes pixels, and the data came normalised or is not there: its pixels are not known",
            next_step="give pixels as bytes with data.mean and data.std, or remove robustness.attacks",
        )
    chosen = (Attack(kind=each, epsilon=wanted.epsilon, steps=wanted.steps) for each in dict.fromkeys(kinds))
    return Attacks(chosen=tuple(chosen), pixels=Pixels(mean=mean, std=std), images=wanted.images)
