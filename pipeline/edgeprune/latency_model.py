"""Predict how the latency of a network changes with its widths, and learn from what was measured.

    ratio(widths) = c_0 · fixed + Σ_k c_k · Σ_{l in k} share_l · macs_l(widths) / macs_l(full) + c_T · T + c_D · D

`share_l` is the layer's measured share of the unpruned model's time and `fixed` what the shares leave to 1. Layers of
one kind and one map size form a class k. T is the same sum with the channels read and written instead of the work
(memory-bound kernels), D with 1 for every layer that is left (the cost of calling a kernel at all). Before anything is
measured c_0 = c_k = 1 and c_T = c_D = 0; measurements move the constants by ridge regression towards that prior.

Channels are rounded up to the block of the runtime's kernels, which is learned: the profile's multiple or twice it.
Every constant stays non-negative, so the prediction never falls when a network is made wider. It proposes plans and
informs the agent; whether a plan fits is decided by measuring.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.layer import Layer

Array = NDArray[np.float64]

PRIOR_SD_CLASS = 0.3
"""Prior standard deviation of c_0 and c_k."""

PRIOR_SD_SHAPE = 0.1
"""Prior standard deviation of c_T and c_D."""

NOISE_SD = 0.01
"""Relative error of one prediction that is put down to the measurement and to what the formula leaves out."""

FULL_SD = 0.002
"""The same for the unpruned model, whose ratio is 1 by definition."""

RECENT = 8
"""How many of the latest prediction errors the margin is learned from."""

LARGEST_MARGIN = 0.08
"""A margin beyond this would waste more of the budget than it saves."""


class Priced(Protocol):
    """What the model has to know of a search problem."""

    @property
    def layers(self) -> Sequence[Layer]:
        """Return the layers of the unpruned graph."""

    @property
    def shares(self) -> Mapping[str, float]:
        """Return layer name → share of the unpruned model's time; what is left to 1 is fixed cost."""

    @property
    def full(self) -> Mapping[str, int]:
        """Return channel group → width of the unpruned model."""

    @property
    def multiple(self) -> int:
        """Return the channel multiple of the profile."""


class LatencyModel:
    """The calibrated formula; its only state are the observations it was given."""

    def __init__(self, problem: Priced) -> None:
        self.names = tuple(problem.full)
        self._full = np.array([problem.full[name] for name in self.names], dtype=np.float64)
        self._features = {block: _Features(problem, block) for block in (problem.multiple, 2 * problem.multiple)}
        self._work = _Features(problem, 1).work
        self.block = problem.multiple
        self._widths: list[Array] = []
        self._ratios: list[float] = []
        self._errors: list[float] = []
        self._constants = self._features[self.block].prior_mean

    def predict(self, widths: Mapping[str, int]) -> float:
        """Return the predicted latency as a ratio of the unpruned model's."""
        return float(self.predict_rows(self.row(widths)[None])[0])

    def predict_rows(self, rows: Array) -> Array:
        """Return the predicted ratio of each row of widths [n, groups], columns in the order of `names`."""
        return np.asarray(np.maximum(self._features[self.block](rows) @ self._constants, 1e-6))

    def work_rows(self, rows: Array) -> Array:
        """Return the multiply-accumulates of each row of widths as a ratio of the unpruned model's, unpadded."""
        work = self._work(np.vstack([self._full, rows]))
        return np.asarray(work[1:] / max(float(work[0]), 1.0))

    def row(self, widths: Mapping[str, int]) -> Array:
        """Return the widths as one row, in the order of `names`."""
        return np.array([widths[name] for name in self.names], dtype=np.float64)

    def observe(self, widths: Mapping[str, int], ratio: float, upper: float | None = None) -> None:
        """Learn that a plan of these widths has this measured ratio.

        Args:
            widths: group → kept units.
            ratio: latency as a ratio of the unpruned model's, above 0.
            upper: upper end of its interval, what the budget is compared with; the ratio itself if not given.
        """
        self._errors.append(math.log((upper or ratio) / self.predict(widths)))
        self._widths.append(self.row(widths))
        self._ratios.append(ratio)
        self._calibrate()

    @property
    def margin(self) -> float:
        """Return the relative distance to the limit that makes a plan fit about two times in three, 0 to 0.08.

        The mean of the recent log errors of prediction plus half their standard deviation, both shrunk by two
        imagined errors of ±1 %.
        """
        errors = np.array([NOISE_SD, -NOISE_SD, *self._errors[-RECENT:]])
        return float(np.clip(errors.mean() + 0.5 * errors.std(), 0.0, LARGEST_MARGIN))

    def group_shares(self) -> dict[str, float]:
        """Return group → share of the unpruned model's time spent in the layers that read or write the group."""
        features = self._features[self.block]
        touched = (features.in_units + features.out_units) > 0
        return dict(zip(self.names, (features.shares @ touched).tolist(), strict=True))

    def _calibrate(self) -> None:
        rows = np.stack([self._full, *self._widths])
        ratios = np.array([1.0, *self._ratios])
        noise = np.array([FULL_SD, *(NOISE_SD * each for each in self._ratios)])
        fits = {block: _ridge(features, rows, ratios, noise) for block, features in self._features.items()}
        self.block = min(fits, key=lambda block: (fits[block][1], block))
        self._constants = fits[self.block][0]


