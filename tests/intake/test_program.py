"""An exported program becomes a module with real layers and the same outputs, and nothing in the file is run."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.errors import ModelError
from edgeprune.intake.config import ModelConfig
from edgeprune.intake.model import load_model
from edgeprune.intake.program import read_program
from edgeprune.intake.rebuild import rebuild


class Residual(nn.Module):
    """Convolutions, batch norms, a projection shortcut, a depthwise layer, dropout and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding="same", groups=16)
        self.bn = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.stem(x)
        x = functional.relu6(self.bn(self.depthwise(self.conv(x) + self.shortcut(x))))
        x = functional.adaptive_avg_pool2d(x, 2)
        return self.head(self.drop(x).view(x.size(0), -1))


class Unusual(nn.Module):
    """Every other layer that is rebuilt, a concatenation, a split, bare parameters and a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 8, 2, stride=2)
        self.groups = nn.GroupNorm(2, 8)
        self.last = nn.LayerNorm(8)
        self.prelu = nn.PReLU(8)
        self.shared = nn.Conv2d(8, 8, 1)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("offset", torch.rand(1, 8, 1, 1))
        self.constant = torch.rand(1, 8, 1, 1)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.prelu(self.groups(self.up(x))) * self.gamma + self.offset - self.constant
        x = self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        left, right = torch.cat([self.shared(x), self.plain(self.shared(x.tanh()))], 1).chunk(2, 1)
        x = functional.interpolate(left[:, :, 1:] * 2.0 + right[:, :, 1:], size=(8, 8), mode="bilinear")
        return self.head(functional.hardswish(functional.max_pool2d(x, 3, 2, 1)).mean((2, 3)))


def trained(model: nn.Module) -> nn.Module:
    """Return the model with batch-norm statistics that are not the initial ones, in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 8, 8))
    return model.eval()


