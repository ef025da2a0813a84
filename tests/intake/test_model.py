"""A model that is handed over works, or the error says what is wrong with it, why and what to do."""

import random
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgeprune.errors import ModelError
from edgeprune.intake.config import ModelConfig
from edgeprune.intake.factory import importable
from edgeprune.intake.model import LoadedModel, load_model
from edgeprune.intake.weights import check_finite, fill, read_state

SOURCE = """
import torch
from torch import nn

def net(width=8, classes=5):
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

def raises():
    raise RuntimeError("no such block")

def nothing():
    net()

class Net:
    @staticmethod
    def build():
        return net()

def maps():
    return nn.Conv2d(1, 4, 3)

class Pair(nn.Module):
    def forward(self, x):
        return x, x

class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(1, -1)[:, :6]

class OneAtATime(nn.Module):
    def forward(self, x):
        return x.view(1, 64)

class Exploding(nn.Module):
    def forward(self, x):
        return x.flatten(1) / 0

class Moody(nn.Module):
    def forward(self, x):
        return x.flatten(1) + torch.rand(1)

class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 6)
    def forward(self, x):
        logits = self.head(x.flatten(1))
        return (logits, logits) if self.training else logits

class Fails(Auxiliary):
    def forward(self, x):
        if self.training:
            raise ValueError("targets are needed")
        return self.head(x.flatten(1))

class Wider(Auxiliary):
    def forward(self, x):
        return torch.cat([self.head(x.flatten(1))] * (1 + self.training), 1)

def renormed():
    return nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(1, 8, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def spectral():
    return nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv2d(1, 8, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def locked():
    import threading
    made = net()
    made.lock = threading.Lock()
    return made

answer = 42
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file that defines models."""
    (tmp_path / "zoo.py").write_text(SOURCE)
    return tmp_path


def settings(folder: Path, **fields: object) -> ModelConfig:
    """Return checked settings as if they were written in `folder`."""
    fields = {"factory": "zoo:net", "input_shape": (1, 1, 8, 8)} | fields
    return ModelConfig.model_validate({k: v for k, v in fields.items() if v is not None}, context={"folder": folder})


def load(folder: Path, **fields: object) -> LoadedModel:
    """Return the model of these settings."""
    return load_model(settings(folder, **fields))


def told(folder: Path, **fields: object) -> str:
    """Return what the user is told about a model that cannot be used."""
    with pytest.raises(ModelError) as caught:
        load(folder, **fields)
    return str(caught.value)


def weights(folder: Path, **kwargs: int) -> dict[str, torch.Tensor]:
    """Return the state dict of a network of the zoo."""
    return dict(load(folder, kwargs=kwargs).module.state_dict())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_are_loaded_into_what_the_factory_makes(folder: Path, suffix: str) -> None:
    """The module computes with the file's weights, in eval mode and float32."""
    state = weights(folder)
    path = folder / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    loaded = load(folder, weights=f"w.{suffix}")
    assert all(torch.equal(each, state[name]) for name, each in loaded.module.state_dict().items())
    assert not loaded.module.training
    assert (loaded.classes, loaded.input_shape, loaded.name, loaded.notes) == (5, (1, 1, 8, 8), "zoo:net", ())
    assert loaded.digest != load(folder).digest
    assert loaded.digest == load(folder, weights=f"w.{suffix}").digest


def test_half_precision_weights_are_widened(folder: Path) -> None:
    """Weights stored as float16 become float32."""
    torch.save(
        {name: each.half() if each.is_floating_point() else each for name, each in weights(folder).items()},
        folder / "w.pt",
    )
    assert {each.dtype for each in load(folder, weights="w.pt").module.parameters()} == {torch.float32}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_prefix_of_every_name_is_removed_and_said(folder: Path, prefix: str) -> None:
    """Names that only a wrapper changed are recognised, and a note says so."""
    torch.save({"state_dict": {prefix + name: each for name, each in weights(folder).items()}}, folder / "w.pt")
    assert prefix in load(folder, weights="w.pt").notes[0]


def test_missing_and_unexpected_weights_are_counted_and_named(folder: Path) -> None:
    """The first names and the counts are in the error."""
    state = weights(folder)
    del state["5.bias"], state["0.weight"]
    torch.save(state | {"head.weight": torch.zeros(2)}, folder / "w.pt")
    text = told(folder, weights="w.pt")
    assert "2 of 9 are missing: 0.weight, 5.bias" in text
    assert "1 are unexpected: head.weight" in text


