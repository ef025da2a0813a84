"""What every searcher remembers: what was asked, what it came to, and the latency model it calibrates."""

from edgeprune.latency_model import LatencyModel
from edgeprune.plan import Plan
from edgeprune.search.problem import Problem, measured_ratio
from edgeprune.trial import Trial


class Memory:
    """The told trials of one search.

    Attributes:
        model: calibrated on every trial that was measured.
        told: number of trials told.
        fits: plan digest → whether it met the budget; None for a candidate that failed.
        pending: the plan asked for and not told yet. Asking again returns it, so a searcher's state depends on
            what it was told and on nothing else.
        best: the plan with the highest reward among those that fit, None while none does.
    """

    def __init__(self, problem: Problem) -> None:
        self.model = LatencyModel(problem)
        self.told = 0
        self.fits: dict[str, bool | None] = {}
        self.pending: Plan | None = None
        self.best: Plan | None = None
        self._best_reward = float("-inf")
        self._full = problem.space.full().digest

    def ask(self, plan: Plan) -> Plan:
        """Return `plan`, which is now pending."""
        self.pending = plan
        return plan

    def tell(self, trial: Trial) -> None:
        """Remember a trial: of the pending plan, or of any other that the harness measured."""
        plan, ratio = trial.plan, measured_ratio(trial)
        if ratio is not None and plan.digest not in self.fits and plan.digest != self._full:
            self.model.observe(plan.widths, ratio.p50, ratio.high)
        if ratio is not None and trial.score.feasible and trial.score.reward > self._best_reward:
            self.best, self._best_reward = plan, trial.score.reward
        self.fits[plan.digest] = trial.score.feasible if ratio is not None else None
        self.told += 1
        if self.pending is not None and self.pending.digest == plan.digest:
            self.pending = None
