"""Which rows of a flat module belong to which unit of which channel group: sums and factors of all units at once.

A unit's *vector* is everything that makes its channels: the filters or matrix rows of every layer that puts them out,
their biases, and the scale and shift of every batch norm over them. What reads the channels (the input slices of the
next layers), the slopes of PReLUs and running statistics are not part of it:

- Vectors do not overlap then. The kernel between two channel groups has a row for every unit of one and a slice for
  every unit of the other; if both counted, two neighbours that shrink together could not both have the length that
  the formula of smooth pruning gives them.
- A vector of zeros makes channels of zeros, so the slices that read them count for nothing when the unit goes. Where
  an operation makes something else of zeros (a sigmoid), the slices still fall away at the removal, not before.

A *trace* is every place a unit has in the parameters, the reading slices included: all of it is zero once the unit is
removed, so that cutting the unit out afterwards changes nothing. A group that loses all its units takes a residual
branch along; what else that branch holds is one unit more, the last of its kind.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune.coupling import BATCH_NORMS, CONVOLUTIONS, is_depthwise
from edgeprune.decay.flat import Bucket, Flat, add_rows, lengths_of, products_of, scale_rows
from edgeprune.plan import Plan
from edgeprune.structure import Structure

Owners = NDArray[np.int64]
Extent = Literal["made", "gates"]
"""What a unit's vector is: all that makes its channels, or only the scale and shift of its batch norms."""

