"""Shares by closed forms, planted duplicates carried exactly through every kind of layer, trained nets on average."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, conv_bn, gap, made, plan_of, prepared, randomize, run_module
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from edgeprune.coupling import CONVOLUTIONS
from edgeprune.cut import cut_module, mask_module
from edgeprune.errors import ConfigError, PlanError
from edgeprune.export import export
from edgeprune.filters import NOISE, Filters
from edgeprune.plan import Plan
from edgeprune.reconstruction import MODES, Settings, likeness, likenesses, repaired, unreached
from edgeprune.structure import Structure, build_structure

TOLERANCE = 1e-5
REPAIRS = [mode for mode in MODES if mode != "none"]
FASHION = Path(__file__).parents[1] / "examples" / "fashion" / "fashion.npz"


# -- planted duplicates ----------------------------------------------------------------------------------------------


def copy_units(net: nn.Module, structure: Structure, group: str, sources: list[int], copies: list[int]) -> None:
    """Make some units of a group copies of others in every layer that makes or normalises them."""
    units = np.array(structure.units[group])
    for name, side in structure.members[group]:
        owners = structure.classes[name, side]
        layer = net.get_submodule(name)
        if side == "in" and not (isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels > 1):
            continue
        into, out = (
            np.concatenate([np.flatnonzero(owners == units[each]) for each in side]) for side in (copies, sources)
        )
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(layer, tensor, None)
            if value is None or (isinstance(layer, nn.PReLU) and len(value) == 1):
                continue
            with torch.no_grad():
                if tensor == "weight" and getattr(layer, "transposed", False) and layer.groups < layer.in_channels:
                    per = layer.out_channels // layer.groups
                    value[:, into[into < per]] = value[:, out[out < per]]
                else:
                    value[into] = value[out]


def planted(name: str) -> tuple[nn.Module, torch.Tensor, Structure, Plan]:
    """Return a family's net whose odd units are copies of the even ones, in groups that can be repaired, and the plan
    that keeps the even ones."""
    net, example = made(name)
    structure = prepared(name).structure
    lost = {group for _, group in unreached(net, structure)}
    kept = {group.name: tuple(range(group.width)) for group in structure.space.groups}
    for group in structure.space.groups:
        if group.name not in lost and group.width // 2 in group.choices:
            copy_units(net, structure, group.name, list(range(0, group.width, 2)), list(range(1, group.width, 2)))
            kept[group.name] = tuple(range(0, group.width, 2))
    return net, example, structure, Plan(kept=kept)


@pytest.mark.parametrize("mode", REPAIRS)
@pytest.mark.parametrize("name", FAMILIES)
def test_copies_in_every_group_at_once_are_carried_exactly(name: str, mode: str) -> None:
    """Whatever the activations: half of every group goes, and nothing changes."""
    net, example, structure, plan = planted(name)
    fixed = cut_module(repaired(net, structure, plan, mode=mode), structure, plan)
    assert gap(run_module(fixed, example), run_module(net, example)) < TOLERANCE


def scaled_norm(norm: nn.BatchNorm2d, unit: int, of: int, by: float, inner: float) -> None:
    """Make a unit behind a norm `by` times another one, if what it reads is `inner` times what the other reads."""
    with torch.no_grad():
        norm.running_mean[unit] = inner * norm.running_mean[of]
        norm.running_var[unit] = inner**2 * (norm.running_var[of] + norm.eps) - norm.eps
        norm.weight[unit], norm.bias[unit] = by * norm.weight[of], by * norm.bias[of]


def scaled_rows(layer: nn.Module, unit: int, of: int, by: float, *, bias: bool = True) -> None:
    """Make one row of a layer `by` times another, its bias too."""
    with torch.no_grad():
        layer.weight[unit] = by * layer.weight[of]
        if layer.bias is not None and bias:
            layer.bias[unit] = by * layer.bias[of]


class ReLUMobileBlock(nn.Module):
    """Expand, depthwise, project, with a shortcut and ReLU, which keeps every scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.expand = conv_bn(6, 8, 1)
        self.depthwise = conv_bn(8, 8, groups=8)
        self.project = conv_bn(8, 6, 1, None)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.project(self.depthwise(self.expand(x)))).mean((2, 3)))


