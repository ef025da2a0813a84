"""DDPG with an actor that cannot get stuck at a bound of its actions.

With a squashed output the first strong gradients drive an actor so far beyond a bound that nothing it learns later
moves its actions. Here the output is linear, clipped, and its gradient is scaled by the room that is left in its
direction: near a bound it fades, and beyond the bound it points back (Hausknecht and Stone, "Deep reinforcement
learning in parameterized action space", arXiv 1511.04143, section "inverting gradients").
"""

from typing import Any

import torch
from stable_baselines3 import DDPG
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import Tensor, nn


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wished: Tensor) -> Tensor:
        """Return the wished actions clipped to [-1, 1]."""
        ctx.save_for_backward(wished)
        return wished.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the gradient times the room in the direction a descent step goes, as a share of the whole range."""
        (wished,) = ctx.saved_tensors
        (gradient,) = gradients
        room = torch.where(gradient > 0, wished + 1, 1 - wished) / 2
        return gradient * room


class Bounded(nn.Module):
    """Clips actions to [-1, 1]; gradients that lead out of the bounds fade, and turn round beyond them."""

    def forward(self, wished: Tensor) -> Tensor:
        """Return `wished` clipped; any shape."""
        clipped: Tensor = _Clip.apply(wished)  # type: ignore[no-untyped-call]
        return clipped


class _BoundedPolicy(TD3Policy):
    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """Return stable-baselines3's actor with `Bounded` where its squashing was."""
        actor = super().make_actor(features_extractor)
        actor.mu[-1] = Bounded()
        return actor


class BoundedDDPG(DDPG):
    """stable-baselines3's DDPG with inverted gradients."""

    policy_aliases = DDPG.policy_aliases | {"MlpPolicy": _BoundedPolicy}
