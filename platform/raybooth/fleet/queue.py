"""The durable queue: one row a job in SQLite, legal state changes only, one trainer a job.

Every change is one committed transaction (WAL, full sync), so a killed process leaves the
queue whole. A job is trained by whoever holds its lease; the lease of a dead owner is free.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raybooth.errors import RayBoothError

JobState = Literal[
    "queued", "waiting_prior", "running", "publishing", "published", "failed", "cancelled"
]
MOVES: Mapping[JobState, frozenset[JobState]] = {
    "queued": frozenset({"waiting_prior", "running", "published", "failed", "cancelled"}),
    "waiting_prior": frozenset({"queued", "running", "published", "failed", "cancelled"}),
    "running": frozenset({"publishing", "published", "queued", "failed", "cancelled"}),
    "publishing": frozenset({"published", "running", "queued", "failed"}),  # its worker died
    "published": frozenset({"queued"}),  # the model was deleted from the store: train again
    "failed": frozenset({"queued", "published"}),
    "cancelled": frozenset({"queued", "published"}),
}
"""Which state may follow which."""

ACTIVE: frozenset[JobState] = frozenset({"queued", "waiting_prior", "running", "publishing"})
SCHEMA_VERSION = 1
LEASE_S = 60.0

_SCHEMA = """
CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY,
    fleet TEXT NOT NULL,
    subject_id TEXT NOT NULL,
    state TEXT NOT NULL,
    train_step INTEGER NOT NULL DEFAULT 0,
    num_train_steps INTEGER NOT NULL,
    loss REAL,
    error TEXT,
    attempt INTEGER NOT NULL DEFAULT 0,
    pack TEXT,
    spec TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    lease_owner TEXT,
    lease_until REAL
);
CREATE INDEX jobs_by_state ON jobs (state);
"""


class QueueError(RayBoothError):
    """The queue cannot be read or written, or is asked for an illegal change."""

    code = "queue_error"


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One subject's training job as the queue knows it."""

    job_id: str
    fleet: str
    subject_id: str
    state: JobState
    train_step: int
    num_train_steps: int
    loss: float | None
    error: str | None
    attempt: int
    pack: str | None
    spec: dict[str, Any]
    created_at: float
    updated_at: float
    started_at: float | None
    finished_at: float | None
    lease_owner: str | None
    lease_until: float | None