class ReLUStream(nn.Module):
    """Two producers of one residual stream, read by a convolution and by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.inner, self.outer = conv_bn(6, 8), conv_bn(8, 6, activation=None)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.outer(self.inner(x))).mean((2, 3)))


def chain(norm: bool) -> nn.Module:
    """Return convolution, maybe batch norm, ReLU, convolution, maximum, flatten, linear, linear."""
    norms = (nn.BatchNorm2d(6), nn.BatchNorm2d(5)) if norm else (nn.Identity(), nn.Identity())
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), norms[0], nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), norms[1], nn.ReLU()),
        *(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(5 * 4, 8), nn.ReLU(), nn.Linear(8, 4)),
    )


def plant_chain(net: nn.Module) -> dict[str, int]:
    """Make unit 2 of each layer a multiple of unit 4."""
    normed = isinstance(net[1], nn.BatchNorm2d)
    for conv, norm in ((net[0], net[1]), (net[3], net[4])):
        scaled_rows(conv, 2, 4, 1.7)
        if normed:
            scaled_norm(norm, 2, 4, 0.6, 1.7)
    scaled_rows(net[8], 2, 4, 2.5)
    return {"0": 2, "3": 2, "8": 2}


def plant_mobile(net: nn.Module) -> dict[str, int]:
    """Make unit 1 of the expansion a multiple of unit 5, through the depthwise layer."""
    scaled_rows(net.expand[0], 1, 5, 2.0)
    scaled_norm(net.expand[1], 1, 5, 0.5, 2.0)
    scaled_rows(net.depthwise[0], 1, 5, 3.0)
    scaled_norm(net.depthwise[1], 1, 5, 0.7, 1.5)
    return {"expand.0": 1}


def plant_stream(net: nn.Module) -> dict[str, int]:
    """Make unit 0 of the stream a multiple of unit 3 in both of its producers, and one inside the branch."""
    for block, unit, of in ((net.stem, 0, 3), (net.outer, 0, 3), (net.inner, 7, 1)):
        scaled_rows(block[0], unit, of, 1.3)
        scaled_norm(block[1], unit, of, 0.4, 1.3)
    return {"stem.0": 0, "inner.0": 7}


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], dict[str, int]]]] = {
    "chain with batch norm": (lambda: chain(norm=True), plant_chain),
    "chain without": (lambda: chain(norm=False), plant_chain),
    "depthwise": (ReLUMobileBlock, plant_mobile),
    "residual stream": (ReLUStream, plant_stream),
}


@cache
def planted_case(case: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor, Structure, Plan]:
    """Return a net with planted multiples, an input, the structure and the plan that drops them; read-only."""
    make, plant = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = make().eval()
        randomize(net)
        example = torch.randn(2, 3, 8, 8)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.bias.data.abs_()  # no unit is silent
    lost = plant(net.double())
    net = net.float()
    structure = build_structure(net, example[:1], export(net, example[:1]), multiple=1)
    full = structure.space.full().kept
    plan = Plan(kept={name: tuple(unit for unit in units if unit != lost.get(name)) for name, units in full.items()})
    if dtype != torch.float32:
        plant(net.to(dtype))  # anew, to the precision of this one
    return net, example.to(dtype), structure, plan


@pytest.mark.parametrize("mode", REPAIRS)
@pytest.mark.parametrize("case", CASES)
def test_positive_multiples_are_carried_exactly(case: str, mode: str) -> None:
    """Behind ReLU and pooling, through columns, blocks of columns, depthwise layers and additions."""
    net, example, structure, plan = planted_case(case)
    wanted = run_module(net, example)
    fixed = repaired(net, structure, plan, mode=mode)
    assert gap(run_module(cut_module(fixed, structure, plan), example), wanted) < TOLERANCE
    assert gap(run_module(mask_module(fixed, structure, plan), example), wanted) < TOLERANCE
    assert gap(run_module(cut_module(net, structure, plan), example), wanted) > 100 * TOLERANCE


# -- what repaired promises ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_nothing_removed_changes_nothing(mode: str) -> None:
    """The full plan gives the weights that were there, bit for bit."""
    family = prepared("resnet")
    fixed = repaired(family.net, family.structure, family.structure.space.full(), mode=mode)
    for name, value in fixed.state_dict().items():
        assert torch.equal(value, family.net.state_dict()[name]), name


def test_only_columns_of_kept_units_change_and_the_module_itself_does_not() -> None:
    """Columns that will be cut, rows, biases, norms and their statistics stay as they were."""
    family = prepared("vgg")
    before = {name: value.clone() for name, value in family.net.state_dict().items()}
    plan = plan_of(family.structure.space, {"features.2.0": 8})
    fixed = repaired(family.net, family.structure, plan, mode="local-ridge").state_dict()
    changed = [name for name, value in fixed.items() if not torch.equal(value, before[name])]
    assert changed == ["features.4.0.weight"]
    lost = np.delete(np.arange(24), plan.kept["features.2.0"])
    assert torch.equal(fixed["features.4.0.weight"][:, lost], before["features.4.0.weight"][:, lost])
    assert all(torch.equal(value, before[name]) for name, value in family.net.state_dict().items())


def test_the_copy_keeps_the_modules_arithmetic() -> None:
    """Float64 stays float64, where planted multiples are carried to nearly its precision; half stays half."""
    net, example, structure, plan = planted_case("chain without", torch.float64)
    wide = repaired(net, structure, plan, mode="merge")
    assert gap(run_module(cut_module(wide, structure, plan), example), run_module(net, example)) < 1e-12
    half = repaired(copy.deepcopy(net).half(), structure, plan, mode="merge")
    assert {each.dtype for each in half.parameters()} == {torch.float16}


def test_removed_branches_are_left_alone() -> None:
    """Width 0 leaves nothing to carry, and the silent branch adds nothing to what its stream's readers see."""
    family = prepared("resnet")
    plan = plan_of(family.structure.space, {"layer1.0.conv1": 0, "stem.0": 8})
    fixed = cut_module(repaired(family.net, family.structure, plan, mode="ridge"), family.structure, plan)
    assert np.isfinite(run_module(fixed, family.example)).all()


