"""The straight line: what a trial says is what the cut graph, the target, the evaluator and the reward said."""

import resource
from collections.abc import Iterator
from pathlib import Path

import families
import formula_bench
import onnx
import pytest

from edgeprune.artifact import Artifact
from edgeprune.errors import CompileError, DeviceLost, StorageFull
from edgeprune.evaluate import Stopwatch, evaluate, write_graph
from edgeprune.ledger import Ledger
from edgeprune.measurement import Measurement, Sampling
from edgeprune.plan import Plan
from edgeprune.reward import score
from edgeprune.target import Target
from edgeprune.trial import Trial


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[formula_bench.Rig]:
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        yield formula_bench.rig(tmp_path, ledger)


class Fails:
    """A target whose compiler or clock fails with an error of your choice."""

    def __init__(self, target: Target, error: Exception, *, at: str) -> None:
        self._target, self._error, self._at = target, error, at
        self.profile = target.profile

    def compile(self, graph: Artifact) -> Artifact:
        return self._do("compile", graph)

    def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
        return self._do("measure", engine, sampling)

    def _do(self, what, *arguments):
        if what == self._at:
            raise self._error
        return getattr(self._target, what)(*arguments)


def narrow(rig: formula_bench.Rig, share: float = 0.5) -> Plan:
    return rig.problem.plan({each.name: each.nearest(share * each.width) for each in rig.problem.space.groups})


def tried(rig: formula_bench.Rig, plan: Plan, **changes: object) -> Trial:
    bench = rig.bench
    settings = {"target": bench.target, "number": 3, "phase": "search", "strategy": "x", "watch": Stopwatch()} | changes
    target = settings.pop("target")
    return evaluate(plan, bench.base, target, bench.judge, bench.sampling, **settings)


def test_a_trial_holds_what_was_seen_and_its_score(rig) -> None:
    """Timing of the cut graph, quality of the cut model, and the reward computed from just these two."""
    plan = narrow(rig)
    seen = tried(rig, plan)
    bench = rig.bench
    graph = write_graph(bench.base.cutter.cut(plan), bench.base.folder / "again.onnx", bench.base.inputs)
    timing = bench.target.measure(bench.target.compile(graph), bench.sampling)
    quality = bench.base.evaluator.quality(plan)
    assert seen.graph_sha256 == graph.sha256 == seen.measurement.artifact_sha256
    assert seen.measurement.sessions == timing.sessions
    assert seen.quality == quality
    expected = score(quality, timing.ratio(), baseline=bench.judge.baseline, limit_ratio=bench.judge.limit_ratio)
    assert seen.score == expected
    assert (seen.number, seen.phase, seen.strategy, seen.plan, seen.failure) == (3, "search", "x", plan, None)


def test_the_unpruned_plan_has_ratio_one_and_the_baselines_accuracy(rig) -> None:
    """The ends of the scale are where they should be."""
    seen = tried(rig, rig.problem.space.full())
    assert seen.score.terms["latency_ratio"] == pytest.approx(1.0)
    assert seen.quality == rig.bench.judge.baseline
    assert not seen.score.feasible


def test_the_time_of_every_part_is_kept(rig) -> None:
    """Cut, measure, quality: the share of the overhead can be computed from the ledger."""
    seconds = tried(rig, narrow(rig)).seconds
    assert set(seconds) == {"cut", "measure", "quality"}
    assert min(seconds.values()) > 0


def test_a_judged_graph_is_deleted(rig) -> None:
    """Also one that the target refused, and one whose device was lost."""
    tried(rig, narrow(rig))
    tried(rig, narrow(rig), target=Fails(rig.bench.target, CompileError("no"), at="compile"))
    with pytest.raises(DeviceLost):
        tried(rig, narrow(rig), target=Fails(rig.bench.target, DeviceLost("gone"), at="measure"))
    assert [each.name for each in rig.bench.base.folder.glob("*.onnx")] == ["baseline.onnx"]


