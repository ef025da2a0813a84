"""Entropy of activation maps: how disordered they are, seen pixel by pixel or pixel by neighbour.

Spatial entropy of one map, quantised to Q levels: with p_ab the share of ordered pairs of 4-neighbours that have the
levels (a, b), H = − Σ p_ab ln p_ab, between 0 and 2 ln Q (the joint entropy of the "aura matrix" of a map). The levels
cut a *fixed* range taken from the unpruned model: a range of the map's own would hide that pruning changed it.

Which estimator the authors of entropy-driven pruning use (arXiv 2312.04918) is not known to us; this is ours.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.errors import CandidateError

CHUNK_COUNTS, CHUNK_PAIRS = 1 << 20, 1 << 19
"""Counters at most, and pairs to count, at once: few enough to stay near, enough that calls and locks cost little."""

KEPT_BYTES = 1 << 24
"""Blocks up to this size are to be reused rather than given back to the system after each chunk."""

Counts = NDArray[np.int64]
Places = NDArray[np.int32]
Levels = NDArray[np.unsignedinteger[Any]]
Number = TypeVar("Number", bound=np.generic)
Chunk = NDArray[np.float32]
"""Images [n, A, H, W, B] without gaps in memory, where A · B are the channels: channels first have B = 1, channels last
A = 1. So neither layout is copied into the other."""


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
    return torch.from_numpy(_quantised(_numbers(maps), low, high, levels).astype(np.int32))


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
    """Return levels as the smallest integers that can number all ordered pairs of them: small ones are counted fast."""
    if not np.isfinite(values.sum()):
        raise CandidateError("activations are not finite", why="the cut model computes NaN or infinity")
    kind = np.min_scalar_type(levels * (levels + 1))
    if not high > low:
        return np.zeros(values.shape, kind)
    scaled = values - np.float32(low)
    scaled *= np.float32(levels / (high - low))
    return np.clip(scaled, 0, levels - 1, out=scaled).astype(kind)


def _by_chunk(maps: Tensor, kinds: int, entropy_of: Callable[[Chunk], NDArray[np.float32]]) -> Tensor:
    """Return the entropies [N, C] that `entropy_of` finds in a few images at a time, in either memory layout."""
    images, channels, height, width = maps.shape
    if maps.numel() == 0:
        return torch.zeros(images, channels)
    last = maps.is_contiguous(memory_format=torch.channels_last)
    laid = _numbers(maps.permute(0, 2, 3, 1).unsqueeze(1) if last else maps.contiguous().unsqueeze(-1))
    at_once = max(1, min(CHUNK_COUNTS // (channels * kinds), CHUNK_PAIRS // (2 * channels * height * width)))
    chunks = [laid[start : start + at_once] for start in range(0, images, at_once)]
    np.empty(KEPT_BYTES, np.uint8)  # freed at once: glibc then keeps such blocks; page faults took most of the time
    found = [torch.from_numpy(each) for each in _each(entropy_of, chunks)]
    return torch.cat(found).view(images, channels)


def _each(work: Callable[[Chunk], NDArray[np.float32]], chunks: list[Chunk]) -> list[NDArray[np.float32]]:
    """Return what `work` makes of each chunk.

    In threads of our own, for PyTorch's would share every single operation out: on operations this short they wait for
    one another longer than they work. For the same reason they are kept: maps come by the hundred.
    """
    threads = torch.get_num_threads()
    if min(len(chunks), threads) < 2:
        return [work(chunk) for chunk in chunks]
    torch.set_num_threads(1)
    try:
        return list(_workers(threads).map(work, chunks))
    finally:
        torch.set_num_threads(threads)


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="entropy")


def _pixel_entropy(images: Chunk, low: float, high: float, levels: int) -> NDArray[np.float32]:
    """Return the entropy of the levels of each map, in the order of images and channels."""
    count, outer, height, width, inner = images.shape
    first = np.arange(0, count * outer * inner * levels, levels, dtype=np.int32)
    place = _quantised(images, low, high, levels) + _lines(first, images)
    return _entropy(_counted(place, len(first) * levels), first, height * width)


def _pair_entropy(images: Chunk, low: float, high: float, levels: int) -> NDArray[np.float32]:
    """Return the joint entropy of neighbouring levels of each map, in the order of images and channels.

    Ordered pairs come in twos, (a, b) and (b, a), so it is enough to count unordered ones: the two halves of a pair
    of unequal levels share its probability, which adds ln 2 to its surprise.

    Most maps use few of the levels, next to one another: each map's table of pairs has those from its lowest to its
    highest alone.
    """
    height, width = images.shape[2:4]
    pairs = height * (width - 1) + (height - 1) * width
    level = _quantised(images, low, high, levels)
    lowest, highest = (each.reshape(-1) for each in _extremes(level))
    if pairs == 0:
        return np.zeros(len(lowest), np.float32)
    level -= _lines(lowest, images)
    spans = (highest - lowest).astype(np.int32) + 1
    kinds = spans * (spans + 1) // 2
    first = np.cumsum(kinds, dtype=np.int32) - kinds
    nowhere = int(first[-1] + kinds[-1])
    counts = _counted(_pair_places(level, _lines(first, images), nowhere), nowhere + 1)[:-1]
    unequal = 1 - _diagonals(counts, first, spans) / pairs
    joint: NDArray[np.float32] = _entropy(counts, first, pairs) + (math.log(2) * unequal).astype(np.float32)
    return joint


def _extremes(level: Levels) -> tuple[Levels, Levels]:
    """Return lowest and highest level of each map, [n, A, B]."""
    count, outer, height, width, inner = level.shape
    if inner == 1:
        maps = level.reshape(count, outer, height * width, inner)
        return maps.min(2), maps.max(2)
    lines = level.reshape(count, outer, height, width * inner)  # long loops first
    low, high = (each.reshape(count, outer, width, inner) for each in (lines.min(2), lines.max(2)))
    return low.min(2), high.max(2)


def _lines(of_maps: NDArray[Number], images: Chunk) -> NDArray[Number]:
    """Return a number of each map for each pixel of a line, [n, A, 1, W, B]: short loops are slow."""
    count, outer, _, width, inner = images.shape
    return np.repeat(of_maps.reshape(count, outer, 1, 1, inner), width, axis=3)


def _pair_places(level: Levels, first: Places, nowhere: int) -> Places:
    """Return the place of each pair of neighbours.

    Unordered pairs have a triangular table, a row for the higher level and a column for the lower; its rows begin at
    0, 1, 3, 6, ..., so the higher level is also the one whose row begins later.

    Every pixel is paired with the one that lies one step, or one line, further on in memory, in one go through all
    maps, for a loop over every line by itself takes longer. What so meets the next line or the next map is no pair.

    Args:
        level: [n, A, H, W, B].
        first: where the map's table begins, [n, A, 1, W, B].
        nowhere: the place of what is no pair.

    Returns:
        [2, n, A, H, W, B]: with the pixel to the right, with the pixel below.
    """
    row = level + level.dtype.type(1)
    row *= level
    row >>= 1
    place = np.empty((2, *level.shape), np.int32)
    within = np.zeros_like(level)
    rows, columns, pairs = row.reshape(-1), level.reshape(-1), within.reshape(-1)
    for half, axis in enumerate((3, 2)):
        step = math.prod(level.shape[axis + 1 :])
        higher = np.maximum(rows[:-step], rows[step:], out=pairs[:-step])
        higher += np.minimum(columns[:-step], columns[step:])
        np.add(within, first, out=place[half])
    place[0, :, :, :, -1] = nowhere
    place[1, :, :, -1] = nowhere
    return place


def _counted(places: Places, size: int) -> Counts:
    """Return how often each of the places 0 to size − 1 is there.

    PyTorch's count and not NumPy's, which lets no other thread work meanwhile.
    """
    counts: Counts = torch.bincount(torch.from_numpy(places.reshape(-1)), minlength=size).numpy()
    return counts


def _diagonals(counts: Counts, first: Places, spans: Places) -> Counts:
    """Return how many pairs of each map are of equal levels: the sum of its table's diagonal, 0, 2, 5, 9, ..."""
    starts = np.cumsum(spans) - spans
    level = np.arange(starts[-1] + spans[-1]) - np.repeat(starts, spans)
    diagonal = np.repeat(first, spans) + level * (level + 3) // 2
    sums: Counts = np.add.reduceat(counts.take(diagonal), starts)
    return sums


def _entropy(counts: Counts, first: Places, size: int) -> NDArray[np.float32]:
    """Return the entropy of each map: ln P − Σ c ln c / P.

    Args:
        counts: of all tables, one after the other.
        first: where each table begins.
        size: P, how many were counted in each map.
    """
    numbers = np.arange(size + 1, dtype=np.float32)  # c ln c from a table: it is faster
    total: NDArray[np.float32] = np.add.reduceat((numbers * np.log(np.maximum(numbers, 1))).take(counts), first)
    entropies: NDArray[np.float32] = np.float32(math.log(size)) - total / np.float32(size)
    return entropies