@pytest.mark.parametrize("mode", MODES)
def test_repairing_keeps_cut_and_masked_alike(mode: str) -> None:
    """On a family with gates, shared widths and several groups at once."""
    for name in ("senet", "mobilenetv2"):
        family = prepared(name)
        widths = {group.name: min(each for each in group.choices if each) for group in family.structure.space.groups}
        plan = plan_of(family.structure.space, widths, seed=3)
        fixed = repaired(family.net, family.structure, plan, mode=mode)
        cut = run_module(cut_module(fixed, family.structure, plan), family.example)
        assert gap(cut, run_module(mask_module(fixed, family.structure, plan), family.example)) < TOLERANCE


def weights(mode: str, *, coefficients: dict[str, float] | None = None, settings: Settings | None = None) -> np.ndarray:
    """Return the weights that read the second group of the VGG after one plan."""
    family = prepared("vgg")
    plan = plan_of(family.structure.space, {"features.2.0": 8})
    fixed = repaired(family.net, family.structure, plan, mode=mode, coefficients=coefficients, settings=settings)
    return fixed.get_submodule("features.4.0").weight.detach().numpy()


@pytest.mark.parametrize("mode", ["ridge", "local-ridge"])
def test_a_ridge_without_end_is_plain_pruning_where_nothing_has_a_twin(mode: str) -> None:
    """λ2 → ∞."""
    plain = weights("none")
    np.testing.assert_allclose(weights(mode, settings=Settings(ridge=1e12)), plain, atol=1e-9)
    assert not np.allclose(weights(mode), plain, atol=1e-3)