@pytest.mark.parametrize("at", ["compile", "measure"])
def test_a_candidate_the_target_refuses_is_a_failed_trial_with_the_worst_score(rig, at: str) -> None:
    """A failure and its words, no timing, no quality, and a score below that of any plan that runs."""
    failed = tried(rig, narrow(rig), target=Fails(rig.bench.target, CompileError("Conv_3", why="odd"), at=at))
    assert failed.failure.kind == "CompileError"
    assert "Conv_3: odd" in failed.failure.message
    assert (failed.measurement, failed.quality) == (None, None)
    assert not failed.score.feasible
    assert failed.score.reward < tried(rig, narrow(rig)).score.reward


def test_a_plan_of_another_space_is_a_failed_trial(rig) -> None:
    """It is the searcher's mistake, not the run's end."""
    failed = tried(rig, Plan(kept={"nowhere": (0,)}))
    assert failed.failure.kind == "PlanError"
    assert failed.graph_sha256 is None


def test_a_lost_device_is_raised_and_makes_no_trial(rig) -> None:
    """Nothing was learnt about the plan."""
    with pytest.raises(DeviceLost):
        tried(rig, narrow(rig), target=Fails(rig.bench.target, DeviceLost("gone"), at="measure"))


def test_an_earlier_timing_of_the_same_bytes_is_used_instead_of_a_new_one(rig) -> None:
    """The trial says so, and is scored as if it were its own."""
    plan = narrow(rig)
    first = tried(rig, plan)
    asked = []

    def remembered(profile: str, artifact: str, reference: str) -> Measurement:
        asked.append((profile, artifact, reference))
        return first.measurement

    second = tried(rig, plan, cache=remembered, target=Fails(rig.bench.target, DeviceLost("gone"), at="measure"))
    measured = first.measurement
    assert asked == [(measured.profile_digest, measured.artifact_sha256, measured.reference_sha256)]
    assert second.cached
    assert not first.cached
    assert second.score == first.score


def test_the_budgets_quantile_and_confidence_decide(rig) -> None:
    """The interval in a score is the one the budget speaks of."""
    judge = rig.bench.judge
    strict = type(judge)(baseline=judge.baseline, limit_ratio=judge.limit_ratio, confidence=0.999, quantile=0.9)
    seen = evaluate(
        narrow(rig),
        rig.bench.base,
        rig.bench.target,
        strict,
        rig.bench.sampling,
        number=0,
        phase="search",
        strategy="x",
        watch=Stopwatch(),
    )
    expected = seen.measurement.ratio(0.999, 0.9)
    assert (seen.score.terms["latency_low"], seen.score.terms["latency_high"]) == (expected.low, expected.high)


def test_a_graph_is_written_the_same_every_time(tmp_path: Path) -> None:
    """One plan, one digest: what was measured can be recognised."""
    made = families.prepared(formula_bench.FAMILY)
    one = write_graph(made.graph, tmp_path / "a.onnx", ())
    other = write_graph(made.graph, tmp_path / "b.onnx", (), lasting=True)
    assert one.sha256 == other.sha256
    assert onnx.load(other.path) == made.graph


def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    """Typed, and an earlier file that was meant to last is left whole."""
    made = families.prepared(formula_bench.FAMILY)
    place = tmp_path / "model.onnx"
    place.write_bytes(b"earlier")
    with file_size_limit(1000), pytest.raises(StorageFull):
        write_graph(made.graph, place, (), lasting=True)
    with file_size_limit(1000), pytest.raises(StorageFull):
        write_graph(made.graph, tmp_path / "candidate.onnx", ())
    assert place.read_bytes() == b"earlier"
    assert not list(tmp_path.glob(".*"))


class file_size_limit:  # noqa: N801 - used like a function
    """No file of this process grows beyond so many bytes during the block."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._most, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)
