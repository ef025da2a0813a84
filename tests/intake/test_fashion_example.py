"""The embedded example is what its notes say: small, honest about its splits, and as accurate as printed."""

import gzip
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from edgeprune.intake.config import Config, load_config
from edgeprune.intake.data import Splits, load_data
from edgeprune.intake.factory import importable
from edgeprune.intake.model import LoadedModel, load_model

FOLDER = Path(__file__).parents[2] / "examples" / "fashion"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on a machine that has other work wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config() -> Config:
    """The example's configuration."""
    return load_config(FOLDER / "edgeprune.toml")


@pytest.fixture(scope="module")
def splits(config: Config) -> Splits:
    """The example's data."""
    return load_data(config.data)


@pytest.fixture(scope="module")
def model(config: Config) -> LoadedModel:
    """The example's model."""
    return load_model(config.model)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The training script, imported as its folder's Python would."""
    spec = importlib.util.spec_from_file_location("fashion_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with importable(FOLDER):
        spec.loader.exec_module(module)
    return module


def test_it_fits_into_twelve_mebibytes() -> None:
    """Weights and images together."""
    assert sum(each.stat().st_size for each in FOLDER.glob("fashion.*")) < 12 * 2**20


def test_model_and_data_belong_together(model: LoadedModel, splits: Splits) -> None:
    """Ten classes of grey 28 x 28 images; 12,000 to train on, 2,000 to search by, 2,000 to test."""
    splits.check_fit(model)
    assert (model.classes, splits.classes, splits.input_shape) == (10, 10, (1, 1, 28, 28))
    assert (len(splits.train), len(splits.validation), splits.test_count) == (12_000, 2_000, 2_000)
    assert [model.module.get_submodule(f"stages.stage{n}.1.conv2").out_channels for n in (1, 2, 3)] == [32, 64, 128]


def test_no_image_is_in_two_splits() -> None:
    """The search cannot have seen a test image, nor the weights a validation image by way of the training set."""
    with np.load(FOLDER / "fashion.npz") as arrays:
        sets = [{each.tobytes() for each in arrays[f"{split}_images"]} for split in ("train", "validation", "test")]
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]


def test_the_weights_are_as_accurate_as_printed(model: LoadedModel, config: Config) -> None:
    """train.py printed 93.90 % on the shipped test images."""
    images, right = load_data(config.data).open_test(), 0
    with torch.inference_mode():
        for pixels, labels in images.batches(100):
            right += int((model.module(pixels).argmax(1) == labels).sum())
    assert right / len(images) == pytest.approx(0.9390, abs=0.001)


def test_the_normalisation_is_the_training_script_s(config: Config, script: ModuleType) -> None:
    """The numbers in edgeprune.toml are those the network was trained with."""
    assert config.data.mean == (script.MEAN,)
    assert config.data.std == (script.STD,)


def test_idx_files_are_read(tmp_path: Path, script: ModuleType) -> None:
    """The layout of the original files: magic, big-endian sizes, bytes."""
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + b"".join(each.to_bytes(4, "big") for each in array.shape)
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + array.tobytes()))
    assert np.array_equal(script.read_idx(tmp_path / "x.gz"), array)


def test_the_training_augmentation_shifts_and_mirrors(script: ModuleType) -> None:
    """Every result is the image, or its mirror image, moved by at most two pixels over a black border."""
    image = torch.arange(1.0, 29.0).expand(1, 1, 28, 28)
    made = script.augmented(image.expand(64, 1, 28, 28), torch.Generator().manual_seed(0))
    assert made.shape == (64, 1, 28, 28)
    inner = made[:, 0, 14, 4:24]
    assert set((inner[:, 1] - inner[:, 0]).tolist()) == {-1.0, 1.0}
    black = torch.isclose(made, torch.tensor(-script.MEAN / script.STD)).sum((1, 2, 3))
    assert int(black.max()) <= 28 * 28 - 26 * 26


def test_the_script_trains(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """One step on one batch moves the weights."""
    torch.manual_seed(0)
    net = script.fashion_net()
    before = net.linear.weight.detach().clone()
    images = torch.randn(128, 1, 28, 28)
    script.train(net, images, torch.arange(128) % 2, epochs=1)
    assert not torch.equal(net.linear.weight, before)
    assert capsys.readouterr().out.count("epoch") == 1
    assert "fashion_train" not in sys.modules