@pytest.mark.parametrize("mode", ["ridge", "local-ridge"])
def test_a_ridge_without_end_still_gives_twins_to_their_twins(mode: str) -> None:
    """What is carried exactly is not penalised: of eight kept channels one alone changes, by its copy's column."""
    net, _ = made("vgg")
    structure = prepared("vgg").structure
    plan = plan_of(structure.space, {"features.2.0": 8})
    kept = plan.kept["features.2.0"]
    lost = min(set(range(24)).difference(kept))
    copy_units(net, structure, "features.2.0", [kept[3]], [lost])
    fixed = repaired(net, structure, plan, mode=mode, settings=Settings(ridge=1e12))
    wanted = net.get_submodule("features.4.0").weight.detach().clone()
    wanted[:, kept[3]] += wanted[:, lost]
    seen = fixed.get_submodule("features.4.0").weight.detach()
    np.testing.assert_allclose(seen.numpy(), wanted.numpy(), atol=1e-6)


def test_a_ridges_coefficient_is_the_part_of_the_shares_that_is_applied() -> None:
    """0 is plain pruning, 1 the mode's own, and half is half way."""
    plain, whole = weights("none"), weights("local-ridge")
    for part in (0.0, 0.5, 1.0):
        seen = weights("local-ridge", coefficients={"features.2.0": part})
        np.testing.assert_allclose(seen, plain + part * (whole - plain), atol=1e-6)


def test_a_merges_coefficient_is_the_weight_of_direction() -> None:
    """λ = 1 looks at the angle alone, the mode's own at both, as 0.85 says."""
    np.testing.assert_array_equal(weights("merge", coefficients={"features.2.0": 0.85}), weights("merge"))
    assert not np.allclose(weights("merge", coefficients={"features.2.0": 0.0}), weights("merge"))


def test_mistakes_are_named() -> None:
    """A mode, a group and a coefficient that are not there, and settings that cannot be used."""
    with pytest.raises(ConfigError, match="no reconstruction 'magic'"):
        weights("magic")
    with pytest.raises(PlanError, match=r"'features\.9'"):
        weights("ridge", coefficients={"features.9": 0.5})
    with pytest.raises(PlanError, match=r"is 1\.5"):
        weights("ridge", coefficients={"features.2.0": 1.5})
    for wrong in ({"ridge": 0.0}, {"neighbours": 0}):
        with pytest.raises(ConfigError, match="neighbours and a ridge"):
            Settings(**wrong)
    family = prepared("vgg")
    with pytest.raises(PlanError):
        repaired(family.net, family.structure, Plan(kept={"features.2.0": (0,)}), mode="ridge")


# -- the algebra -----------------------------------------------------------------------------------------------------

ROWS = arrays(np.float64, (1, 6, 9), elements=st.floats(-2, 2, allow_nan=False))
KEPT, LOST = np.array([0, 2, 3, 5]), np.array([1, 4])


def plain_filters(rows: np.ndarray) -> Filters:
    """Return filters of six units that are in general position, with constants."""
    rows = rows + 3 * np.eye(6, 9)[None]
    return Filters.of(rows, rows[:, :, -1] - 0.5)


@given(ROWS)
def test_ridge_is_the_least_squares_of_its_equation(rows: np.ndarray) -> None:
    """The stacked system [√v f; √λ1 m; √λ2 I], solved by an orthogonal factorisation.

    Behind a batch norm, where the mean is not the constant and the variance not the squared length.
    """
    rows = rows + 3 * np.eye(6, 9)[None]
    constants, means, variances = rows[:, :, -1] - 0.5, rows[:, :, -2] + 1.0, 0.3 + rows[:, :, -3] ** 2
    filters = replace(Filters.of(rows, constants), means=means, variances=variances, normed=True)
    varying, average = rows[0].T / np.sqrt((rows**2).sum(2).mean()), means / np.sqrt(variances.mean())
    stacked = np.concatenate([varying, np.sqrt(0.7) * average])
    design = np.concatenate([stacked[:, KEPT], np.sqrt(0.05) * np.eye(4)])
    targets = np.concatenate([stacked[:, LOST], np.zeros((4, 2))])
    wanted = np.linalg.lstsq(design, targets, rcond=None)[0].T
    seen = MODES["ridge"](filters, KEPT, LOST, None, Settings(bias_weight=0.7, ridge=0.05))
    np.testing.assert_allclose(seen, wanted, atol=1e-8)


