"""From whatever holds images and labels to one checked `ArraySet`; nothing is guessed silently."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from edgeprune.errors import DataError
from edgeprune.intake.images import ArraySet

MOST_BYTES = 4 * 2**30
"""Images are kept in memory; more than this is refused."""

CHANNELS = (1, 3, 4)
"""Numbers of channels that mark an axis of byte images as the channel axis."""

Pair = tuple[Any, Any]
Sets = dict[str, ArraySet]

SPLITS = ("train", "validation", "test")


class MapStyle(Protocol):
    """A data set as torch knows it: a length, and (image, label) by index."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Return an image and its label."""
        ...


def array_set(images: Any, labels: Any, *, source: str, mean: tuple[float, ...], std: tuple[float, ...]) -> ArraySet:
    """Return the checked set.

    Args:
        images: uint8 N x H x W x C, N x H x W or N x C x H x W, or normalised floats N x C x H x W or N x H x W.
        labels: N whole numbers from 0; None: there are none.
        source: what to call it in an error.
        mean, std: of each channel, needed for uint8 and refused for floats; empty: not given.

    Raises:
        DataError: saying what is wrong with which image or label.
    """
    pixels = _images(images, source)
    numbers = torch.zeros(len(pixels), dtype=torch.int64) if labels is None else _labels(labels, source)
    labelled = labels is not None
    if len(pixels) != len(numbers):
        raise DataError(
            f"{source} has {len(pixels)} images and {len(numbers)} labels", next_step="give one label for each"
        )
    if len(pixels) == 0:
        raise DataError(f"{source} is empty", next_step="check the path or the factory that made it")
    if pixels.dtype != torch.uint8:
        _check_floats(pixels, source, normalised=not mean)
        return ArraySet(images=pixels, labels=numbers, labelled=labelled)
    repeat = _check_normalisation(pixels.shape[1], source, mean, std)
    return ArraySet(images=pixels, labels=numbers, mean=mean * repeat, std=std * repeat, labelled=labelled)


def _check_normalisation(channels: int, source: str, mean: tuple[float, ...], std: tuple[float, ...]) -> int:
    """Return how often mean and std are to be repeated to have one for each channel."""
    if not mean:
        unit = f"{[0.0] * channels} and {[1.0] * channels}"
        raise DataError(
            f"{source} has byte pixels, but no mean and std",
            why="the model's own normalisation cannot be guessed",
            next_step=f"set data.mean and data.std ({unit} if it saw pixels in [0, 1])",
        )
    if not all(0 <= each <= 1 for each in mean) or not all(0 < each <= 1 for each in std):
        raise DataError(
            f"data.mean is {list(mean)} and data.std {list(std)}",
            why="bytes are scaled to [0, 1] first",
            next_step="divide both by 255 if they are meant for pixels from 0 to 255",
        )
    if len(mean) not in {1, channels}:
        raise DataError(
            f"{source} has {channels} channels and data.mean {len(mean)}", next_step="give one for each channel"
        )
    return channels // len(mean)


def _array(values: Any, source: str, what: str) -> np.ndarray[Any, Any]:
    try:
        return _as_numpy(values)
    except Exception as error:  # ragged lists are a ValueError, sparse tensors a TypeError, and a stranger's are any
        raise DataError(
            f"{source} has {what} that are no array",
            why=f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}",
            next_step=f"give numpy arrays or dense tensors; all {what} are to have one shape",
        ) from error


def _as_numpy(values: Any) -> np.ndarray[Any, Any]:
    """Return the values as an array; bfloat16, which numpy does not have, as float32."""
    if isinstance(values, Tensor):
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)
    return np.asarray(values)


