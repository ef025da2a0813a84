"""Parameters laid out flat are the same parameters, and rows are their channels."""

import copy

import pytest
import torch
from families import made
from torch import nn

from edgeprune.decay.flat import Flat, add_rows, lengths_of, products_of, scale_rows
from edgeprune.errors import ModelError


def small() -> nn.Module:
    """Return kernels of two shapes, a transposed one, a matrix and vectors."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "a": nn.Conv2d(3, 4, 3),
            "b": nn.ConvTranspose2d(5, 6, 2),
            "c": nn.Linear(7, 2),
            "d": nn.BatchNorm2d(4),
            "e": nn.Conv2d(3, 5, 3, bias=False).to(memory_format=torch.channels_last),
        }
    )


AXES = {"b.weight": 1}


def test_the_module_keeps_its_values_and_its_memory_format() -> None:
    """Every parameter is a view of one tensor, equal to what it was."""
    net = small()
    before = copy.deepcopy(net).state_dict()
    flat = Flat(net, AXES)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net["e"].weight.is_contiguous(memory_format=torch.channels_last)
    flat.values.fill_(3.0)
    assert all(bool((each == 3).all()) for each in net.parameters())


def test_a_row_is_what_one_output_channel_holds() -> None:
    """Filters, columns of a transposed kernel, rows of a matrix, single numbers."""
    net = small()
    flat = Flat(net, AXES)
    lengths = lengths_of(flat.by_length(flat.values))
    for name, parameter in net.named_parameters():
        rows = parameter.detach().movedim(AXES.get(name, 0), 0).reshape(parameter.shape[AXES.get(name, 0)], -1)
        assert torch.allclose(lengths[flat.places[name].rows], rows.norm(dim=1)), name


def test_rows_of_one_length_lie_together() -> None:
    """The two 3x3 kernels over 3 channels are one bucket, and so are all vectors."""
    flat = Flat(small(), AXES)
    assert sorted((each.length, each.rows) for each in flat.buckets) == [
        (1, 4 + 6 + 2 + 4 + 4),
        (7, 2),
        (20, 6),
        (27, 9),
    ]
    assert flat.rows == 9 + 6 + 2 + 20
    assert flat.kernels.numel() + flat.vectors.numel() == flat.values.numel()


def test_the_parts_share_memory_with_the_module() -> None:
    """A step of SGD on two flat parts is a step on every parameter."""
    net, twin = small(), small()
    flat = Flat(net, AXES)
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        theirs.grad = torch.randn_like(theirs)
        mine.grad = theirs.grad.clone()
    flat.gather()
    torch.optim.SGD([flat.kernels, flat.vectors], lr=0.5).step()
    torch.optim.SGD(twin.parameters(), lr=0.5).step()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, theirs)


def test_gradients_are_found_wherever_autograd_put_them() -> None:
    """Copied once, seen by parameters and parts from then on; added to in place; zero where there is none."""
    net, x = made("resnet")
    flat = Flat(net, {})
    net.train()(x.repeat(2, 1, 1, 1)).square().sum().backward()
    wanted = {name: each.grad.clone() for name, each in net.named_parameters()}
    flat.gather()
    for name, parameter in net.named_parameters():
        assert torch.equal(flat.places[name].of(flat.grads), wanted[name])
        assert torch.equal(parameter.grad, wanted[name])
    flat.grads.mul_(2.0)
    assert torch.equal(net.head.linear.weight.grad, 2 * wanted["head.linear.weight"])
    assert float(flat.kernels.grad.abs().max()) > 0
    net(x.repeat(2, 1, 1, 1)).square().sum().backward()
    flat.gather()
    assert torch.allclose(net.head.linear.bias.grad, 3 * wanted["head.linear.bias"], rtol=1e-3, atol=1e-4)
    flat.zero_grad()
    assert net.stem[0].weight.grad is None
    flat.gather()
    assert float(flat.grads.abs().max()) == 0.0


def test_row_arithmetic_is_the_plain_one() -> None:
    """Products, factors and sums of rows, against loops over channels."""
    net = small()
    flat = Flat(net, AXES)
    flat.grads.copy_(torch.randn_like(flat.grads))
    factors, before, grads = torch.randn(flat.rows), flat.values.clone(), flat.grads.clone()
    products = products_of(flat.by_length(flat.values), flat.by_length(flat.grads))
    add_rows(flat.by_length(flat.grads), flat.by_length(flat.values), factors)
    scale_rows(flat.by_length(flat.values), factors)
    for bucket in flat.buckets:
        for place in range(bucket.rows):
            row = slice(bucket.start + place * bucket.length, bucket.start + (place + 1) * bucket.length)
            factor = factors[bucket.first + place]
            assert torch.allclose(products[bucket.first + place], before[row] @ grads[row], atol=1e-6)
            assert torch.allclose(flat.values[row], before[row] * factor)
            assert torch.allclose(flat.grads[row], grads[row] + before[row] * factor, atol=1e-6)


def test_per_row_knows_parameters_and_parts() -> None:
    """What an optimiser's groups say of a parameter, or of the part it lies in, is said of its rows."""
    net = small()
    flat = Flat(net, AXES)
    rows = flat.per_row({net["a"].weight: 0.5, flat.vectors: 0.25})
    assert set(rows[flat.places["a.weight"].rows].tolist()) == {0.5}
    assert set(rows[flat.places["d.bias"].rows].tolist()) == {0.25}
    assert set(rows[flat.places["c.weight"].rows].tolist()) == {0.0}


def test_a_copy_of_the_module_is_its_own() -> None:
    """Deep copies do not share the flat tensor."""
    net = small()
    flat = Flat(net, AXES)
    twin = copy.deepcopy(net)
    flat.values.zero_()
    assert float(twin["a"].weight.detach().abs().max()) > 0


def test_frozen_parameters_stay_where_they_are() -> None:
    """Only what learns is laid out."""
    net = small()
    net["a"].requires_grad_(False)
    assert not {name for name in Flat(net, AXES).places if name.startswith("a.")}


@pytest.mark.parametrize("spoil", [lambda net: net["c"].double(), lambda net: net.requires_grad_(False)])
def test_what_cannot_be_flat_is_refused(spoil: object) -> None:
    """Two types, or nothing that learns."""
    net = small()
    spoil(net)  # type: ignore[operator]
    with pytest.raises(ModelError, match="one tensor"):
        Flat(net, AXES)
