"""A run without data looks at synthetic images, and at the user's once, at the end, or never."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import DataError, EdgepruneError
from edgeprune.intake.config import DataConfig
from edgeprune.intake.data import load_data
from edgeprune.intake.data_free import DataFree
from edgeprune.intake.model import LoadedModel


@pytest.fixture
def model() -> LoadedModel:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    return LoadedModel(module=module, name="m", input_shape=(1, 1, 4, 4), classes=3, digest="d")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(24, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def config(path: Path) -> DataConfig:
    return DataConfig.model_validate(
        {"arrays": str(path), "mean": [0.5], "std": [0.25]}, context={"folder": path.parent}
    )


def write(path: Path, *, labels: bool) -> Path:
    rng = np.random.default_rng(0)
    arrays = {"images": rng.integers(0, 256, (60, 4, 4), dtype=np.uint8)}
    np.savez(path, **arrays, **({"labels": np.arange(60) % 3} if labels else {}))
    return path


def test_its_images_are_answered_by_the_model(model: LoadedModel, images: torch.Tensor) -> None:
    splits = DataFree(model, images, images + 1)
    assert torch.equal(splits.validation.labels, model.module(images).argmax(1))
    assert not splits.labelled
    assert not splits.validation.labelled
    assert not splits.train.labels.is_inference()  # fine-tuning may learn from them


def test_without_a_data_set_the_last_evaluation_sees_other_synthetic_images(
    model: LoadedModel, images: torch.Tensor
) -> None:
    splits = DataFree(model, images, images + 1)
    test = splits.open_test()
    assert torch.equal(test.images, images + 1)
    assert torch.equal(test.labels, model.module(images + 1).argmax(1))
    assert "what the unpruned model answers" in splits.tested_on
    with pytest.raises(EdgepruneError, match="twice"):
        splits.open_test()


def test_the_data_set_is_opened_by_the_last_evaluation_alone(
    model: LoadedModel, images: torch.Tensor, tmp_path: Path
) -> None:
    """Until then it need not even be there."""
    splits = DataFree(model, images, config(tmp_path / "later.npz"))
    assert splits.normalisation == ((0.5,), (0.25,))
    assert splits.digest
    write(tmp_path / "later.npz", labels=True)
    test = splits.open_test()
    assert test.labelled
    assert splits.tested_on == "test images"
    assert len(test) == 12


def test_a_data_set_that_is_not_there_is_told_when_it_is_opened(
    model: LoadedModel, images: torch.Tensor, tmp_path: Path
) -> None:
    splits = DataFree(model, images, config(tmp_path / "never.npz"))
    with pytest.raises(DataError, match="missing"):
        splits.open_test()


def test_images_without_labels_are_answered_by_the_model(model: LoadedModel, tmp_path: Path) -> None:
    splits = load_data(config(write(tmp_path / "d.npz", labels=False)))
    assert not splits.labelled
    splits.answered_by(model)
    assert torch.equal(splits.train.labels, model.module(splits.train.tensor()).argmax(1))
    assert "what the unpruned model answers" in splits.tested_on
    assert not splits.labelled
