"""Keeps queue, progress and store in step: every event goes through here, once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from raybooth.errors import RayBoothError
from raybooth.fleet.events import Event, StateEvent, StepEvent
from raybooth.fleet.progress import Progress
from raybooth.fleet.queue import ACTIVE, LEASE_S, Queue
from raybooth.store import Store

PROGRESS_S = 1.0
"""Train steps go to the queue at most this often."""


class Heartbeat:
    """Renews an owner's leases from a thread of its own, for as long as the context lasts."""

    def __init__(self, queue: Queue, owner: str, every_s: float = LEASE_S / 6) -> None:
        self._queue, self._owner, self._every_s = queue, owner, every_s
        self._held: frozenset[str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def held(self) -> frozenset[str] | None:
        """Jobs whose lease was ours at the last beat; None before the first."""
        return self._held

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5)
        self._queue.release(self._owner)

    def _beat(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self._held = frozenset(self._queue.renew(self._owner))
            except RayBoothError:
                continue  # the next beat tries again; the lease outlives several


class JobLedger:
    """The one place that changes what is known of our jobs."""

    def __init__(
        self, queue: Queue, store: Store, progress: Progress, owner: str, heartbeat: Heartbeat
    ) -> None:
        self._queue, self._store, self._progress = queue, store, progress
        self._owner, self._heartbeat = owner, heartbeat
        self._steps: dict[str, tuple[int, float | None]] = {}
        self._flushed = 0.0

    def apply(self, event: Event, *, pack: str | None = None) -> bool:
        """Takes an event in; False when it is about a job that is not ours (any more)."""
        match event:
            case StepEvent():
                self._steps[event.job_id] = (event.train_step, event.loss)
                if time.monotonic() - self._flushed > PROGRESS_S:
                    self.flush()
            case StateEvent():
                if not self._is_ours(event.job_id):
                    return False
                job = self._progress.jobs[event.job_id]
                self.flush()
                if event.train_step is not None:
                    self._queue.progress({event.job_id: (event.train_step, job.loss)})
                job.pack = pack or job.pack
                self._queue.move(
                    event.job_id, event.state, owner=self._owner, error=event.error, pack=pack
                )
                if event.state not in ACTIVE:
                    self._store.drop_preview(job.subject_id, event.job_id)
        self._progress.apply(event)
        return True

    def flush(self) -> None:
        """What is known of train steps is in the queue."""
        self._flushed = time.monotonic()
        steps, self._steps = self._steps, {}
        ours = {job_id: step for job_id, step in steps.items() if self._is_ours(job_id)}
        if ours:
            self._queue.progress(ours)

    def lost(self, job_ids: Iterable[str]) -> frozenset[str]:
        """Those of our open jobs whose lease another trainer has now."""
        held = self._heartbeat.held
        if held is None:
            return frozenset()
        doubtful = (job_id for job_id in job_ids if job_id not in held)
        return frozenset(job_id for job_id in doubtful if not self._is_ours(job_id))

    def is_open(self, job_id: str) -> bool:
        """Whether the job has not ended yet."""
        return self._progress.jobs[job_id].state in ACTIVE

    def published_reference(self, job_id: str) -> str | None:
        """`subject@version` that the job published, None when it has not."""
        record = self._store.published_job(self._progress.jobs[job_id].subject_id, job_id)
        return None if record is None else record.reference

    def _is_ours(self, job_id: str) -> bool:
        known = job_id in self._progress.jobs
        return known and self._queue.get(job_id).lease_owner == self._owner
