"""What a run depends on beside its inputs: a change of any of it starts another run."""

import importlib.util
import sys
from pathlib import Path

import pytest
from torch import nn

from edgeprune.provenance import code_digest, machine, versions

SOURCE = """
from torch import nn
from torch.nn import functional

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return functional.relu(self.conv(x))
"""


def net(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return the net of a module that was written and imported just now."""
    path = folder / "a_users_net.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("a_users_net", path)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "a_users_net", made)
    spec.loader.exec_module(made)
    return made.Net()


def test_other_code_of_the_same_layers_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ReLU became GELU in `forward`: structure and weights look the same."""
    folders = [tmp_path / name for name in "abc"]
    sources = [SOURCE, SOURCE, SOURCE.replace("relu", "gelu")]
    for folder in folders:
        folder.mkdir()
    first, same, other = (
        code_digest(nn.Sequential(net(folder, source, monkeypatch)))
        for folder, source in zip(folders, sources, strict=True)
    )
    assert first == same
    assert first != other


def test_a_class_without_source_is_no_reason_to_stop() -> None:
    made = type("Nowhere", (nn.Module,), {"__module__": "no_such_module"})()
    assert code_digest(made) != code_digest(nn.Linear(2, 2))


def test_the_machine_is_known_by_its_cpu(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Imaginary 9000\nprocessor\t: 1\nmodel name\t: Imaginary 9000\n")
    assert "Imaginary 9000" in machine(cpuinfo)
    assert machine(tmp_path / "missing")


def test_the_packages_that_shape_a_result_are_listed() -> None:
    assert {"edgeprune", "torch", "onnxruntime"} <= set(versions())
