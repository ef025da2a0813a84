"""The images that data-free runs look at: made once for a model, and kept beside the runs.

They take minutes, and a run that is continued must see the same ones: another number of threads rounds them otherwise.
"""

from pathlib import Path

from torch import Tensor

from edgeprune.canonical import digest
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import CorruptArtifact
from edgeprune.intake.model import LoadedModel
from edgeprune.progress import Progress
from edgeprune.provenance import code_digest, versions
from edgeprune.synthetic import RECIPE, synthesise


def synthetic_images(
    model: LoadedModel,
    count: int,
    *,
    seed: int,
    folder: Path,
    progress: Progress,
    what: str = "synthetic images",
    fresh: bool = False,
) -> Tensor:
    """Return images [count, C, H, W], float32, made from a model alone, or those that an earlier run made.

    Args:
        model: whose weights, code and input shape they are made from, by these versions of the packages.
        count: of images.
        seed: of the noise that they begin as.
        folder: where they are kept.
        progress: told how far the making is, or that there is nothing to make.
        what: they are called there.
        fresh: make them in any case.

    Raises:
        ModelError: if no images can be made.
        StorageFull: if they cannot be kept for want of room.
        ConfigError: if the folder cannot be written.
    """
    shape = model.input_shape[1:]
    identity = digest([model.digest, code_digest(model.module), versions(), RECIPE, list(shape), count, seed])
    path = folder / f"synthetic-{identity[:16]}.safetensors"
    known = None if fresh else _kept(path, identity, what, progress)
    if known is not None:
        return known
    with progress.stage(f"make {what}", total=1.0) as stage:
        images = synthesise(model.module, shape, count, seed=seed, advance=stage.advance)
    Checkpoint(identity=identity, facts={}, tensors={"images": images}).write(path)
    return images


def _kept(path: Path, identity: str, what: str, progress: Progress) -> Tensor | None:
    if not path.exists():
        return None
    try:
        images = Checkpoint.read(path, identity).tensors["images"]
    except CorruptArtifact as error:
        progress.note(f"{error}: the images are made anew")
        return None
    progress.note(f"{what} are those of {path}")
    return images
