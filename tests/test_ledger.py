"""The ledger keeps what it acknowledged, refuses what is damaged, and hands back exactly what it was given."""

import itertools
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune.errors import ConfigError, DeviceBusy, EdgepruneError, LedgerError, StorageFull
from edgeprune.ledger import Incident, Ledger
from edgeprune.measurement import Calls, Measurement, Session
from edgeprune.plan import Plan
from edgeprune.samples import packed, unpacked
from edgeprune.trial import Failure, Quality, Score, Trial

fork = multiprocessing.get_context("fork")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")


def calls(rng: random.Random, typical_ns: float, count: int = 60) -> Calls:
    wall = tuple(int(typical_ns * (1 + abs(rng.gauss(0, 0.05)))) for _ in range(count))
    return Calls(elapsed=wall, on_cpu=tuple(each - 7 for each in wall), preempted=tuple(each % 2 for each in wall))


def measurement(seed: int = 0, *, flags: tuple[str, ...] = (), artifact: str = "a") -> Measurement:
    rng = random.Random(seed)
    sessions = tuple(Session(candidate=calls(rng, 5e5), reference=calls(rng, 1e6)) for _ in range(2))
    return Measurement(
        profile_digest="p" * 64,
        artifact_sha256=artifact * 64,
        reference_sha256="r" * 64,
        sessions=sessions,
        conditions={"load": [0.5, 0.25], "threads": 1, "governor": None},
        taken_at="2026-01-01T00:00:00+00:00",
        seconds=1.5,
        layers={"conv2": 3.5, "conv1": 1.25},
        flags=flags,
    )


def trial(number: int, *, timing: Measurement | None = None, phase: str = "search") -> Trial:
    rng = random.Random(number)
    return Trial(
        number=number,
        phase=phase,
        strategy="ddpg",
        plan=Plan(kept={"b": tuple(sorted(rng.sample(range(16), 8))), "a": (0, 1)}),
        graph_sha256=f"{number:064x}",
        measurement=timing or measurement(number),
        failure=None,
        quality=Quality(accuracy=rng.random(), entropy=None, images=512),
        score=Score(reward=rng.random(), feasible=bool(number % 2), terms={"latency": rng.random(), "accuracy": 0.1}),
        seconds={"cut": 0.01, "ask": 0.002},
    )


def failed(number: int, message: str = "13 channels") -> Trial:
    return Trial(
        number=number,
        phase="search",
        strategy="random",
        plan=Plan(kept={"a": (0,)}),
        graph_sha256=None,
        measurement=None,
        failure=Failure(kind="CompileError", message=message),
        quality=None,
        score=Score(reward=-1.0, feasible=False),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ledger.sqlite"


def test_trials_come_back_as_they_were_appended_after_reopening(path: Path) -> None:
    stored = [trial(0), failed(1), trial(2, phase="final")]
    with Ledger.open(path) as ledger:
        for each in stored:
            ledger.append("r1", each, seed=7)
    with Ledger.open(path) as ledger:
        assert ledger.trials("r1") == stored
        assert ledger.trials("r1", "final") == [stored[2]]
        assert ledger.trials("r2") == []
        assert ledger.runs() == ["r1"]
        assert ledger.trials("r1")[0].measurement.ratio() == stored[0].measurement.ratio()


_texts = st.text(max_size=12)
_finite = st.floats(allow_nan=False, allow_infinity=False)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | _finite | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)
_nanoseconds = st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 2**63))


@st.composite
def _calls(draw: st.DrawFn) -> Calls:
    rows = draw(st.lists(st.tuples(_nanoseconds, _nanoseconds, st.integers(0, 99)), max_size=6))
    columns = tuple(zip(*rows, strict=True)) or ((), (), ())
    return Calls(elapsed=columns[0], on_cpu=columns[1], preempted=columns[2])