def _images(images: Any, source: str) -> Tensor:
    array = _array(images, source, "images")
    if array.nbytes > MOST_BYTES:
        raise DataError(
            f"{source} takes {array.nbytes / 2**30:.1f} GiB",
            why="images are kept in memory",
            next_step="set data.limit",
        )
    if array.dtype == np.uint8:
        return torch.from_numpy(_channels_first(array, source).copy(order="C"))  # with the strides of its shape
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(
            f"{source} has images of type {array.dtype}",
            why="bytes (0 to 255) or normalised floats are wanted",
            next_step="images.astype(numpy.uint8) where the values are 0 to 255",
        )
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4:
        raise DataError(f"{source} has images of shape {array.shape}", why="N x C x H x W is wanted")
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _channels_first(array: np.ndarray[Any, Any], source: str) -> np.ndarray[Any, Any]:
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4 and array.shape[3] in CHANNELS:
        return array.transpose(0, 3, 1, 2)
    if array.ndim == 4 and array.shape[1] in CHANNELS:
        return array
    raise DataError(
        f"{source} has byte images of shape {array.shape}", why="N x H x W x C or N x H x W is wanted, C one of 1, 3, 4"
    )


def _check_floats(pixels: Tensor, source: str, *, normalised: bool) -> None:
    if not normalised:
        raise DataError(
            f"{source} has float pixels, but data.mean and data.std are set",
            why="floats are taken as normalised already, so both would be ignored",
            next_step="remove data.mean and data.std, or give bytes from 0 to 255",
        )
    finite = torch.isfinite(pixels).flatten(1).all(1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise DataError(
            f"{int((~finite).sum())} of {len(pixels)} images in {source} hold NaN or infinity",
            why=f"the first is image {first}",
            next_step="leave them out, or mend the preprocessing that made them",
        )


def _labels(labels: Any, source: str) -> Tensor:
    array = _array(labels, source, "labels")
    if array.ndim != 1:
        hint = "labels.argmax(1)" if array.ndim == 2 else "labels.reshape(-1)"
        raise DataError(
            f"{source} has labels of shape {array.shape}", why="N numbers are wanted", next_step=f"try {hint}"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"{source} has labels of type {array.dtype}",
            why="whole numbers from 0 are wanted",
            next_step="labels.astype(numpy.int64)",
        )
    if len(array) and array.min() < 0:
        first = int(np.flatnonzero(array < 0)[0])
        raise DataError(
            f"{source} has the negative label {array[first]} at index {first}",
            why="classes are numbered from 0",
            next_step="leave unlabelled images out",
        )
    return torch.from_numpy(array.astype(np.int64))


# ---------------------------------------------------------------------------------------------------------- sources


def from_npz(path: Path) -> dict[str, Pair]:
    """Return split → (images, labels); a file that has only one pair calls it "all".

    A file without any labels gives None for them; one that lacks them for some images is taken for a mistake.

    Raises:
        DataError: if the file is missing or damaged, holds pickles, lacks the arrays or has others.
    """
    try:
        found = _members(path)
    except FileNotFoundError as error:
        raise DataError(f"data {path} is missing", next_step="give the path of an .npz file") from error
    except Exception as error:  # numpy, zipfile, zlib and lzma each raise their own
        raise DataError(
            f"data {path.name} cannot be read",
            why=f"{type(error).__name__}: {error}",
            next_step="write it again with numpy.savez_compressed; arrays of objects are refused, they are pickles",
        ) from error
    if found is None:
        raise DataError(
            f"data {path.name} is a single array", next_step="numpy.savez_compressed(path, images=..., labels=...)"
        )
    return _paired(found, path.name)


def _members(path: Path) -> dict[str, Any] | None:
    """Return the arrays of an archive, None if the file is a lone array."""
    opened = np.load(path, allow_pickle=False)
    if isinstance(opened, np.ndarray):
        return None
    with opened as archive:
        return {name: archive[name] for name in archive.files}


def _paired(found: Mapping[str, Any], source: str) -> dict[str, Pair]:
    prefixes = {"all": "", **{split: f"{split}_" for split in SPLITS}}
    parts = {"images", "labels"} if any(name.endswith("labels") for name in found) else {"images"}
    pairs = {
        split: (found[f"{prefix}images"], found.get(f"{prefix}labels"))
        for split, prefix in prefixes.items()
        if {f"{prefix}{part}" for part in parts} <= set(found)
    }
    if not {"all", "train"} & set(pairs) or ("all" in pairs and len(pairs) > 1):
        shapes = ", ".join(f"{name} {np.shape(each)}" for name, each in list(found.items())[:8])
        raise DataError(
            f"data {source} holds {shapes or 'nothing'}",
            why="images and labels are wanted, or train_images, train_labels, test_images, test_labels",
            next_step="rename the arrays",
        )
    used = {f"{prefixes[split]}{part}" for split in pairs for part in ("images", "labels")}
    if strange := sorted(set(found) - used):
        raise DataError(
            f"data {source} has the array {strange[0]!r}",
            why="images and labels are understood, and both with train_, validation_ or test_ before them",
            next_step="rename it, or leave it out",
        )
    return pairs


def from_factory(made: object, source: str, limit: int | None) -> dict[str, Pair]:
    """Return split → (images, labels) from what a factory returned.

    Raises:
        DataError: if it returned none of the forms that are understood.
    """
    if isinstance(made, Mapping) and {"images", "labels"} <= set(made):
        if others := set(made) - {"images", "labels"}:
            raise DataError(f"{source} returned images, labels and {others.pop()!r}", next_step="leave it out")
        return {"all": (made["images"], made["labels"])}
    if isinstance(made, Mapping):
        if "train" not in made or (strange := set(made) - set(SPLITS)):
            raise DataError(
                f"{source} returned a mapping of {', '.join(str(each) for each in made) or 'nothing'}",
                why="train is wanted, validation and test are allowed",
                next_step=f"remove {', '.join(map(str, strange))}" if "train" in made else "add train",
            )
        return {str(split): _pair(each, f"{source} {split}", limit) for split, each in made.items()}
    return {"all": _pair(made, source, limit)}


def _pair(made: object, source: str, limit: int | None) -> Pair:
    if isinstance(made, tuple | list) and len(made) == 2 and isinstance(made[1], np.ndarray | Tensor | list | tuple):
        return made[0], made[1]
    indexed = hasattr(made, "__len__") and hasattr(made, "__getitem__")
    if indexed and not isinstance(made, str | bytes | Mapping):
        return _materialised(cast(MapStyle, made), source, limit)
    raise DataError(
        f"{source} returned a {type(made).__name__}",
        why="(images, labels), a map-style data set, or a mapping of train and test to either is wanted",
        next_step="return arrays",
    )


def _materialised(made: MapStyle, source: str, limit: int | None) -> Pair:
    """Return a map-style data set as arrays; with a limit, images spread evenly over it."""
    count = len(made)
    chosen = np.unique(np.linspace(0, count - 1, min(limit or count, count)).astype(int))
    images: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    for index in chosen:
        image, label = _item(made, int(index), source)
        if images and image.shape != images[0].shape:
            raise DataError(
                f"{source}: image {index} is {image.shape}, image {chosen[0]} is {images[0].shape}",
                next_step="resize in the data set's transform",
            )
        if image.nbytes * len(chosen) > MOST_BYTES:
            size = image.nbytes * len(chosen) / 2**30
            raise DataError(
                f"{source} takes {size:.1f} GiB", why="images are kept in memory", next_step="set data.limit"
            )
        images.append(image)
        labels.append(label)
    return np.stack(images) if images else np.empty((0, 1, 1, 1), np.float32), np.array(labels, dtype=np.int64)


def _item(made: MapStyle, index: int, source: str) -> tuple[np.ndarray[Any, Any], int]:
    try:
        image, label, *_ = made[index]
        number = int(label)
        if number != label:
            raise ValueError(f"label {label!r} is not whole")
        return _as_numpy(image), number
    except Exception as error:  # a stranger's data set may raise anything
        raise DataError(
            f"{source}: reading image {index} failed",
            why=f"{type(error).__name__}: {error}",
            next_step="each item is to be an image and a whole number",
        ) from error
