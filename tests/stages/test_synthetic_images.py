"""Synthetic images are made once for a model, kept, and made anew when what is kept is not what was written."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeprune.intake.model import LoadedModel
from edgeprune.progress import Silent, Stage
from edgeprune.stages.synthetic_images import synthetic_images

SHAPE = (2, 8, 8)


class Heard(Silent):
    """Remembers which stages began and what was said."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def stage(self, name: str, total: float | None = None) -> AbstractContextManager[Stage]:
        self.stages.append(name)
        return super().stage(name, total)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def model() -> LoadedModel:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    return LoadedModel(module=module, name="m", input_shape=(1, *SHAPE), classes=3, digest="d")


def made(model: LoadedModel, folder: Path, *, seed: int = 0, count: int = 6, fresh: bool = False) -> torch.Tensor:
    return synthetic_images(model, count, seed=seed, folder=folder, progress=Silent(), fresh=fresh)


def heard(model: LoadedModel, folder: Path, *, fresh: bool = False) -> tuple[torch.Tensor, Heard]:
    progress = Heard()
    return synthetic_images(model, 6, seed=0, folder=folder, progress=progress, fresh=fresh), progress


def test_a_second_run_sees_the_images_of_the_first(model: LoadedModel, tmp_path: Path) -> None:
    """And makes none: bit for bit the same, and the file is named."""
    first, before = heard(model, tmp_path / "dist")
    second, after = heard(model, tmp_path / "dist")
    assert torch.equal(first, second)
    assert first.shape == (6, *SHAPE)
    assert (before.stages, after.stages) == (["make synthetic images"], [])
    assert str(next((tmp_path / "dist").iterdir())) in after.notes[0]


def test_fresh_makes_them_anyway(model: LoadedModel, tmp_path: Path) -> None:
    heard(model, tmp_path)
    assert heard(model, tmp_path, fresh=True)[1].stages == ["make synthetic images"]


def test_another_seed_count_or_model_has_images_of_its_own(model: LoadedModel, tmp_path: Path) -> None:
    first = made(model, tmp_path)
    assert not torch.equal(first, made(model, tmp_path, seed=1))
    assert len(made(model, tmp_path, count=7)) == 7
    made(replace(model, digest="another"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert torch.equal(made(model, tmp_path), first)


@pytest.mark.parametrize("harm", ["cut", "flip", "empty"])
def test_what_is_damaged_is_said_and_made_anew(model: LoadedModel, tmp_path: Path, harm: str) -> None:
    first = made(model, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-9], "flip": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b""}[harm])
    again, said = heard(model, tmp_path)
    assert torch.equal(first, again)
    assert "made anew" in said.notes[0]
    assert heard(model, tmp_path)[1].stages == []