_session = st.builds(Session, candidate=_calls(), reference=_calls(), single_threaded=st.booleans())
_measurements = st.builds(
    Measurement,
    profile_digest=_texts,
    artifact_sha256=_texts,
    reference_sha256=_texts,
    sessions=st.lists(_session, max_size=3).map(tuple),
    conditions=st.dictionaries(_texts, _json, max_size=3),
    taken_at=_texts,
    seconds=_finite,
    metric=_texts,
    emulated=st.booleans(),
    layers=st.dictionaries(_texts, _finite, max_size=3),
    flags=st.lists(_texts, max_size=2).map(tuple),
)
_any_text = st.text(st.characters(), max_size=12)
_qualities = st.builds(Quality, accuracy=_finite, entropy=st.none() | _finite, images=st.integers())
_failures = st.builds(Failure, kind=_texts, message=_any_text)


@st.composite
def _trials(draw: st.DrawFn, number: int) -> Trial:
    timing = draw(st.none() | _measurements)
    return Trial(
        number=number,
        phase=draw(_texts),
        strategy=draw(_texts),
        plan=Plan(kept=draw(st.dictionaries(_texts, st.lists(st.integers(0, 99), max_size=4).map(tuple), max_size=3))),
        graph_sha256=draw(st.none() | _texts),
        measurement=timing,
        failure=None if timing else draw(_failures),
        quality=draw(
            st.none() | st.builds(Quality, accuracy=_finite, entropy=st.none() | _finite, images=st.integers())
        ),
        score=Score(
            reward=draw(_finite | st.integers(-9, 9)),
            feasible=draw(st.booleans()),
            terms=draw(st.dictionaries(_texts, _finite, max_size=3)),
        ),
        seconds=draw(st.dictionaries(_texts, _finite, max_size=3)),
        cached=draw(st.booleans()),
    )


_counter = itertools.count()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_trial_comes_back_equal_with_its_mappings_in_order(tmp_path: Path, data: st.DataObject) -> None:
    number = next(_counter)
    given_trial = data.draw(_trials(number))
    with Ledger.open(tmp_path / "any.sqlite") as ledger:
        ledger.append(f"run {number}", given_trial, seed=data.draw(st.integers(-(2**63), 2**63 - 1)))
        (back,) = ledger.trials(f"run {number}")
    assert back == given_trial
    assert list(back.score.terms) == list(given_trial.score.terms)
    if given_trial.measurement:
        assert list(back.measurement.layers) == list(given_trial.measurement.layers)


@given(_calls())
def test_packed_samples_unpack_to_the_same_integers(timed: Calls) -> None:
    assert unpacked(packed(timed)) == timed


def test_two_hundred_calls_take_a_kilobyte_or_two() -> None:
    assert len(packed(calls(random.Random(0), 1e6, 200))) < 2000


def test_calls_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="inhomogeneous"):
        packed(Calls(elapsed=(1, 2), on_cpu=(1,), preempted=(0, 0)))


