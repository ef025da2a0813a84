"""Several formula devices as one target: spread, lost, drifting, quarantined, and never mixed."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from contract import TargetContract, convnet, quick

from edgeprune.artifact import Artifact
from edgeprune.errors import CompileError, DeviceBusy, DeviceLost, ProfileError, Unstable
from edgeprune.fleet import LOST_S, Fleet, examine_fleet, open_boards, open_fleet
from edgeprune.lease import Lease
from edgeprune.measurement import Measurement, Sampling
from edgeprune.profile import Profile, at_address, load_profile
from edgeprune.target import Finding, Packager, Selftest, Target, open_target

PROFILE = load_profile("formula", {"options": {"noise": 0.002}})
NAMES = ("one", "two", "three")


def boards(*names: str) -> list[Profile]:
    return [at_address(PROFILE, each) for each in names]


class Faults:
    """Opens formula devices that behave as their address says; counts what was opened and closed.

    Args:
        lose: address → 0-based measurements of a connection that lose it; "open": it cannot even be opened.
        slow: address → (after so many measurements, times as slow from then on).
        unstable: addresses that refuse every measurement.
    """

    def __init__(
        self,
        lose: Mapping[str, Any] | None = None,
        slow: Mapping[str, tuple[int, float]] | None = None,
        unstable: tuple[str, ...] = (),
    ) -> None:
        self.lose, self.slow, self.unstable = dict(lose or {}), dict(slow or {}), unstable
        self.opened: list[str] = []
        self.open_now: list[str] = []
        self.measured: dict[str, int] = {}
        self.compiled: list[tuple[str, str]] = []

    @contextmanager
    def __call__(self, profile: Profile) -> Iterator[Target]:
        name = str(profile.address)
        if self.lose.get(name) == "open":
            raise DeviceLost(f"{name} does not answer", why="its cable is loose")
        options = {**profile.options, "lose_at": self.lose.get(name, [])}
        with open_target(replace(profile, options=options)) as target:
            self.opened.append(name)
            self.open_now.append(name)
            try:
                yield Watched(target, profile, self)
            finally:
                self.open_now.remove(name)


class Watched:
    """A formula device on the bench of `Faults`."""

    def __init__(self, target: Target, profile: Profile, faults: Faults) -> None:
        self.target, self.profile, self.faults, self.name = target, profile, faults, str(profile.address)

    def compile(self, graph: Artifact) -> Artifact:
        engine = self.target.compile(graph)
        self.faults.compiled.append((self.name, graph.path.name))
        return replace(engine, kind=f"engine of {self.name}")

    def measure(self, engine: Artifact, sampling: Sampling) -> Measurement:
        if self.name in self.faults.unstable:
            raise Unstable(f"{self.name} is too hot")
        for each in (engine, sampling.reference):
            assert each.kind == f"engine of {self.name}", "boards were mixed"
        seen = self.target.measure(engine, sampling)
        count = self.faults.measured[self.name] = self.faults.measured.get(self.name, 0) + 1
        after, times = self.faults.slow.get(self.name, (0, 1.0))
        return slowed(seen, times) if count > after else seen

    def run(self, engine: Artifact, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        assert engine.kind == f"engine of {self.name}", "boards were mixed"
        return self.target.run(engine, inputs)


def slowed(seen: Measurement, times: float) -> Measurement:
    """Return a measurement of a machine that is so many times as slow: the ratio is the same."""

    def stretched(calls: Any) -> Any:
        longer = tuple(round(times * each) for each in calls.elapsed)
        return replace(calls, elapsed=longer, on_cpu=longer)

    sessions = [replace(s, candidate=stretched(s.candidate), reference=stretched(s.reference)) for s in seen.sessions]
    return replace(seen, sessions=tuple(sessions))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """Open fleets that are left when the test ends; each measurement goes to the next board unless told otherwise."""
    contexts: list[AbstractContextManager[Fleet]] = []

    def open_one(faults: Faults, names: tuple[str, ...] = NAMES, **settings: Any) -> Fleet:
        given = {"turn_s": 0.0, "wait_s": 0.0, "leases": tmp_path / "leases"} | settings
        context = open_fleet(boards(*names), faults, **given)
        contexts.append(context)
        return context.__enter__()

    yield open_one
    for each in contexts:
        each.__exit__(None, None, None)


@pytest.fixture
def small(tmp_path: Path) -> Artifact:
    return convnet(tmp_path / "small.onnx", (16, 16), 8)


@pytest.fixture
def large(tmp_path: Path) -> Artifact:
    return convnet(tmp_path / "large.onnx", (32, 64), 8)


def boards_of(fleet: Fleet, engine: Artifact, reference: Artifact, count: int) -> list[str]:
    return [fleet.measure(engine, quick(reference, seed=seed)).conditions["board"] for seed in range(count)]


class Tuned(Watched):
    """A board that writes down what it tuned."""

    graphs: ClassVar[list[str]] = []

    def tune(self, graph: Artifact, progress: Callable[[float, str], None]) -> None:
        self.graphs.append(graph.sha256)
        progress(1.0, "")


def test_one_board_tunes_for_all_and_boards_that_cannot_are_left_alone(tmp_path: Path, small: Artifact) -> None:
    @contextmanager
    def opened(profile: Profile) -> Iterator[Target]:
        with open_target(replace(profile, address=None)) as target:
            yield Tuned(target, profile, Faults())

    Tuned.graphs.clear()
    shares: list[float] = []
    with open_fleet(boards(*NAMES), opened, leases=tmp_path / "leases") as fleet:
        fleet.tune(small, lambda share, _: shares.append(share))
    assert (Tuned.graphs, shares) == ([small.sha256], [1.0])
    with open_fleet(boards(*NAMES), lambda each: open_target(replace(each, address=None)), leases=tmp_path) as fleet:
        fleet.tune(small, lambda share, _: shares.append(share))
    assert shares == [1.0]


# -- a fleet is a target ---------------------------------------------------------------------------------------------


class OfThree(ModuleType):
    """An adapter that only this test can open: three boards as one."""

    leases: Path

    @classmethod
    def connect(cls, profile: Profile) -> AbstractContextManager[Target]:
        alone = replace(profile, adapter="formula")

        @contextmanager
        def each(one: Profile) -> Iterator[Target]:
            with open_target(one) as target:
                yield target

        @contextmanager
        def all_of_them() -> Iterator[Target]:
            with open_fleet([at_address(alone, name) for name in NAMES], each, turn_s=0, leases=cls.leases) as fleet:
                fleet._profile = profile  # the contract compares it with what was opened
                yield fleet

        return all_of_them()

    @staticmethod
    def examine(profile: Profile) -> list[Finding]:
        return examine_fleet([at_address(replace(profile, adapter="formula"), name) for name in NAMES])


class TestFleetContract(TargetContract):
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Profile]:
        with pytest.MonkeyPatch.context() as patch:
            OfThree.leases = tmp_path_factory.mktemp("leases")
            patch.setitem(sys.modules, "edgeprune.targets.three_formulas", OfThree("three_formulas"))
            yield replace(PROFILE, adapter="three_formulas")


# -- spreading -------------------------------------------------------------------------------------------------------


def test_measurements_go_round_the_boards_and_say_which_they_were_on(fleet, small, large) -> None:
    faults = Faults()
    assert boards_of(fleet(faults), small, large, 6) == [*NAMES, *NAMES]
    assert faults.open_now == []


def test_a_board_is_held_until_its_turn_is_over(fleet, small, large) -> None:
    now = [0.0]
    faults = Faults()
    one = fleet(faults, turn_s=30.0, clock=lambda: now[0])
    assert boards_of(one, small, large, 3) == ["one"] * 3
    assert faults.opened == ["one"]
    now[0] = 31.0
    assert boards_of(one, small, large, 2) == ["one", "two"]


def test_a_graph_is_compiled_once_on_each_board_that_measures_it(fleet, small, large) -> None:
    faults = Faults()
    one = fleet(faults, turn_s=1e9)
    one.compile(small)
    boards_of(one, small, large, 4)
    assert sorted(faults.compiled) == [("one", "large.onnx"), ("one", "small.onnx")]


def test_the_ratio_is_that_of_one_board_whatever_the_others_are_like(fleet, small, large) -> None:
    """The second board is three times as slow; nobody can tell from a ratio."""
    one = fleet(Faults(slow={"two": (0, 3.0)}))
    seen = [one.measure(small, quick(large, seed=seed)) for seed in range(2)]
    assert seen[1].latency().p50 == pytest.approx(3 * seen[0].latency().p50, rel=0.02)
    assert seen[1].ratio().p50 == pytest.approx(seen[0].ratio().p50, rel=0.01)
    assert seen[0].comparable(seen[1])


def test_what_was_measured_is_named_by_its_graph_on_every_board(fleet, small, large) -> None:
    one = fleet(Faults())
    for _ in NAMES:
        seen = one.measure(small, quick(large))
        assert (seen.artifact_sha256, seen.reference_sha256) == (small.sha256, large.sha256)
        assert seen.profile_digest == one.profile.digest == PROFILE.digest
    assert one.profile.address is None


def test_a_board_that_another_holds_is_passed_over(fleet, small, large, tmp_path: Path) -> None:
    with Lease.take("one", folder=tmp_path / "leases"):
        assert boards_of(fleet(Faults()), small, large, 3) == ["two", "three", "two"]
    assert boards_of(fleet(Faults()), small, large, 1) == ["one"]


def test_two_fleets_share_the_boards(fleet, small, large) -> None:
    first, second = fleet(Faults(), turn_s=1e9), fleet(Faults(), turn_s=1e9)
    assert boards_of(first, small, large, 2) == ["one", "one"]
    assert boards_of(second, small, large, 2) == ["two", "two"]


def test_if_others_hold_every_board_the_wait_is_bounded(fleet, small, large, tmp_path: Path) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    one = fleet(Faults(), ("one", "two"), wait_s=5.0, clock=lambda: now[0], sleep=sleep)
    folder = tmp_path / "leases"
    with Lease.take("one", folder=folder), Lease.take("two", folder=folder), pytest.raises(DeviceBusy, match="in use"):
        one.measure(small, quick(large))
    assert now[0] == pytest.approx(5.0)


def test_leaving_gives_the_board_back(fleet, small, large, tmp_path: Path) -> None:
    faults = Faults()
    with open_fleet(boards(*NAMES), faults, leases=tmp_path / "leases") as one:
        one.measure(small, quick(large))
        assert one.board == "one"
        assert faults.open_now == ["one"]
    assert faults.open_now == []
    Lease.take("one", folder=tmp_path / "leases").release()


def test_outputs_come_from_the_board_that_is_held(fleet, small, large) -> None:
    import numpy as np

    one = fleet(Faults(), turn_s=1e9)
    one.measure(small, quick(large))
    assert one.run(small, {"x": np.zeros((1, 3, 8, 8), np.float32)})["y"].shape == (1, 10)


# -- losing ----------------------------------------------------------------------------------------------------------


def test_a_lost_board_is_set_aside_and_the_others_go_on(fleet, small, large) -> None:
    one = fleet(Faults(lose={"two": [0]}))
    assert boards_of(one, small, large, 5) == ["one", "three", "one", "three", "one"]
    notes = one.measure(small, quick(large)).notes
    assert any(each.startswith("board two is set aside: the formula device was lost") for each in notes)


def test_a_board_that_cannot_be_opened_is_set_aside(fleet, small, large) -> None:
    assert boards_of(fleet(Faults(lose={"one": "open"})), small, large, 3) == ["two", "three", "two"]


def test_if_none_is_left_each_is_named_with_its_reason_and_the_next_call_tries_them_again(fleet, small, large) -> None:
    faults = Faults(lose={"one": "open", "two": [0]})
    one = fleet(faults, ("one", "two"))
    with pytest.raises(DeviceLost, match="none of 2 boards is left") as lost:
        one.measure(small, quick(large))
    assert "one: one does not answer: its cable is loose; two: the formula device was lost" in lost.value.why
    faults.lose.clear()
    assert boards_of(one, small, large, 2) == ["one", "two"]


def test_a_lost_board_is_tried_again_later(fleet, small, large) -> None:
    now = [0.0]
    faults = Faults(lose={"one": "open"})
    one = fleet(faults, ("one", "two"), clock=lambda: now[0])
    assert boards_of(one, small, large, 2) == ["two", "two"]
    faults.lose.clear()
    now[0] = LOST_S + 1
    assert "one" in boards_of(one, small, large, 2)


def test_a_broken_candidate_is_no_fault_of_a_board(fleet, small, large, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    broken = Artifact.of(tmp_path / "broken.onnx", kind="onnx", inputs=small.inputs)
    one = fleet(Faults())
    with pytest.raises(CompileError):
        one.compile(broken)
    assert not any(each.trouble for each in one.boards)


# -- drifting --------------------------------------------------------------------------------------------------------


def test_a_board_whose_sentinel_drifts_is_put_in_quarantine_and_named(fleet, small, large) -> None:
    """The second board becomes half as fast after six measurements of its own."""
    one = fleet(Faults(slow={"two": (6, 2.0)}))
    seen = [one.measure(small, quick(large, seed=seed)) for seed in range(24)]
    flagged = [each for each in seen if each.flags]
    assert len(flagged) == 1
    assert flagged[0].conditions["board"] == "two"
    assert "board two is put in quarantine: its sentinel takes 2.0" in flagged[0].flags[0]
    place = seen.index(flagged[0])
    assert {each.conditions["board"] for each in seen[place + 1 :]} == {"one", "three"}
    assert all(any("board two is set aside" in note for note in each.notes) for each in seen[place + 1 :])


def test_a_board_that_becomes_faster_has_drifted_as_well(fleet, small, large) -> None:
    one = fleet(Faults(slow={"one": (6, 0.8)}), ("one", "two"))
    flags = [flag for seed in range(16) for flag in one.measure(small, quick(large, seed=seed)).flags]
    assert len(flags) == 1
    assert "takes 0.80 times as long" in flags[0]


def test_five_measurements_are_needed_to_speak_of_a_drift(fleet, small, large) -> None:
    one = fleet(Faults(slow={"one": (4, 2.0)}), ("one",))
    assert not any(one.measure(small, quick(large, seed=seed)).flags for seed in range(5))


def test_steady_boards_are_never_suspected(fleet, small, large) -> None:
    """Two hundred measurements with noise of 2 %."""
    noisy = replace(PROFILE, options={**PROFILE.options, "noise": 0.02})
    one = fleet(Faults(), ("one",))
    one.boards[0].profile = at_address(noisy, "one")
    assert not any(one.measure(small, quick(large, seed=seed)).flags for seed in range(200))


def test_each_sentinel_has_its_own_history(fleet, small, large) -> None:
    one = fleet(Faults(), ("one",))
    for seed in range(12):
        assert not one.measure(small, quick((small, large)[seed % 2], seed=seed)).flags


def test_if_the_last_board_drifts_the_next_call_says_why_none_is_left(fleet, small, large) -> None:
    one = fleet(Faults(slow={"one": (6, 2.0)}), ("one",))
    for seed in range(7):
        one.measure(small, quick(large, seed=seed))
    for _ in range(2):
        with pytest.raises(DeviceLost, match="none of 1 boards") as lost:
            one.measure(small, quick(large))
        assert "one: its sentinel takes 2.0" in lost.value.why


def test_an_unstable_board_gives_way_and_is_put_in_quarantine_after_three_times(fleet, small, large) -> None:
    one = fleet(Faults(unstable=("one",)), ("one", "two"), turn_s=0.0)
    seen = []
    for _ in range(8):
        try:
            seen.append(one.measure(small, quick(large)).conditions["board"])
        except Unstable as error:
            seen.append(error.what)
    assert seen == ["one is too hot", "two"] * 3 + ["two"] * 2
    assert "unstable 3 times in a row" in one.boards[0].quarantined


# -- what is no fleet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        ([], "no board"),
        (boards("one", "one"), "not told apart"),
        ([PROFILE], "not told apart"),
        ([*boards("one"), replace(boards("two")[0], precision="fp16")], "not of one kind"),
    ],
    ids=["none", "twice", "without an address", "of two kinds"],
)
def test_boards_that_are_no_fleet_are_refused(profiles: list[Profile], said: str) -> None:
    with pytest.raises(ProfileError, match=said), open_fleet(profiles):
        pass
    with pytest.raises(ProfileError, match=said):
        examine_fleet(profiles)


def test_examining_names_every_board() -> None:
    subjects = {each.subject for each in examine_fleet(boards("one", "two"))}
    assert {"one: formula", "two: formula"} <= subjects


# -- what a bundle holds ---------------------------------------------------------------------------------------------


class Packing(Watched):
    """A board that packages engines and tests bundles, by its own name."""

    def package(self, engine: Artifact) -> Mapping[str, Path]:
        assert engine.kind == f"engine of {self.name}", "boards were mixed"
        return {"engine": engine.path}

    def selftest(self, bundle: Path, model: Artifact, *, trusted: bool) -> Selftest:
        return Selftest(ok=trusted, detail=f"on {self.name}")


class PackingFaults(Faults):
    """The same bench with boards that package."""

    @contextmanager
    def __call__(self, profile: Profile) -> Iterator[Target]:
        with super().__call__(profile) as watched:
            yield Packing(watched.target, profile, self)


def test_a_board_packages_and_tests_for_its_kind(fleet: Callable[..., Fleet], small: Artifact, tmp_path: Path) -> None:
    boards = fleet(PackingFaults(lose={"one": "open"}))
    assert isinstance(boards, Packager)
    assert boards.package(boards.compile(small)) == {"engine": small.path}
    assert boards.selftest(tmp_path, small, trusted=True) == Selftest(ok=True, detail="on two")


def test_boards_that_hold_nothing_package_nothing(fleet: Callable[..., Fleet], small: Artifact, tmp_path: Path) -> None:
    boards = fleet(Faults())
    assert boards.package(boards.compile(small)) == {}
    assert not boards.selftest(tmp_path, small, trusted=True).ok


def test_one_board_is_opened_as_it_is_and_several_as_a_fleet() -> None:
    with open_boards([PROFILE]) as one, open_boards(boards("one", "two")) as several:
        assert not isinstance(one, Fleet)
        assert isinstance(several, Fleet)
