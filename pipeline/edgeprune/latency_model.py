"""Predict how the latency of a network changes with its widths, and learn from what was measured.

    ratio(widths) = c_0 · fixed + Σ_k ( Σ_b c_kb · W_kb  +  c_kD · D_k )

    W_kb = Σ_{l in k} share_l · work_lb(widths) / work_lb(full)         D_k = Σ_{l in k, left} share_l

`share_l` is the layer's measured share of the unpruned model's time and `fixed` what the shares leave to 1. Layers of
one kind and one map size form a class k. `work` is the multiply-accumulates with input and output channels rounded up
to the blocks b of the runtime's kernels, which are not known: the profile's multiple or twice it, on either side (a
kernel that fills vectors with output channels pads those alone). D is the cost of calling a layer's kernel at all.
Before anything is measured c_0 = 1, the finest block of every class has 1 and everything else 0; measurements move the
constants by non-negative ridge regression towards that prior.

No constant is negative, so the prediction never falls when a network is made wider. It proposes plans and informs the
agent; whether a plan fits is decided by measuring.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from edgeprune.layer import Layer

Array = NDArray[np.float64]

PRIOR_SD = 0.3
"""Prior standard deviation of every constant."""

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
        ...

    @property
    def shares(self) -> Mapping[str, float]:
        """Return layer name → share of the unpruned model's time; what is left to 1 is fixed cost."""
        ...

    @property
    def full(self) -> Mapping[str, int]:
        """Return channel group → width of the unpruned model."""
        ...

    @property
    def multiple(self) -> int:
        """Return the channel multiple of the profile."""
        ...


class LatencyModel:
    """The calibrated formula; its only state are the observations it was given."""

    def __init__(self, problem: Priced) -> None:
        self.names = tuple(problem.full)
        self._full = np.array([problem.full[name] for name in self.names], dtype=np.float64)
        self._features = _Features(problem)
        self._widths: list[Array] = []
        self._ratios: list[float] = []
        self._errors: list[float] = []
        self._constants = self._features.prior_mean

    def predict(self, widths: Mapping[str, int]) -> float:
        """Return the predicted latency as a ratio of the unpruned model's."""
        return float(self.predict_rows(self.row(widths)[None])[0])

    def predict_rows(self, rows: Array) -> Array:
        """Return the predicted ratio of each row of widths [n, groups], columns in the order of `names`."""
        return np.asarray(np.maximum(self._features(rows) @ self._constants, 1e-6))

    def work_rows(self, rows: Array) -> Array:
        """Return the multiply-accumulates of each row of widths as a ratio of the unpruned model's, unpadded."""
        work = self._features.work(np.vstack([self._full, rows]))
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
        features = self._features
        touched = (features.in_units + features.out_units) > 0
        return dict(zip(self.names, (features.shares @ touched).tolist(), strict=True))

    def _calibrate(self) -> None:
        rows = np.stack([self._full, *self._widths])
        ratios = np.array([1.0, *self._ratios])
        noise = np.array([FULL_SD, *(NOISE_SD * each for each in self._ratios)])
        prior = self._features.prior_mean
        matrix = np.vstack([self._features(rows) / noise[:, None], np.eye(len(prior)) / PRIOR_SD])
        self._constants = nnls(matrix, np.concatenate([ratios / noise, prior / PRIOR_SD]))[0]


class _Features:
    """The columns that multiply (c_0, c_kb for the first block pair of every class, .. for the last, c_kD)."""

    def __init__(self, problem: Priced) -> None:
        layers, names = problem.layers, list(problem.full)
        self.full = np.array([problem.full[name] for name in names], dtype=np.float64)
        self.shares = np.array([problem.shares.get(layer.name, 0.0) for layer in layers])
        self.in_units = _units([layer.in_units for layer in layers], names)
        self.out_units = _units([layer.out_units for layer in layers], names)
        self.gone_with = _units([dict.fromkeys(layer.gone_with, 1) for layer in layers], names)
        self.channels = np.array([[layer.in_channels, layer.out_channels] for layer in layers]).reshape(-1, 2).T
        self.area = np.array([layer.kernel * layer.height * layer.width for layer in layers], dtype=np.float64)
        self.groups = np.array([1 if layer.kind == "depthwise" else layer.groups for layer in layers], dtype=np.float64)
        self.depthwise = np.array([layer.kind == "depthwise" for layer in layers], dtype=bool)
        self.by_class = self.shares[:, None] * _classes(layers)
        self.blocks = tuple(itertools.product((problem.multiple, 2 * problem.multiple), repeat=2))
        self.full_works = [self._work(*self._channels_left(self.full[None]), *pair) for pair in self.blocks]
        classes = self.by_class.shape[1]
        self.prior_mean = np.array([1.0] * (1 + classes) + [0.0] * (len(self.blocks) * classes))

    def __call__(self, rows: Array) -> Array:
        """Return the columns [n, 1 + 5 · classes] for widths [n, groups]."""
        into, out = self._channels_left(rows)
        fixed = np.full((len(rows), 1), max(0.0, 1.0 - float(self.shares.sum())))
        works = [
            (self._work(into, out, *pair) / full) @ self.by_class
            for pair, full in zip(self.blocks, self.full_works, strict=True)
        ]
        return np.hstack([fixed, *works, (into > 0) @ self.by_class])

    def work(self, rows: Array) -> Array:
        """Return the multiply-accumulates [n] at the widths [n, groups], nothing rounded up."""
        return np.asarray(self._work(*self._channels_left(rows), 1, 1) @ (self.area / self.groups))

    def _channels_left(self, rows: Array) -> tuple[Array, Array]:
        """Return input and output channels, each [n, layers]; 0 for a layer that is gone."""
        lost = self.full - rows
        into, out = self.channels[0] - lost @ self.in_units.T, self.channels[1] - lost @ self.out_units.T
        removed = (rows == 0).astype(np.float64) @ self.gone_with.T
        left = (into > 0) & (out > 0) & (removed == 0)
        return into * left, out * left

    def _work(self, into: Array, out: Array, in_block: int, out_block: int) -> Array:
        """Return the pairs of channels that are multiplied, rounded up to blocks, [n, layers]."""
        padded = np.ceil(out / out_block) * out_block
        return np.where(self.depthwise, padded, np.ceil(into / in_block) * in_block * padded)


def _units(per_layer: Sequence[Mapping[str, int]], names: Sequence[str]) -> Array:
    table = [[units.get(name, 0) for name in names] for units in per_layer]
    return np.array(table, dtype=np.float64).reshape(len(per_layer), len(names))


def _classes(layers: Sequence[Layer]) -> Array:
    """Return [layers, classes], 1 where a layer is of that kind and map size."""
    keys = [(layer.kind, layer.height * layer.width) for layer in layers]
    return np.array([[float(key == each) for each in sorted(set(keys))] for key in keys]).reshape(len(keys), -1)
