"""What a rule needs besides the weights, and what it is given."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a rule cannot do without.

    Attributes:
        images: of the kind that the model was trained on; labels may be missing.
        labels: of those images.
        batch_norms: at least one with a scale in every channel group.
    """

    images: bool = False
    labels: bool = False
    batch_norms: bool = False

    def __str__(self) -> str:
        """Return the needs in words."""
        needed = ["labelled images"] if self.labels else ["images"] if self.images else []
        return " and ".join([*needed, *(["batch norms"] if self.batch_norms else [])]) or "nothing"


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a rule may look at besides the weights.

    Attributes:
        labelled: batches of images [N, ...] float32 and labels int64 [N]; None: there are none.
        images: batches of images [N, ...] float32 without labels; None: there are none.
        seed: of what is drawn.
    """

    labelled: Iterable[Batch] | None = None
    images: Iterable[Tensor] | None = None
    seed: int = 0

    def unlabelled(self) -> Iterable[Tensor]:
        """Return the images without labels, or else those of the labelled batches."""
        if self.images is not None:
            return self.images
        return (images for images, _ in self.labelled or ())
