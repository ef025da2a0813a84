"""Three disjoint splits from whatever form data comes in, and precise words for what cannot be used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeprune.errors import DataError, EdgepruneError
from edgeprune.intake.config import DataConfig
from edgeprune.intake.data import Splits, load_data
from edgeprune.intake.images import ArraySet, augmented, interleaved, stratified
from edgeprune.intake.model import LoadedModel

FACTORIES = """
import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

rng = np.random.default_rng(0)
X = rng.integers(0, 256, (60, 6, 6), dtype=np.uint8)
Y = np.arange(60) % 3

class Pictures(Dataset):
    def __init__(self, bad=None):
        self.bad = bad
    def __len__(self):
        return 60
    def __getitem__(self, index):
        if index == self.bad:
            raise OSError("disk on fire")
        return torch.from_numpy(X[index]).unsqueeze(0) / 255, int(Y[index])

def pair(): return X, Y
def tensors(): return torch.from_numpy(X), torch.from_numpy(Y)
def mapping(): return {"train": (X[:40], Y[:40]), "test": (X[40:], Y[40:])}
def three(): return {"train": (X[:30], Y[:30]), "validation": (X[30:40], Y[30:40]), "test": (X[40:], Y[40:])}
def dataset(): return Pictures()
def floats(): return X.astype(np.float32), Y
def brain(): return torch.from_numpy(X).bfloat16(), torch.from_numpy(Y)
def ragged(): return [[[1, 2], [3]]], [0]
def ragged_labels(): return X, [[0], [1, 2]]
def sparse(): return torch.zeros(4, 3, 6, 6).to_sparse(), torch.zeros(4, dtype=torch.int64)
def mixed(): return {"train": TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), "test": (X[:, 1:], Y)}
def burning(): return Pictures(bad=7)
def odd(): return {"train": (X, Y), "holdout": (X, Y)}
def more(): return {"images": X, "labels": Y, 3: Y}
def empty(): return (X[:0], Y[:0])
def text(): return "data"
"""

PLAIN: dict[str, Any] = {"mean": (0.5,), "std": (0.25,)}


def loaded(place: Path, /, **fields: Any) -> Splits:
    """Return the splits of settings written in `place`."""
    return load_data(DataConfig.model_validate(fields, context={"folder": place}))


def told(place: Path, /, **fields: Any) -> str:
    """Return what the user is told about data that cannot be used."""
    with pytest.raises(DataError) as caught:
        loaded(place, **fields)
    return str(caught.value)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A folder with d.npz: 100 images of 6 x 6 pixels whose corner pixel is their number, in 4 classes."""
    images = np.random.default_rng(0).integers(0, 256, (100, 6, 6), dtype=np.uint8)
    images[:, 0, 0] = np.arange(100)
    np.savez_compressed(tmp_path / "d.npz", images=images, labels=np.arange(100) % 4)
    (tmp_path / "feed.py").write_text(FACTORIES)
    return tmp_path


def numbers(images: ArraySet) -> set[int]:
    """Return which images of `archive` these are."""
    return set(images.images[:, 0, 0, 0].tolist())


def test_one_set_becomes_three_disjoint_ones(archive: Path) -> None:
    """Every image is in exactly one split, with the classes in proportion."""
    splits = loaded(archive, arrays="d.npz", validation=0.25, test=20, **PLAIN)
    test = splits.open_test()
    parts = [numbers(splits.train), numbers(splits.validation), numbers(test)]
    assert [len(each) for each in parts] == [60, 20, 20]
    assert set.union(*parts) == set(range(100))
    assert torch.bincount(test.labels).tolist() == [5, 5, 5, 5]
    assert torch.bincount(splits.validation.labels).tolist() == [5, 5, 5, 5]
    assert (splits.classes, splits.input_shape, splits.name) == (4, (1, 1, 6, 6), "d.npz")
    assert numbers(splits.calibration) <= numbers(splits.train)


def test_the_test_split_opens_once(archive: Path) -> None:
    """A second reading is a mistake in the program, and says so."""
    splits = loaded(archive, arrays="d.npz", **PLAIN)
    assert splits.test_count == len(splits.open_test()) == 20
    with pytest.raises(EdgepruneError, match="opened twice") as caught:
        splits.open_test()
    assert caught.value.blame == "bug"