class Queue:
    """All jobs of one state folder; safe for many processes of one machine at once."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        is_dead: Callable[[str], bool] | None = None,
    ) -> None:
        self.path = path
        self._clock = clock
        self._is_dead = is_dead or owner_is_dead
        with self._transaction() as rows:
            self._open_schema(rows)

    def submit(
        self, job_id: str, *, fleet: str, subject_id: str, num_train_steps: int, spec: Any
    ) -> JobRecord:
        """The job of this id, added as `queued` if it is new; the same job twice is one job."""
        now = self._clock()
        with self._transaction() as rows:
            rows.execute(
                "INSERT INTO jobs (job_id, fleet, subject_id, state, num_train_steps, spec,"
                " created_at, updated_at) VALUES (?, ?, ?, 'queued', ?, ?, ?, ?)"
                " ON CONFLICT (job_id) DO UPDATE SET fleet = excluded.fleet, spec = excluded.spec",
                (job_id, fleet, subject_id, num_train_steps, json.dumps(spec), now, now),
            )
            return _get(rows, job_id)

    def get(self, job_id: str) -> JobRecord:
        """The job; QueueError when there is none."""
        with self._transaction(write=False) as rows:
            return _get(rows, job_id)

    def jobs(self, *, state: JobState | None = None, fleet: str | None = None) -> list[JobRecord]:
        """Jobs in order of submission, of one state or one fleet file if asked."""
        where, values = ["1"], []
        for column, value in (("state", state), ("fleet", fleet)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        query = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY created_at, rowid"
        with self._transaction(write=False) as rows:
            return [_record(row) for row in rows.execute(query, values)]

    def claim(
        self, job_ids: Iterable[str], owner: str, duration_s: float = LEASE_S
    ) -> tuple[str, ...]:
        """Those of the jobs whose lease `owner` now holds; the others are trained elsewhere."""
        now = self._clock()
        claimed = []
        with self._transaction() as rows:
            for job_id in job_ids:
                job = _get(rows, job_id)
                if self._is_free(job, owner, now):
                    rows.execute(
                        "UPDATE jobs SET lease_owner = ?, lease_until = ? WHERE job_id = ?",
                        (owner, now + duration_s, job_id),
                    )
                    claimed.append(job_id)
        return tuple(claimed)

    def renew(self, owner: str, duration_s: float = LEASE_S) -> tuple[str, ...]:
        """The heartbeat: extends every lease of `owner`; the ids that it still holds."""
        with self._transaction() as rows:
            rows.execute(
                "UPDATE jobs SET lease_until = ? WHERE lease_owner = ?",
                (self._clock() + duration_s, owner),
            )
            held = rows.execute("SELECT job_id FROM jobs WHERE lease_owner = ?", (owner,))
            return tuple(row["job_id"] for row in held)

    def release(self, owner: str, job_ids: Iterable[str] | None = None) -> None:
        """Gives the owner's leases back (all, or those of `job_ids`)."""
        query = "UPDATE jobs SET lease_owner = NULL, lease_until = NULL WHERE lease_owner = ?"
        with self._transaction() as rows:
            if job_ids is None:
                rows.execute(query, (owner,))
                return
            for job_id in job_ids:
                rows.execute(query + " AND job_id = ?", (owner, job_id))

    def move(
        self,
        job_id: str,
        state: JobState,
        *,
        owner: str | None = None,
        error: str | None = None,
        pack: str | None = None,
    ) -> JobRecord:
        """The job in its new state; QueueError for an illegal change or a lost lease.

        `failed` needs its reason; every other state clears the reason of an earlier attempt.
        """
        if state == "failed" and not error:
            raise QueueError(f"job {job_id} cannot fail without a reason", "no error text")
        now = self._clock()
        with self._transaction() as rows:
            job = _get(rows, job_id)
            if owner is not None and job.lease_owner != owner:
                found = f"its lease is held by {job.lease_owner or 'nobody'}"
                raise QueueError(f"job {job_id} is not ours to move", found)
            if state != job.state and state not in MOVES[job.state]:
                raise QueueError(f"job {job_id} cannot go to {state}", f"state {job.state}")
            starts = state == "running" and job.state != "running"
            ends = state not in ACTIVE
            rows.execute(
                "UPDATE jobs SET state = ?, error = ?, pack = COALESCE(?, pack), updated_at = ?,"
                " attempt = attempt + ?, started_at = CASE WHEN ? THEN ? ELSE started_at END,"
                " finished_at = ? WHERE job_id = ?",
                (state, error, pack, now, int(starts), starts, now, now if ends else None, job_id),
            )
            return _get(rows, job_id)

    def progress(self, steps: Mapping[str, tuple[int, float | None]]) -> None:
        """Notes the train step and loss of many jobs in one transaction."""
        now = self._clock()
        with self._transaction() as rows:
            rows.executemany(
                "UPDATE jobs SET train_step = ?, loss = ?, updated_at = ? WHERE job_id = ?",
                [(step, loss, now, job_id) for job_id, (step, loss) in steps.items()],
            )

    def _is_free(self, job: JobRecord, owner: str, now: float) -> bool:
        if job.lease_owner in (None, owner) or (job.lease_until or 0) <= now:
            return True
        return self._is_dead(str(job.lease_owner))

    def _open_schema(self, rows: sqlite3.Connection) -> None:
        version = int(rows.execute("PRAGMA user_version").fetchone()[0])
        if version == SCHEMA_VERSION:
            return
        tables = rows.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != 0 or tables:
            do = f"use the RayBooth that wrote it (this one knows version {SCHEMA_VERSION})"
            raise QueueError(f"the queue {self.path} is of another version", str(version), do)
        for statement in _SCHEMA.split(";"):
            rows.execute(statement)
        rows.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        """One committed transaction on a connection of its own (no state between calls)."""
        try:
            rows = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
        except sqlite3.Error as error:
            raise self._broken(error) from error
        try:
            rows.row_factory = sqlite3.Row
            rows.execute("PRAGMA journal_mode = WAL")
            rows.execute("PRAGMA synchronous = FULL")
            rows.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield rows
            except BaseException:
                rows.execute("ROLLBACK")
                raise
            rows.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._broken(error) from error
        finally:
            rows.close()

    def _broken(self, error: sqlite3.Error) -> QueueError:
        do = "check that the state folder is writable and its disk has room"
        return QueueError(f"the queue {self.path} cannot be used", str(error), do)


def this_owner() -> str:
    """A name for this process that no other process has, also after the pid is used again."""
    pid = os.getpid()
    return f"{socket.gethostname()}/{pid}/{_start_time(pid)}"


def owner_is_dead(owner: str) -> bool:
    """Whether `owner` is a process of this machine that has ended; False when not known."""
    parts = owner.split("/")
    if len(parts) != 3 or parts[0] != socket.gethostname() or not parts[1].isdigit():
        return False
    try:
        os.kill(int(parts[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _start_time(int(parts[1])) != parts[2]


def _start_time(pid: int) -> str:
    """Start of the process in clock ticks since boot (`unknown` where /proc does not say)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return text.rpartition(")")[2].split()[19]


def _get(rows: sqlite3.Connection, job_id: str) -> JobRecord:
    row = rows.execute("SELECT * FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    if row is None:
        raise QueueError(f"the queue holds no job {job_id}")
    return _record(row)


def _record(row: sqlite3.Row) -> JobRecord:
    values: dict[str, Any] = dict(zip(row.keys(), tuple(row), strict=True))
    return JobRecord(**{**values, "spec": json.loads(values["spec"])})
