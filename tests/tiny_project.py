"""A deploy small enough for a test: a residual net of 30,000 weights, images a linear map could tell apart, a formula.

`write_project(folder)` writes ``edgeprune.toml``, ``net.py``, ``net.safetensors`` and ``images.npz``; the weights are
trained once a process, for a second.
"""

import io
import runpy
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

CLASSES, SIDE = 4, 12

NET = '''
"""A stem, two residual blocks of which the second halves the map, a head."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, into, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(into, out, 1, stride, bias=False) if into != out else nn.Identity()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block1 = Block(16, 32, 1)
        self.block2 = Block(32, 64, 2)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.block2(self.block1(self.stem(x))).mean((2, 3)))


def net(classes=4):
    return Net(classes)


def broken():
    raise RuntimeError("the checkpoint server is down")
'''

CONFIG = """
[model]
factory = "net:net"
weights = "net.safetensors"

[data]
arrays = "images.npz"
validation = 80
calibration = 64

[budget]
latency = "0.5x"

[search]
strategy = "random"
trials = 6
seed = 1

[space]
channel_multiple = 8

[finetune]
steps = 12
batch_size = 32
precision = "fp32"
augment = "none"

[measure]
session_ms = 20.0
final_sessions = 4

[targets.toy]
profile = "formula"
[targets.toy.options]
block = 8
"""


@cache
def images() -> dict[str, np.ndarray]:
    """Return 400 training and 120 test images, float32, each the pattern of its class under noise."""
    rng = np.random.default_rng(7)
    patterns = rng.standard_normal((CLASSES, 1, SIDE, SIDE))
    found = {}
    for split, count in (("train", 400), ("test", 120)):
        labels = np.arange(count) % CLASSES
        noise = rng.standard_normal((count, 1, SIDE, SIDE))
        found[f"{split}_images"] = (patterns[labels] + 1.2 * noise).astype(np.float32)
        found[f"{split}_labels"] = labels.astype(np.int64)
    return found


def factory(folder: Path) -> nn.Module:
    """Return the net with fresh, seeded weights, made by ``net.py`` in `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return runpy.run_path(str(folder / "net.py"))["net"]()


@cache
def _trained(folder: Path) -> bytes:
    module = factory(folder)
    pixels, labels = (torch.from_numpy(images()[f"train_{each}"]) for each in ("images", "labels"))
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(6):
        for chosen in torch.randperm(len(labels), generator=order).split(50):
            loss = nn.functional.cross_entropy(module.train()(pixels[chosen]), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return save(module.state_dict())


_weights: list[bytes] = []


def weights(folder: Path) -> bytes:
    """Return the trained weights as a safetensors file; trained by the first call."""
    if not _weights:
        _weights.append(_trained(folder))
    return _weights[0]


def write_project(folder: Path, *changes: tuple[str, str]) -> Path:
    """Write a project into `folder`, pieces of its configuration exchanged; return the configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    text = CONFIG
    for old, new in changes:
        assert old in text, f"{old!r} is not in the configuration"
        text = text.replace(old, new)
    (folder / "net.py").write_text(NET)
    (folder / "net.safetensors").write_bytes(weights(folder))
    packed = io.BytesIO()
    np.savez(packed, **images())
    (folder / "images.npz").write_bytes(packed.getvalue())
    path = folder / "edgeprune.toml"
    path.write_text(text)
    return path