def saved(folder: Path, model: nn.Module, *, dynamic: bool, batch: int = 2) -> Path:
    """Return the path of the exported model."""
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    path = folder / "m.pt2"
    torch.export.save(torch.export.export(model, (torch.randn(batch, 3, 8, 8),), dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("make", [Residual, Unusual])
def test_outputs_and_state_equal_the_original(tmp_path: Path, make: Callable[[], nn.Module], dynamic: bool) -> None:
    """For any batch size, also where the program was exported for a fixed one."""
    model = trained(make())
    rebuilt = rebuild(read_program(saved(tmp_path, model, dynamic=dynamic))).eval()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(rebuilt(images), model(images), rtol=1e-5, atol=1e-6)
    mine, theirs = rebuilt.state_dict(), model.state_dict()
    assert set(theirs) <= set(mine)
    assert all(torch.equal(mine[name], each) for name, each in theirs.items() if "num_batches" not in name)


def test_layers_are_real_and_trainable(tmp_path: Path) -> None:
    """Layers stand where they stood in the original, keep their settings, and learn."""
    rebuilt = rebuild(read_program(saved(tmp_path, trained(Residual()), dynamic=True)))
    assert isinstance(depthwise := rebuilt.get_submodule("depthwise"), nn.Conv2d)
    assert (depthwise.groups, depthwise.padding) == (16, "same")
    assert isinstance(rebuilt.get_submodule("stem.1"), nn.BatchNorm2d)
    assert any(isinstance(each, nn.Dropout) and each.p == 0.2 for each in rebuilt.modules())
    rebuilt.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(each.grad is not None for each in rebuilt.parameters())


def test_a_shared_layer_stays_shared(tmp_path: Path) -> None:
    """Two calls of one layer are two calls of one module."""
    rebuilt = rebuild(read_program(saved(tmp_path, trained(Unusual()), dynamic=True)))
    assert sum(isinstance(each, nn.Conv2d) for each in rebuilt.modules()) == 1
    assert [node.target for node in rebuilt.graph.nodes].count("shared") == 2


def test_channels_of_a_rebuilt_module_can_be_cut(tmp_path: Path) -> None:
    """The dependency graph finds the coupled layers, and the cut module still runs."""
    rebuilt = rebuild(read_program(saved(tmp_path, trained(Residual()), dynamic=False))).eval()
    images = torch.randn(1, 3, 8, 8)
    graph = torch_pruning.DependencyGraph().build_dependency(rebuilt, example_inputs=images)
    graph.get_pruning_group(rebuilt.get_submodule("conv"), torch_pruning.prune_conv_out_channels, [0, 3]).prune()
    graph.get_pruning_group(rebuilt.get_submodule("stem.0"), torch_pruning.prune_conv_out_channels, [1]).prune()
    assert rebuilt(torch.randn(3, 3, 8, 8)).shape == (3, 5)
    assert rebuilt.get_submodule("head").in_features == 14 * 4


def test_a_program_is_a_model_like_any_other(tmp_path: Path) -> None:
    """Intake takes the input shape from the program."""
    path = saved(tmp_path, trained(Residual()), dynamic=False, batch=1)
    loaded = load_model(ModelConfig(program=path))
    assert (loaded.classes, loaded.input_shape, loaded.name) == (5, (1, 3, 8, 8), "m.pt2")


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_program_in_train_mode_is_refused(tmp_path: Path) -> None:
    """Its batch norms write statistics, and the error says to call eval()."""
    with pytest.raises(ModelError, match="train mode"):
        rebuild(read_program(saved(tmp_path, Residual().train(), dynamic=False, batch=4)))


def test_an_operator_that_is_not_allowed_is_named(tmp_path: Path) -> None:
    """A program broken down to core operators has none of the layers left, and the error says what to do."""

    class Sorting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sort(1).values

    with pytest.raises(ModelError, match=r"aten\.sort") as caught:
        rebuild(read_program(saved(tmp_path, Sorting(), dynamic=False)))
    assert "give a factory" in caught.value.next_step


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    """A classifier takes one batch of images."""

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    path = tmp_path / "two.pt2"
    torch.export.save(torch.export.export(Two(), (torch.ones(2, 3), torch.ones(2, 3))), path)
    with pytest.raises(ModelError, match="exactly one input"):
        read_program(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"not a zip"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """The error names the file."""
    path = tmp_path / "m.pt2"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.pt2"):
        read_program(path)
    with pytest.raises(ModelError, match=r"cannot read .*none\.pt2"):
        read_program(tmp_path / "none.pt2")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """Every cut of a good file is an error, never another model."""
    path = saved(tmp_path, trained(Residual()), dynamic=True)
    whole = path.read_bytes()
    for share in (0.2, 0.6, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ModelError):
            read_program(path)


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """Return a copy of an archive whose members went through `change`."""
    copy = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return copy


def test_pickled_payloads_are_refused_and_sample_inputs_are_never_read(tmp_path: Path) -> None:
    """A pickle in place of the sample inputs is not touched; one in place of a weight is an error."""
    path = saved(tmp_path, trained(Residual()), dynamic=True)
    evil = b"cos\nsystem\n(S'touch harmed'\ntR."

    def poisoned(name: str, content: bytes) -> bytes:
        return evil if "sample_inputs" in name else content

    assert read_program(rewritten(path, poisoned)).calls
    assert not (tmp_path / "harmed").exists()

    def pickled(name: str, content: bytes) -> bytes:
        return content.replace(b'"use_pickle": false', b'"use_pickle": true') if "weights_config" in name else content

    with pytest.raises(ModelError, match="is pickled"):
        read_program(rewritten(path, pickled))


@pytest.mark.parametrize(
    "target", ["os.system", "torch.ops.aten.from_file.default", "torch.ops.aten.add.out", "torch.load"]
)
def test_a_planted_call_is_refused(tmp_path: Path, target: str) -> None:
    """Only operators of the list are called, whatever the file asks for."""

    def planted(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        top = json.loads(content)
        top["graph_module"]["graph"]["nodes"][2]["target"] = target
        return json.dumps(top).encode()

    path = rewritten(saved(tmp_path, trained(Residual()), dynamic=True), planted)
    with pytest.raises(ModelError, match="is not among the operators"):
        rebuild(read_program(path))


def test_another_schema_is_refused(tmp_path: Path) -> None:
    """A file of a later major version is not guessed at."""

    def newer(name: str, content: bytes) -> bytes:
        return content.replace(b'"major": 8', b'"major": 9') if name.endswith("models/model.json") else content

    with pytest.raises(ModelError, match="schema version 9"):
        read_program(rewritten(saved(tmp_path, trained(Residual()), dynamic=True), newer))