def test_weights_of_another_shape_are_named_with_both_shapes(folder: Path) -> None:
    """A network of another width says which tensor differs and how."""
    torch.save(weights(folder, width=4), folder / "w.pt")
    assert "0.weight is 4x1x3x3, wanted 8x1x3x3" in told(folder, weights="w.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    """The tensor with the NaN is named."""
    state = weights(folder)
    state["1.running_var"][2] = value
    torch.save(state, folder / "w.pt")
    assert "1 of 8 tensors of w.pt hold NaN or infinity: 1.running_var" in told(folder, weights="w.pt")


def test_weights_that_would_run_code_are_refused(folder: Path) -> None:
    """A pickled module is not read."""
    torch.save(nn.Linear(2, 2), folder / "w.pt")
    assert "would run code" in told(folder, weights="w.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_truncated_weights_are_refused(folder: Path, suffix: str) -> None:
    """Half a file is an error of the user's file, not a traceback."""
    path = folder / f"w.{suffix}"
    save_file(weights(folder), path) if suffix == "safetensors" else torch.save(weights(folder), path)
    path.write_bytes(path.read_bytes()[:700])
    assert f"w.{suffix} cannot be read" in told(folder, weights=path.name)


def test_absent_and_strange_weights_are_refused(folder: Path) -> None:
    """A missing file, a list, and a checkpoint with other things in it."""
    assert "are missing" in told(folder, weights="w.pt")
    torch.save([1, 2], folder / "w.pt")
    assert "hold a list" in told(folder, weights="w.pt")
    torch.save({"epoch": 3, "weight": torch.zeros(1)}, folder / "w.pt")
    assert "'epoch' is a int" in told(folder, weights="w.pt")


@pytest.mark.parametrize("state", [{0: torch.zeros(1)}, {0: torch.zeros(1), "a": torch.zeros(1)}, {0: 1, "a": None}])
def test_weights_without_names_are_refused(folder: Path, state: dict[object, object]) -> None:
    """A number is not the name of a tensor."""
    torch.save(state, folder / "w.pt")
    assert "0 is not a name" in told(folder, weights="w.pt")


def test_weights_that_a_module_cannot_take_are_refused(folder: Path) -> None:
    """A sparse tensor, and a matrix where a number is wanted."""
    torch.save(weights(folder) | {"0.bias": torch.zeros(8).to_sparse()}, folder / "w.pt")
    assert "tensors in w.pt cannot be loaded into the model" in told(folder, weights="w.pt")
    torch.save(weights(folder) | {"1.num_batches_tracked": torch.zeros(2, 2)}, folder / "w.pt")
    assert "tensors in w.pt cannot be loaded into the model" in told(folder, weights="w.pt")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_mutated_weights_are_weights_or_an_error(folder: Path, form: str) -> None:
    """Whatever bytes of a good file change, only a `ModelError` comes out."""
    module, path = load(folder).module, folder / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(module.state_dict(), path)
    else:
        torch.save(module.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    whole, rng = path.read_bytes(), random.Random(form)
    refused = 0
    for _ in range(300):
        mutated = bytearray(whole)
        for _ in range(rng.choice([1, 4, 16])):
            mutated[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(mutated)
        try:
            fill(module, read_state(path), path.name)
            check_finite(module, path.name)
        except ModelError:
            refused += 1
        else:
            assert all(bool(each.isfinite().all()) for each in module.state_dict().values())
    assert refused


def test_a_factory_that_raises_keeps_the_original_error(folder: Path) -> None:
    """The original exception is chained, and its place is named."""
    with pytest.raises(ModelError, match=r"raised RuntimeError: no such block \(zoo.py:10 in raises\)") as caught:
        load(folder, factory="zoo:raises")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("factory", "kwargs", "text"),
    [
        ("zoo:nett", {}, "name one of net"),
        ("zoos:net", {}, "no module 'zoos'"),
        ("zoo:answer", {}, "is a int"),
        ("zoo:nothing", {}, "returned a NoneType: a torch.nn.Module is wanted"),
        ("zoo:net", {"widths": 3}, "raised TypeError"),
        ("zoo:maps", {}, "maps 1 x 1 x 8 x 8 to 1 x 4 x 6 x 6"),
        ("zoo:Pair", {}, "returns a tuple"),
        ("zoo:FixedBatch", {}, "another answer for an image alone"),
        ("zoo:OneAtATime", {}, "cannot process 2 x 1 x 8 x 8"),
        ("zoo:Moody", {}, "not deterministic in eval mode"),
        ("zoo:Exploding", {}, "returns NaN or infinity"),
        ("zoo:Auxiliary", {}, "zoo:Auxiliary in train mode returns a tuple"),
        ("zoo:Fails", {}, "zoo:Fails in train mode cannot process 2 x 1 x 8 x 8: ValueError: targets are needed"),
        ("zoo:Wider", {}, "zoo:Wider in train mode maps 2 x 1 x 8 x 8 to 2 x 12"),
        ("zoo:renormed", {}, "zoo:renormed cannot be copied: RuntimeError"),
        ("zoo:spectral", {}, "zoo:spectral cannot be copied: RuntimeError"),
        ("zoo:locked", {}, "zoo:locked cannot be copied: TypeError"),
    ],
)
def test_a_factory_that_is_wrong_is_explained(folder: Path, factory: str, kwargs: dict[str, int], text: str) -> None:
    """Each way to be wrong has its own words."""
    assert text in told(folder, factory=factory, kwargs=kwargs)


def test_what_only_train_mode_returns_is_told_with_its_cure(folder: Path) -> None:
    """Otherwise fine-tuning would fail when the whole search is done."""
    assert "return the logits alone in train mode as well, for example with kwargs aux_logits = false" in told(
        folder, factory="zoo:Auxiliary"
    )
    assert "torch.nn.utils.remove_weight_norm" in told(folder, factory="zoo:renormed")


def test_trying_train_mode_leaves_no_trace(folder: Path) -> None:
    """Statistics of batch norms, the mode of every module and the random numbers to come are as they were."""
    torch.manual_seed(3)
    drawn = torch.rand(1)
    module = load(folder, factory="zoo:net").module
    norm = module.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.num_batches_tracked is not None
    assert (float(norm.running_mean.abs().max()), int(norm.num_batches_tracked)) == (0.0, 0)
    assert not any(each.training for each in module.modules())
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))
    (folder / "given.py").write_text("module = None\ndef give():\n    return module\n")
    with importable(folder):
        import_module("given").module = dropout  # type: ignore[attr-defined]
    torch.manual_seed(3)
    load(folder, factory="given:give")
    assert torch.equal(torch.rand(1), drawn)


