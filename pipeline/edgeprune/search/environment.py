"""Pruning as an episode: one step per channel group in forward order, each step keeps a width under a latency budget.

    observation   what the group is, what the network costs so far and can still cost        [26 + groups] in [0, 1]
    action        keep ratio of the group's units                                            [1] in [0, 1]
                  and, where a problem repairs, the coefficient of the reconstruction        [2] in [0, 1]
    clip          between the widest width with which the target can still be met and the narrowest with which the
                  budget can still be used

After He et al., AMC (arXiv 1802.03494), whose clip counts FLOPs and is one-sided; this one asks the calibrated latency
model. Without the lower side DDPG's actor, saturated by its first gradients, prunes everything to the least for whole
runs: plans that use half of the budget and that no other searcher is allowed to propose. The environment measures
nothing: a step's reward is 0 unless a `rewarder` prices the finished episode.
"""

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from edgeprune.latency_model import Array, LatencyModel
from edgeprune.layer import Layer
from edgeprune.plan import Group, Plan
from edgeprune.search.problem import Problem
from edgeprune.search.rounding import Rounding

Observation = NDArray[np.float32]
Action = NDArray[np.float32]

FEATURES = (
    "index",
    "depthwise",
    "linear",
    "in_channels",
    "out_channels",
    "kernel",
    "stride",
    "map_size",
    "parameters",
    "macs",
    "macs_saved",
    "macs_rest",
    "last_action",
    "width",
    "latency_share",
    "latency_saved",
    "latency_rest",
    "latency_slope",
    "headroom",
    "widest_ratio",
    "narrowest_ratio",
    "fill_ratio",
    "remainder",
    "remainder_twice",
    "removable",
    "past_end",
)
"""The observation, in order.

The first 13 are AMC's. `headroom` is the target less the prediction with the rest at its least; `widest_ratio` and
`narrowest_ratio` are the keep ratios the clip allows now; `fill_ratio` the uniform ratio of the rest that just meets
the target; `remainder` what the group's width leaves over multiples of the kernel block and of twice that, as
fractions. After these comes the group's identity, one-hot: what a group is worth is not written in its shape. Where a
problem knows how alike a group's units are (`Problem.similarity`), those numbers come last.
"""

USED = 0.93
"""An episode is predicted to use at least this share of the target, where the space allows it."""

FILL_LEVELS = np.linspace(0.0, 1.0, 33)
"""Uniform keep ratios of the rest that are tried for the fill ratio."""


