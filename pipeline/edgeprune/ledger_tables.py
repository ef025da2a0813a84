"""The tables of a ledger; `edgeprune.ledger` is the only reader and writer.

JSON is kept as text. Rows with a column `sha256` carry the digest of their other columns; a measurement's `id` is the
digest of everything it says, raw samples included.
"""

from sqlalchemy import Boolean, Column, Float, Integer, LargeBinary, MetaData, Table, Text, UniqueConstraint

APPLICATION_ID = 0x65647072
"""Marks the SQLite file as ours (``edpr``)."""

SCHEMA_VERSION = 2
"""Raised whenever a table changes shape."""

METADATA = MetaData()

RUNS = Table(
    "runs",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("run", Text, nullable=False, unique=True),
    Column("created_at", Text, nullable=False),
)

MEASUREMENTS = Table(
    "measurements",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("profile_digest", Text, nullable=False),
    Column("artifact_sha256", Text, nullable=False, index=True),
    Column("reference_sha256", Text, nullable=False),
    Column("taken_at", Text, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("metric", Text, nullable=False),
    Column("emulated", Boolean, nullable=False),
    Column("conditions", Text, nullable=False),
    Column("layers", Text, nullable=False),
    Column("flags", Text, nullable=False),
)

SAMPLES = Table(
    "samples",
    METADATA,
    Column("measurement", Text, primary_key=True),
    Column("session", Integer, primary_key=True),
    Column("single_threaded", Boolean, nullable=False),
    Column("candidate", LargeBinary, nullable=False),
    Column("reference", LargeBinary, nullable=False),
)

TRIALS = Table(
    "trials",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("run", Text, nullable=False),
    Column("phase", Text, nullable=False),
    Column("number", Integer, nullable=False),
    Column("strategy", Text, nullable=False),
    Column("seed", Integer, nullable=False),
    Column("plan_digest", Text, nullable=False),
    Column("plan", Text, nullable=False),
    Column("graph_sha256", Text),
    Column("artifact_sha256", Text),
    Column("profile_digest", Text),
    Column("reference_sha256", Text),
    Column("measurement", Text),
    Column("failure", Text),
    Column("quality", Text),
    Column("reward", Float, nullable=False),
    Column("feasible", Boolean, nullable=False),
    Column("terms", Text, nullable=False),
    Column("seconds", Text, nullable=False),
    Column("cached", Boolean, nullable=False),
    Column("created_at", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    UniqueConstraint("run", "phase", "number"),
)

FACTS = Table(
    "facts",
    METADATA,
    Column("run", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
    Column("created_at", Text, nullable=False),
    Column("sha256", Text, nullable=False),
)

INCIDENTS = Table(
    "incidents",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("run", Text, nullable=False),
    Column("at", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("plan_digest", Text),
    Column("sha256", Text, nullable=False),
)