def test_a_module_that_cannot_be_imported_is_explained(folder: Path) -> None:
    """A syntax error in the user's file names the file's line."""
    (folder / "broken.py").write_text("def net(:\n")
    assert "importing broken raised SyntaxError" in told(folder, factory="broken:net")


def test_an_input_shape_that_does_not_fit_is_explained(folder: Path) -> None:
    """Three channels into a network for one."""
    assert "cannot process 1 x 3 x 8 x 8" in told(folder, input_shape=(1, 3, 8, 8))


def test_images_with_their_channels_last_are_told_how_to_turn(folder: Path) -> None:
    assert "transpose(0, 3, 1, 2)" in told(folder, input_shape=(1, 8, 8, 3))


def test_a_model_with_two_inputs_is_told_to_have_one(folder: Path) -> None:
    (folder / "two.py").write_text(
        "from torch import nn\nclass Two(nn.Module):\n    def forward(self, image, mask, scale=1.0):\n"
        "        return image * mask * scale\n"
    )
    said = told(folder, factory="two:Two")
    assert "wrap the model in a module with one input: its forward takes image, mask" in said


def test_an_input_shape_that_no_memory_holds_is_explained(folder: Path) -> None:
    """The model is not blamed for it."""
    assert "no image of the input shape 1 x 1 x 10000000 x 10000000 can be made" in told(
        folder, input_shape=(1, 1, 10_000_000, 10_000_000)
    )


def test_the_data_may_give_the_input_shape(folder: Path) -> None:
    """Settings win over the data; without either there is an error."""
    open_settings = settings(folder, input_shape=None)
    assert load_model(open_settings, input_shape=(1, 1, 6, 6)).input_shape == (1, 1, 6, 6)
    assert load_model(settings(folder), input_shape=(1, 1, 6, 6)).input_shape == (1, 1, 8, 8)
    with pytest.raises(ModelError, match="input shape of zoo:net is unknown"):
        load_model(open_settings)


def test_two_configurations_may_call_their_file_the_same(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The second folder's zoo.py is not confused with the first's, and the import path is left as it was."""
    import sys

    before = list(sys.path)
    assert load(folder, factory="zoo:Net.build").classes == 5
    other = tmp_path_factory.mktemp("other")
    (other / "zoo.py").write_text(SOURCE.replace("classes=5", "classes=7"))
    assert load(other).classes == 7
    assert load(folder).classes == 5
    assert sys.path == before


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_hub_that_is_not_installed_is_explained(folder: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error gives the command that installs it."""
    import sys

    monkeypatch.setitem(sys.modules, library, None)
    text = told(folder, factory=None, name=f"{library}:resnet18")
    assert f"python -m pip install {library}" in text


def test_a_hub_model_is_made_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for timm sees the name and the arguments, and is asked for weights only where none are given."""
    (folder / "hub").mkdir()
    (folder / "hub" / "timm.py").write_text(
        "from zoo import net\n"
        "def create_model(name, pretrained, classes=5):\n"
        "    if name != 'small' or pretrained:\n"
        "        raise RuntimeError(f'no {name}, pretrained {pretrained}')\n"
        "    return net(classes=classes)\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.syspath_prepend(folder / "hub")
    torch.save(weights(folder), folder / "w.pt")
    assert load(folder, factory=None, name="timm:small", weights="w.pt").classes == 5
    assert load(folder, factory=None, name="timm:small", kwargs={"pretrained": False, "classes": 7}).classes == 7
    assert "cannot make 'small': RuntimeError: no small, pretrained True" in told(
        folder, factory=None, name="timm:small"
    )


def test_a_hub_that_belongs_to_another_torch_is_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing a torchvision that was built for another torch raises a RuntimeError."""
    (folder / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(folder)
    text = told(folder, factory=None, name="torchvision:resnet18")
    assert "does not work with torch" in text
    assert "--upgrade torchvision" in text