class PruningEnvironment(gymnasium.Env[Observation, Action]):
    """An episode over the groups of one problem.

    Args:
        problem: what is searched.
        model: predicts latency; may be calibrated between episodes.
        rewarder: prices the widths of a finished episode; without it every reward is 0.
        used: share of the target that an episode has to use, in [0, 1].
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's class attribute)

    def __init__(
        self,
        problem: Problem,
        model: LatencyModel,
        rewarder: Callable[[Mapping[str, int]], float] | None = None,
        *,
        used: float = USED,
    ) -> None:
        self.problem = problem
        self.model = model
        alike = {len(each) for each in problem.similarity.values()} or {0}
        size = len(FEATURES) + len(problem.space.groups) + max(alike)
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(0.0, 1.0, (1 + problem.repairs,), np.float32)
        self._groups = problem.space.groups
        self._full = model.row(problem.full)
        rounding = Rounding(problem.space)
        self._least = rounding.least
        self._fillings = rounding.nearest(FILL_LEVELS[:, None] * rounding.full)
        self._rewarder = rewarder
        self._static = _static_features(problem, model)
        self._used = used
        self._widest = self._narrowest = 0
        self._begin()

    @property
    def target(self) -> float:
        """Return the ratio that a finished episode is predicted to stay under: the limit less the learned margin."""
        return self.problem.aim * (1 - self.model.margin)

    @property
    def widths(self) -> dict[str, int]:
        """Return group → width: decided ones as decided, the rest in full."""
        return dict(zip(self.model.names, self._decided.astype(int).tolist(), strict=True))

    @property
    def plan(self) -> Plan:
        """Return the plan of the episode so far."""
        return self.problem.plan(self.widths, self._repair if self.problem.repairs else None)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Return the first observation of a new episode."""
        super().reset(seed=seed, options=options)
        self._begin()
        return self._observe(), {}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Keep the width that `action`, a keep ratio, asks for and the budget allows; repair as it asks for."""
        group = self._groups[self._at]
        wished = group.nearest(float(np.clip(action[0], 0.0, 1.0)) * group.width)
        width = min(max(wished, self._narrowest), self._widest)
        observation = self.keep(width, float(np.clip(action[-1], 0.0, 1.0)))
        done = self._at == len(self._groups)
        reward = self._rewarder(self.widths) if done and self._rewarder else 0.0
        return observation, reward, done, False, {"width": width, "action": self._last}

    def keep(self, width: int, coefficient: float = 0.0) -> Observation:
        """Return what follows when the current group keeps `width` units, whatever the clip says.

        Args:
            coefficient: of its reconstruction, in [0, 1], for a problem that repairs.
        """
        self._decided[self._at] = width
        self._repair[self._groups[self._at].name] = coefficient
        self._last = width / self._groups[self._at].width
        self._at += 1
        return self._observe()

    def _begin(self) -> None:
        self._target = self.target  # the margin must not move in the middle of an episode
        self._decided = self._full.copy()
        self._repair: dict[str, float] = {}
        self._at = 0
        self._last = 1.0
        self._widest = self._narrowest = 0

    def _rest_at(self, widths: Array) -> Array:
        """Return the decided widths, followed by `widths` (a row or many) for every group that is not decided yet."""
        undecided = np.arange(len(self._full)) >= self._at
        return np.where(undecided, widths, self._decided)

    def _observe(self) -> Observation:
        here = min(self._at, len(self._groups) - 1)
        values = self._static[here] | self._moving(here)
        identity = np.arange(len(self._groups)) == here
        alike = self.problem.similarity.get(self._groups[here].name, ())
        observed = [*(values[name] for name in FEATURES), *identity, *alike]
        return np.clip(np.array(observed, dtype=np.float32), 0.0, 1.0)

    def _moving(self, here: int) -> dict[str, float]:
        """Return what changes from step to step, from one batch of predictions; decide what the clip allows."""
        group, choices = self._groups[here], np.array(self._groups[here].choices, dtype=np.float64)
        wider, narrower = self._rest_at(self._full), self._rest_at(self._full)
        narrower[here] = max(choices[choices < wider[here]], default=wider[here])
        others = [self._choosing(here, choices, rest) for rest in (self._least, self._full)]
        rows = np.vstack([wider, self._rest_at(self._least), narrower, self._rest_at(self._fillings), *others])
        parts = np.cumsum([3, len(FILL_LEVELS), len(choices)])
        (now, least, after), filled, at_least, at_most = np.split(self.model.predict_rows(rows), parts)
        macs_now, macs_least = self.model.work_rows(rows[:2]).tolist()
        self._widest = self._widest_fitting(choices, at_least)
        self._narrowest = self._narrowest_using(choices, at_most)
        return {
            "macs_saved": 1 - macs_now,
            "macs_rest": macs_now - macs_least,
            "last_action": self._last,
            "latency_saved": 1 - now,
            "latency_rest": now - least,
            "latency_slope": (now - after) * len(self._groups),
            "headroom": self._target - least,
            "widest_ratio": self._widest / group.width,
            "narrowest_ratio": self._narrowest / group.width,
            "fill_ratio": max(FILL_LEVELS[filled <= self._target], default=0.0),
            "past_end": float(self._at > here),
        }

    def _choosing(self, here: int, choices: Array, rest: Array) -> Array:
        """Return one row per width of the current group, every group after it at `rest`."""
        rows = np.tile(self._rest_at(rest), (len(choices), 1))
        rows[:, here] = choices
        return rows

    def _widest_fitting(self, choices: Array, predicted: Array) -> int:
        """Return the widest width predicted to meet the target; if none is, the one of least prediction."""
        fitting = choices[predicted <= self._target]
        return int(fitting.max() if len(fitting) else choices[predicted.argmin()])

    def _narrowest_using(self, choices: Array, predicted: Array) -> int:
        """Return the narrowest width with which the rest can still use the budget; if there is none, the widest."""
        using = choices[predicted >= self._used * self._target]
        return int(using.min() if len(using) else choices.max())


def _static_features(problem: Problem, model: LatencyModel) -> list[dict[str, float]]:
    """Return for every group what never changes, counts scaled by the largest of all groups."""
    makers = [_maker(group, problem.layers) for group in problem.space.groups]
    raw = [_shape(maker) for maker in makers]
    largest = {name: max(each[name] for each in raw) or 1.0 for name in raw[0]}
    shares, block = model.group_shares(), problem.multiple
    return [
        {name: value / largest[name] for name, value in shape.items()}
        | {
            "index": index / len(makers),
            "depthwise": float(maker.kind == "depthwise"),
            "linear": float(maker.kind == "linear"),
            "width": group.width / max(each.width for each in problem.space.groups),
            "latency_share": shares[group.name],
            "remainder": group.width % block / block,
            "remainder_twice": group.width % (2 * block) / (2 * block),
            "removable": float(group.removable),
        }
        for index, (group, maker, shape) in enumerate(zip(problem.space.groups, makers, raw, strict=True))
    ]


def _maker(group: Group, layers: tuple[Layer, ...]) -> Layer:
    """Return the layer a group is named after, or the first that writes it, or reads it."""
    named = [layer for layer in layers if layer.name == group.name]
    writers = [layer for layer in layers if group.name in layer.out_units]
    readers = [layer for layer in layers if group.name in layer.in_units]
    return (named + writers + readers + [_NO_LAYER])[0]


_NO_LAYER = Layer(
    name="", node="", kind="conv", in_channels=0, out_channels=0, kernel=0, stride=0, height=0, width=0
)  # a group that no priced layer touches: cutting it costs and saves nothing


def _shape(layer: Layer) -> dict[str, float]:
    weights = layer.in_channels * layer.out_channels * layer.kernel / layer.groups
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel": layer.kernel,
        "stride": layer.stride,
        "map_size": layer.height * layer.width,
        "parameters": weights,
        "macs": weights * layer.height * layer.width,
    }
