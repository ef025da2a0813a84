"""An exported program becomes a module with real layers and the same outputs, and nothing in the file is run."""

import json
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


# ------------------------------------------------------------------------------------------------------ planted code


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of an `Unusual`; what is made of it lies beside it."""
    return saved(tmp_path_factory.mktemp("unusual"), trained(Unusual()), dynamic=True)


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of a program whose graph module went through `change`."""

    def rewrite(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        top = json.loads(content)
        change(top["graph_module"])
        return json.dumps(top).encode()

    return rewritten(path, rewrite)


def refused(path: Path) -> str:
    """Return what the user is told about a program that cannot be used."""
    with pytest.raises(ModelError) as caught:
        load_model(ModelConfig(program=path))
    assert caught.value.exit_code == 2
    assert caught.value.next_step
    return str(caught.value)


def call_of(module: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the first call of an operator in a program."""
    return next(each for each in module["graph"]["nodes"] if f"aten.{name}." in each["target"])


def touching(marker: Path) -> str:
    """Return Python source that makes a file, with no dot in it."""
    return f"exec({f'import pathlib; pathlib.Path({str(marker)!r}).touch()'!r})".replace(".", "\\x2e")


@pytest.mark.parametrize("operator", ["mul", "conv2d"])
def test_code_in_the_name_of_an_argument_is_not_run(tmp_path: Path, unusual: Path, operator: str) -> None:
    """An argument that the operator does not have is refused: fx would print its name into the source it runs."""
    marker = tmp_path / "harmed"
    planted = {"name": f"alpha = {touching(marker)}, other2", "arg": {"as_int": 1}, "kind": 2}
    text = refused(changed(unusual, lambda module: call_of(module, operator)["inputs"].append(planted)))
    assert f"aten.{operator}" in text
    assert "the argument 'alpha = exec(" in text
    assert not marker.exists()


def test_code_in_the_name_of_a_size_is_not_run(tmp_path: Path) -> None:
    """Arithmetic on sizes has no schema; its two arguments are known all the same."""
    marker = tmp_path / "harmed"

    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.expand(x.size(0) * 2 // 2, 3, 8, 8).flatten(1)

    def plant(module: dict[str, Any]) -> None:
        call = next(each for each in module["graph"]["nodes"] if each["target"] == "_operator.mul")
        call["inputs"][0]["name"] = touching(marker)

    path = saved(tmp_path, Sized(), dynamic=True)
    assert load_model(ModelConfig(program=path)).classes == 192
    assert "it takes a, b" in refused(changed(path, plant))
    assert not marker.exists()


@pytest.mark.parametrize("stored", ["gamma", "shared.weight", "offset"])
def test_code_in_the_name_of_a_tensor_is_not_run(tmp_path: Path, unusual: Path, stored: str) -> None:
    """A bare parameter, a layer's weight and a buffer: each name would be part of the source."""
    marker = tmp_path / "harmed"
    evil = f'training") or {touching(marker)} or getattr(self, "training'
    name = stored.replace(stored.split(".")[0], evil)

    def renamed(member: str, content: bytes) -> bytes:
        if not member.endswith(".json"):
            return content
        return content.replace(json.dumps(stored).encode(), json.dumps(name).encode())

    assert "has a layer or tensor named 'training" in refused(rewritten(unusual, renamed))
    assert not marker.exists()


@pytest.mark.parametrize(
    "argument",
    [
        {"as_int": {"a": 1}},
        {"as_float": "1) or exec('1'"},
        {"as_ints": ["1"]},
        {"as_string": ["x"]},
        {"as_tensor": {"name": "x); exec('1'"}},
        {"as_name": 3},
        {"as_scalar_type": "torch.float32"},
        {"as_memory_format": "exec('1')"},
        {"as_device": {"type": "exec('1')"}},
        {"as_layout": "exec('1')"},
        {"as_operator": "os.system"},
    ],
)
def test_an_argument_of_another_kind_than_it_says_is_refused(unusual: Path, argument: dict[str, Any]) -> None:
    """What becomes source is a number, text, or a name that was checked."""

    def plant(module: dict[str, Any]) -> None:
        call_of(module, "mul")["inputs"][1]["arg"] = argument

    with pytest.raises(ModelError, match="is not a program"):
        read_program(changed(unusual, plant))


def test_text_in_an_argument_stays_text(tmp_path: Path) -> None:
    """A string literal with quotes and newlines in it is only a mode that nobody knows."""
    marker = tmp_path / "harmed"
    text = f"'\"\n\\' + {touching(marker)} + '"

    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.pad(x, (1, 1, 1, 1), mode="reflect").flatten(1)

    def plant(module: dict[str, Any]) -> None:
        (mode,) = (each for each in call_of(module, "pad")["inputs"] if each["name"] == "mode")
        mode["arg"] = {"as_string": text}

    path = saved(tmp_path, Padded(), dynamic=True)
    assert load_model(ModelConfig(program=path)).classes == 300
    assert "cannot process" in refused(changed(path, plant))
    assert not marker.exists()


def test_infinity_is_a_number(tmp_path: Path) -> None:
    """JSON has no infinity, so the schema writes it as text."""

    class Clamped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(0.0, float("inf")).flatten(1)

    path = saved(tmp_path, Clamped(), dynamic=True)
    assert load_model(ModelConfig(program=path)).classes == 192


def _unknown(module: dict[str, Any]) -> None:
    call_of(module, "mul")["inputs"][1]["arg"]["as_tensor"]["name"] = "nowhere"


def _without_data(module: dict[str, Any]) -> None:
    del call_of(module, "conv2d")["inputs"][0]


def _without_weight(module: dict[str, Any]) -> None:
    del call_of(module, "conv2d")["inputs"][1]


def _odd_padding(module: dict[str, Any]) -> None:
    call_of(module, "conv2d")["inputs"].append({"name": "padding", "arg": {"as_string": "wide"}, "kind": 1})


def _no_results(module: dict[str, Any]) -> None:
    call_of(module, "conv2d")["outputs"] = []


def _other_output(module: dict[str, Any]) -> None:
    module["signature"]["output_specs"][0]["user_output"]["arg"]["as_tensor"]["name"] = "nowhere"


@pytest.mark.parametrize("change", [_unknown, _without_data, _without_weight, _odd_padding, _no_results, _other_output])
def test_a_graph_that_does_not_hold_together_is_refused(
    unusual: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """A reference to nothing, an input that is missing, a padding that does not exist."""
    path = changed(unusual, change)
    assert "is not one that torch.export makes" in refused(path)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([2, 3, -1, 8], "no image of the input shape 1 x 3 x -1 x 8"),
        ([2, 3, "x", 8], "no image of the input shape 1 x 3 x x x 8"),
        (None, "the input shape of changed.pt2 is unknown"),
    ],
)
def test_an_input_of_a_strange_shape_is_refused(tmp_path: Path, sizes: list[Any] | None, text: str) -> None:
    """A program of layers alone asks for the sizes of no value, so they are looked at last."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    def plant(module: dict[str, Any]) -> None:
        if sizes is None:
            del module["graph"]["tensor_values"]["x"]
        else:
            module["graph"]["tensor_values"]["x"]["sizes"] = [{"as_int": each} for each in sizes]

    assert text in refused(changed(saved(tmp_path, Flat(), dynamic=False), plant))


@pytest.mark.parametrize("seed", range(30))
def test_a_mutated_program_is_a_model_or_an_error(unusual: Path, seed: int) -> None:
    """Whatever value of the graph is exchanged for whatever other, only a `ModelError` comes out."""
    rng = random.Random(seed)

    def mutate(module: dict[str, Any]) -> None:
        spots = list(_spots(module))
        holder, key = rng.choice(spots)
        other, place = rng.choice(spots)
        holder[key] = rng.choice([None, -1, 2**70, "", "a.b", [], {}, other[place]])

    path = changed(unusual, mutate)
    try:
        loaded = load_model(ModelConfig(program=path))
    except ModelError:
        return
    assert loaded.module(torch.zeros(loaded.input_shape)).shape == (1, loaded.classes)


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in nested lists and mappings."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _spots(value[key])


def test_another_schema_is_refused(tmp_path: Path) -> None:
    """A file of a later major version is not guessed at."""

    def newer(name: str, content: bytes) -> bytes:
        return content.replace(b'"major": 8', b'"major": 9') if name.endswith("models/model.json") else content

    with pytest.raises(ModelError, match="schema version 9"):
        read_program(rewritten(saved(tmp_path, trained(Residual()), dynamic=True), newer))
