"""Reinforcement learning as ask and tell: stable-baselines3's DDPG and SAC, one episode for every plan.

    ask     an episode through the environment: the actor decides group after group, with noise; its plan is measured
    tell    the measured reward goes to every step of that episode (AMC, arXiv 1802.03494), then the networks learn

A plan's worth is known only once it is measured, so the agents are stepped by hand instead of through `learn`.
Everything random comes from the problem's seed and the number of told trials, and nobody else's generator moves: a
killed search replays to the same asks.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from stable_baselines3 import DDPG, SAC
from stable_baselines3.common.logger import Logger

from edgeprune.plan import Plan
from edgeprune.search.bounded_actor import BoundedDDPG
from edgeprune.search.environment import PruningEnvironment
from edgeprune.search.memory import Memory
from edgeprune.search.problem import Problem
from edgeprune.search.random_search import first_or_random, random_plan
from edgeprune.trial import Trial

EPISODES_TRIED = 8
"""Episodes before a random plan is asked for because all of them gave plans that are known already."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an agent learns.

    Attributes:
        algorithm: of stable-baselines3, an off-policy one.
        hidden: units of both hidden layers. AMC has 300; with 40 to 400 episodes smaller ones learn sooner.
        learning_rate: of actor and critic.
        batch: transitions in one gradient step.
        steps_per_group: gradient steps after every trial, times the number of groups.
        warm_up: share of the trials that are random episodes, at least 5.
        random_every: after the warm-up one trial in so many is a random plan again: what a few dozen trials never tried
            the networks never learn, and the policy settles before it has seen much.
        noise: standard deviation of the action noise at the end of the warm-up; 0: the policy is random itself.
        noise_end: the same at the last trial.
        extra: further arguments of the algorithm.
    """

    algorithm: type[DDPG] | type[SAC]
    hidden: int = 64
    learning_rate: float = 1e-3
    batch: int = 64
    steps_per_group: int = 2
    warm_up: float = 0.15
    random_every: int = 3
    noise: float = 0.35
    noise_end: float = 0.05
    extra: dict[str, Any] = field(default_factory=dict)


ddpg = Settings(algorithm=BoundedDDPG, learning_rate=2e-3)
sac = Settings(algorithm=SAC, noise=0.0, extra={"ent_coef": "auto_0.1"})


@contextmanager
def own_randomness(*seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's generators for the block, and leave them and the thread count as found."""
    words = [int(word) for word in np.random.SeedSequence(seed).generate_state(3)]
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        random.seed(words[0])
        np.random.seed(words[1])  # the replay buffer draws from it
        torch.manual_seed(words[2])
        torch.set_num_threads(1)  # the networks are tiny, and more threads may sum in another order
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            random.setstate(python)
            np.random.set_state(numpy)


