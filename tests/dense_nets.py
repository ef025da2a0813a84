"""Networks with dense layers: random chains with known answers, and small trained ones on the example's images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgeprune.export import export
from edgeprune.paoding.intervals import ACTIVATIONS, Array, Bounds
from edgeprune.paoding.network import Chain, Dense, Network, read
from edgeprune.robustness import Pixels
from edgeprune.structure import Structure, build_structure

IMAGES = Path(__file__).parents[1] / "examples" / "fashion" / "fashion.npz"
PIXELS = Pixels(mean=(0.0,), std=(1.0,))


def chain_of(rng: np.random.Generator, sizes: Sequence[int], activation: str, *, bias: bool = True) -> Chain:
    """Return a chain with random weights over a random box; every layer but the last is a group, its units in order."""
    layers = []
    for place, (into, out) in enumerate(pairwise(sizes)):
        inside = place < len(sizes) - 2
        layers.append(
            Dense(
                name=f"fc{place}",
                weight=rng.normal(size=(out, into)),
                bias=rng.normal(size=out) if bias else None,
                activation=activation if inside else "identity",
                group=f"fc{place}" if inside else None,
                rows=np.arange(out if inside else 0),
            )
        )
    low = rng.normal(size=sizes[0])
    return Chain(
        layers=tuple(layers), box=Bounds(low=low, high=low + rng.exponential(size=sizes[0])), box_source="test"
    )


def network_of(chain: Chain) -> Network:
    """Return a network that is nothing but a chain."""
    scale = {layer.group: np.abs(layer.weight).mean(1) for layer in chain.layers if layer.group is not None}
    return Network(scale=scale, chains=(chain,), obstacles={})


def output_of(chain: Chain, inputs: Array, merged: Sequence[np.ndarray]) -> Array:
    """Return what a chain answers to inputs [n, in] when every row is read in place of those it answers for."""
    values = inputs
    for place, layer in enumerate(chain.layers):
        values = values @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        values = ACTIVATIONS[layer.activation].function(values)
        if place < len(merged):
            values = values[:, merged[place]]
    return values


def inside(box: Bounds, rng: np.random.Generator, count: int) -> Array:
    """Return points of a box [n, in]: half of them corners."""
    corners = rng.random((count // 2, len(box.low))) < 0.5
    return box.low + np.vstack([corners, rng.random((count - count // 2, len(box.low)))]) * box.width


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A module, its example, its graph, its structure (single units, everything may go) and what the walk knows."""

    module: nn.Module
    example: Tensor
    graph: onnx.ModelProto
    structure: Structure
    network: Network


def prepared(module: nn.Module, example: Tensor, box: Bounds | None = None) -> Prepared:
    """Return a module with everything that is read off it."""
    graph = export(module.eval(), example)
    structure = build_structure(module, example, graph, multiple=1)
    network = read(module, structure, graph, box=box)
    return Prepared(module=module, example=example, graph=graph, structure=structure, network=network)


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return flatten and dense layers of these sizes with an activation between any two."""
    layers: list[nn.Module] = [nn.Flatten()]
    for into, out in pairwise(sizes):
        layers += [nn.Linear(into, out), activation()]
    return nn.Sequential(*layers[:-1])


class SmallCNN(nn.Module):
    """Two convolutions, a pool after each, and two dense layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.fc1, self.fc2, self.fc3 = nn.Linear(12 * 9, 20), nn.Linear(20, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def small_cnn(seed: int = 0) -> Prepared:
    """Return the small CNN with random weights, for images of 16 x 16."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return prepared(SmallCNN(), torch.randn(1, 1, 16, 16))


@cache
def fashion(split: str) -> tuple[Tensor, Tensor]:
    """Return the example's images, pixels in [0, 1], and labels of "train" or "test"."""
    with np.load(IMAGES) as arrays:
        images, labels = (torch.from_numpy(arrays[f"{split}_{what}"]) for what in ("images", "labels"))
    return images.float().view(-1, 1, 28, 28) / 255, labels.long()


@cache
def trained(seed: int) -> Prepared:
    """Return the papers' MLP trained a little on the example's images; made once in a session, treat as read-only."""
    images, labels = fashion("train")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = mlp(784, 128, 128, 64, 10)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(6):
            for chosen in torch.randperm(len(labels)).split(128):
                loss = nn.functional.cross_entropy(net(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return prepared(net, images[:1], Bounds(low=np.zeros(1), high=np.ones(1)))
