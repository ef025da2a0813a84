"""What the walk has to know of a network: how strong each filter is, and its chains of dense layers.

    conv ─▶ pool ─▶ flatten ─▶ [fc1 ─ relu ─▶ fc2 ─ relu ─▶ fc3] ─▶ logits
    a group of filters          a chain: fc1 and fc2 are groups of dense units, fc3 ends it

A *group of dense units* is made by one linear layer alone and read by linear layers alone, with nothing between but a
batch norm (folded here) and an activation whose range is known. Only such units can stand in for one another. Every
other group is a group of filters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from edgeprune.coupling import CONVOLUTIONS
from edgeprune.paoding.graph import Follow, Graph
from edgeprune.paoding.intervals import Array, Bounds
from edgeprune.structure import Structure

PIXELS = (0.0, 1.0)
"""The box that is assumed where nothing bounds what a chain reads (the authors' setting for every chain)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """One dense layer with its batch norm folded.

    Attributes:
        name: module path.
        weight: [out, in].
        bias: [out], None where neither the layer nor a batch norm adds anything.
        activation: what follows, a name in `intervals.ACTIVATIONS`; "identity" for the last layer of a chain.
        group: the group its units are, None where no unit may go.
        rows: unit → row of the weight; empty without a group.
    """

    name: str
    weight: Array
    bias: Array | None
    activation: str = "identity"
    group: str | None = None
    rows: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """Dense layers that read one another; the last one's output, before any activation, is what a merge is judged by.

    Attributes:
        layers: two or more. Where several layers read the same units the chain ends in all of them, stacked.
        box: of what the first layer reads, [in].
        box_source: what bounds it: "the input", the name of an operator, or "assumed" if nothing does.
    """

    layers: tuple[Dense, ...]
    box: Bounds
    box_source: str

    @property
    def groups(self) -> tuple[str, ...]:
        """Return the groups of dense units in it, in order."""
        return tuple(layer.group for layer in self.layers if layer.group is not None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """What the walk works on.

    Attributes:
        scale: group → mean |w| of the filters that make each unit; all of the groups, in forward order.
        chains: those in which units can be merged.
        obstacles: group of units that one linear layer makes, and that are not merged → what is in the way.
    """

    scale: Mapping[str, Array]
    chains: tuple[Chain, ...]
    obstacles: Mapping[str, str]

    @property
    def pairs(self) -> tuple[str, ...]:
        """Return the groups of dense units."""
        return tuple(group for chain in self.chains for group in chain.groups)


def read(
    module: nn.Module,
    structure: Structure,
    graph: onnx.ModelProto,
    *,
    box: Bounds | None = None,
    assumed: tuple[float, float] = PIXELS,
) -> Network:
    """Return what the walk has to know of a module.

    Args:
        module: in eval mode; left as it is.
        structure: of that module.
        graph: what `edgeprune.export.export` wrote for it.
        box: of the input's channels, [C]: what valid pixels become when they are normalised. None: nothing is known.
        assumed: low and high of what a chain reads where nothing bounds it. What rests on it is no proven bound.
    """
    makers = _dense_makers(structure)
    linear = [layer.name for layer in structure.layers if layer.kind == "linear"]
    known = Graph(graph, linear)
    follows = {layer: known.follow(layer) for layer in linear}
    follows = {layer: _aligned(structure, layer, follow) for layer, follow in follows.items()}
    chains = []
    for names in _paths(follows):
        layers = tuple(_dense(module, structure, name, follows[name], makers) for name in names)
        found, source = known.box(names[0], box, assumed)
        chains.append(Chain(layers=(*layers, _end(module, follows[names[-1]].readers)), box=found, box_source=source))
    return Network(
        scale=filter_scale(module, structure),
        chains=tuple(chain for chain in chains if chain.groups),
        obstacles={group: follows[layer].obstacle for layer, group in makers.items() if follows[layer].obstacle},
    )


def filter_scale(module: nn.Module, structure: Structure) -> dict[str, Array]:
    """Return group → mean |w| over all filters that make each unit, of all the layers that do (biases left out)."""
    total, count = np.zeros(structure.class_count + 1), np.zeros(structure.class_count + 1)
    for layer in structure.layers:
        weight, out = _matrix(module, layer.name), structure.classes[layer.name, "out"]
        np.add.at(total, out, np.abs(weight).sum(1))
        np.add.at(count, out, weight.shape[1])
    mean = total / np.maximum(count, 1)
    return {group.name: mean[list(structure.units[group.name])] for group in structure.space.groups}


def _matrix(module: nn.Module, name: str) -> Array:
    """Return a layer's weight with one row an output channel, float64."""
    layer = module.get_submodule(name)
    weight = _array(layer.weight)
    if isinstance(layer, CONVOLUTIONS) and layer.transposed:  # [in, out / groups, ...]
        weight = weight.reshape(layer.groups, -1, *weight.shape[1:]).swapaxes(1, 2)
    rows = layer.out_channels if isinstance(layer, CONVOLUTIONS) else len(weight)
    return weight.reshape(rows, -1)


def _array(tensor: object) -> Array:
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach().cpu().double().numpy()


# -- chains ----------------------------------------------------------------------------------------------------------


def _dense_makers(structure: Structure) -> dict[str, str]:
    """Return linear layer → the group of its units, where it alone makes them and linear layers alone read them."""
    kinds = {layer.name: layer.kind for layer in structure.layers}
    found = {}
    for group in structure.space.groups:
        axes = structure.members[group.name]
        makers = [layer for layer, side in axes if side == "out" and layer in kinds]
        readers = {kinds.get(layer) for layer, side in axes if side == "in"}
        if [kinds[each] for each in makers] == ["linear"] and readers == {"linear"}:
            found[makers[0]] = group.name
    return found


def _aligned(structure: Structure, layer: str, follow: Follow) -> Follow:
    """Return what follows a layer, with an obstacle if a reader takes its units in another order or not all of them."""
    out = structure.classes[layer, "out"]
    for reader in follow.readers:
        if not np.array_equal(structure.classes[reader, "in"], out):
            return Follow(obstacle=f"{reader!r} reads its units in another order")
    return follow


def _paths(follows: Mapping[str, Follow]) -> list[list[str]]:
    """Return the layers of each chain but its end: each the only reader of the one before."""
    after = {name: each.readers[0] for name, each in follows.items() if len(each.readers) == 1}
    starts = [name for name in follows if follows[name].readers and name not in after.values()]
    return [_path(name, after, follows) for name in starts]


def _path(start: str, after: Mapping[str, str], follows: Mapping[str, Follow]) -> list[str]:
    path = [start]
    while path[-1] in after and follows[after[path[-1]]].readers:
        path.append(after[path[-1]])
    return path


def _dense(module: nn.Module, structure: Structure, name: str, follow: Follow, groups: Mapping[str, str]) -> Dense:
    weight, bias = _folded(module, name, follow.norm)
    group = groups.get(name)
    places = {owner: row for row, owner in enumerate(structure.classes[name, "out"].tolist())}
    rows = [places[unit] for unit in structure.units[group]] if group is not None else []
    return Dense(
        name=name,
        weight=weight,
        bias=bias,
        activation=follow.activation,
        group=group,
        rows=np.array(rows, dtype=np.int64),
    )


def _folded(module: nn.Module, name: str, norm: str | None) -> tuple[Array, Array | None]:
    """Return weight and bias of a linear layer and the batch norm behind it as one affine map."""
    layer = module.get_submodule(name)
    weight, bias = _array(layer.weight), None if layer.bias is None else _array(layer.bias)
    if norm is None:
        return weight, bias
    batch_norm = module.get_submodule(norm)
    assert isinstance(batch_norm, nn.BatchNorm1d)
    spread = np.sqrt(_array(batch_norm.running_var) + batch_norm.eps)
    scale = 1 / spread if batch_norm.weight is None else _array(batch_norm.weight) / spread
    shift = 0 if batch_norm.bias is None else _array(batch_norm.bias)
    return scale[:, None] * weight, scale * ((0 if bias is None else bias) - _array(batch_norm.running_mean)) + shift


def _end(module: nn.Module, names: Sequence[str]) -> Dense:
    """Return the layers that end a chain as one."""
    parts = [_folded(module, name, None) for name in names]
    biases = [np.zeros(len(weight)) if bias is None else bias for weight, bias in parts]
    return Dense(
        name=" + ".join(names),
        weight=np.vstack([weight for weight, _ in parts]),
        bias=np.concatenate(biases),
        rows=np.empty(0, dtype=np.int64),
    )
