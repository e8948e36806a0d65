"""Each running job's newest checkpoint, published as `subject@preview` beside the training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth.errors import RayBoothError
from raybooth.fleet.publishing import adapter_files, adapter_record
from raybooth.store import Store

if TYPE_CHECKING:
    from raybooth.data.encode import SubjectTensors
    from raybooth.model.base import Base
    from raybooth.model.learned import LearnedTokens
    from raybooth.model.lora import AdapterTensors
    from raybooth.store import AdapterRecord
    from raybooth.subject import Subject
    from raybooth.training.checkpoint import SlotState
    from raybooth.training.job import SlotJob
    from raybooth.training.pack import Pack


class Previews:
    """Writes on a thread of its own, at most one pending a job; training waits for no disk.

    What cannot be written is told, and the job goes on: its checkpoint is what it depends on.
    """

    def __init__(
        self,
        base: Base,
        subjects: Mapping[str, Subject],
        held_out: Mapping[str, SubjectTensors | None],
        store: Store,
        revision: str | None,
        on_problem: Callable[[str], None],
    ) -> None:
        """Subjects and their held-out photos by job id."""
        self._base, self._subjects, self._held_out = base, subjects, held_out
        self._store, self._revision, self._on_problem = store, revision, on_problem
        self._pool = ThreadPoolExecutor(1, "preview")
        self._pending: dict[str, Future[None]] = {}

    def take(self, job: SlotJob, pack: Pack, state: SlotState) -> None:
        """Queue the job's adapter as it is now, unless its config wants no previews."""
        subject = self._subjects[job.job_id]
        if not subject.train.previews:
            return
        adapter = pack.adapter(job.job_id)
        learned = pack.learned(job.job_id)
        held_out = self._held_out[job.job_id]
        record = adapter_record(
            self._base,
            subject,
            job,
            state,
            adapter,
            learned,
            held_out=() if held_out is None else held_out.photo_digests,
            revision=self._revision,
            seconds={},
        )
        self.settle(job.job_id)
        scale = subject.train.adapter.scale
        future = self._pool.submit(self._write, record, adapter, learned, scale)
        self._pending[job.job_id] = future

    def settle(self, job_id: str) -> None:
        """Return when what was queued of the job is in the store, or its error told."""
        future = self._pending.pop(job_id, None)
        error = future.exception() if future is not None else None
        if isinstance(error, RayBoothError | OSError):
            self._on_problem(f"{self._subjects[job_id].subject_id}: no new preview: {error}")
        elif error is not None:
            raise error

    def close(self) -> None:
        """Everything that was queued is written or told."""
        for job_id in tuple(self._pending):
            self.settle(job_id)
        self._pool.shutdown()

    def _write(
        self,
        record: AdapterRecord,
        adapter: AdapterTensors,
        learned: LearnedTokens | None,
        scale: float,
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="raybooth-") as name:
            files = adapter_files(Path(name), adapter, learned, scale)
            self._store.publish_preview(record, files)
