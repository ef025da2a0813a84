"""Spatial entropy of activation maps: closed forms, invariances, and that dead channels cannot hide behind it."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.entropy import histogram_entropy, kept_mean, network_entropy, quantise, spatial_entropy
from edgeprune.errors import CandidateError


def pairs_counted_one_by_one(levels: list[list[int]]) -> float:
    """Return the joint entropy of ordered 4-neighbour pairs by walking over the pixels."""
    counts: dict[tuple[int, int], int] = {}
    height, width = len(levels), len(levels[0])
    for y in range(height):
        for x in range(width):
            for other_y, other_x in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)):
                if 0 <= other_y < height and 0 <= other_x < width:
                    pair = (levels[y][x], levels[other_y][other_x])
                    counts[pair] = counts.get(pair, 0) + 1
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_constant_map_has_no_entropy() -> None:
    """One level everywhere: every pair is the same pair."""
    maps = torch.full((2, 3, 5, 7), 0.4)
    assert spatial_entropy(maps, 0.0, 1.0).abs().max() < 1e-6
    assert histogram_entropy(maps, 0.0, 1.0).abs().max() < 1e-6


def test_independent_uniform_pixels_reach_two_ln_q() -> None:
    """The maximum, 2 ln Q for pairs and ln Q for single pixels, up to the bias of a finite sample."""
    maps = noise(1, 1, 500, 500)
    assert spatial_entropy(maps, 0.0, 1.0).item() == pytest.approx(2 * math.log(32), abs=2e-3)
    assert histogram_entropy(maps, 0.0, 1.0).item() == pytest.approx(math.log(32), abs=2e-3)


def test_a_slow_ramp_is_close_to_ln_q() -> None:
    """Neighbours on a slow ramp nearly always share their level, so a pair tells little more than a pixel."""
    ramp = torch.linspace(0, 1, 3200)[None, None, None, :].expand(1, 1, 20, 3200)
    assert spatial_entropy(ramp, 0.0, 1.0).item() == pytest.approx(math.log(32), abs=0.08)


def test_a_checkerboard_has_two_ordered_pairs() -> None:
    """(0, 1) and (1, 0), each half of all pairs: ln 2."""
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    assert spatial_entropy(board[None, None].float(), 0.0, 1.0, levels=2).item() == pytest.approx(math.log(2), abs=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), height=st.integers(1, 6), width=st.integers(1, 6), levels=st.integers(2, 9))
def test_vectorised_counting_equals_walking_over_pixels(seed: int, height: int, width: int, levels: int) -> None:
    """Any small map gives the entropy of its pairs counted one by one; one pixel has no pairs."""
    maps = noise(1, 2, height, width, seed=seed)
    found = spatial_entropy(maps, 0.0, 1.0, levels)[0]
    for channel in range(2):
        rows = quantise(maps, 0.0, 1.0, levels)[0, channel].tolist()
        expected = pairs_counted_one_by_one(rows) if height * width > 1 else 0.0
        assert found[channel].item() == pytest.approx(expected, abs=1e-5)


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_flips_and_transposes_change_nothing(seed: int) -> None:
    """Neither turning nor mirroring a map changes who its neighbours are."""
    maps = noise(2, 3, 6, 9, seed=seed)
    expected = spatial_entropy(maps, 0.0, 1.0)
    for other in (maps.flip(2), maps.flip(3), maps.transpose(2, 3), maps.rot90(1, (2, 3))):
        torch.testing.assert_close(spatial_entropy(other, 0.0, 1.0), expected, atol=1e-5, rtol=0)


def test_maps_counted_in_many_chunks_keep_their_place() -> None:
    """More maps than one chunk holds: every map has the entropy that it has alone."""
    maps = noise(600, 4, 3, 3) * torch.linspace(0, 1, 600)[:, None, None, None]
    together = spatial_entropy(maps, 0.0, 1.0)
    assert together.shape == (600, 4)
    for image in (0, 255, 256, 599):
        alone = spatial_entropy(maps[image : image + 1], 0.0, 1.0)
        torch.testing.assert_close(together[image : image + 1], alone, atol=1e-6, rtol=0)


def test_dead_channels_do_not_lower_the_kept_mean() -> None:
    """Silencing channels lowers the mean over all channels but not the mean over those that are kept."""
    maps = noise(4, 6, 8, 8)
    kept = torch.tensor([True, True, False, True, False, False])
    before = kept_mean(spatial_entropy(maps, 0.0, 1.0), kept)
    masked = spatial_entropy(maps * kept[None, :, None, None], 0.0, 1.0)
    assert kept_mean(masked, kept) == pytest.approx(before, abs=1e-6)
    assert kept_mean(masked) < 0.6 * before


def test_a_fixed_range_sees_that_activations_shrank() -> None:
    """Halving the activations leaves fewer levels in use; a range of their own would show no change."""
    maps = noise(1, 1, 64, 64)
    assert spatial_entropy(maps / 2, 0.0, 1.0).item() < spatial_entropy(maps, 0.0, 1.0).item() - 1
    assert spatial_entropy(maps / 2, 0.0, 0.5).item() == pytest.approx(spatial_entropy(maps, 0.0, 1.0).item(), abs=0.01)


def test_values_outside_the_range_count_as_its_ends() -> None:
    """The levels are 0..Q−1 whatever comes in, and an empty range has one level."""
    maps = torch.tensor([[[[-5.0, 0.0], [0.99, 7.0]]]])
    assert quantise(maps, 0.0, 1.0, 4).flatten().tolist() == [0, 0, 3, 3]
    assert quantise(maps, 1.0, 1.0, 4).flatten().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_activations_fail_the_candidate(value: float) -> None:
    """NaN and infinity have no level; they are the candidate's fault."""
    maps = noise(1, 1, 4, 4)
    maps[0, 0, 1, 1] = value
    with pytest.raises(CandidateError, match="not finite"):
        spatial_entropy(maps, 0.0, 1.0)


