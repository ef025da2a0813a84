"""Three splits: training images, validation images carved from them for the search, test images for the very end.

given            train                     validation                 test
one set          what is left              carved from the rest       carved first
train and test   what is left              carved from train          as given
all three        as given                  as given                   as given
"""

import hashlib
from typing import TYPE_CHECKING

import torch

from edgeprune.errors import DataError, EdgepruneError
from edgeprune.intake.arrays import Pair, array_set, from_factory, from_npz
from edgeprune.intake.folder import from_folder
from edgeprune.intake.images import ArraySet, interleaved, stratified

if TYPE_CHECKING:
    from edgeprune.intake.config import DataConfig
    from edgeprune.intake.model import LoadedModel

MOST_VALIDATION = 5000
"""A share of the training images sets aside at most so many."""


class Splits:
    """The three splits; the test split opens once.

    Attributes:
        train: to learn from.
        validation: to choose by; any beginning of it has the classes in proportion.
        calibration: a part of `train`, in such an order as well, for batch-norm statistics, importance and entropy.
        classes: one more than the largest label.
        name: as the user named the data.
        digest: SHA-256 of everything in all three splits.
        labelled: every split has true labels.
    """

    def __init__(self, *, train: ArraySet, validation: ArraySet, test: ArraySet, name: str, calibration: int) -> None:
        self.train = train
        self.validation = validation.subset(interleaved(validation.labels, seed=0))
        self.calibration = train.subset(interleaved(train.labels, seed=0)[:calibration])
        self.classes = 1 + max(int(each.labels.max()) for each in (train, validation, test))
        self.name = name
        self.digest = hashlib.sha256("".join(each.digest for each in (train, validation, test)).encode()).hexdigest()
        self.labelled = train.labelled and validation.labelled and test.labelled
        self._test = test
        self._opened = False

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Return the shape of one call: 1 x C x H x W."""
        return (1, *self.train.shape)

    @property
    def tested_on(self) -> str:
        """Return what the last evaluation counts."""
        return "test images" if self._test.labelled else "test images, right is what the unpruned model answers"

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel of pixels in [0, 1]; empty where they are not known."""
        return self.train.mean, self.train.std

    @property
    def test_count(self) -> int:
        """Return the number of test images without looking at them."""
        return len(self._test)

    def open_test(self) -> ArraySet:
        """Return the test split, once: whoever evaluates at the end evaluates everything that is to be reported.

        Raises:
            EdgepruneError: on the second call, which is a mistake in the program, not of the user.
        """
        if self._opened:
            raise EdgepruneError("the test split was opened twice", why="it is read once, when every choice is made")
        self._opened = True
        return self._test

    def answered_by(self, model: "LoadedModel") -> None:
        """Put the model's answers where labels are missing; everything that learns from labels learns from these."""
        self.train, self.validation, self.calibration, self._test = (
            each if each.labelled else each.answered(answers(model.module, each))
            for each in (self.train, self.validation, self.calibration, self._test)
        )

    def check_fit(self, model: "LoadedModel") -> None:
        """Check that the model takes these images and knows these classes.

        Raises:
            DataError: if channels, size or labels do not fit.
        """
        _check_shape(self.input_shape, model)
        for split, images in (("train", self.train), ("validation", self.validation), ("test", self._test)):
            wrong = (images.labels >= model.classes).nonzero().flatten()
            if len(wrong):
                first = int(wrong[0])
                raise DataError(
                    f"{self.name}: label {int(images.labels[first])} of {split} image {first} is out of range",
                    why=f"{model.name} has {model.classes} classes, numbered 0 to {model.classes - 1}",
                    next_step="check that labels start at 0 and that model and data belong together",
                )


@torch.no_grad()  # not inference mode: fine-tuning may learn from them
def answers(module: torch.nn.Module, images: ArraySet) -> torch.Tensor:
    """Return the class that a module takes each image for, N int64."""
    return torch.cat([module.eval()(each).argmax(1) for each, _ in images.batches(images.evaluation_batch)])


def _check_shape(shape: tuple[int, int, int, int], model: "LoadedModel") -> None:
    if shape[1] != model.input_shape[1]:
        raise DataError(
            f"the images have {shape[1]} channels, {model.name} takes {model.input_shape[1]}",
            next_step="set data.grayscale for a folder, or convert the arrays",
        )
    if shape != model.input_shape:
        height, width = model.input_shape[2:]
        raise DataError(
            f"the images are {shape[2]} x {shape[3]}, {model.name} takes {height} x {width}",
            next_step="set data.image_size for a folder, or model.input_shape to the images' size",
        )


def load_data(settings: "DataConfig") -> Splits:
    """Return the splits that the settings name, in memory.

    Raises:
        DataError: saying what is wrong with the data.
    """
    name = str(settings)
    sets = {
        split: _limited(_checked(pair, f"{name} ({split})", settings), settings)
        for split, pair in _given(settings).items()
    }
    train = sets.get("train", sets.get("all"))
    assert train is not None
    test, train = (sets["test"], train) if "test" in sets else _carved(train, settings.test, settings, name, "test")
    if "validation" in sets:
        validation = sets["validation"]
    else:
        validation, train = _carved(train, settings.validation, settings, name, "validation")
    for split, each in (("validation", validation), ("test", test)):
        if each.shape != train.shape:
            raise DataError(f"{name}: {split} images are {each.shape}, training images {train.shape}")
    return Splits(train=train, validation=validation, test=test, name=name, calibration=settings.calibration)


def _given(settings: "DataConfig") -> dict[str, Pair]:
    if settings.arrays is not None:
        return from_npz(settings.arrays)
    if settings.folder is not None:
        return from_folder(settings)
    assert settings.factory is not None
    return from_factory(settings.factory.call(settings.kwargs, DataError), str(settings.factory), settings.limit)


def _checked(pair: Pair, source: str, settings: "DataConfig") -> ArraySet:
    return array_set(*pair, source=source, mean=settings.mean or (), std=settings.std or ())


def _limited(images: ArraySet, settings: "DataConfig") -> ArraySet:
    if settings.limit is None or settings.limit >= len(images):
        return images
    return images.subset(stratified(images.labels, settings.limit, settings.seed)[0])


def _carved(images: ArraySet, size: float, settings: "DataConfig", name: str, split: str) -> tuple[ArraySet, ArraySet]:
    """Return a part of `images` and the rest, classes in proportion."""
    count = int(size) if size >= 1 else max(1, min(MOST_VALIDATION, round(size * len(images))))
    if count >= len(images):
        raise DataError(
            f"{name}: {count} images for {split} leave none of {len(images)} to learn from",
            next_step=f"lower data.{split}",
        )
    chosen, rest = stratified(images.labels, count, settings.seed + (split == "test"))
    return images.subset(chosen), images.subset(torch.as_tensor(rest))
