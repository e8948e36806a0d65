"""The training loop of one pack: resume, step, checkpoint, hand over finished slots; no Ray."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybooth.model.base import Base
from raybooth.training.checkpoint import CheckpointWriter, SlotState, load_latest
from raybooth.training.job import SlotJob, SlotReport
from raybooth.training.pack import Pack
from raybooth.training.validation import Validation

_NOT_THE_RESULT = {
    *("pack", "resources", "checkpoint", "gradient_checkpointing", "samples", "min_images"),
    "validation",
}
"""Parts of a train config that a slot's weights do not depend on."""


@dataclass(frozen=True, slots=True)
class PackReport:
    """What one call of `train_pack` did."""

    finished: tuple[str, ...]
    failed: dict[str, str]
    """Error by job id."""
    cancelled: tuple[str, ...]
    stopped: tuple[str, ...]
    """Jobs that a stop left unfinished; their states are on disk."""
    num_pack_steps: int
    num_subject_steps: int
    seconds: float
    """Spent in train steps alone."""
    notes: tuple[str, ...]
    """Damaged checkpoints that were passed over."""

    @property
    def subject_steps_per_s(self) -> float:
        return self.num_subject_steps / self.seconds if self.seconds > 0 else 0.0


def train_pack(
    base: Base,
    jobs: Sequence[SlotJob],
    *,
    checkpoint_root: Path,
    on_report: Callable[[list[SlotReport]], None] = lambda reports: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_finished: Callable[[SlotJob, Pack], None] = lambda job, pack: None,
    cancelled: Callable[[], Collection[str]] = tuple,
    validation: Validation | None = None,
    on_checkpoint: Callable[[SlotJob, Pack, SlotState], None] = lambda job, pack, state: None,
) -> PackReport:
    """Train `jobs` together to their ends, going on from checkpoint_root/<job_id>.

    `on_report` gets every train step's reports; `should_stop` is asked between train steps (all
    states are written, then the call returns); `cancelled` names jobs to take out now;
    `on_finished` gets each job once its last state is on disk, again if the process died since.
    `validation` watches its jobs and may end them early. `on_checkpoint` gets each job that goes
    on with the state that is being written, its slot as it was then. A job whose state cannot be
    written fails alone. Raises CheckpointError when a state cannot be read.

    Jobs that began together with one checkpoint rhythm, and keep two, end bit for bit as if
    nothing had been when their pack is killed at any moment and trained again: slots go on from
    the newest train step that all of them have on disk, and everybody's state is written when
    somebody leaves. Resumed beside other jobs, a state is the same bits and its next steps are
    the same up to rounding.
    """
    states, notes = _load(base, jobs, checkpoint_root)
    pack = Pack(base, jobs, states=states)
    try:
        fresh = {job.job_id for job in jobs} - states.keys()
        return _Loop(
            base, jobs, pack, checkpoint_root, tuple(notes), fresh, validation, on_checkpoint
        ).run(on_report, should_stop, on_finished, cancelled)
    finally:
        pack.close()


def job_fields(base: Base, job: SlotJob) -> dict[str, Any]:
    """What makes a checkpoint this job's: base, seed, subject, train config, images."""
    prior = job.tensors.prior
    digests = "\n".join(prior.image_digests) if prior is not None else ""
    return {
        "base": base.fingerprint,
        "subject_id": job.subject_id,
        "seed": job.seed,
        "masters": "float64" if str(base.dtype) == "torch.float64" else "float32",
        "train": job.train.model_dump(mode="json", exclude=_NOT_THE_RESULT),
        "photos": list(job.tensors.photo_digests),
        "sidecars": list(job.tensors.sidecar_digests),
        "prior_images": hashlib.sha256(digests.encode()).hexdigest(),
    }