def test_the_seed_chooses_the_split_and_the_digest_tells(archive: Path) -> None:
    """The same seed gives the same splits; another seed and another normalisation give another digest."""
    one, same = (loaded(archive, arrays="d.npz", **PLAIN) for _ in range(2))
    other = loaded(archive, arrays="d.npz", seed=1, **PLAIN)
    assert one.digest == same.digest != other.digest
    assert numbers(one.validation) == numbers(same.validation) != numbers(other.validation)
    assert loaded(archive, arrays="d.npz", mean=(0.0,), std=(0.25,)).digest != one.digest


def test_named_splits_of_an_archive_are_kept(archive: Path) -> None:
    """Validation and test that the archive has are used as they are."""
    images = np.random.default_rng(0).random((30, 2, 5, 5), dtype=np.float32)
    labels = np.arange(30, dtype=np.uint8) % 3
    parts = {"train": slice(0, 18), "validation": slice(18, 24), "test": slice(24, 30)}
    arrays = {f"{k}_images": images[v] for k, v in parts.items()} | {f"{k}_labels": labels[v] for k, v in parts.items()}
    np.savez(archive / "three.npz", **arrays)
    splits = loaded(archive, arrays="three.npz")
    assert {each.sum().item() for each in splits.validation.images} == {
        each.sum().item() for each in torch.from_numpy(images[18:24])
    }
    assert torch.equal(splits.open_test().tensor(), torch.from_numpy(images[24:]))
    assert len(splits.train) == 18


@pytest.mark.parametrize(
    ("factory", "sizes"),
    [
        ("pair", (43, 5, 12)),
        ("tensors", (43, 5, 12)),
        ("mapping", (36, 4, 20)),
        ("three", (30, 10, 20)),
        ("dataset", (43, 5, 12)),
        ("brain", (43, 5, 12)),
    ],
)
def test_a_factory_may_return_any_usual_form(archive: Path, factory: str, sizes: tuple[int, int, int]) -> None:
    """Arrays, tensors of any floating type, mappings of them, and data sets of (image, label)."""
    normalised = factory in {"dataset", "brain"}
    splits = loaded(archive, factory=f"feed:{factory}", **({} if normalised else PLAIN))
    assert (len(splits.train), len(splits.validation), splits.test_count) == sizes
    assert splits.input_shape == (1, 1, 6, 6)


def test_a_limit_takes_fewer_images_of_every_split(archive: Path) -> None:
    """Arrays are thinned out in proportion, data sets evenly and without reading the rest."""
    splits = loaded(archive, factory="feed:mapping", limit=12, validation=3, **PLAIN)
    assert (len(splits.train), len(splits.validation), splits.test_count) == (9, 3, 12)
    assert len(loaded(archive, factory="feed:burning", limit=4, validation=1, test=1).train) == 2


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("burning", "reading image 7 failed: OSError: disk on fire"),
        ("odd", "remove holdout"),
        ("more", "returned images, labels and 3"),
        ("empty", "is empty"),
        ("text", "returned a str"),
        ("absent", "has no 'absent'"),
        ("mixed", "test images are"),
        ("ragged", "has images that are no array: ValueError"),
        ("ragged_labels", "has labels that are no array: ValueError"),
        ("sparse", "has images that are no array: TypeError"),
    ],
)
def test_a_factory_that_is_wrong_is_explained(archive: Path, factory: str, text: str) -> None:
    """Each way to be wrong has its own words."""
    assert text in told(archive, factory=f"feed:{factory}", **PLAIN)


