"""The evaluator says what a plain loop says, faster: re-estimated, folded, perhaps in bfloat16."""

import copy
import time

import families
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - everybody calls it F

from edgeprune import entropy
from edgeprune.cut import cut_module, mask_module
from edgeprune.export import export
from edgeprune.plan import Plan
from edgeprune.quality import Evaluator, convolution_batch_norms, fastest_dtype, folded, recorded
from edgeprune.recalibration import recalibrate, regress_statistics
from edgeprune.structure import Structure, build_structure

LABELLED, CALIBRATION = 96, 32


class Net(nn.Module):
    """A residual net whose second block may be removed, with the momenta of a user who chose them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16, momentum=0.03), nn.ReLU())
        self.conv1 = nn.Conv2d(16, 16, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(16, momentum=None)
        self.conv2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.linear(F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))).mean((2, 3)))


@pytest.fixture(scope="module")
def module() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = Net()
        net.train()(torch.randn(64, 3, 8, 8))
        return net.eval()


@pytest.fixture(scope="module")
def graph(module: nn.Module):
    return export(module, torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def structure(module: nn.Module, graph) -> Structure:
    return build_structure(module, torch.zeros(1, 3, 8, 8), graph, multiple=4)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(LABELLED, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def labels(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return what the net itself says, but for every fourth image."""
    with torch.inference_mode():
        said = module(images).argmax(1)
    wrong = torch.arange(LABELLED) % 4 == 0
    return torch.where(wrong, (said + 1) % 4, said)


def evaluator(module, structure, graph, images, labels, **settings) -> Evaluator:
    settings = {"dtype": torch.float32} | settings
    batches = list(zip(images.split(40), labels.split(40), strict=True))
    return Evaluator(
        module, structure, graph, validation=batches, calibration=[images[:CALIBRATION] * 1.5 + 0.2], **settings
    )


def plan_of(structure: Structure, **widths: int) -> Plan:
    """Return the plan that keeps the first units of the named groups, and all of the others."""
    full = structure.space.full().kept
    return Plan(kept={name: kept[: widths.get(name, len(kept))] for name, kept in full.items()})


def plain_accuracy(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        return float((module(images).argmax(1) == labels).float().mean())


def test_the_full_plan_is_as_accurate_as_a_plain_loop_says(module, structure, graph, images, labels) -> None:
    """Three in four by construction, over batches of unequal size; the unpruned model is not re-estimated."""
    judge = evaluator(module, structure, graph, images, labels)
    seen = judge.quality(structure.space.full())
    assert seen.accuracy == pytest.approx(plain_accuracy(module, images, labels)) == pytest.approx(0.75)
    assert seen.images == LABELLED


def test_a_cut_plan_is_as_accurate_as_the_cut_module_in_a_plain_loop(module, structure, graph, images, labels) -> None:
    """Cut, re-estimate, run: nothing else happens to a candidate."""
    judge = evaluator(module, structure, graph, images, labels)
    plan = plan_of(structure, conv1=8)
    by_hand = cut_module(module, structure, plan)
    recalibrate(by_hand, [images[:CALIBRATION] * 1.5 + 0.2])
    assert judge.quality(plan).accuracy == pytest.approx(plain_accuracy(by_hand.eval(), images, labels))


def test_statistics_are_carried_over_on_foreign_images(module, structure, graph, images, labels) -> None:
    """Of the channels that a plan keeps, not of those that happen to stand in their places."""
    judge = evaluator(module, structure, graph, images, labels, statistics="regressed")
    full = structure.space.full().kept
    plan, calibration = Plan(kept={**full, "conv1": full["conv1"][-8:]}), [images[:CALIBRATION] * 1.5 + 0.2]
    by_hand, beside = cut_module(module, structure, plan), copy.deepcopy(module)
    every = {"stem.1": torch.arange(16), "bn1": torch.arange(8, 16), "bn2": torch.arange(16)}
    regress_statistics(by_hand, calibration, beside, every)
    found = judge.candidate(plan)
    for name in ("bn1", "bn2"):
        norm, wanted = found.get_submodule(name), by_hand.get_submodule(name)
        assert torch.allclose(norm.running_mean, wanted.running_mean, atol=1e-5)
        assert torch.allclose(norm.running_var, wanted.running_var, rtol=1e-4)
    assert torch.allclose(found.stem[1].running_mean, module.stem[1].running_mean, atol=1e-5)  # before what is cut
    assert torch.allclose(found.bn1.running_mean, module.bn1.running_mean[8:], atol=1e-5)
    assert not torch.allclose(found.bn2.running_mean, module.bn2.running_mean, atol=1e-3)


def test_bfloat16_is_named_and_near(module, structure, graph, images, labels) -> None:
    """The arithmetic is an attribute, and costs a few images at most."""
    judge = evaluator(module, structure, graph, images, labels, dtype=torch.bfloat16)
    assert judge.dtype == torch.bfloat16
    assert judge.quality(structure.space.full()).accuracy == pytest.approx(0.75, abs=0.05)


def test_accuracy_on_other_images_is_computed_in_float32(module, structure, graph, images, labels) -> None:
    """What is reported about the test split is what the float32 model does, whatever the search used."""
    judge = evaluator(module, structure, graph, images, labels, dtype=torch.bfloat16)
    batches = list(zip(images.split(7), labels.split(7), strict=True))
    assert judge.accuracy(module, batches) == pytest.approx(plain_accuracy(module, images, labels))


def test_the_faster_arithmetic_is_chosen() -> None:
    """A module that dawdles in one format is run in the other."""

    class Dawdler(nn.Module):
        def __init__(self, slow: torch.dtype) -> None:
            super().__init__()
            self.slow = slow

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.2 if x.dtype == self.slow else 0.0)
            return x

    images = torch.zeros(2, 1, 4, 4)
    assert fastest_dtype(lambda: Dawdler(torch.float32), images) == torch.bfloat16
    assert fastest_dtype(lambda: Dawdler(torch.bfloat16), images) == torch.float32