def test_appending_an_equal_trial_again_changes_nothing(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.append("r", trial(0), seed=1)
        ledger.append("r", trial(0), seed=1)
        assert ledger.trials("r") == [trial(0)]


@pytest.mark.parametrize(("other", "seed"), [(trial(0, timing=measurement(9)), 1), (failed(0), 1), (trial(0), 2)])
def test_a_different_trial_under_a_taken_number_is_refused(path: Path, other: Trial, seed: int) -> None:
    with Ledger.open(path) as ledger:
        ledger.append("r", trial(0), seed=1)
        with pytest.raises(LedgerError, match="trial 0 of phase 'search' is taken"):
            ledger.append("r", other, seed=seed)
        assert ledger.trials("r") == [trial(0)]


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused_and_leaves_no_row(path: Path, reward: float) -> None:
    broken = Trial(**{**vars(failed(0)), "score": Score(reward=reward, feasible=False)})
    with Ledger.open(path) as ledger:
        with pytest.raises(LedgerError, match="cannot be written"):
            ledger.append("r", broken, seed=0)
        assert ledger.trials("r") == []
        assert ledger.runs() == []


def test_a_seed_that_sqlite_cannot_hold_is_refused_with_a_typed_error(path: Path) -> None:
    with Ledger.open(path) as ledger, pytest.raises(LedgerError, match="too large"):
        ledger.append("r", trial(0), seed=2**70)


def test_a_cached_trial_shares_the_samples_of_the_first(path: Path) -> None:
    timing = measurement()
    with Ledger.open(path) as ledger:
        ledger.append("r", trial(0, timing=timing), seed=0)
        ledger.append("r", trial(1, timing=timing), seed=0)
        assert [each.measurement for each in ledger.trials("r")] == [timing, timing]
    with sqlite3.connect(path) as plain:
        assert plain.execute("select count(*) from measurements").fetchone() == (1,)
        assert plain.execute("select count(*) from samples").fetchone() == (2,)


def test_a_measurement_is_found_by_profile_engine_and_sentinel_newest_first(path: Path) -> None:
    old, new, flagged = measurement(1), measurement(2), measurement(3, flags=("reference 31 % slow",))
    with Ledger.open(path) as ledger:
        for number, timing in enumerate((old, new, flagged)):
            ledger.append("an earlier run", trial(number, timing=timing), seed=0)
        assert ledger.measurement("p" * 64, "a" * 64, "r" * 64) == new
        for other in (("q" * 64, "a" * 64, "r" * 64), ("p" * 64, "b" * 64, "r" * 64), ("p" * 64, "a" * 64, "s" * 64)):
            assert ledger.measurement(*other) is None


def test_a_flagged_measurement_is_never_a_cache_hit(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.append("r", trial(0, timing=measurement(flags=("machine slow",))), seed=0)
        assert ledger.measurement("p" * 64, "a" * 64, "r" * 64) is None


def test_facts_are_replaced_and_keep_the_order_of_mappings(path: Path) -> None:
    with Ledger.open(path) as ledger:
        assert ledger.fact("r", "shares") is None
        ledger.record("r", "shares", {"z": 1})
        ledger.record("r", "shares", {"z": 0.1, "a": [None, True, "\ud800"]})
    with Ledger.open(path) as ledger:
        assert list(ledger.fact("r", "shares").items()) == [("z", 0.1), ("a", [None, True, "\ud800"])]
        assert ledger.fact("other", "shares") is None


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"bytes"])
def test_a_fact_that_is_not_json_is_refused(path: Path, value: object) -> None:
    with Ledger.open(path) as ledger, pytest.raises(LedgerError, match="fact 'x' cannot be written"):
        ledger.record("r", "x", value)


def test_an_incident_is_kept_apart_from_trials(path: Path) -> None:
    plan = Plan(kept={"a": (0,)})
    with Ledger.open(path, now=lambda: "now") as ledger:
        ledger.note_incident("r", kind="DeviceLost", message="worker gone \udcff", plan=plan)
        ledger.note_incident("r", kind="Unstable", message="noisy")
        assert ledger.incidents("r") == [
            Incident(at="now", kind="DeviceLost", message="worker gone \\udcff", plan_digest=plan.digest),
            Incident(at="now", kind="Unstable", message="noisy", plan_digest=None),
        ]
        assert ledger.trials("r") == []
        assert ledger.runs() == ["r"]