GOOD = np.zeros((40, 6, 6), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (GOOD, np.arange(39), "40 images and 39 labels"),
        (GOOD, np.arange(40) - 1, "negative label -1 at index 0"),
        (GOOD, np.arange(40) / 2, "labels of type float64"),
        (GOOD, np.eye(40), "try labels.argmax(1)"),
        (GOOD.astype(np.int64), np.arange(40), "images of type int64"),
        (np.full((40, 1, 6, 6), np.nan, np.float32), np.arange(40), "40 of 40 images"),
        (np.zeros((40, 6, 6, 6), np.uint8), np.arange(40), "byte images of shape (40, 6, 6, 6)"),
        (np.zeros((40, 36), np.float32), np.arange(40), "images of shape (40, 36)"),
        (GOOD[:0], np.arange(0), "is empty"),
    ],
)
def test_arrays_that_are_wrong_are_explained(tmp_path: Path, images: Any, labels: Any, text: str) -> None:
    """Shapes, types, values and lengths."""
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    assert text in told(tmp_path, arrays="d.npz", **(PLAIN if images.dtype == np.uint8 else {}))


def test_bytes_need_a_normalisation(archive: Path) -> None:
    """It cannot be guessed, and the error says what to set."""
    assert "set data.mean and data.std ([0.0] and [1.0]" in told(archive, arrays="d.npz")
    assert "1 channels and data.mean 3" in told(archive, arrays="d.npz", mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize("factory", ["floats", "dataset"])
def test_floats_take_no_normalisation(archive: Path, factory: str) -> None:
    """Whether they are normalised cannot be seen, so a mean that would be ignored is refused."""
    assert loaded(archive, factory=f"feed:{factory}").train.mean == ()
    text = told(archive, factory=f"feed:{factory}", **PLAIN)
    assert "has float pixels, but data.mean and data.std are set" in text
    assert "remove data.mean and data.std, or give bytes" in text


@pytest.mark.parametrize(
    "extra",
    [
        {"val_images": GOOD, "val_labels": np.arange(40)},
        {"validation_images": GOOD},
        {"weights": np.arange(40)},
    ],
)
def test_arrays_that_would_be_ignored_are_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    """A validation set under another name is not passed over in silence."""
    np.savez(tmp_path / "d.npz", train_images=GOOD, train_labels=np.arange(40), **extra)
    text = told(tmp_path, arrays="d.npz", **PLAIN)
    assert f"d.npz has the array {min(extra)!r}" in text
    assert "images and labels are understood, and both with train_, validation_ or test_ before them" in text


def test_an_archive_has_something_to_learn_from(tmp_path: Path) -> None:
    """A test set alone is no data set."""
    np.savez(tmp_path / "d.npz", test_images=GOOD, test_labels=np.arange(40))
    assert "images and labels are wanted" in told(tmp_path, arrays="d.npz", **PLAIN)


def test_archives_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    """Missing, pickled, truncated, a lone array, and names that say nothing."""
    assert "is missing" in told(tmp_path, arrays="none.npz", **PLAIN)
    np.savez(tmp_path / "p.npz", images=np.array([{}], dtype=object), labels=[0])
    assert "they are pickles" in told(tmp_path, arrays="p.npz", **PLAIN)
    np.savez(tmp_path / "x.npz", x_train=GOOD, y_train=np.arange(40))
    assert "holds x_train (40, 6, 6), y_train (40,)" in told(tmp_path, arrays="x.npz", **PLAIN)
    (tmp_path / "t.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:300])
    assert "t.npz cannot be read" in told(tmp_path, arrays="t.npz", **PLAIN)
    np.save(tmp_path / "lone.npy", GOOD)
    assert "is a single array" in told(tmp_path, arrays="lone.npy", **PLAIN)


def test_splits_that_leave_nothing_are_refused(archive: Path) -> None:
    """Somebody must be left to learn from."""
    assert "100 images for test leave none of 100" in told(archive, arrays="d.npz", test=100, **PLAIN)
    assert "lower data.validation" in told(archive, arrays="d.npz", validation=80, **PLAIN)


# ---------------------------------------------------------------------------------------------------------- folders


def pictures(root: Path, classes: dict[str, int], size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    """Write images whose pixels are all their class's number times 50."""
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for each in range(count):
            Image.new(mode, size, (number * 50,) * 3 if mode == "RGB" else number * 50).save(
                root / name / f"{each}.png"
            )


def test_a_folder_of_class_folders_is_one_set(tmp_path: Path) -> None:
    """Classes are numbered in sorted order; other files are passed over."""
    pictures(tmp_path / "d", {"cat": 10, "dog": 10})
    (tmp_path / "d" / "cat" / "notes.txt").write_text("soft")
    splits = loaded(tmp_path, folder="d", mean=(0,) * 3, std=(1,) * 3, validation=4, test=4)
    assert splits.input_shape == (1, 3, 8, 8)
    assert torch.equal(splits.train.images[:, 0, 0, 0].long(), splits.train.labels * 50)


def test_train_and_test_folders_share_their_classes(tmp_path: Path) -> None:
    """A class that only test/ has is an error, a grayscale reading has one channel."""
    pictures(tmp_path / "d" / "train", {"a": 6, "b": 6})
    pictures(tmp_path / "d" / "test", {"a": 2, "b": 2})
    splits = loaded(tmp_path, folder="d", grayscale=True, validation=2, **PLAIN)
    assert (splits.input_shape, splits.test_count) == ((1, 1, 8, 8), 4)
    pictures(tmp_path / "d" / "test", {"z": 1})
    assert "has the class 'z'" in told(tmp_path, folder="d", **PLAIN)


@pytest.mark.parametrize("strange", ["val", "Test", "extra"])
def test_folders_that_would_be_ignored_are_refused(tmp_path: Path, strange: str) -> None:
    """A validation set under another name is not passed over in silence."""
    for split in ("train", "test", strange):
        pictures(tmp_path / "d" / split, {"a": 6, "b": 6})
    text = told(tmp_path, folder="d", grayscale=True, **PLAIN)
    assert f"has the folder {strange!r} beside train/" in text
    assert "validation/ and test/ are understood" in text


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("png", np.uint16), ("tif", np.uint16), ("pgm", np.uint16), ("png", np.uint8)]
)
@pytest.mark.parametrize("grayscale", [True, False])
def test_pixels_of_16_bits_are_scaled_to_8(tmp_path: Path, suffix: str, dtype: Any, grayscale: bool) -> None:
    """The largest value stays the largest and nothing saturates on the way."""
    ramp = np.linspace(0, np.iinfo(dtype).max, 256).round().astype(dtype).reshape(16, 16)
    (tmp_path / "d" / "a").mkdir(parents=True)
    for each in range(6):
        Image.fromarray(ramp).save(tmp_path / "d" / "a" / f"{each}.{suffix}")
    channels = 1 if grayscale else 3
    splits = loaded(tmp_path, folder="d", grayscale=grayscale, mean=(0,) * channels, std=(1,) * channels)
    expected = torch.arange(256, dtype=torch.uint8).view(16, 16)
    assert splits.input_shape == (1, channels, 16, 16)
    assert bool((splits.train.images == expected).all())


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_an_unknown_range_are_refused(tmp_path: Path, dtype: Any) -> None:
    """Whole numbers of 32 bits and floats do not say what white is."""
    (tmp_path / "d" / "a").mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 70_000, dtype)).save(tmp_path / "d" / "a" / "0.tif")
    text = told(tmp_path, folder="d", **PLAIN)
    assert "0.tif has 32 bits a pixel" in text
    assert "save it with 8 or 16 bits" in text


