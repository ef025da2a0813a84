"""Every trial, fact and incident of a run, durable the moment the call returns: one SQLite file.

    ledger.sqlite
    ├── runs             every run key, oldest first
    ├── trials           one row a candidate ─┐
    ├── measurements     one row a timing  ◀──┘  (cached trials share it)
    ├── samples          raw nanoseconds, one row a session, packed
    ├── facts            (run, name) → JSON: what a stage found
    └── incidents        what the lab did; never a trial

Write-ahead log with ``synchronous=FULL``: a row whose `append` returned survives SIGKILL and a power cut. Every row
carries the SHA-256 of its content, so that a flipped bit is an error and never a number.
"""

import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import URL, RowMapping
from sqlalchemy.exc import DBAPIError

from edgeprune.canonical import canonical_json, digest
from edgeprune.errors import ConfigError, DeviceBusy, EdgepruneError, LedgerError, StorageFull
from edgeprune.ledger_tables import (
    APPLICATION_ID,
    FACTS,
    INCIDENTS,
    MEASUREMENTS,
    METADATA,
    RUNS,
    SAMPLES,
    SCHEMA_VERSION,
    TRIALS,
)
from edgeprune.measurement import Measurement, Session
from edgeprune.plan import Plan
from edgeprune.run_lock import RunLock
from edgeprune.samples import packed, samples_sha256, unpacked
from edgeprune.trial import Failure, Quality, Score, Trial


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Something the lab did while a run was going on.

    Attributes:
        at: UTC, ISO 8601.
        kind: name of the error class.
        message: what happened.
        plan_digest: of the plan that was being tried, None outside a trial.
    """

    at: str
    kind: str
    message: str
    plan_digest: str | None = None


def utc_now() -> str:
    """Return the time in UTC as ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Ledger:
    """An open ledger; made by `Ledger.open`, closed by leaving it as a context manager."""

    def __init__(self, path: Path, engine: Engine, lock: RunLock | None, now: Callable[[], str]) -> None:
        self.path = path
        self._engine = engine
        self._lock = lock
        self._now = now

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False, now: Callable[[], str] = utc_now) -> "Ledger":
        """Return the ledger at `path`, created if missing, held for this process alone.

        Args:
            path: the SQLite file; ``<path>.lock`` beside it tells other processes that it is in use.
            read_only: look without holding it, also while another process writes; the file must exist.
            now: the clock behind every `created_at`.

        Raises:
            DeviceBusy: if another run holds it.
            LedgerError: if the file is corrupt, is not a ledger or was written by another schema.
            StorageFull: if the disk is full.
            ConfigError: if the folder cannot be written, or `read_only` and there is no such file.
        """
        path = Path(path).absolute()
        if read_only and not path.is_file():
            raise ConfigError(f"there is no ledger at {path}", next_step="name the folder of a run")
        lock = None if read_only else RunLock.take(path.with_name(path.name + ".lock"))
        engine = _engine(path, read_only=read_only)
        try:
            with _translated(path):
                _examine(path, engine, create=not read_only)
        except BaseException:
            engine.dispose()
            if lock:
                lock.release()
            raise
        return cls(path, engine, lock, now)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let other processes have it; closing twice is harmless."""
        self._engine.dispose()
        if self._lock:
            self._lock.release()
            self._lock = None

    def append(self, run: str, trial: Trial, *, seed: int) -> None:
        """Store `trial` durably; an equal trial that is already there is left as it is.

        Raises:
            LedgerError: if another trial has this run, phase and number, or a value is not JSON (NaN included).
            StorageFull: if the disk is full; every earlier row is whole.
        """
        with self._transaction() as connection:
            before = _find_trial(connection, run, trial.phase, trial.number)
            if before is not None:
                _require_same(self.path, connection, before, trial, seed)
                return
            _name_run(connection, run, self._now())
            with _refusing(f"trial {trial.number} of phase {trial.phase!r}"):
                timing = _store_measurement(connection, trial.measurement)
                connection.execute(insert(TRIALS), _trial_row(run, trial, timing, seed, self._now()))

    def trials(self, run: str, phase: str | None = None) -> list[Trial]:
        """Return the trials of `run` as they were appended, raw samples included.

        Raises:
            LedgerError: if a row is damaged.
        """
        return list(self.each_trial(run, phase))

    def each_trial(self, run: str, phase: str | None = None) -> Iterator[Trial]:
        """Yield what `trials` returns one at a time, holding one trial's samples in memory and no transaction."""
        query = select(TRIALS.c.seq).where(TRIALS.c.run == run).order_by(TRIALS.c.seq)
        if phase is not None:
            query = query.where(TRIALS.c.phase == phase)
        with self._transaction() as connection:
            places = connection.execute(query).scalars().all()
        for place in places:
            with self._transaction() as connection:
                row = connection.execute(select(TRIALS).where(TRIALS.c.seq == place)).mappings().one()
                trial = _trial(self.path, connection, row)
            yield trial

    def measurement(self, profile_digest: str, artifact_sha256: str, reference_sha256: str) -> Measurement | None:
        """Return the newest steady measurement of this engine against this sentinel under this profile, of any run.

        A measurement with flags is never returned: it is worth repeating.

        Raises:
            LedgerError: if the row is damaged.
        """
        columns = MEASUREMENTS.c
        query = (
            select(MEASUREMENTS)
            .where(columns.profile_digest == profile_digest, columns.artifact_sha256 == artifact_sha256)
            .where(columns.reference_sha256 == reference_sha256, columns.flags == "[]")
            .order_by(columns.seq.desc())
            .limit(1)
        )
        with self._transaction() as connection:
            row = connection.execute(query).mappings().one_or_none()
            return None if row is None else _measurement(self.path, connection, row)

    def record(self, run: str, name: str, value: object) -> None:
        """Store the JSON `value` under `name`, replacing what was there; the order of mappings is kept.

        Raises:
            LedgerError: if `value` is not JSON (NaN included).
            StorageFull: if the disk is full; every earlier row is whole.
        """
        with _refusing(f"fact {name!r}"):
            row = _sealed({"run": run, "name": name, "value": _text(value), "created_at": self._now()})
        with self._transaction() as connection:
            _name_run(connection, run, row["created_at"])
            connection.execute(sqlite.insert(FACTS).values(row).on_conflict_do_update(set_=row))

    def fact(self, run: str, name: str) -> Any:
        """Return the JSON value stored under `name`, or None.

        Raises:
            LedgerError: if the row is damaged.
        """
        with self._transaction() as connection:
            query = select(FACTS).where(FACTS.c.run == run, FACTS.c.name == name)
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else json.loads(_unsealed(self.path, "fact", row)["value"])

    def note_incident(self, run: str, *, kind: str, message: str, plan: Plan | None = None) -> None:
        """Store that the lab failed in this way, while `plan` was being tried.

        Raises:
            StorageFull: if the disk is full; every earlier row is whole.
        """
        printable = message.encode("utf-8", "backslashreplace").decode()
        during = plan.digest if plan else None
        row = {"run": run, "at": self._now(), "kind": kind, "message": printable, "plan_digest": during}
        with self._transaction() as connection:
            _name_run(connection, run, self._now())
            connection.execute(insert(INCIDENTS), _sealed(row))

    def incidents(self, run: str) -> list[Incident]:
        """Return the incidents of `run`, oldest first.

        Raises:
            LedgerError: if a row is damaged.
        """
        query = select(INCIDENTS).where(INCIDENTS.c.run == run).order_by(INCIDENTS.c.seq)
        with self._transaction() as connection:
            rows = connection.execute(query).mappings().all()
        checked = [_unsealed(self.path, "incident", row) for row in rows]
        return [Incident(**{each: row[each] for each in ("at", "kind", "message", "plan_digest")}) for row in checked]

    def runs(self) -> list[str]:
        """Return the keys of all runs, oldest first."""
        with self._transaction() as connection:
            return list(connection.execute(select(RUNS.c.run).order_by(RUNS.c.seq)).scalars())

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with _translated(self.path), self._engine.begin() as connection:
            yield connection