class _Loop:
    def __init__(
        self,
        base: Base,
        jobs: Sequence[SlotJob],
        pack: Pack,
        root: Path,
        notes: tuple[str, ...],
        fresh: Collection[str],
        validation: Validation | None,
        on_checkpoint: Callable[[SlotJob, Pack, SlotState], None],
    ) -> None:
        self._pack, self._root, self._notes, self._fresh = pack, root, notes, fresh
        self._validation, self._on_checkpoint = validation, on_checkpoint
        self._jobs = {job.job_id: job for job in jobs}
        self._fields = {job.job_id: job_fields(base, job) for job in jobs}
        self._failed: dict[str, str] = {}
        self._num_pack_steps = self._num_subject_steps = 0
        self._seconds = 0.0

    def run(
        self,
        on_report: Callable[[list[SlotReport]], None],
        should_stop: Callable[[], bool],
        on_finished: Callable[[SlotJob, Pack], None],
        cancelled: Callable[[], Collection[str]],
    ) -> PackReport:
        pack, validation = self._pack, self._validation

        def finish(job: SlotJob) -> None:
            if validation is not None:
                validation.settle(pack, job.job_id)
            on_finished(job, pack)

        with CheckpointWriter() as writer:
            if validation is not None:
                validation.resume(pack)
            for job_id, job in self._jobs.items():
                if pack.status(job_id) == "finished":
                    finish(job)
                elif job_id in self._fresh:
                    self._save_one(writer, job_id)
            while pack.active:
                taken = [pack.cancel(job_id) for job_id in cancelled() if job_id in pack.active]
                if taken:
                    on_report(taken)
                if should_stop():
                    break
                reports = self._step()
                if validation is not None:
                    reports = validation.after_step(pack, reports)
                on_report(reports)
                self._save(writer, [*taken, *reports])
                if unsaved := self._fail_unsaved(writer):
                    on_report(unsaved)
                for report in reports:
                    if pack.status(report.job_id) == "finished":
                        finish(self._jobs[report.job_id])
            for job_id in pack.active:
                self._save_one(writer, job_id)
            writer.flush()
            if unsaved := self._fail_unsaved(writer):
                on_report(unsaved)
        return self._report()

    def _step(self) -> list[SlotReport]:
        start = time.perf_counter()
        reports = self._pack.step()
        self._seconds += time.perf_counter() - start
        self._num_pack_steps += bool(reports)
        self._num_subject_steps += len(reports)
        for report in reports:
            if report.status == "failed":
                self._failed[report.job_id] = report.error or "failed"
        return reports

    def _save(self, writer: CheckpointWriter, reports: Sequence[SlotReport]) -> None:
        """States that are due; all of them when somebody leaves, on disk before he is published."""
        left = any(report.status != "running" for report in reports)
        for report in reports:
            every = self._jobs[report.job_id].train.checkpoint.every_steps
            due = report.status == "running" and (left or report.train_step % every == 0)
            if due or report.status == "finished":
                self._save_one(writer, report.job_id)
        if left:
            writer.flush()

    def _fail_unsaved(self, writer: CheckpointWriter) -> list[SlotReport]:
        """Jobs whose state the disk does not take leave the pack; older states stay."""
        reports = []
        for folder, error in writer.errors().items():
            job_id = folder.name
            self._failed[job_id] = str(error)
            reports.append(self._pack.cancel(job_id, str(error)))
        return reports

    def _save_one(self, writer: CheckpointWriter, job_id: str) -> None:
        keep = self._jobs[job_id].train.checkpoint.keep
        state = self._pack.state(job_id)
        writer.save(self._root / job_id, state, self._fields[job_id], keep)
        if state.train_step and self._pack.status(job_id) == "running":
            self._on_checkpoint(self._jobs[job_id], self._pack, state)

    def _report(self) -> PackReport:
        by_status = {job_id: self._pack.status(job_id) for job_id in self._jobs}
        return PackReport(
            finished=tuple(j for j, status in by_status.items() if status == "finished"),
            failed=self._failed,
            cancelled=tuple(j for j, status in by_status.items() if status == "cancelled"),
            stopped=tuple(j for j, status in by_status.items() if status == "running"),
            num_pack_steps=self._num_pack_steps,
            num_subject_steps=self._num_subject_steps,
            seconds=self._seconds,
            notes=self._notes,
        )


def _load(
    base: Base, jobs: Sequence[SlotJob], root: Path
) -> tuple[dict[str, SlotState], list[str]]:
    """Each job's newest state, or an older one from the train step where the hindmost stands."""
    states: dict[str, SlotState] = {}
    notes: list[str] = []
    for job in jobs:
        found = load_latest(root / job.job_id, job_fields(base, job))
        notes += found.notes
        if found.state is not None:
            states[job.job_id] = found.state
    steps = {job.job_id: job.train.num_train_steps for job in jobs}
    running = [s.train_step for name, s in states.items() if s.train_step < steps[name]]
    hindmost = min(running, default=max(steps.values()))
    for job in jobs:
        state = states.get(job.job_id)
        if state is not None and state.train_step > hindmost:
            older = load_latest(root / job.job_id, job_fields(base, job), train_step=hindmost)
            states[job.job_id] = older.state or state
    return states, notes
