"""All parameters of a module in one tensor and all their gradients in another, as rows that belong to channels.

    values  [ conv1: row row row .. | conv2: row row .. | .. | bn1.weight . . . | bn1.bias . . . | .. ]

A row is what one output channel holds of one parameter: a filter, a row of a matrix, a single number of a batch norm.
Rows of equal length lie together, so a handful of operations reaches every row of the network. The parameters of the
module become views of the tensor; nothing else about the module changes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Rows of one length that lie together.

    Attributes:
        first: number of the first row.
        rows: how many there are.
        start: place of the first element.
        length: elements of a row.
    """

    first: int
    rows: int
    start: int
    length: int

    @property
    def numbers(self) -> slice:
        """Return the numbers of the rows."""
        return slice(self.first, self.first + self.rows)

    def of(self, values: Tensor) -> Tensor:
        """Return these rows of a flat tensor, [rows, length], a view."""
        return values[self.start : self.start + self.rows * self.length].view(self.rows, self.length)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one parameter lies.

    Attributes:
        rows: numbers of its rows.
        elements: places of its elements.
        shape, strides: of the parameter as its module sees it.
    """

    rows: slice
    elements: slice
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, values: Tensor) -> Tensor:
        """Return this parameter's part of a flat tensor, in the parameter's shape, a view."""
        return values.as_strided(self.shape, self.strides, values.storage_offset() + self.elements.start)


class Flat:
    """A module's parameters and gradients, flat.

    Gradients are collected by `gather`; between a step and the next backward pass they are to be forgotten.

    Args:
        module: its parameters that learn become views of `values`, in the memory format they have.
        axes: parameter name → axis of its output channels; 0 where it is missing.

    Attributes:
        values, grads: flat tensors of one length.
        places: parameter name → where it lies.
        buckets: all rows, by length.
        kernels, vectors: what an optimiser may be given in place of the module's parameters, so that it needs few
            operations: all that have more than one axis, and all others. Only for an optimiser that treats every
            number of a parameter alike (SGD, Adam, RMSprop and their kin).

    Raises:
        ModelError: if nothing learns, or the parameters that do differ in type or device.
    """

    def __init__(self, module: nn.Module, axes: Mapping[str, int]) -> None:
        learning = {name: each for name, each in module.named_parameters() if each.requires_grad}
        _check_alike(learning.values())
        self.places = _laid_out(learning, axes)
        self.buckets = _buckets(self.places.values())
        self._parameters = [learning[name] for name in self.places]
        self.values = self._parameters[0].new_empty(sum(each.numel() for each in self._parameters)).detach()
        self.grads = torch.zeros_like(self.values)
        self._views = [place.of(self.grads) for place in self.places.values()]
        for parameter, place in zip(self._parameters, self.places.values(), strict=True):
            view = place.of(self.values)
            view.copy_(parameter.detach())
            parameter.data = view
        # What autograd made is let go when gradients are forgotten, as under any optimiser. Let go by `gather`, the
        # heap's top is free after every step and goes back to the system: page faults then cost a tenth of the next.
        self._received: list[Tensor | None] = []
        split = sum(each.numel() for each in self._parameters if each.dim() > 1)
        self.kernels, self.vectors = self._part(slice(0, split)), self._part(slice(split, None))

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return self.buckets[-1].first + self.buckets[-1].rows

    def by_length(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of all buckets of a flat tensor, [rows, length] each, views."""
        return tuple(bucket.of(values) for bucket in self.buckets)

    def zero_grad(self) -> None:
        """Forget all gradients: autograd makes new ones faster than it adds to what is there."""
        self._received.clear()
        for parameter in self._parameters:
            parameter.grad = None

    def gather(self) -> None:
        """Bring all gradients to their place, and let the parameters see them there; one without any counts as zero."""
        self._received = [parameter.grad for parameter in self._parameters]
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.grad is not view:
                view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
                parameter.grad = view

    def per_row(self, values: Mapping[Tensor, float]) -> Tensor:
        """Return what each row's parameter, or the part it lies in, is mapped to, [rows]; 0 if neither is."""
        result = self.values.new_zeros(self.rows)
        for parameter, place in zip(self._parameters, self.places.values(), strict=True):
            part = self.kernels if parameter.dim() > 1 else self.vectors
            result[place.rows] = values.get(parameter, values.get(part, 0.0))
        return result

    def views(self, values: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield every parameter, the two flat parts included, with its part of a flat tensor."""
        split = self.kernels.numel()
        yield self.kernels, values[:split]
        yield self.vectors, values[split:]
        for parameter, place in zip(self._parameters, self.places.values(), strict=True):
            yield parameter, place.of(values)

    def _part(self, elements: slice) -> nn.Parameter:
        part = nn.Parameter(self.values[elements])
        part.grad = self.grads[elements]
        return part


Rows = Sequence[Tensor]
"""Views of a flat tensor, one a bucket, [rows, length] each; a number a row is [rows] of all of them together."""


def lengths_of(rows: Rows) -> Tensor:
    """Return the L2 norm of every row, [rows]."""
    return torch.cat([torch.linalg.vector_norm(each, dim=1) for each in rows])


def products_of(rows: Rows, others: Rows) -> Tensor:
    """Return the inner product of every row with its like in another tensor, [rows]."""
    return torch.cat([torch.linalg.vecdot(one, other, dim=1) for one, other in zip(rows, others, strict=True)])


def scale_rows(rows: Rows, factors: Tensor) -> None:
    """Multiply every row by its factor, [rows], in place."""
    for each, part in zip(rows, _parted(factors, rows), strict=True):
        each.mul_(part)


def add_rows(rows: Rows, others: Rows, factors: Tensor) -> None:
    """Add to every row its like in another tensor times its factor, [rows], in place."""
    for each, other, part in zip(rows, others, _parted(factors, rows), strict=True):
        each.addcmul_(other, part)


def _parted(numbers: Tensor, rows: Rows) -> Sequence[Tensor]:
    return torch.split_with_sizes(numbers.unsqueeze(1), [each.shape[0] for each in rows])


def _check_alike(parameters: Iterable[nn.Parameter]) -> None:
    kinds = {f"{each.dtype} on {each.device}" for each in parameters}
    if len(kinds) != 1:
        raise ModelError(
            "the parameters cannot be laid out in one tensor",
            why=f"they are {', '.join(sorted(kinds))}" if kinds else "none of them learns",
            next_step="bring the module to one type and one device, and let at least one parameter learn",
        )


def _laid_out(parameters: Mapping[str, nn.Parameter], axes: Mapping[str, int]) -> dict[str, Place]:
    """Return the places, kernels before vectors and short rows before long ones."""

    def rank(name: str) -> tuple[bool, int]:
        parameter = parameters[name]
        return parameter.dim() <= 1, parameter.numel() // _rows(parameter, axes.get(name, 0))

    places: dict[str, Place] = {}
    row = element = 0
    for name in sorted(parameters, key=rank):
        parameter, axis = parameters[name], axes.get(name, 0)
        places[name] = Place(
            rows=slice(row, row + _rows(parameter, axis)),
            elements=slice(element, element + parameter.numel()),
            shape=tuple(parameter.shape),
            strides=_strides(parameter, axis),
        )
        row, element = places[name].rows.stop, places[name].elements.stop
    return places


def _rows(parameter: Tensor, axis: int) -> int:
    return parameter.shape[axis] if parameter.dim() else 1


def _strides(parameter: Tensor, axis: int) -> tuple[int, ...]:
    """Return the strides that put rows one after the other and keep the order within a row as it is."""
    others = (each for each in range(parameter.dim()) if each != axis)
    inner = sorted(others, key=parameter.stride, reverse=True)
    strides, step = [0] * parameter.dim(), 1
    for each in reversed(([axis] if parameter.dim() else []) + inner):
        strides[each], step = step, step * parameter.shape[each]
    return tuple(strides)


def _buckets(places: Iterable[Place]) -> tuple[Bucket, ...]:
    """Return the runs of rows of equal length."""
    found: list[Bucket] = []
    for place in places:
        rows = place.rows.stop - place.rows.start
        length = (place.elements.stop - place.elements.start) // rows
        if found and found[-1].length == length:
            found[-1] = replace(found[-1], rows=found[-1].rows + rows)
        else:
            found.append(Bucket(first=place.rows.start, rows=rows, start=place.elements.start, length=length))
    return tuple(found)