def test_images_are_scaled_by_the_short_side_and_cut_from_the_centre(tmp_path: Path) -> None:
    """A wide image loses its edges, not its proportions."""
    (tmp_path / "d" / "a").mkdir(parents=True)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    for each in range(12):
        Image.fromarray(wide).save(tmp_path / "d" / "a" / f"{each}.png")
    splits = loaded(tmp_path, folder="d", image_size=8, resize=10, mean=(0,) * 3, std=(1,) * 3)
    assert splits.train.images.shape[1:] == (3, 8, 8)
    assert bool((splits.train.images == 200).all())


def test_images_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """A broken image, sizes that differ, an empty class, no folder."""
    pictures(tmp_path / "d", {"a": 6, "b": 6})
    three: dict[str, Any] = {"folder": "d", "mean": (0,) * 3, "std": (1,) * 3}
    (tmp_path / "d" / "b" / "3.png").write_bytes(b"\x89PNG broken")
    assert "b/3.png cannot be read" in told(tmp_path, **three)
    whole = (tmp_path / "d" / "b" / "2.png").read_bytes()
    (tmp_path / "d" / "b" / "3.png").write_bytes(whole[: len(whole) - 30])
    assert "b/3.png cannot be read" in told(tmp_path, **three)
    Image.new("RGB", (9, 8)).save(tmp_path / "d" / "b" / "3.png")
    assert "b/3.png is 9 x 8 pixels, 0.png is 8 x 8 pixels" in told(tmp_path, **three)
    (tmp_path / "d" / "c").mkdir()
    assert "c holds no images" in told(tmp_path, **three)
    assert "none cannot be read" in told(tmp_path, **(three | {"folder": "none"}))
    (tmp_path / "bare").mkdir()
    assert "has no sub-folders" in told(tmp_path, **(three | {"folder": "bare"}))