# -- folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["resnet", "mobilenetv2", "densenet"])
def test_a_folded_model_answers_as_the_unfolded_one(family: str) -> None:
    """Batch norms disappear into convolutions; the original is not touched."""
    net, example = families.made(family)
    before = copy.deepcopy(net.state_dict())
    pairs = convolution_batch_norms(export(net, example))
    fast = folded(net, pairs)
    assert pairs
    with torch.inference_mode():
        wanted, seen = net(example), fast(example)
    assert torch.allclose(seen, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_every_batch_norm_after_its_own_convolution_is_folded(module, graph) -> None:
    """All three here."""
    assert convolution_batch_norms(graph) == {"stem.1": "stem.0", "bn1": "conv1", "bn2": "conv2"}


class Shared(nn.Module):
    """One convolution with two batch norms, and one batch norm after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.left, self.right, self.both = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.twice(self.one(self.twice(x))))
        return self.linear((self.both(self.left(x)) + self.both(self.right(x))).mean((2, 3)))


class Borrowed(nn.Module):
    """A forward method that takes a convolution's weight and leaves its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.bn(F.conv2d(x, self.conv.weight)).mean((2, 3)))


@pytest.mark.parametrize("kind", [Shared, Borrowed])
def test_what_cannot_be_folded_is_run_as_it_is(kind: type[nn.Module]) -> None:
    """Layers that are used twice, or without being called, answer as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = kind()
        net.train()(2 * torch.randn(32, 3, 4, 4) + 1)
        images, net = torch.randn(40, 3, 4, 4), net.eval()
    graph = export(net, images[:1])
    structure = build_structure(net, images[:1], graph, multiple=1)
    with torch.inference_mode():
        labels = net(images).argmax(1)
    judge = Evaluator(net, structure, graph, validation=[(images, labels)], calibration=[images], dtype=torch.float32)
    assert judge.judge(net).accuracy == 1.0
    assert judge.accuracy(net, [(images, labels)]) == 1.0


# -- entropy ---------------------------------------------------------------------------------------------------------


def test_entropy_is_the_mean_over_the_convolutions_of_the_folded_model(
    module, structure, graph, images, labels
) -> None:
    """By hand: every convolution's maps, in the range they have in the unpruned model."""
    judge = evaluator(module, structure, graph, images, labels, entropy_images=8)
    fast, probe = folded(module, convolution_batch_norms(graph)), images[:8] * 1.5 + 0.2
    with recorded(fast, lambda layer: isinstance(layer, nn.Conv2d)) as seen, torch.inference_mode():
        fast(probe)
    means = [
        float(entropy.spatial_entropy(maps, float(maps.min()), float(maps.max())).mean()) for maps in seen.values()
    ]
    assert len(means) == 3
    assert judge.quality(structure.space.full()).entropy == pytest.approx(sum(means) / 3, rel=1e-5)


def test_dead_channels_do_not_count_and_ranges_are_the_unpruned_models(
    module, structure, graph, images, labels
) -> None:
    """By hand, from the masked model: it has all the channels, and those the plan removes are 0 everywhere."""
    judge = evaluator(module, structure, graph, images, labels, entropy_images=8, statistics="kept")
    plan = plan_of(structure, conv1=8, **{"stem.0": 12})
    kept = {"stem.0": plan.kept["stem.0"], "conv1": plan.kept["conv1"], "conv2": plan.kept["stem.0"]}
    whole, means, with_dead = convolution_maps(module, graph, images), [], []
    for name, maps in convolution_maps(mask_module(module, structure, plan), graph, images).items():
        entropies = entropy.spatial_entropy(maps, float(whole[name].min()), float(whole[name].max()))
        means.append(float(entropies[:, list(kept[name])].mean()))
        with_dead.append(float(entropies[:, list(kept[name])].sum(1).mean()) / maps.shape[1])
    assert judge.quality(plan).entropy == pytest.approx(sum(means) / 3, rel=1e-5)
    assert sum(with_dead) < 0.8 * sum(means)


def convolution_maps(module: nn.Module, graph, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what each convolution of the folded model makes of the probe."""
    fast = folded(module, convolution_batch_norms(graph))
    with recorded(fast, lambda layer: isinstance(layer, nn.Conv2d)) as seen, torch.inference_mode():
        fast(images[:8] * 1.5 + 0.2)
    return seen


def test_a_removed_branch_has_no_entropy_of_its_own(module, structure, graph, images, labels) -> None:
    """What is left is the stem alone, whose maps no plan here changes: re-estimating scales them, that is all."""
    group = structure.space.by_name["conv1"]
    assert group.removable
    judge = evaluator(module, structure, graph, images, labels, entropy_images=8)
    plan = plan_of(structure, conv1=0)
    fast = folded(judge.candidate(plan), convolution_batch_norms(graph))
    unpruned = folded(module, convolution_batch_norms(graph))
    with recorded(fast, lambda layer: isinstance(layer, nn.Conv2d)) as seen, torch.inference_mode():
        fast(images[:8] * 1.5 + 0.2)
    assert list(seen) == ["stem.0"]
    with recorded(unpruned, lambda layer: isinstance(layer, nn.Conv2d)) as full, torch.inference_mode():
        unpruned(images[:8] * 1.5 + 0.2)
    low, high = float(full["stem.0"].min()), float(full["stem.0"].max())
    expected = float(entropy.spatial_entropy(seen["stem.0"], low, high).mean())
    assert judge.quality(plan).entropy == pytest.approx(expected, rel=1e-5)


def test_no_entropy_is_computed_when_none_is_asked_for(module, structure, graph, images, labels) -> None:
    """Zero probe images: None, which is no number."""
    judge = evaluator(module, structure, graph, images, labels, entropy_images=0)
    assert judge.quality(structure.space.full()).entropy is None


def test_hooks_are_gone_after_a_look(module, images) -> None:
    """Also if the model fails in between."""
    with pytest.raises(RuntimeError), recorded(module, lambda layer: isinstance(layer, nn.Conv2d)):
        module(images[:, :1])
    assert not any(each._forward_hooks for each in module.modules())


# -- other judges, and repairs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", ["teacher", "synthetic"])
def test_without_labels_the_unpruned_model_is_right_by_definition(
    module, structure, graph, images, labels, judge
) -> None:
    """Whatever the labels say; and a model that is cut to pieces is not."""
    seen = evaluator(module, structure, graph, images, labels, judged_by=judge)
    assert seen.quality(structure.space.full()).accuracy == pytest.approx(1.0)
    assert seen.quality(structure.space.full()).judged_by == judge
    narrow = structure.space.check(Plan(kept={g.name: tuple(range(g.choices[0])) for g in structure.space.groups}))
    assert seen.quality(narrow).accuracy < 1.0


def test_agreement_is_the_share_of_equal_answers(module, structure, graph, images, labels) -> None:
    judge = evaluator(module, structure, graph, images, labels, judged_by="teacher", statistics="kept")
    plan = plan_of(structure, conv1=8)
    with torch.inference_mode():
        same = cut_module(module, structure, plan).eval()(images).argmax(1) == module(images).argmax(1)
    assert judge.quality(plan).accuracy == pytest.approx(float(same.float().mean()))


def test_a_candidate_is_cut_from_the_repaired_module(module, structure, graph, images, labels) -> None:
    """Nothing is re-estimated where that is not wanted, so that the repair is all there is."""
    asked = []

    def repair(plan: Plan) -> nn.Module:
        asked.append(plan)
        repaired = copy.deepcopy(module)
        with torch.no_grad():
            repaired.conv2.weight.mul_(2)
        return repaired

    judge = evaluator(module, structure, graph, images, labels, repair=repair, statistics="kept")
    plan = plan_of(structure, conv1=8)
    candidate = judge.candidate(plan)
    plain = cut_module(module, structure, plan)
    assert asked == [plan]
    assert torch.equal(candidate.conv2.weight, 2 * plain.conv2.weight)
    assert torch.equal(candidate.bn1.running_mean, plain.bn1.running_mean)