@given(ROWS)
def test_one_neighbour_and_no_penalty_is_the_projection(rows: np.ndarray) -> None:
    """s = f_p · f_k / ‖f_k‖² for the k of largest cosine."""
    filters = plain_filters(rows)
    settings = Settings(neighbours=1, distance=0.0, bias_weight=0.0, ridge=1e-12)
    seen = MODES["local-ridge"](filters, KEPT, LOST, None, settings)
    for row, unit in zip(seen, LOST, strict=True):
        best = int(np.argmax(filters.cosines[unit, KEPT]))
        wanted = np.zeros(4)
        wanted[best] = filters.products[unit, KEPT[best]] / filters.products[KEPT[best], KEPT[best]]
        np.testing.assert_allclose(row, wanted, atol=1e-6)


@given(ROWS)
def test_local_ridge_with_every_kept_unit_is_ridge(rows: np.ndarray) -> None:
    """N(p) = K, by number or by one cluster of all."""
    filters = plain_filters(rows)
    wanted = MODES["ridge"](filters, KEPT, LOST, None, Settings())
    for settings in (Settings(neighbours=9, distance=0.0), Settings(distance=2.0)):
        np.testing.assert_allclose(MODES["local-ridge"](filters, KEPT, LOST, None, settings), wanted, atol=1e-8)


@pytest.mark.parametrize("mode", ["ridge", "local-ridge"])
def test_a_twins_share_is_its_scale_whatever_the_penalty(mode: str) -> None:
    """Unit 1 is 1.5 times unit 0, constant and all; unit 4 is like nobody and, at λ2 → ∞, carried by nobody."""
    rows = 3 * np.eye(6, 9)[None] + 0.5
    rows[0, 1] = 1.5 * rows[0, 0]
    filters = Filters.of(rows, rows[:, :, -1])
    shares = MODES[mode](filters, KEPT, LOST, None, Settings(ridge=1e12))
    np.testing.assert_allclose(shares, [[1.5, 0, 0, 0], [0, 0, 0, 0]], atol=1e-9)


def test_a_removed_unit_is_shared_within_its_cluster() -> None:
    """Unit 1 is near 0 and far from 2; unit 3 is near nobody, so the nearest of all carry it."""
    rows = np.array([[[1.0, 0, 0], [1.0, 0.05, 0], [0, 1.0, 0.2], [0.1, 0.6, 1.0]]])
    filters = Filters.of(rows, np.zeros((1, 4)))
    seen = MODES["local-ridge"](filters, np.array([0, 2]), np.array([1, 3]), None, Settings(distance=0.1))
    np.testing.assert_allclose(seen[0], [1.0, 0.0], atol=1e-5)
    assert (np.abs(seen[1]) > 0.05).all()


@given(ROWS)
def test_nonnegative_shares_meet_the_conditions_of_an_optimum(rows: np.ndarray) -> None:
    """No share is negative, and none could be changed to any gain: x ≥ 0, gradient ≥ 0, and one of the two is 0."""
    rows = rows + 3 * np.eye(6, 9)[None]
    settings = Settings(nonnegative=True, ridge=1e-2)
    filters = Filters.of(rows, np.zeros((1, 6)))
    shares = MODES["ridge"](filters, KEPT, LOST, None, settings)
    system = filters.products / filters.products.diagonal().mean()
    gradient = shares @ (system[np.ix_(KEPT, KEPT)] + 1e-2 * np.eye(4)) - system[np.ix_(LOST, KEPT)]
    assert (shares >= 0).all()
    assert gradient.min() > -1e-6
    assert np.abs(gradient * shares).max() < 1e-6