# ------------------------------------------------------------------------------------------------- model and data


def model(classes: int, shape: tuple[int, int, int, int]) -> LoadedModel:
    """Return a model of these facts."""
    return LoadedModel(module=torch.nn.Identity(), name="net", input_shape=shape, classes=classes, digest="")


@pytest.mark.parametrize(
    ("classes", "shape", "text"),
    [
        (3, (1, 1, 6, 6), "is out of range: net has 3 classes, numbered 0 to 2"),
        (4, (1, 3, 6, 6), "the images have 1 channels, net takes 3"),
        (4, (1, 1, 8, 8), "the images are 6 x 6, net takes 8 x 8"),
    ],
)
def test_model_and_data_must_fit(archive: Path, classes: int, shape: tuple[int, int, int, int], text: str) -> None:
    """Labels, channels and size are compared before anything is measured."""
    splits = loaded(archive, arrays="d.npz", **PLAIN)
    splits.check_fit(model(4, (1, 1, 6, 6)))
    with pytest.raises(DataError) as caught:
        splits.check_fit(model(classes, shape))
    assert text in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- batches


def labelled(count: int, shape: tuple[int, int, int] = (2, 5, 7)) -> ArraySet:
    """Return random byte images."""
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    return ArraySet(images=images, labels=torch.arange(count), mean=(0.3, 0.6), std=(0.2, 0.4))


