"""The splits of a run that looks at no image: synthetic ones, made from the network alone, stand for all but the test.

The user's data set, if there is one, is opened by the last evaluation and not before.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from edgeprune.canonical import digest
from edgeprune.errors import EdgepruneError
from edgeprune.intake.data import answers, load_data
from edgeprune.intake.images import ArraySet

if TYPE_CHECKING:
    from edgeprune.intake.config import DataConfig
    from edgeprune.intake.model import LoadedModel


class DataFree:
    """Synthetic images with the unpruned model's answers in the places of training, validation and calibration images.

    Attributes:
        train, validation, calibration: the same synthetic images, normalised floats.
        name: says what they are.
        digest: of the images, and of how pixels of the data for the last evaluation are normalised.
        labelled: False.
        tested_on: what the last evaluation counts.
    """

    labelled = False

    def __init__(self, model: "LoadedModel", images: Tensor, last: "Tensor | DataConfig") -> None:
        """Take synthetic images [N, C, H, W], and what the last evaluation sees: others, or the data set."""
        settings, others = (None, last) if isinstance(last, Tensor) else (last, None)
        self.train = self.validation = self.calibration = _answered(model, images)
        self.name = "synthetic images"
        self.tested_on = "test images" if settings else "synthetic images, right is what the unpruned model answers"
        self._model, self._others, self._settings, self._opened = model, others, settings, False
        self.digest = digest([self.train.digest, *self.normalisation])

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel as given for the test images; empty without any."""
        if self._settings is None:
            return (), ()
        mean, std = self._settings.mean or (), self._settings.std or ()
        repeat = self._model.input_shape[1] if len(mean) == 1 else 1
        return mean * repeat, std * repeat

    def open_test(self) -> ArraySet:
        """Return the test images: the data set is read here, once.

        Raises:
            DataError: if it cannot be read or does not fit the model.
            EdgepruneError: on the second call, which is a mistake in the program, not of the user.
        """
        if self._opened:
            raise EdgepruneError("the test split was opened twice", why="it is read once, when every choice is made")
        self._opened = True
        if self._others is not None:
            return _answered(self._model, self._others)
        assert self._settings is not None
        splits = load_data(self._settings)
        splits.check_fit(self._model)
        splits.answered_by(self._model)
        self.tested_on = splits.tested_on
        return splits.open_test()


def _answered(model: "LoadedModel", images: Tensor) -> ArraySet:
    unknown = ArraySet(images=images, labels=images.new_zeros(len(images)).long())
    return unknown.answered(answers(model.module, unknown))
