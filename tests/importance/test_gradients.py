"""Taylor importance: a loss whose gradients fit on a napkin."""

import pytest
import torch
from importance_toys import Three, scores
from torch import nn

from edgeprune.importance.gradients import IMAGES_AT_ONCE, gradients_of


def test_taylor_is_the_squared_change_of_the_loss_when_a_channel_is_zeroed_to_first_order() -> None:
    """Both sides of a channel see the same g·w, so a channel is worth 2 (g·w)².

    x = 1, activations a = (1, 2, 3), logits z = R a with R = ((1, 0, 0), (0, 1, 0)) = (1, 2), label 0.
    dL/dz = softmax(z) − (1, 0) = (p − 1, 1 − p) with p = 1 / (1 + e); g·w of channel c is (dL/dz · R[:, c]) a_c.
    """
    module = Three((1.0, 2.0, 3.0), ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)))
    p = 1 / (1 + float(torch.e))
    first, second = ((p - 1) * 1) ** 2, ((1 - p) * 2) ** 2
    batch = (torch.ones(1, 1, 2, 2), torch.tensor([0]))
    assert scores(module, "taylor", batch) == pytest.approx([2 * first, 2 * second, 0.0])


def test_a_large_batch_in_parts_is_the_same_batch() -> None:
    """Gradients of the mean loss over 70 images, whatever is held in memory at once."""
    module = Three((0.5, -1.0, 2.0), ((1.0, 0.3, -0.2), (-0.5, 0.1, 0.7))).eval()
    draw = torch.Generator().manual_seed(0)
    batch = (torch.randn(70, 1, 2, 2, generator=draw), torch.arange(70) % 2)
    parameters = list(module.parameters())
    whole = torch.autograd.grad(nn.functional.cross_entropy(module(batch[0]), batch[1]), parameters)
    in_parts = gradients_of(module, parameters, *batch)
    assert len(batch[1]) > 2 * IMAGES_AT_ONCE
    for one, other in zip(in_parts, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_taylor_adds_up_over_batches() -> None:
    """Two equal batches say twice what one says."""
    module = Three((1.0, 2.0, 3.0), ((1.0, 0.5, 0.0), (0.0, 1.0, -1.0)))
    batch = (torch.ones(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))
    once, twice = scores(module, "taylor", batch), scores(module, "taylor", batch, batch)
    assert twice == pytest.approx([2 * each for each in once])


def test_a_channel_of_zeros_is_worth_nothing() -> None:
    """Nothing changes when it is zeroed."""
    module = Three((1.0, 0.0, -3.0), ((1.0, 0.0, 2.0), (-1.0, 0.0, 1.0)))
    assert scores(module, "taylor", (torch.ones(2, 1, 2, 2), torch.tensor([0, 1])))[1] == 0.0


def test_permuting_channels_permutes_their_importance() -> None:
    """A channel's place does not matter."""
    batch = (torch.ones(1, 1, 2, 2), torch.tensor([0]))
    first = scores(Three((1.0, 2.0, 3.0), ((1.0, 0.5, 0.2), (0.0, 1.0, -1.0))), "taylor", batch)
    second = scores(Three((3.0, 1.0, 2.0), ((0.2, 1.0, 0.5), (-1.0, 0.0, 1.0))), "taylor", batch)
    assert second == pytest.approx((first[2], first[0], first[1]))


def test_moving_scale_from_one_layer_to_the_next_changes_nothing() -> None:
    """The function is the same, and so is what zeroing a channel does to it."""
    batch = (torch.ones(1, 1, 2, 2), torch.tensor([0]))
    first = scores(Three((1.0, 2.0, 3.0), ((1.0, 0.5, 0.2), (0.0, 1.0, -1.0))), "taylor", batch)
    second = scores(Three((4.0, 2.0, 3.0), ((0.25, 0.5, 0.2), (0.0, 1.0, -1.0))), "taylor", batch)
    assert second == pytest.approx(first)


def test_the_module_is_left_as_it_was() -> None:
    """Neither gradients nor flags nor the mode change, also for frozen parameters."""
    module = Three((1.0, 2.0, 3.0), ((1.0, 0.5, 0.0), (0.0, 1.0, -1.0))).eval()
    module.conv.weight.requires_grad_(False)
    scores(module, "taylor", (torch.ones(1, 1, 2, 2), torch.tensor([0])))
    assert [each.requires_grad for each in module.parameters()] == [False, True]
    assert all(each.grad is None for each in module.parameters())
    assert not module.training