def test_pixels_are_normalised_channel_by_channel() -> None:
    """(pixel / 255 - mean) / std."""
    images = labelled(4)
    expected = (images.images / 255 - torch.tensor([0.3, 0.6]).view(2, 1, 1)) / torch.tensor([0.2, 0.4]).view(2, 1, 1)
    torch.testing.assert_close(images.tensor(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(images.tensor([2, 0]), expected[[2, 0]], rtol=0, atol=1e-6)


def test_floats_are_handed_out_as_copies() -> None:
    """What a caller does to a batch does not reach the data."""
    images = ArraySet(images=torch.zeros(2, 1, 3, 3), labels=torch.zeros(2, dtype=torch.int64))
    images.tensor().add_(1)
    assert float(images.images.sum()) == 0


@pytest.mark.parametrize("augment", ["none", "flip-crop"])
def test_the_largest_seed_shuffles(augment: Any) -> None:
    """The seed of `finetune` is multiplied twice on the way to a generator, which takes 64 bits."""
    seed = (2**31 - 1) * 10_007 + 99
    first, again = (list(labelled(8).batches(3, shuffle_seed=seed, augment=augment)) for _ in range(2))
    assert all(torch.equal(one[0], two[0]) for one, two in zip(first, again, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.sampled_from(["none", "flip", "flip-crop"]))
def test_batches_cover_the_set_and_can_be_resumed(count: int, size: int, start: int, augment: Any) -> None:
    """Every image once; leaving out the first batches changes nothing in the others."""
    images = labelled(count)
    whole = list(images.batches(size, shuffle_seed=3, augment=augment))
    assert sorted(torch.cat([labels for _, labels in whole]).tolist()) == list(range(count))
    rest = list(images.batches(size, shuffle_seed=3, augment=augment, start=start))
    assert len(rest) == max(0, len(whole) - start)
    for (pixels, labels), (again, names) in zip(whole[start:], rest, strict=True):
        assert torch.equal(pixels, again)
        assert torch.equal(labels, names)


def test_batches_do_not_touch_the_global_generator() -> None:
    """The order is a function of the seed alone."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(labelled(9).batches(4, shuffle_seed=0, augment="flip-crop"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_flip_mirrors_and_a_crop_shifts() -> None:
    """A mirrored image is itself or its mirror image; a shifted one repeats its border."""
    image = torch.arange(16.0).view(1, 1, 1, 16).expand(200, 1, 16, 16)
    generator = torch.Generator().manual_seed(0)
    flipped = augmented(image, "flip", generator)
    rows = {tuple(each) for each in flipped[:, 0, 0].tolist()}
    assert rows == {tuple(range(16)), tuple(reversed(range(16)))}
    shifted = {tuple(each) for each in augmented(image, "flip-crop", generator)[:, 0, 0].tolist()}
    assert len(shifted) == 10
    assert (0, 0, 0, *range(1, 14)) in shifted


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(0, 9))
def test_every_beginning_of_an_interleaved_order_is_in_proportion(labels: list[int], seed: int) -> None:
    """All images once, and no class is ever ahead or behind by more than the number of classes."""
    values = torch.tensor(sorted(labels))
    order = interleaved(values, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    classes = set(labels)
    for count in range(1, len(labels) + 1):
        found = values[order[:count]].tolist()
        for each in classes:
            assert abs(found.count(each) - labels.count(each) * count / len(labels)) <= len(classes)


def test_balanced_classes_take_turns() -> None:
    """With equal classes every round of a beginning has one image of each."""
    order = interleaved(torch.arange(40) // 10, seed=1)
    rounds = (torch.arange(40) // 10)[order].view(10, 4)
    assert torch.equal(rounds.sort(1).values, torch.arange(4).expand(10, 4))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.data())
def test_a_stratified_choice_keeps_proportions(labels: list[int], data: Any) -> None:
    """Exactly the count asked for, disjoint from the rest, and no class off by one image or more."""
    count = data.draw(st.integers(1, len(labels) - 1))
    values = torch.tensor(labels)
    chosen, rest = stratified(values, count, seed=0)
    assert len(chosen) == count
    assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(len(labels)))
    for each in set(labels):
        assert abs(labels.count(each) * count / len(labels) - int((values[chosen] == each).sum())) < 1


@pytest.mark.parametrize("normalisation", [{"mean": (77.0,), "std": (80.0,)}, {"mean": (0.5,), "std": (64.0,)}])
def test_a_mean_of_pixels_from_0_to_255_is_refused(tmp_path: Path, normalisation: dict[str, Any]) -> None:
    """Otherwise every image would be a constant, and the model at chance."""
    (tmp_path / "d.py").write_text(FACTORIES)
    with pytest.raises(DataError, match=r"data\.mean is") as caught:
        loaded(tmp_path, factory="d:pair", **normalisation)
    assert "255" in caught.value.next_step


def test_grey_images_with_a_channel_axis_have_the_strides_of_their_shape(tmp_path: Path) -> None:
    """An axis of one element may have any stride, and an exporter may write them into the graph."""
    np.savez(tmp_path / "a.npz", images=np.zeros((20, 6, 6, 1), np.uint8), labels=np.arange(20) % 2)
    images = loaded(tmp_path, arrays=tmp_path / "a.npz", mean=(0.5,), std=(0.5,)).train.tensor()
    assert images.stride() == torch.empty(images.shape).stride()


@pytest.mark.parametrize(
    ("shape", "at_once"), [((1, 28, 28), 250), ((3, 32, 32), 250), ((3, 224, 224), 5), ((3, 1024, 1024), 1)]
)
def test_large_images_are_evaluated_few_at_a_time(shape: tuple[int, ...], at_once: int) -> None:
    """The maps of 250 images of 224 x 224 pixels would be gigabytes, asked of the system in every layer anew."""
    images = ArraySet(images=torch.zeros(1, dtype=torch.uint8).expand(2, *shape), labels=torch.zeros(2).long())
    assert images.evaluation_batch == at_once
