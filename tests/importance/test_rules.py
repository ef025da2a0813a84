"""The table of rules: what each refuses, and the order that importance gives."""

import families
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from importance_toys import Pair, Three, structure_of
from torch import nn

from edgeprune.errors import ConfigError
from edgeprune.importance import RULES, Needs, check_needs, ranking, unit_importance

BATCH = (torch.ones(2, 1, 2, 2), torch.tensor([0, 1]))


def three() -> nn.Module:
    return Three((1.0, 2.0, 3.0), ((1.0, 0.5, 0.0), (0.0, 1.0, -1.0))).eval()


def test_the_table_says_what_each_rule_needs() -> None:
    """In words a user can read."""
    assert {name: str(rule.needs) for name, rule in RULES.items()} == {
        "l1": "nothing",
        "l2": "nothing",
        "geometric-median": "nothing",
        "group-norm": "nothing",
        "batch-norm-scale": "batch norms",
        "activation-entropy": "images",
        "taylor": "labelled images",
        "random": "nothing",
    }
    assert str(Needs(labels=True, batch_norms=True)) == "labelled images and batch norms"


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.needs == Needs()])
def test_a_rule_that_needs_nothing_touches_no_images(rule: str) -> None:
    """They may be a loader that raises."""

    def loader():
        raise AssertionError("the images were read")
        yield

    structure = structure_of(three())
    found = unit_importance(three(), structure, rule, loader(), images=loader())
    assert {name: len(each) for name, each in found.items()} == structure.space.full().widths
    assert all(np.isfinite(each).all() for each in found.values())


def test_an_unknown_rule_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'magnitude' is unknown") as caught:
        unit_importance(three(), structure_of(three()), "magnitude")
    assert "group-norm" in caught.value.next_step


def test_taylor_without_labels_is_refused() -> None:
    """Images alone are not enough."""
    with pytest.raises(ConfigError, match="needs labelled images") as caught:
        unit_importance(three(), structure_of(three()), "taylor", images=[BATCH[0]])
    assert "choose a rule that needs nothing: l1" in caught.value.next_step


def test_taylor_of_no_batches_is_refused() -> None:
    """A list without batches is found out when it is read: zeros would rank nothing."""
    with pytest.raises(ConfigError, match="no images"):
        unit_importance(three(), structure_of(three()), "taylor", [])


def test_activation_entropy_without_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="it needs images, and there are none"):
        unit_importance(three(), structure_of(three()), "activation-entropy")


def test_scales_of_a_model_without_batch_norms_are_refused() -> None:
    with pytest.raises(ConfigError, match="the model has none"):
        check_needs("batch-norm-scale", three(), structure_of(three()), images=True, labels=True)


def test_scales_of_a_group_without_batch_norms_are_refused_by_name() -> None:
    """Other groups have them; the layer to exclude is named, and excluding it helps."""
    made = families.prepared("vgg")
    with pytest.raises(ConfigError, match=r"1 of 4 groups \(classifier.0\)") as caught:
        unit_importance(made.net, made.structure, "batch-norm-scale")
    assert "space.exclude" in caught.value.next_step


def test_batch_norms_without_scales_do_not_count() -> None:
    """`affine=False`: there is nothing to read."""
    module = Pair([[1.0], [2.0]], [1.0, 1.0]).eval()
    assert unit_importance(module, structure_of(module), "batch-norm-scale")["one"] == (1.0, 1.0)
    module.norm = nn.BatchNorm2d(2, affine=False).eval()
    with pytest.raises(ConfigError, match="the model has none"):
        unit_importance(module, structure_of(module), "batch-norm-scale")


def test_a_batch_norm_that_only_reads_a_class_scales_it() -> None:
    """Pre-activation blocks normalise what they read."""
    made = families.prepared("preactivation")
    found = unit_importance(made.net, made.structure, "batch-norm-scale")
    norms = (made.net.blocks[0].bn1, made.net.blocks[1].bn1, made.net.norm)
    expected = torch.stack([norm.weight.detach().abs() for norm in norms]).mean(0)
    assert found["stem"] == pytest.approx(expected.tolist())


def test_ties_keep_their_order() -> None:
    """Equal units rank as they stand, so a ranking is the same everywhere."""
    assert ranking({"a": (1.0, 2.0, 1.0, 2.0)}) == {"a": (1, 3, 0, 2)}


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_a_ranking_is_a_permutation_in_falling_order(values: list[float]) -> None:
    """Every unit appears once, and none before a more important one."""
    order = ranking({"a": tuple(values)})["a"]
    assert sorted(order) == list(range(len(values)))
    assert [values[unit] for unit in order] == sorted(values, reverse=True)
