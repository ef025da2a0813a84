"""The searchers by name; what one of them needs is imported only when it is asked for."""

from collections.abc import Callable

from edgeprune.errors import ConfigError
from edgeprune.search.problem import Problem, Searcher


def _uniform(problem: Problem) -> Searcher:
    from edgeprune.search.uniform import Uniform

    return Uniform(problem)


def _random(problem: Problem) -> Searcher:
    from edgeprune.search.random_search import RandomSearch

    return RandomSearch(problem)


def _ddpg(problem: Problem) -> Searcher:
    from edgeprune.search.agent import Agent, ddpg

    return Agent(problem, ddpg)


def _sac(problem: Problem) -> Searcher:
    from edgeprune.search.agent import Agent, sac

    return Agent(problem, sac)


def _walk(problem: Problem) -> Searcher:
    from edgeprune.search.walk import WalkSearch

    return WalkSearch(problem)


STRATEGIES: dict[str, Callable[[Problem], Searcher]] = {
    "uniform": _uniform,
    "random": _random,
    "ddpg": _ddpg,
    "sac": _sac,
    "walk": _walk,
}


def make_searcher(name: str, problem: Problem) -> Searcher:
    """Return a new searcher.

    Raises:
        ConfigError: if there is no strategy of this name; lists those there are.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"unknown search strategy {name!r}", next_step=f"one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name](problem)