def test_the_network_mean_weighs_every_layer_the_same() -> None:
    """A layer with many channels counts once; no layers at all count 0."""
    assert network_entropy([1.0, 3.0]) == 2.0
    assert network_entropy([]) == 0.0


def test_it_leaves_its_input_alone() -> None:
    """The maps belong to the caller."""
    maps = noise(2, 2, 5, 5)
    copy = maps.clone()
    spatial_entropy(maps, 0.2, 0.8)
    assert torch.equal(maps, copy)


@pytest.mark.parametrize("entropy_of", [spatial_entropy, histogram_entropy])
def test_the_memory_layout_does_not_matter(entropy_of: Callable[..., torch.Tensor]) -> None:
    """Channels first, channels last, and a view that is neither."""
    maps = noise(9, 5, 6, 7)
    expected = entropy_of(maps, 0.1, 0.9)
    last = maps.to(memory_format=torch.channels_last)
    view = maps.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (last, view, last[2:]):
        assert other.stride() != maps.stride() or len(other) < len(maps)
        torch.testing.assert_close(entropy_of(other, 0.1, 0.9), expected[-len(other) :], atol=1e-6, rtol=0)


def test_threads_count_the_same() -> None:
    """Two threads share out the chunks, and every map keeps its place."""
    maps = noise(400, 4, 8, 8) * torch.linspace(0, 1, 400)[:, None, None, None]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = spatial_entropy(maps, 0.0, 1.0)
        torch.set_num_threads(2)
        assert torch.equal(spatial_entropy(maps, 0.0, 1.0), alone)
    finally:
        torch.set_num_threads(threads)


def test_a_broken_map_in_a_late_chunk_is_found() -> None:
    """Also by a thread of ours."""
    maps = noise(400, 4, 8, 8)
    maps[-1, -1, -1, -1] = math.nan
    with pytest.raises(CandidateError, match="not finite"):
        spatial_entropy(maps, 0.0, 1.0)


@pytest.mark.parametrize(("size", "levels"), [(3, 32), (12, 32), (40, 32), (5, 300)])
def test_small_and_large_maps_are_counted_alike(size: int, levels: int) -> None:
    """Whether the pairs or the kinds of pairs are fewer: the entropy of pairs counted one by one."""
    maps = noise(2, 1, size, size, seed=size)
    rows = quantise(maps, 0.0, 1.0, levels)[1, 0].tolist()
    found = spatial_entropy(maps, 0.0, 1.0, levels)[1, 0].item()
    assert found == pytest.approx(pairs_counted_one_by_one(rows), abs=1e-5)


def test_half_precision_is_counted_in_single() -> None:
    """bfloat16 activations have the entropy of the same numbers in float32."""
    maps = noise(2, 3, 8, 8).bfloat16()
    assert torch.equal(spatial_entropy(maps, 0.0, 1.0), spatial_entropy(maps.float(), 0.0, 1.0))


def test_no_channels_and_no_images_have_no_entropies() -> None:
    """A layer that is cut away altogether."""
    assert spatial_entropy(noise(3, 0, 4, 4), 0.0, 1.0).shape == (3, 0)
    assert spatial_entropy(noise(0, 3, 4, 4), 0.0, 1.0).shape == (0, 3)