def _hold(path: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with Ledger.open(path):
        ready.set()
        time.sleep(60)


def test_a_second_process_is_told_that_the_run_is_held_until_the_first_dies(path: Path) -> None:
    ready = fork.Event()
    holder = fork.Process(target=_hold, args=(path, ready))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(DeviceBusy, match="another edgeprune run holds"):
        Ledger.open(path)
    holder.kill()
    holder.join()
    with Ledger.open(path) as ledger:
        assert ledger.runs() == []


def test_the_holder_cannot_open_its_ledger_twice_but_anyone_may_read(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.append("r", trial(0), seed=0)
        with pytest.raises(DeviceBusy):
            Ledger.open(path)
        with Ledger.open(path, read_only=True) as reader:
            assert reader.trials("r") == [trial(0)]
            ledger.append("r", trial(1), seed=0)
            assert len(reader.trials("r")) == 2
            with pytest.raises(ConfigError):
                reader.record("r", "x", 1)
    with Ledger.open(path) as ledger:
        assert len(ledger.trials("r")) == 2


def test_reading_trials_holds_no_transaction_that_an_append_would_wait_for(path: Path) -> None:
    with Ledger.open(path) as ledger:
        for number in range(3):
            ledger.append("r", trial(number), seed=0)
        for each in ledger.each_trial("r"):
            ledger.append("replay", each, seed=0)
        assert ledger.trials("replay") == ledger.trials("r")


def test_reading_a_ledger_that_does_not_exist_says_so_and_creates_nothing(path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no ledger"):
        Ledger.open(path, read_only=True)
    assert not path.exists()


def _in_child(action, *args) -> str:
    """Return what `action` returned in a forked process, or the name of the error it raised."""
    out, into = fork.Pipe(duplex=False)

    def body() -> None:
        try:
            into.send(action(*args))
        except BaseException as error:
            into.send(type(error).__name__)

    child = fork.Process(target=body)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    return out.recv()


def _as_nobody(action, *args) -> object:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setuid(65534)
    return action(*args)


def _count(path: Path) -> int:
    with Ledger.open(path, read_only=True) as reader:
        return len(reader.trials("r"))


def _open(path: Path) -> None:
    Ledger.open(path).close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Yield a folder that other users may enter; pytest's own are private."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
        Path(name).chmod(0o755)


def test_a_ledger_in_a_folder_without_write_permission_can_be_read_but_not_run(open_folder: Path) -> None:
    path = open_folder / "ledger.sqlite"
    with Ledger.open(path) as ledger:
        ledger.append("r", trial(0), seed=0)
    path.chmod(0o444)
    path.with_name("ledger.sqlite.lock").unlink()
    open_folder.chmod(0o555)
    assert _in_child(_as_nobody, _count, path) == 1
    assert _in_child(_as_nobody, _open, path) == "ConfigError"


# Sudden death


def _write_until_killed(path: Path, acknowledged: int) -> None:
    with Ledger.open(path) as ledger:
        for number in itertools.count(len(ledger.trials("r"))):
            ledger.append("r", trial(number), seed=0)
            os.write(acknowledged, b".")


def _acknowledged_until_killed(path: Path, rows: int, seconds: float) -> int:
    """Return how many rows a child acknowledged that is killed some seconds after it acknowledged `rows`."""
    out, into = os.pipe()
    child = fork.Process(target=_write_until_killed, args=(path, into))
    child.start()
    os.close(into)
    with os.fdopen(out, "rb", buffering=0) as stream:
        seen = sum(len(stream.read(1)) for _ in range(rows))
        time.sleep(seconds)
        child.kill()
        child.join()
        return seen + len(stream.read())


def test_rows_acknowledged_before_sigkill_exist_and_every_row_is_whole(path: Path) -> None:
    """Kills at random moments: while the ledger is opened, when it is fresh, and between and inside appends."""
    rng, kept = random.Random(5), 0
    for rows in (0, 0, 0, 1, 2, 0, 3, 0, 1, 4, 0, 2, 5, 1):
        kept += _acknowledged_until_killed(path, rows, rng.uniform(0, 0.05))
        with Ledger.open(path) as ledger:
            stored = ledger.trials("r")
        assert stored == [trial(number) for number in range(len(stored))]
        assert kept <= len(stored) <= kept + 1
        kept = len(stored)
    assert kept >= 19


# Full disk


def _append_until_refused(path: Path) -> None:
    with Ledger.open(path) as ledger:
        for number in range(1000):
            ledger.append("r", trial(number), seed=0)


def _limited(limit: int, path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    _append_until_refused(path)


def _assert_whole(path: Path) -> int:
    with Ledger.open(path) as ledger:
        stored = ledger.trials("r")
        assert stored == [trial(number) for number in range(len(stored))]
        ledger.append("r", trial(len(stored)), seed=0)
    return len(stored)


@pytest.mark.parametrize("limit", [0, 4096, 60_000, 200_000, 333_333])
def test_a_file_that_may_not_grow_is_storage_full_and_earlier_rows_are_whole(path: Path, limit: int) -> None:
    path.parent.mkdir()
    assert _in_child(_limited, limit, path) == "StorageFull"
    assert _assert_whole(path) >= (3 if limit > 100_000 else 0)


@needs_root
def test_a_full_file_system_is_storage_full_and_earlier_rows_are_whole(path: Path) -> None:
    path.parent.mkdir()
    mounted = os.spawnlp(os.P_WAIT, "mount", "mount", "-t", "tmpfs", "-o", "size=512k", "none", str(path.parent))
    if mounted:
        pytest.skip("this machine allows no mount; the file-size limit above stands in for it")
    try:
        with pytest.raises(StorageFull, match="no room to write"):
            _append_until_refused(path)
        os.spawnlp(os.P_WAIT, "mount", "mount", "-o", "remount,size=8m", str(path.parent))
        assert _assert_whole(path) > 10
    finally:
        os.spawnlp(os.P_WAIT, "umount", "umount", str(path.parent))


# Damage


@pytest.fixture
def bytes_of_a_ledger(path: Path) -> bytes:
    with Ledger.open(path) as ledger:
        for number in range(12):
            ledger.append("r", trial(number), seed=0)
        ledger.append("r", failed(12), seed=0)
        ledger.record("r", "outcome", {"ratio": 0.5, "why": "x" * 3000})
        ledger.note_incident("r", kind="Unstable", message="noisy")
    return path.read_bytes()


def _everything(path: Path) -> object:
    with Ledger.open(path) as ledger:
        return ledger.runs(), ledger.trials("r"), ledger.fact("r", "outcome"), ledger.incidents("r")


def test_a_flipped_byte_is_refused_or_harmless_but_never_a_wrong_value(path: Path, bytes_of_a_ledger: bytes) -> None:
    """Two hundred places, seeded; a third is unused space or padding."""
    whole, rng, refused = _everything(path), random.Random(11), 0
    for _ in range(200):
        damaged = bytearray(bytes_of_a_ledger)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert _everything(path) == whole
        except LedgerError:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.99])
def test_a_truncated_ledger_is_refused(path: Path, bytes_of_a_ledger: bytes, share: float) -> None:
    path.write_bytes(bytes_of_a_ledger[: int(len(bytes_of_a_ledger) * share)])
    with pytest.raises(LedgerError):
        _everything(path)


def test_the_refused_file_is_left_as_it_is(path: Path, bytes_of_a_ledger: bytes) -> None:
    damaged = bytes_of_a_ledger[: len(bytes_of_a_ledger) // 2]
    path.write_bytes(damaged)
    with pytest.raises(LedgerError, match="cannot be read"):
        Ledger.open(path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [b"not a database, but longer than a header " * 40, b"{}"])
def test_a_file_that_is_no_database_is_refused(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LedgerError):
        Ledger.open(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as plain:
        plain.execute("create table theirs (x)")
    plain.close()
    with pytest.raises(LedgerError, match="is not an edgeprune ledger"):
        Ledger.open(path)


def test_a_ledger_of_another_schema_is_refused(path: Path) -> None:
    with Ledger.open(path):
        pass
    with sqlite3.connect(path) as plain:
        plain.execute("pragma user_version=99")
    plain.close()
    with pytest.raises(LedgerError, match="another edgeprune") as caught:
        Ledger.open(path)
    assert "schema 99" in caught.value.why


def test_after_a_refusal_the_run_is_not_held(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"x" * 5000)
    for _ in range(2):
        with pytest.raises(LedgerError):
            Ledger.open(path)
    path.unlink()
    Ledger.open(path).close()


def test_a_folder_in_place_of_the_file_is_a_typed_error(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(EdgepruneError):
        Ledger.open(path)


def test_a_hand_edited_reward_is_refused(path: Path, bytes_of_a_ledger: bytes) -> None:
    with sqlite3.connect(path) as plain:
        plain.execute("update trials set reward = 99 where number = 3")
    plain.close()
    with Ledger.open(path) as ledger, pytest.raises(LedgerError, match="cannot be read"):
        ledger.trials("r")


def test_hand_edited_samples_are_refused(path: Path, bytes_of_a_ledger: bytes) -> None:
    faster = packed(calls(random.Random(99), 1e5))
    with sqlite3.connect(path) as plain:
        plain.execute("update samples set candidate = ? where session = 0", (faster,))
    plain.close()
    with Ledger.open(path) as ledger, pytest.raises(LedgerError):
        ledger.measurement("p" * 64, "a" * 64, "r" * 64)


def test_the_score_terms_can_be_read_with_sql_alone(path: Path, bytes_of_a_ledger: bytes) -> None:
    with sqlite3.connect(path) as plain:
        rows = plain.execute("select number, reward, json_extract(terms, '$.latency'), seed from trials order by seq")
        first = rows.fetchone()
    assert first == (0, trial(0).score.reward, trial(0).score.terms["latency"], 0)