BRANCHES = "(removed branches)"
"""Name of the group whose only unit is what removed branches hold beside the units of their groups."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One channel axis of one parameter.

    Attributes:
        parameter: its name.
        axis: of the parameter.
        side: "out" where the channels are made, "in" where they are read, "slope" for a PReLU.
        units: unit of each place on the axis, int64.
        layer: the layer that holds the parameter.
    """

    parameter: str
    axis: int
    side: Literal["out", "in", "slope"]
    units: Tensor
    layer: str

    def multiply(self, parameter: Tensor, factors: Tensor) -> None:
        """Multiply each place on the axis of this parameter by its unit's factor, [count + 1], in place."""
        parameter.mul_(self._spread(parameter, factors))

    def add(self, parameter: Tensor, terms: Tensor) -> None:
        """Add its unit's term, [count + 1], to each place on the axis of this parameter, in place."""
        parameter.add_(self._spread(parameter, terms))

    def _spread(self, parameter: Tensor, units: Tensor) -> Tensor:
        return units[self.units].view([-1 if axis == self.axis else 1 for axis in range(parameter.dim())])

    @property
    def weighs(self) -> bool:
        """Return whether the parameter is a weight: of a layer's kernel or matrix, or a batch norm's scale."""
        return self.side != "slope" and self.parameter.rpartition(".")[2] == "weight"


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """The units of all channel groups, numbered group after group from 0; `count` stands for nobody.

    Attributes:
        flat: the module's parameters.
        ranges: group → numbers of its units, in unit order.
        losses: group → how many of them must go.
        group_of: unit → number of its group, int64 [count + 1]; nobody is of a group of its own.
        ranks: unit → its place in its group, int64 [count + 1].
        owner: row → unit whose vector it belongs to, int64 [rows]; `count`: nobody's.
        maker: row → unit with which it goes, int64 [rows]; beside the vectors, slopes and what the extent leaves out.
        buckets: those that hold a row of somebody's vector.
        traces: every place of every unit.
        means: running means of batch norms with the unit of each entry.
    """

    flat: Flat
    ranges: Mapping[str, range]
    losses: Mapping[str, int]
    group_of: Tensor
    ranks: Tensor
    owner: Tensor
    maker: Tensor
    buckets: tuple[Bucket, ...]
    traces: tuple[Trace, ...]
    means: tuple[tuple[Tensor, Tensor], ...]

    @property
    def count(self) -> int:
        """Return the number of units."""
        return len(self.group_of) - 1

    @property
    def nothing(self) -> Tensor:
        """Return a zero for every unit and for nobody, [count + 1]."""
        return self.flat.values.new_zeros(self.count + 1)

    @cached_property
    def rows(self) -> Tensor:
        """Return the numbers of the rows of `buckets`, int64."""
        numbers = torch.arange(len(self.owner), device=self.owner.device)
        return torch.cat([numbers[:0], *(numbers[each.numbers] for each in self.buckets)])

    @cached_property
    def owners(self) -> Tensor:
        """Return the owner of each of those rows."""
        return self.owner[self.rows]

    def of(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of `buckets` in a flat tensor, [rows, length] each, views."""
        known = self._views.get(id(values))
        return tuple(each.of(values) for each in self.buckets) if known is None else known

    @cached_property
    def _views(self) -> dict[int, tuple[Tensor, ...]]:
        return {id(each): tuple(b.of(each) for b in self.buckets) for each in (self.flat.values, self.flat.grads)}

    def per_unit(self, rows: Tensor) -> Tensor:
        """Return the sums of numbers of rows of `buckets` over the vectors of all units, [count + 1]."""
        return self.nothing.index_add_(0, self.owners, rows)

    def per_group(self, units: Tensor) -> Tensor:
        """Return the sums of numbers of units [count + 1] over groups, [groups + 1]."""
        return units.new_zeros(len(self.ranges) + 1).index_add_(0, self.group_of, units)

    def lengths(self, values: Tensor) -> Tensor:
        """Return the L2 norm of every unit's vector in a flat tensor, [count + 1]."""
        return self.per_unit(lengths_of(self.of(values)).square_()).sqrt_()

    def products(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the inner product of every unit's vectors in two flat tensors, [count + 1]."""
        return self.per_unit(products_of(self.of(one), self.of(other)))

    def sizes(self) -> Tensor:
        """Return how many numbers every unit's vector has, [count + 1]."""
        lengths = self.flat.values.new_zeros(self.flat.rows)
        for bucket in self.buckets:
            lengths[bucket.numbers] = float(bucket.length)
        return self.per_unit(lengths[self.rows])

    def scale(self, factors: Tensor) -> None:
        """Multiply every unit's vector by its factor, [count + 1], in place; nobody's factor is to be 1."""
        scale_rows(self.of(self.flat.values), factors.index_select(0, self.owners))

    def pull(self, factors: Tensor) -> None:
        """Add to the gradient of every unit's vector the vector times its factor, [count + 1]; nobody's is to be 0."""
        self.pull_rows(factors.index_select(0, self.owners))

    def pull_rows(self, factors: Tensor) -> None:
        """Add to the gradient of every row of `buckets` the row times its factor, [rows]."""
        add_rows(self.of(self.flat.grads), self.of(self.flat.values), factors)

    def lowest(self, scores: Tensor, counts: Tensor, among: Tensor) -> Tensor:
        """Return the units with the lowest scores of each group, bool [count + 1]; of equals the first.

        Args:
            scores: [count + 1].
            counts: how many of each group, [groups + 1].
            among: whom to choose from, bool [count + 1].
        """
        order = torch.argsort(torch.where(among, scores, torch.inf), stable=True)
        order = order[torch.argsort(self.group_of[order], stable=True)]  # groups are runs of numbers: back in place
        chosen = torch.empty_like(among)
        chosen[order] = self.ranks < counts[self.group_of]
        return chosen & among

    def mask(self, removed: Tensor) -> Tensor:
        """Return a flat tensor of ones with zeros in every trace of the units that are removed, bool [count + 1]."""
        kept = (~removed).to(self.flat.values.dtype)
        mask = torch.ones_like(self.flat.values)
        scale_rows(self.flat.by_length(mask), kept[self.maker])
        for trace in self.traces:
            if trace.side == "in":
                trace.multiply(self.flat.places[trace.parameter].of(mask), kept)
        return mask

    def silence_means(self, removed: Tensor) -> None:
        """Set the running means of removed units to zero: what they average is zero from now on."""
        for mean, units in self.means:
            mean.masked_fill_(removed[units], 0.0)


def find_units(module: nn.Module, structure: Structure, plan: Plan, extent: Extent = "made") -> Units:
    """Return the units of every group that the plan makes narrower; the module's parameters become flat.

    Args:
        module: the unpruned model, of the structure; its parameters that learn are laid out anew.
        structure: its channel groups.
        plan: only its widths count.
        extent: what a unit's vector is.

    Raises:
        ModelError: if the parameters differ in type or device.
    """
    names = [group.name for group in structure.space.groups if len(plan.kept[group.name]) < group.width]
    removal = structure.removal(plan)
    ranges, numbers = _numbered(structure, names, branches=bool(removal.dead_layers))
    traces = tuple(_traces(module, structure, numbers))
    flat = Flat(module, {each.parameter: each.axis for each in traces if each.side != "in"})
    nobody = ranges[-1][1].stop if ranges else 0
    traces = tuple(each for each in traces if each.parameter in flat.places and bool((each.units < nobody).any()))
    maker = _rows(flat, (each for each in traces if each.side != "in"), nobody)
    vectors = (each for each in traces if each.side == "out" and _counts(module.get_submodule(each.layer), extent))
    owner = _rows(flat, vectors, nobody)
    if removal.dead_layers:
        emptied = {number for name, each in ranges if not plan.kept.get(name, (0,)) for number in each}
        _give_rest(flat, (owner, maker), removal.dead_layers, emptied, nobody - 1)
    groups = [place for place, (_, each) in enumerate(ranges) for _ in each]
    ranks = [place for _, each in ranges for place in range(len(each))]
    device = owner.device
    return Units(
        flat=flat,
        ranges=dict(ranges),
        losses={name: len(each) - len(plan.kept.get(name, ())) for name, each in ranges},
        group_of=torch.tensor([*groups, len(ranges)], device=device),
        ranks=torch.tensor([*ranks, 0], device=device),
        owner=owner,
        maker=maker,
        buckets=tuple(each for each in flat.buckets if bool((owner[each.numbers] < nobody).any())),
        traces=traces,
        means=tuple(_means(module, structure, numbers, device)),
    )


def _numbered(structure: Structure, names: list[str], *, branches: bool) -> tuple[list[tuple[str, range]], Owners]:
    """Return the numbers of each group's units, and a table from class to number; -1, the last place, is nobody."""
    ranges: list[tuple[str, range]] = []
    total = sum(len(structure.units[name]) for name in names) + branches
    table = np.full(structure.class_count + 1, total, dtype=np.int64)
    start = 0
    for name in names:
        units = structure.units[name]
        table[list(units)] = np.arange(start, start + len(units))
        ranges.append((name, range(start, start + len(units))))
        start += len(units)
    return ranges + ([(BRANCHES, range(start, start + 1))] if branches else []), table


def _traces(module: nn.Module, structure: Structure, numbers: Owners) -> Iterator[Trace]:
    for name, layer in module.named_modules():
        if (name, "out") not in structure.classes:
            continue
        out = structure.classes[name, "out"]
        into = structure.classes.get((name, "in"), out)
        for tensor, parameter in layer.named_parameters(recurse=False):
            for axis, side, owners in _sides(layer, parameter, into, out):
                units = torch.from_numpy(numbers[owners[: parameter.shape[axis]]]).to(parameter.device)
                yield Trace(
                    parameter=f"{name}.{tensor}" if name else tensor, axis=axis, side=side, units=units, layer=name
                )


def _sides(
    layer: nn.Module, parameter: Tensor, into: Owners, out: Owners
) -> Iterator[tuple[int, Literal["out", "in", "slope"], Owners]]:
    if isinstance(layer, nn.PReLU):
        yield 0, "slope", out
    elif parameter.dim() <= 1 or is_depthwise(layer):
        yield 0, "out", out
    else:
        transposed = isinstance(layer, CONVOLUTIONS) and layer.transposed
        yield (1 if transposed else 0), "out", out
        yield (0 if transposed else 1), "in", into


def _rows(flat: Flat, traces: Iterable[Trace], nobody: int) -> Tensor:
    """Return row → unit of the trace that runs along it."""
    units = torch.full((flat.rows,), nobody, dtype=torch.int64, device=flat.values.device)
    for trace in traces:
        units[flat.places[trace.parameter].rows] = trace.units
    return units


def _counts(layer: nn.Module, extent: Extent) -> bool:
    return extent == "made" or isinstance(layer, BATCH_NORMS)


def _give_rest(
    flat: Flat, tables: Iterable[Tensor], dead: Collection[str], emptied: Collection[int], rest: int
) -> None:
    """Give the rows of removed branches that no unit of an emptied group owns to the branches' own unit."""
    for name, place in flat.places.items():
        if name.rpartition(".")[0] in dead:
            for table in tables:
                theirs = [unit in emptied for unit in table[place.rows].tolist()]
                table[place.rows] = torch.where(torch.tensor(theirs, device=table.device), table[place.rows], rest)


def _means(
    module: nn.Module, structure: Structure, numbers: Owners, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for name, layer in module.named_modules():
        if (
            isinstance(layer, BATCH_NORMS)
            and (name, "out") in structure.classes
            and isinstance(layer.running_mean, Tensor)
        ):
            yield layer.running_mean, torch.from_numpy(numbers[structure.classes[name, "out"]]).to(device)