class _Features:
    """The columns that multiply (c_0, c_1 .. c_K, c_T, c_D), for one kernel block."""

    def __init__(self, problem: Priced, block: int) -> None:
        layers, names = problem.layers, list(problem.full)
        self.block = block
        self.full = np.array([problem.full[name] for name in names], dtype=np.float64)
        self.shares = np.array([problem.shares.get(layer.name, 0.0) for layer in layers])
        self.in_units = _units([layer.in_units for layer in layers], names)
        self.out_units = _units([layer.out_units for layer in layers], names)
        self.gone_with = _units([dict.fromkeys(layer.gone_with, 1) for layer in layers], names)
        self.channels = np.array([[layer.in_channels, layer.out_channels] for layer in layers]).reshape(-1, 2).T
        self.area = np.array([layer.kernel * layer.height * layer.width for layer in layers], dtype=np.float64)
        self.groups = np.array([1 if layer.kind == "depthwise" else layer.groups for layer in layers], dtype=np.float64)
        self.depthwise = np.array([layer.kind == "depthwise" for layer in layers], dtype=bool)
        self.classes = _classes(layers)
        self.work_full, self.traffic_full, _ = self._parts(self.full[None])
        self.prior_mean = np.concatenate([np.ones(1 + self.classes.shape[1]), np.zeros(2)])
        self.prior_sd = np.where(self.prior_mean > 0, PRIOR_SD_CLASS, PRIOR_SD_SHAPE)

    def __call__(self, rows: Array) -> Array:
        """Return the columns [n, 3 + classes] for widths [n, groups]."""
        work, traffic, left = self._parts(rows)
        fixed = np.full((len(rows), 1), max(0.0, 1.0 - float(self.shares.sum())))
        by_class = (self.shares * work / self.work_full) @ self.classes
        return np.hstack(
            [fixed, by_class, (traffic / self.traffic_full) @ self.shares[:, None], left @ self.shares[:, None]]
        )

    def work(self, rows: Array) -> Array:
        """Return the multiply-accumulates [n] at the widths [n, groups]."""
        return np.asarray(self._parts(rows)[0] @ (self.area / self.groups))

    def _parts(self, rows: Array) -> tuple[Array, Array, Array]:
        """Return work (channel pairs), channels moved, and being there at all, each [n, layers]; 0 for a layer gone."""
        lost = self.full - rows
        into, out = self.channels[0] - lost @ self.in_units.T, self.channels[1] - lost @ self.out_units.T
        removed = (rows == 0).astype(np.float64) @ self.gone_with.T
        left = ((into > 0) & (out > 0) & (removed == 0)).astype(np.float64)
        into, out = (np.ceil(each / self.block) * self.block * left for each in (into, out))
        return np.where(self.depthwise, out, into * out), into + out, left


def _units(per_layer: Sequence[Mapping[str, int]], names: Sequence[str]) -> Array:
    table = [[units.get(name, 0) for name in names] for units in per_layer]
    return np.array(table, dtype=np.float64).reshape(len(per_layer), len(names))


def _classes(layers: Sequence[Layer]) -> Array:
    """Return [layers, classes], 1 where a layer is of that kind and map size."""
    keys = [(layer.kind, layer.height * layer.width) for layer in layers]
    return np.array([[float(key == each) for each in sorted(set(keys))] for key in keys]).reshape(len(keys), -1)


def _ridge(features: _Features, rows: Array, ratios: Array, noise: Array) -> tuple[Array, float]:
    """Return the constants of least squared error plus squared distance to the prior, and that sum.

    A constant that would become negative is held at 0 and the rest solved again.
    """
    columns = features(rows) / noise[:, None]
    matrix = np.vstack([columns, np.diag(1 / features.prior_sd)])
    wanted = np.concatenate([ratios / noise, features.prior_mean / features.prior_sd])
    free = np.ones(len(features.prior_mean), dtype=bool)
    constants = np.zeros(len(free))
    while free.any():
        solved = np.linalg.lstsq(matrix[:, free], wanted, rcond=None)[0]
        if (solved >= 0).all():
            constants[free] = solved
            break
        free[np.flatnonzero(free)[solved < 0]] = False
    return constants, float(np.square(matrix @ constants - wanted).sum())
