"""Read a folder of images: one sub-folder for each class, numbered in sorted order."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from edgeprune.errors import DataError
from edgeprune.intake.arrays import MOST_BYTES, Pair
from edgeprune.intake.images import stratified

if TYPE_CHECKING:
    from edgeprune.intake.config import DataConfig

SPLITS = ("train", "validation", "test")

SIXTEEN_BITS = {"PNG", "PPM"}
"""Formats whose pixels Pillow may hand out as 32-bit whole numbers although they are from 0 to 65,535."""

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
"""What counts as an image; other files are passed over."""


def from_folder(settings: "DataConfig") -> dict[str, Pair]:
    """Return split → (uint8 N x H x W x C, labels); a folder without train/ is "all".

    Raises:
        DataError: naming the folder that is not understood, or the folder or the image that cannot be read.
    """
    root = settings.folder
    assert root is not None
    children = _folders(root)
    names = {each.name for each in children}
    if "train" not in names:
        return {"all": _read(root, [each.name for each in children], settings)}
    if strange := sorted(names - set(SPLITS)):
        raise DataError(
            f"{root} has the folder {strange[0]!r} beside train/",
            why="validation/ and test/ are understood",
            next_step="rename it, or move it elsewhere",
        )
    classes = [each.name for each in _folders(root / "train")]
    return {split: _read(root / split, classes, settings) for split in SPLITS if split in names}


def _folders(root: Path) -> list[Path]:
    try:
        found = sorted(each for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError as error:
        raise DataError(f"data folder {root} cannot be read", why=error.strerror or str(error)) from error
    if not found:
        raise DataError(
            f"data folder {root} has no sub-folders", next_step="put the images of each class into one of its own"
        )
    return found


def _read(root: Path, classes: Sequence[str], settings: "DataConfig") -> Pair:
    if strange := sorted({each.name for each in _folders(root)} - set(classes)):
        raise DataError(f"{root} has the class {strange[0]!r}", why="train/ does not have it")
    paths, labels = _listed(root, classes)
    if settings.limit is not None and settings.limit < len(paths):
        chosen, _ = stratified(torch.tensor(labels), settings.limit, settings.seed)
        paths, labels = [paths[each] for each in chosen], [labels[each] for each in chosen]
    images: list[np.ndarray[Any, Any]] = []
    for path in paths:
        image = _decoded(path, settings)
        if images and image.shape != images[0].shape:
            raise DataError(
                f"{path} is {_size(image)}, {paths[0].name} is {_size(images[0])}",
                next_step="set data.image_size, the side that every image is brought to",
            )
        if image.nbytes * len(paths) > MOST_BYTES:
            size = image.nbytes * len(paths) / 2**30
            raise DataError(f"{root} takes {size:.1f} GiB", why="images are kept in memory", next_step="set data.limit")
        images.append(image)
    return np.stack(images), np.array(labels, dtype=np.int64)


def _listed(root: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = root / name
        inside = sorted(each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        if not inside:
            raise DataError(f"{folder} holds no images", why=f"looked for {', '.join(sorted(SUFFIXES))}")
        paths += inside
        labels += [label] * len(inside)
    return paths, labels


def _decoded(path: Path, settings: "DataConfig") -> np.ndarray[Any, Any]:
    """Return one image, H x W x C bytes."""
    try:
        with Image.open(path) as opened:
            image = _eight_bits(opened, path).convert("L" if settings.grayscale else "RGB")
            if settings.image_size:
                image = _centre(image, settings.image_size, settings.resize or settings.image_size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"image {path} cannot be read", why=str(error), next_step="delete it or replace it by a good copy"
        ) from error
    return np.asarray(image).reshape(image.height, image.width, -1)


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Return the image with 8 bits a channel; Pillow's own conversion clips 16 bits instead of scaling them."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))  # 65,535 / 257 = 255
    if image.mode in {"I", "F"}:
        raise DataError(
            f"image {path} has 32 bits a pixel",
            why="which of its values is white cannot be seen",
            next_step="save it with 8 or 16 bits",
        )
    return image


def _centre(image: Image.Image, side: int, resize: int) -> Image.Image:
    """Return the central square of the image whose short side was scaled to `resize` pixels, bilinear."""
    scale = resize / min(image.size)
    width, height = (max(resize, round(each * scale)) for each in image.size)
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return scaled.crop((left, top, left + side, top + side))


def _size(image: np.ndarray[Any, Any]) -> str:
    return f"{image.shape[1]} x {image.shape[0]} pixels"
