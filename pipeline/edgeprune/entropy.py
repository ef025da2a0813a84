"""Entropy of activation maps: how disordered they are, seen pixel by pixel or pixel by neighbour.

Spatial entropy of one map, quantised to Q levels: with p_ab the share of ordered pairs of 4-neighbours that have the
levels (a, b), H = − Σ p_ab ln p_ab, between 0 and 2 ln Q (the joint entropy of the "aura matrix" of a map). The levels
cut a *fixed* range taken from the unpruned model: a range of the map's own would hide that pruning changed it.

Which estimator the authors of entropy-driven pruning use (arXiv 2312.04918) is not known to us; this is ours.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.errors import CandidateError

CHUNK_COUNTS = CHUNK_PAIRS = 1 << 18
"""Counters, and pairs to count, at once: few enough to stay in the cache, enough that calls cost little (8 MiB)."""

KEPT_BYTES = 1 << 24
"""Blocks up to this size are to be reused rather than given back to the system after each chunk."""

Codes = NDArray[np.int64]
Chunk = NDArray[np.float32]
"""Images [n, A, H, W, B] without gaps in memory, where A · B are the channels: channels first have B = 1, channels last
A = 1. So neither layout is copied into the other."""
Levels = NDArray[np.int32]


def spatial_entropy(maps: Tensor, low: float, high: float, levels: int = 32) -> Tensor:
    """Return the spatial entropy of every map, nats.

    Every pair of every map is counted, none is sampled. As many threads count as PyTorch would use.

    Args:
        maps: activations [N, C, H, W], either memory layout.
        low, high: range of the layer's activations in the unpruned model; values outside count as its ends.
        levels: Q.

    Returns:
        Entropy [N, C], float32; 0 for maps of one pixel, which have no neighbours.

    Raises:
        CandidateError: if an activation is not finite.
    """
    return _by_chunk(maps, levels * (levels + 1) // 2, lambda chunk: _pair_entropy(chunk, low, high, levels))


def histogram_entropy(maps: Tensor, low: float, high: float, levels: int = 32) -> Tensor:
    """Return the entropy of the distribution of levels in every map [N, C], nats, between 0 and ln Q.

    Arguments and errors as for `spatial_entropy`.
    """
    return _by_chunk(maps, levels, lambda chunk: _pixel_entropy(chunk, low, high, levels))


def quantise(maps: Tensor, low: float, high: float, levels: int) -> Tensor:
    """Return the level of every value, 0 to levels − 1, int32; all 0 if the range is empty.

    Raises:
        CandidateError: if a value is not finite.
    """
    return torch.from_numpy(_quantised(_numbers(maps), low, high, levels))


def kept_mean(entropies: Tensor, kept: Tensor | None = None) -> float:
    """Return the mean of [N, C] entropies over images and over the channels kept (bool [C]; all if None), nats.

    Channels that are masked out would count as 0 and make any network that is cut look ordered.
    """
    chosen = entropies if kept is None else entropies[:, kept]
    return float(chosen.mean()) if chosen.numel() else 0.0


def network_entropy(layer_means: Iterable[float]) -> float:
    """Return the mean over layers, each weighing the same, nats; 0 without layers."""
    means = list(layer_means)
    return math.fsum(means) / len(means) if means else 0.0


def _numbers(maps: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = maps.detach().to("cpu", torch.float32).numpy()
    return values


def _quantised(values: NDArray[np.float32], low: float, high: float, levels: int) -> Levels:
    if not np.isfinite(values.sum()):
        raise CandidateError("activations are not finite", why="the cut model computes NaN or infinity")
    if not high > low:
        return np.zeros(values.shape, np.int32)
    scaled = values - np.float32(low)
    scaled *= np.float32(levels / (high - low))
    return np.clip(scaled, 0, levels - 1, out=scaled).astype(np.int32)


def _by_chunk(maps: Tensor, kinds: int, entropy_of: Callable[[Chunk], NDArray[np.float32]]) -> Tensor:
    """Return the entropies [N, C] that `entropy_of` finds in a few images at a time, in either memory layout."""
    images, channels, height, width = maps.shape
    last = maps.is_contiguous(memory_format=torch.channels_last)
    laid = _numbers(maps.permute(0, 2, 3, 1).unsqueeze(1) if last else maps.contiguous().unsqueeze(-1))
    tables, pairs = max(1, channels * kinds), max(1, 2 * channels * height * width)
    at_once = max(1, min(CHUNK_COUNTS // tables, CHUNK_PAIRS // pairs))
    chunks = [laid[start : start + at_once] for start in range(0, images, at_once)]
    np.empty(KEPT_BYTES, np.uint8)  # freed at once: glibc then keeps such blocks; page faults took most of the time
    found = [torch.from_numpy(each) for each in _each(entropy_of, chunks)]
    return torch.cat(found).view(images, channels) if found else torch.zeros(images, channels)


def _each(work: Callable[[Chunk], NDArray[np.float32]], chunks: list[Chunk]) -> list[NDArray[np.float32]]:
    """Return what `work` makes of each chunk.

    NumPy in threads of our own, for PyTorch's would share every single operation out: on operations this short they
    wait for one another longer than they work.
    """
    threads = min(len(chunks), torch.get_num_threads())
    if threads < 2:
        return [work(chunk) for chunk in chunks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, chunks))


def _pixel_entropy(images: Chunk, low: float, high: float, levels: int) -> NDArray[np.float32]:
    """Return the entropy of the levels of each map, in the order of images and channels."""
    count, outer, height, width, inner = images.shape
    first = _first_places(images, levels)
    codes = _quantised(images, low, high, levels).reshape(count, outer, height, width * inner) + first
    place = codes.reshape(count, outer, height * width, inner).astype(np.int64)
    return _entropy(place, _counts(place, levels))


def _pair_entropy(images: Chunk, low: float, high: float, levels: int) -> NDArray[np.float32]:
    """Return the joint entropy of neighbouring levels of each map, in the order of images and channels.

    Ordered pairs come in twos, (a, b) and (b, a), so it is enough to count unordered ones: the two halves of a pair
    of unequal levels share its probability, which adds ln 2 to its surprise.

    Unordered pairs have a triangular table, a row for the higher level and a column for the lower; its rows begin at
    0, 1, 3, 6, ..., so the higher level is also the one whose row begins later.
    """
    count, outer, height, width, inner = images.shape
    across, pairs = height * (width - 1), height * (width - 1) + (height - 1) * width
    if pairs == 0:
        return np.zeros(count * outer * inner, np.float32)
    kinds = levels * (levels + 1) // 2
    column = _quantised(images, low, high, levels).reshape(count, outer, height, width * inner)
    row = column + np.int32(1)
    row *= column
    row >>= 1
    row += _first_places(images, kinds)
    place = np.empty((count, outer, pairs, inner), np.int64)
    _place_pairs(row[..., :-inner], row[..., inner:], column[..., :-inner], column[..., inner:], place[:, :, :across])
    _place_pairs(row[:, :, :-1], row[:, :, 1:], column[:, :, :-1], column[:, :, 1:], place[:, :, across:])
    counts = _counts(place, kinds)
    level = np.arange(levels)
    equal = counts.take((level + 1) * level // 2 + level, axis=1).sum(1) / pairs
    joint: NDArray[np.float32] = _entropy(place, counts) + (math.log(2) * (1 - equal)).astype(np.float32)
    return joint


def _first_places(images: Chunk, kinds: int) -> Levels:
    """Return where the table of each map begins, [n, A, 1, W · B]: as long as a line, for short loops are slow."""
    count, outer, _, width, inner = images.shape
    first = np.arange(0, count * outer * inner * kinds, kinds, dtype=np.int32)
    return np.tile(first.reshape(count, outer, 1, inner), width)


def _place_pairs(one_row: Levels, other_row: Levels, one: Levels, other: Levels, out: Codes) -> None:
    """Write the place of each pair: the row of the higher level plus the column of the lower."""
    place = np.maximum(one_row, other_row)
    place += np.minimum(one, other)
    out[...] = place.reshape(out.shape)


def _counts(place: Codes, kinds: int) -> Codes:
    """Return how often each place of the tables of all maps was taken, [maps, kinds]."""
    maps = place.shape[0] * place.shape[1] * place.shape[3]
    counts: Codes = np.bincount(place.reshape(-1), minlength=maps * kinds).reshape(maps, kinds)
    return counts


def _entropy(place: Codes, counts: Codes) -> NDArray[np.float32]:
    """Return the entropy of each map: ln P − Σ c ln c / P, summed over the kinds, or over the pairs if they are few.

    Logarithms come from a table of 1..P; fetching the count of a pair takes about as long as two steps through counts.

    Args:
        place: of each of the P pairs in the tables, [n, A, P, B].
        counts: [maps, kinds].
    """
    size, kinds = place.shape[2], counts.shape[1]
    numbers = np.arange(size + 1, dtype=np.float32)
    logarithms = np.log(np.maximum(numbers, 1))
    if 2 * size < kinds:
        total = logarithms.take(counts.take(place)).sum(2).reshape(-1)
    else:
        total = (numbers * logarithms).take(counts).sum(1)
    entropies: NDArray[np.float32] = np.float32(math.log(size)) - total / np.float32(size)
    return entropies