def positive(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


@given(
    arrays(np.float64, (2, 4), elements=positive(0.2, 2.0)),
    arrays(np.float64, (2, 2), elements=st.floats(-2, 2, allow_nan=False)),
    positive(0.1, 5.0),
)
def test_merge_scales_by_the_exact_algebra_of_neuron_merging(
    norms: np.ndarray, shifts: np.ndarray, ratio: float
) -> None:
    """S = s (γ_p / γ_k) (σ_k / σ_p) of raw filters whose lengths have the ratio s, and what is left over is B."""
    (scale_p, sigma_p, mean_p, _), (scale_k, sigma_k, mean_k, _) = norms
    (shift_p, shift_k), _ = shifts
    raw = np.array([[[ratio * 0.6, ratio * 0.8], [0.6, 0.8]]])
    scales = np.array([[scale_p / sigma_p, scale_k / sigma_k]])
    folded = np.array([[shift_p - scale_p * mean_p / sigma_p, shift_k - scale_k * mean_k / sigma_k]])
    filters = Filters.of(raw, np.zeros((1, 2))).normalised(scales, folded, means=folded, spreads=scales)
    seen = MODES["merge"](filters, np.array([1]), np.array([0]), None, Settings())[0, 0]
    assert seen == pytest.approx(ratio * (scale_p / scale_k) * (sigma_k / sigma_p))
    left = scale_p / sigma_p * (ratio * (mean_k - sigma_k * shift_k / scale_k) - mean_p) + shift_p
    assert filters.constants[0, 0] - seen * filters.constants[0, 1] == pytest.approx(left, abs=1e-9)


def test_behind_a_batch_norm_a_parallel_pair_is_exact_but_for_its_constant() -> None:
    """In float64, statistics and eps of a real layer: what the cut net lacks is the reader's column times B.

    The published code swaps p and k in S and takes variances for deviations: either, or both, is off by over a tenth.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Conv2d(2, 4, 1)).eval()
        x = torch.randn(2, 3, 6, 6)
    structure = build_structure(net, x[:1], export(net, x[:1]), multiple=1)
    net, x = net.double(), x.double()
    scaled_rows(net[0], 0, 1, 1.7)
    with torch.no_grad():
        for name, values in (("weight", (0.6, 1.5)), ("bias", (0.3, -0.2))):
            net[1].get_parameter(name).copy_(torch.tensor(values))
        net[1].running_mean.copy_(torch.tensor([0.4, -0.7]))
        net[1].running_var.copy_(torch.tensor([0.5, 2.0]))
    scale, shift, mean = (each.detach().numpy() for each in (net[1].weight, net[1].bias, net[1].running_mean))
    sigma = np.sqrt(net[1].running_var.numpy() + net[1].eps)

    def constant(sigma: np.ndarray) -> float:
        """Return B."""
        return scale[0] / sigma[0] * (1.7 * (mean[1] - sigma[1] * shift[1] / scale[1]) - mean[0]) + shift[0]

    plan = Plan(kept={"0": (1,)})
    cut = cut_module(repaired(net, structure, plan, mode="merge"), structure, plan)
    column, units = net[2].weight[:, 0].detach().numpy(), run_module(net[:2], x)
    lacks = run_module(net, x) - run_module(cut, x)
    np.testing.assert_allclose(lacks, np.broadcast_to(column * constant(sigma), lacks.shape), atol=1e-12)
    for power, spread in ((-1, sigma), (1, sigma**2), (-1, sigma**2)):
        share = 1.7 * (scale[0] / scale[1] * spread[1] / spread[0]) ** power
        assert np.abs(share * units[:, 1] + constant(spread) - units[:, 0]).max() > 0.1


def test_merge_weighs_direction_against_the_constant() -> None:
    """Unit 0 points like 1 and has the constant of 2: λ = 1 takes the one, λ = 0 the other."""
    filters = Filters.of(np.array([[[1.0, 0.0], [1.0, 0.1], [1.0, 0.5]]]), np.array([[0.5, 3.0, 0.5]]))
    filters = filters.normalised(np.ones((1, 3)), np.zeros((1, 3)), means=np.zeros((1, 3)), spreads=np.ones((1, 3)))
    kept, lost = np.array([1, 2]), np.array([0])
    assert MODES["merge"](filters, kept, lost, 1.0, Settings()).nonzero()[1].tolist() == [0]
    assert MODES["merge"](filters, kept, lost, 0.0, Settings()).nonzero()[1].tolist() == [1]


def heir(rows: list[list[float]], constants: list[float]) -> int:
    """Return which of two kept units, both behind a batch norm, the first unit is given to by merge's own λ."""
    units = len(rows)
    filters = replace(Filters.of(np.array([rows]), np.array([constants])), normed=True)
    shares = MODES["merge"](filters, np.arange(1, units), np.array([0]), None, Settings())
    return int(shares.nonzero()[1].item())


def test_what_a_merge_leaves_over_is_counted_in_units_of_the_share() -> None:
    """Both are parallel, S = 2 and ½, B = −2 and −1.5: |B| / |S| is 1 and 3, so the one whose |B| is more wins."""
    assert heir([[1.0, 0.0], [0.5, 0.0], [2.0, 0.0]], [0.0, 1.0, 3.0]) == 0


def test_gaps_of_constants_are_scaled_from_least_to_largest() -> None:
    """The gap of two counts as 0 and 1, .15 at λ = .85, whether it is 10 or a tenth and wherever it begins.

    A cosine of .8 costs .17, more than that; one of 12/13 costs .065, less. As they are the gaps say the contrary.
    """
    assert heir([[1.0, 0.0], [0.8, 0.6], [1.0, 0.0]], [0.0, 0.0, 10.0]) == 1
    assert heir([[13.0, 0.0], [12.0, 5.0], [13.0, 0.0]], [0.0, 5.0, 5.1]) == 0


def test_merge_drops_what_is_like_nothing() -> None:
    """Below the threshold a unit goes as in plain pruning; without batch norm the constant is part of the filter."""
    filters = Filters.of(np.array([[[1.0, 0.0], [0.0, 1.0]]]), np.array([[0.0, 1.0]]))
    kept, lost = np.array([1]), np.array([0])
    assert not MODES["merge"](filters, kept, lost, None, Settings()).any()
    seen = MODES["merge"](filters, kept, lost, None, Settings(plain_threshold=-1.0))
    np.testing.assert_allclose(seen, [[1 / 2**0.5]])


def test_merge_weighs_and_refuses_as_the_published_settings_do() -> None:
    """λ = .85; of plain filters cosines from .45 on are merged, behind a batch norm from .1 on."""
    assert Settings().cosine_weight == 0.85
    for least, normed in ((0.45, False), (0.1, True)):
        for cosine, merged in ((least - 0.01, 0), (least + 0.01, 1)):
            rows = np.array([[[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]]])
            filters = replace(Filters.of(rows, np.zeros((1, 2))), normed=normed)
            shares = MODES["merge"](filters, np.array([1]), np.array([0]), None, Settings())
            np.testing.assert_allclose(shares, [[merged]])


@pytest.mark.parametrize("mode", MODES)
def test_units_of_zeros_take_and_give_nothing(mode: str) -> None:
    """Dead filters among the removed and the kept: shares are finite, and zero for the dead."""
    rows = np.array([[[1.0, 0.0], [0.0, 0.0], [0.5, 0.5], [0.0, 0.0]]])
    for filters in (Filters.of(rows, np.zeros((1, 4))), Filters.silent(1, 4)):
        shares = MODES[mode](filters, np.array([0, 1]), np.array([2, 3]), None, Settings(plain_threshold=0.1))
        assert np.isfinite(shares).all()
        assert not shares[1].any()
        assert not shares[:, 1].any()


# -- how alike -------------------------------------------------------------------------------------------------------


def test_likeness_of_pairs_and_a_loner() -> None:
    """Two pairs of parallel filters and one alone: two clusters of five units, a fifth is noise."""
    rows = np.array([[[1.0, 0, 0], [2.0, 0, 0], [0, 1.0, 0], [0, 3.0, 0], [0, 0, 1.0]]])
    seen = likeness(Filters.of(rows, np.zeros((1, 5))), Settings())
    assert seen.labels.tolist() == [0, 0, 1, 1, NOISE]
    assert (seen.clusters, seen.noise, seen.nearest) == pytest.approx((0.4, 0.2, 0.2))
    assert seen.residual == pytest.approx(0.5**0.5, abs=1e-5)  # kept: 3, 1 and 0; of 2 and 4 only 2 is expressed


def test_what_cannot_be_expressed_is_the_residual() -> None:
    """Kept: (3, 0) and (0, 2). Removed: (1, 0, 1) and (0, 0, 1), of which √2 of √3 is left."""
    rows = np.array([[[3.0, 0, 0], [0, 2.0, 0], [1.0, 0, 1.0], [0, 0, 1.0]]])
    seen = likeness(Filters.of(rows, np.zeros((1, 4))), Settings())
    assert seen.residual == pytest.approx((2 / 3) ** 0.5, abs=1e-4)


def test_every_group_that_can_be_repaired_has_its_likeness() -> None:
    """And the figures are shares."""
    family = prepared("senet")
    seen = likenesses(family.net, family.structure)
    assert set(seen) == {group.name for group in family.structure.space.groups}
    for name, each in seen.items():
        assert len(each.labels) == family.structure.full[name]
        assert 0 <= each.clusters <= 0.5
        assert 0 <= each.noise <= 1
        assert 0 <= each.residual <= 1
        assert 0 <= each.nearest <= 2


# -- trained nets ----------------------------------------------------------------------------------------------------

SEEDS = range(5)
RATIOS = (0.3, 0.5, 0.7, 0.8)


def net_of_two_hidden_layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


@cache
def fashion() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training and test images of the embedded example at half their size, with labels."""
    with np.load(FASHION) as arrays_:
        parts = [
            torch.from_numpy(arrays_[name]) for name in ("train_images", "train_labels", "test_images", "test_labels")
        ]
    images = [nn.functional.avg_pool2d(each[:, None].float() / 255 - 0.3, 2) for each in parts[::2]]
    return images[0], parts[1].long(), images[1], parts[3].long()


def trained(seed: int) -> nn.Module:
    """Return a net after three short epochs."""
    images, labels, _, _ = fashion()
    torch.manual_seed(seed)
    net = net_of_two_hidden_layers()
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(3):
        for batch in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimiser.step()
    return net.eval()


@cache
def curves() -> dict[tuple[str, float], tuple[float, float]]:
    """Return (mode, share pruned) → mean over seeds of the relative error of the logits and of the accuracy."""
    _, _, images, labels = fashion()
    example = images[:1]
    structure = build_structure(
        net_of_two_hidden_layers(), example, export(net_of_two_hidden_layers(), example), multiple=1
    )
    found: dict[tuple[str, float], list[tuple[float, float]]] = {
        (mode, ratio): [] for mode in MODES for ratio in RATIOS
    }
    with torch.random.fork_rng():
        for seed in SEEDS:
            net = trained(seed)
            wanted = run_module(net, images)
            for mode, ratio in found:
                kept = {}
                for group, layer in zip(structure.space.groups, (net[1], net[3]), strict=True):
                    order = layer.weight.detach().abs().sum(1).argsort(descending=True).tolist()
                    kept[group.name] = tuple(sorted(order[: round((1 - ratio) * group.width)]))
                plan = Plan(kept=kept)
                logits = run_module(cut_module(repaired(net, structure, plan, mode=mode), structure, plan), images)
                error = float(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted))
                found[mode, ratio].append((error, float((logits.argmax(1) == labels.numpy()).mean())))
    means = {case: np.mean(runs, axis=0) for case, runs in found.items()}
    return {case: (float(error), float(accuracy)) for case, (error, accuracy) in means.items()}


@pytest.mark.parametrize("mode", REPAIRS)
@pytest.mark.parametrize("ratio", [ratio for ratio in RATIOS if ratio >= 0.5])
def test_half_and_more_pruned_reconstruction_loses_less_on_average(mode: str, ratio: float) -> None:
    """Same keep sets, mean over five trained nets: the logits are nearer and the accuracy is not below plain."""
    (error, accuracy), (plain_error, plain_accuracy) = curves()[mode, ratio], curves()["none", ratio]
    assert error < plain_error
    assert accuracy >= plain_accuracy


@pytest.mark.parametrize("ratio", [0.7, 0.8])
def test_several_similar_units_carry_more_than_one(ratio: float) -> None:
    """Mean over five trained nets: local-ridge is nearer than merge."""
    assert curves()["local-ridge", ratio][0] < curves()["merge", ratio][0]