class Agent:
    """One reinforcement-learning searcher.

    The first ask is the uniform plan, as for every searcher; then come random plans near the budget, then the policy's
    with a random one in between.
    """

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self._problem, self._settings = problem, settings
        self._memory = Memory(problem)
        self._environment = PruningEnvironment(problem, self._memory.model)
        self._groups = problem.space.groups
        self._warm_up = max(5, round(settings.warm_up * problem.trials))
        self._rewards: list[float] = []
        self._episode_of: list[int] = []
        with own_randomness(problem.seed, 0):
            self._learner = settings.algorithm(
                "MlpPolicy",
                self._environment,
                learning_rate=settings.learning_rate,
                buffer_size=len(self._groups) * (problem.trials + 64),
                batch_size=settings.batch,
                tau=0.01,
                gamma=0.0,  # the episode's reward is copied to every step, so there is no later one to discount
                device="cpu",
                seed=problem.seed,
                policy_kwargs={"net_arch": [settings.hidden, settings.hidden]},
                **settings.extra,
            )
            self._learner.set_logger(Logger(None, []))

    def ask(self) -> Plan:
        """Return a plan that was not told before, unless neither policy nor chance finds one."""
        if self._memory.pending is not None:
            return self._memory.pending
        if self._memory.told < self._warm_up or self._memory.told % self._settings.random_every == 0:
            return self._memory.ask(first_or_random(self._problem, self._memory))
        rng = np.random.default_rng([self._problem.seed, self._memory.told])
        for _ in range(EPISODES_TRIED):
            plan = self._episode(rng)
            if plan.digest not in self._memory.fits:
                return self._memory.ask(plan)
        return self._memory.ask(random_plan(self._problem, self._memory, rng))

    def tell(self, trial: Trial) -> None:
        """Learn from a trial; the worst score of a failed one teaches as well."""
        self._memory.tell(trial)
        self._rewards.append(trial.score.reward)
        self._store(trial.plan)
        if len(self._rewards) < self._warm_up:
            return
        self._rescale()
        rounds = self._warm_up if len(self._rewards) == self._warm_up else 1
        steps = self._settings.steps_per_group * len(self._groups) * rounds
        with own_randomness(self._problem.seed, 2, len(self._rewards)):
            self._learner.train(gradient_steps=steps, batch_size=self._settings.batch)

    def _episode(self, rng: np.random.Generator) -> Plan:
        """Return the plan one episode decides on."""
        sigma = self._sigma()
        observation, _ = self._environment.reset()
        done = False
        with own_randomness(self._problem.seed, 1, int(rng.integers(2**31))):
            while not done:
                action, _ = self._learner.predict(observation, deterministic=sigma > 0)
                observation, _, done, _, _ = self._environment.step(_disturbed(action, sigma, rng))
        return self._environment.plan

    def _sigma(self) -> float:
        """Return the action noise now, decaying geometrically from the warm-up to the last trial (AMC)."""
        first, last = self._settings.noise, self._settings.noise_end
        if not first:
            return 0.0
        passed = (self._memory.told - self._warm_up) / max(1, self._problem.trials - self._warm_up)
        return float(first * (last / first) ** min(1.0, max(0.0, passed)))

    def _store(self, plan: Plan) -> None:
        """Put the steps that lead to a plan into the replay buffer; the actions are the widths really kept."""
        buffer = self._learner.replay_buffer
        assert buffer is not None
        widths = plan.widths
        observation, _ = self._environment.reset()
        for group in self._groups:
            # a group that loses nothing has no coefficient: any would have done, the middle teaches least
            taken = (widths[group.name] / group.width, plan.repair.get(group.name, 0.5))[: 1 + self._problem.repairs]
            following = self._environment.keep(widths[group.name], taken[-1])
            scaled = 2 * np.array(taken, dtype=np.float32) - 1  # actions are in [-1, 1]
            done = np.array([group is self._groups[-1]])
            buffer.add(observation, following, scaled, np.zeros(1), done, [{}])
            self._episode_of.append(len(self._rewards) - 1)
            observation = following

    def _rescale(self) -> None:
        """Rewrite all stored rewards as standard scores over the trials so far, in place of AMC's moving average."""
        buffer = self._learner.replay_buffer
        assert buffer is not None
        rewards = np.array(self._rewards)
        scores = np.clip((rewards - rewards.mean()) / (rewards.std() + 1e-6), -3, 3)
        buffer.rewards[: len(self._episode_of), 0] = scores[self._episode_of]


def _disturbed(action: Any, sigma: float, rng: np.random.Generator) -> Any:
    """Return the action with truncated normal noise, in [0, 1] (AMC).

    Raises:
        FloatingPointError: if the policy answers with no number: its training diverged.
    """
    if not np.isfinite(action).all():
        raise FloatingPointError("the policy's action is not a number")
    if not sigma:
        return action
    return np.array([_truncated(float(mean), sigma, rng) for mean in action], dtype=np.float32)


def _truncated(mean: float, sigma: float, rng: np.random.Generator) -> float:
    """Return a normal number that lies in [0, 1]."""
    noisy = mean + sigma * rng.standard_normal()
    while not 0 <= noisy <= 1:
        noisy = mean + sigma * rng.standard_normal()
    return float(noisy)