# Opening


def _engine(path: Path, *, read_only: bool) -> Engine:
    engine = create_engine(
        URL.create("sqlite+pysqlite", database=_uri(path, read_only=read_only), query={"uri": "true"}),
        connect_args={"timeout": 10.0},
        pool_size=1,
        max_overflow=0,
    )
    event.listen(engine, "connect", _reader if read_only else _writer)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def _uri(path: Path, *, read_only: bool) -> str:
    # A reader of a write-ahead log writes its shared-memory file; where the folder forbids that there is no writer.
    frozen = read_only and not os.access(path.parent, os.W_OK)
    return f"{path.as_uri()}?mode=ro&immutable=1" if frozen else path.as_uri()


def _writer(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # transactions are begun by us, so that creating the tables is one as well
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _reader(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA query_only=ON")


def _examine(path: Path, engine: Engine, *, create: bool) -> None:
    with engine.begin() as connection:
        tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_schema").scalar_one()
        if create and not tables:
            METADATA.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
        _require_ours(path, connection)
        verdict = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one()
        if verdict != "ok":
            raise _damaged(path, f"SQLite says: {verdict}")


def _require_ours(path: Path, connection: Connection) -> None:
    if connection.exec_driver_sql("PRAGMA application_id").scalar_one() != APPLICATION_ID:
        raise LedgerError(f"{path} is not an edgeprune ledger", next_step="name another file, or move this one away")
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if version != SCHEMA_VERSION:
        why = f"it has schema {version}, this edgeprune reads {SCHEMA_VERSION}"
        raise LedgerError(f"{path} was written by another edgeprune", why=why, next_step="use that one, or a new --out")


# Errors


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        raise _translation(path, error.orig) from error
    except sqlite3.Error as error:
        raise _translation(path, error) from error


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        advice = "store finite numbers and plain JSON values"
        raise LedgerError(f"{what} cannot be written", why=str(error), next_step=advice) from error


_REFUSED_WRITES = (
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_DIR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
)


def _translation(path: Path, error: BaseException | None) -> EdgepruneError:
    code = getattr(error, "sqlite_errorcode", 0)
    if code & 0xFF == sqlite3.SQLITE_FULL or code in _REFUSED_WRITES:
        return _full(path, str(error))
    if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return _busy(path)
    if code & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return ConfigError(f"{path} cannot be written", why=str(error), next_step="choose a folder you may write")
    return _damaged(path, str(error))


def _full(path: Path, why: str) -> StorageFull:
    advice = "free some space and run the same command again: it continues"
    return StorageFull(f"no room to write {path}", why=why, next_step=advice)


def _busy(path: Path) -> DeviceBusy:
    advice = "wait until it is done, or write to another --out"
    return DeviceBusy(f"another edgeprune run holds {path.parent}", next_step=advice)


def _damaged(path: Path, why: str) -> LedgerError:
    advice = "put back a copy, or move it away with its -wal file and run the same command again: it starts over"
    return LedgerError(f"the ledger {path} cannot be read", why=why, next_step=advice)


# Rows


def _text(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _sealed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "sha256": digest(dict(row))}


def _unsealed(path: Path, kind: str, row: RowMapping) -> dict[str, Any]:
    content = {name: value for name, value in row.items() if name not in ("seq", "sha256")}
    try:
        whole = row["sha256"] == digest(content)
    except (TypeError, ValueError):  # a damaged column can come back as bytes or as an infinity
        whole = False
    if not whole:
        raise _damaged(path, f"a {kind} written at {content.get('created_at', content.get('at'))} changed on disk")
    return content


def _name_run(connection: Connection, run: str, now: str) -> None:
    connection.execute(sqlite.insert(RUNS).values(run=run, created_at=now).on_conflict_do_nothing())


def _real(value: float) -> float:
    # SQLite stores -0.0 as 0.0 and hands whole numbers of a REAL column back as floats; the seal must not see that.
    return float(value) + 0.0


def _trial_row(run: str, trial: Trial, measurement: str | None, seed: int, now: str) -> dict[str, Any]:
    timing = trial.measurement
    row = {
        "run": run,
        "phase": trial.phase,
        "number": trial.number,
        "strategy": trial.strategy,
        "seed": seed,
        "plan_digest": trial.plan.digest,
        "plan": _text(trial.plan.to_json()),
        "graph_sha256": trial.graph_sha256,
        "artifact_sha256": timing.artifact_sha256 if timing else None,
        "profile_digest": timing.profile_digest if timing else None,
        "reference_sha256": timing.reference_sha256 if timing else None,
        "measurement": measurement,
        "failure": _text(asdict(trial.failure)) if trial.failure else None,
        "quality": _text(asdict(trial.quality)) if trial.quality else None,
        "reward": _real(trial.score.reward),
        "feasible": bool(trial.score.feasible),
        "terms": _text(dict(trial.score.terms)),
        "seconds": _text(dict(trial.seconds)),
        "cached": bool(trial.cached),
        "created_at": now,
    }
    return _sealed(row)


def _find_trial(connection: Connection, run: str, phase: str, number: int) -> RowMapping | None:
    columns = TRIALS.c
    query = select(TRIALS).where(columns.run == run, columns.phase == phase, columns.number == number)
    return connection.execute(query).mappings().one_or_none()


def _require_same(path: Path, connection: Connection, row: RowMapping, trial: Trial, seed: int) -> None:
    before = _trial(path, connection, row)
    if row["seed"] == seed and canonical_json(before.to_json()) == canonical_json(trial.to_json()):
        return
    why = "the row already there differs"
    advice = "a run is replayed, never rewritten: use another --out for another run"
    raise LedgerError(f"trial {trial.number} of phase {trial.phase!r} is taken", why=why, next_step=advice)


def _trial(path: Path, connection: Connection, row: RowMapping) -> Trial:
    content = _unsealed(path, "trial", row)
    quality, failure = content["quality"], content["failure"]
    terms = json.loads(content["terms"])
    return Trial(
        number=content["number"],
        phase=content["phase"],
        strategy=content["strategy"],
        plan=Plan.from_json(json.loads(content["plan"])),
        graph_sha256=content["graph_sha256"],
        measurement=_measurement_of(path, connection, content["measurement"]),
        failure=Failure(**json.loads(failure)) if failure else None,
        quality=Quality(**json.loads(quality)) if quality else None,
        score=Score(reward=content["reward"], feasible=content["feasible"], terms=terms),
        seconds=json.loads(content["seconds"]),
        cached=content["cached"],
    )


# Measurements and their samples


def _measurement_id(measurement: Measurement) -> str:
    """Return the SHA-256 of everything a measurement says, raw samples included."""
    sessions = [
        [each.single_threaded, samples_sha256(each.candidate), samples_sha256(each.reference)]
        for each in measurement.sessions
    ]
    return digest(_measurement_facts(measurement) | {"sessions": sessions})


def _measurement_facts(measurement: Measurement) -> dict[str, Any]:
    return {
        "profile_digest": measurement.profile_digest,
        "artifact_sha256": measurement.artifact_sha256,
        "reference_sha256": measurement.reference_sha256,
        "taken_at": measurement.taken_at,
        "seconds": _real(measurement.seconds),
        "metric": measurement.metric,
        "emulated": bool(measurement.emulated),
        "conditions": _text(dict(measurement.conditions)),
        "layers": _text(dict(measurement.layers)),
        "flags": _text(list(measurement.flags)),
    }


def _store_measurement(connection: Connection, measurement: Measurement | None) -> str | None:
    if measurement is None:
        return None
    name = _measurement_id(measurement)
    row = {"id": name} | _measurement_facts(measurement)
    stored = connection.execute(sqlite.insert(MEASUREMENTS).values(row).on_conflict_do_nothing())
    if stored.rowcount and measurement.sessions:
        connection.execute(insert(SAMPLES), [_session_row(name, k, s) for k, s in enumerate(measurement.sessions)])
    return name


def _session_row(measurement: str, number: int, session: Session) -> dict[str, Any]:
    return {
        "measurement": measurement,
        "session": number,
        "single_threaded": session.single_threaded,
        "candidate": packed(session.candidate),
        "reference": packed(session.reference),
    }


def _measurement_of(path: Path, connection: Connection, name: str | None) -> Measurement | None:
    if name is None:
        return None
    query = select(MEASUREMENTS).where(MEASUREMENTS.c.id == name)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise _damaged(path, f"measurement {name[:12]} is missing")
    return _measurement(path, connection, row)


def _measurement(path: Path, connection: Connection, row: RowMapping) -> Measurement:
    query = select(SAMPLES).where(SAMPLES.c.measurement == row["id"]).order_by(SAMPLES.c.session)
    try:
        sessions = tuple(_session(each) for each in connection.execute(query).mappings())
        facts = {name: value for name, value in row.items() if name not in ("seq", "id")}
        facts |= {name: json.loads(facts[name]) for name in ("conditions", "layers", "flags")}
        measurement = Measurement(**{**facts, "sessions": sessions, "flags": tuple(facts["flags"])})
        whole = _measurement_id(measurement) == row["id"]
    except (ValueError, TypeError, KeyError, zlib.error) as error:
        raise _damaged(path, f"measurement {row['id']!s:.12}: {error}") from error
    if not whole:
        raise _damaged(path, f"measurement {row['id']!s:.12} changed on disk")
    return measurement


def _session(row: RowMapping) -> Session:
    candidate, reference = unpacked(row["candidate"]), unpacked(row["reference"])
    return Session(candidate=candidate, reference=reference, single_threaded=row["single_threaded"])
