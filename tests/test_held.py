"""A module that is looked at is afterwards as it was."""

import pytest
import torch
from torch import nn

from edgeprune.held import held


@pytest.mark.parametrize(
    ("trainable", "during"),
    [(True, [True, True, True, True]), (False, [False, False, False, False]), (None, [True, True, False, True])],
)
def test_modes_and_flags_are_set_and_restored(trainable: bool | None, during: list[bool]) -> None:
    """Each layer's own, also where they are mixed, also after an error."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    module[1].eval()
    module[2].weight.requires_grad_(False)
    seen = []

    def look() -> None:
        with held(module, trainable=trainable):
            seen.extend(
                [any(each.training for each in module.modules()), *(p.requires_grad for p in module.parameters())]
            )
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert seen == [False, *during]
    assert [each.training for each in module.modules()] == [True, True, False, True]
    assert [each.requires_grad for each in module.parameters()] == [True, True, False, True]


def test_gradients_that_are_there_stay() -> None:
    """They belong to whoever is training."""
    module = nn.Linear(2, 2)
    module(torch.ones(1, 2)).sum().backward()
    before = module.weight.grad.clone()
    with held(module, trainable=False):
        module(torch.ones(1, 2))
    assert torch.equal(module.weight.grad, before)
