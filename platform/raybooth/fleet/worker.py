"""What happens inside a pack's worker: load the base once, encode, train, publish (no ray)."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raybooth.errors import BaseModelError, RayBoothError, StoreError
from raybooth.fleet.events import NoteEvent, PackEvent
from raybooth.fleet.planner import halves
from raybooth.fleet.reporter import Reporter
from raybooth.fleet.task import Member, PackOutcome, PackTask
from raybooth.store import Store

if TYPE_CHECKING:
    from raybooth.data.encode import SubjectTensors
    from raybooth.fleet.previewing import Previews
    from raybooth.model.base import Base
    from raybooth.training.job import SlotJob, SlotReport
    from raybooth.training.pack import Pack
    from raybooth.training.validation import Validation

CURVES = ("instance_loss", "prior_loss", "grad_norm", "learning_rate")
"""Figures of a train step that trackers draw beside the loss."""


def train_pack_fn(config: dict[str, Any]) -> dict[str, list[str]]:
    """The worker function of Ray Train: trains `config["task"]`, tells `config["monitor"]`.

    Safe to be killed at any moment and called again: published jobs are skipped, every other
    slot goes on from its own latest checkpoint.
    """
    reporter = Reporter(config["monitor"])
    try:
        outcome = PackWorker(config["task"], reporter).run()
    finally:
        reporter.close()
    return {
        "published": list(outcome.published),
        "failed": list(outcome.failed),
        "stopped": list(outcome.stopped),
    }


class PackWorker:
    """One pack, from subjects to published models."""

    def __init__(self, task: PackTask, reporter: Reporter) -> None:
        self._task = task
        self._reporter = reporter
        self._store = Store(task.folders.store)
        self._members = {member.job_id: member for member in task.members}
        self._published: list[str] = []
        self._failed: list[str] = []
        self._encode_s: dict[str, float] = {}
        self._held_out: dict[str, SubjectTensors | None] = {}
        self._train_started = 0.0

    def run(self) -> PackOutcome:
        """Trains and publishes every member that is neither published nor failed yet."""
        self._reporter.send(PackEvent(self._task.pack_id, "started", process=os.getpid()))
        waiting = self._waiting()
        if not waiting:
            return self._outcome()
        base = self._load_base()
        jobs = self._encode(base, waiting)
        if jobs and not self._reporter.should_stop():
            self._train_or_split(base, jobs)
        return self._outcome()

    def _waiting(self) -> list[Member]:
        """Members that are still to be trained."""
        failed = self._reporter.failed()
        waiting = []
        for job_id, member in self._members.items():
            if job_id in failed:
                self._failed.append(job_id)
                continue
            record = self._store.published_job(member.subject.subject_id, job_id)
            if record is None:
                waiting.append(member)
            else:
                self._is_published(job_id, record.reference)
        return waiting

    def _load_base(self) -> Base:
        import torch

        from raybooth.data.prior_key import DTYPES
        from raybooth.model.base import load_base

        task = self._task
        torch.set_num_threads(max(1, int(task.resources.num_cpus)))
        base = load_base(
            task.base,
            revision=task.revision,
            device="cuda" if task.resources.num_gpus else "cpu",
            dtype=getattr(torch, DTYPES[task.members[0].subject.train.precision]),
        )
        if base.fingerprint != task.base_fingerprint:
            raise BaseModelError(
                f"the base {task.base} is not the one that this fleet was planned for",
                f"fingerprint {base.fingerprint[:12]}, planned {task.base_fingerprint[:12]}",
                "have every node see the same weights",
            )
        return base

    def _encode(self, base: Base, members: Sequence[Member]) -> list[SlotJob]:
        """The members as slots; one whose photos, prior or checkpoint are bad fails alone."""
        from raybooth.data.encode import encode_subject
        from raybooth.data.prior import PriorCache
        from raybooth.fleet.validation import split_photos
        from raybooth.training.checkpoint import load_latest
        from raybooth.training.job import SlotJob
        from raybooth.training.loop import job_fields

        folders = self._task.folders
        priors = PriorCache(folders.priors)
        jobs = []
        for job_id, subject in ((member.job_id, member.subject) for member in members):
            if self._reporter.should_stop():
                break
            start = time.perf_counter()
            try:
                encoded = encode_subject(base, subject, folders.encoded, priors=priors)
                tensors, self._held_out[job_id] = split_photos(subject, encoded)
                job = SlotJob(
                    job_id,
                    subject.subject_id,
                    subject.seed,
                    subject.train,
                    tensors,
                    subject.class_noun,
                    subject.class_prompt,
                )
                state = load_latest(folders.checkpoints / job_id, job_fields(base, job)).state
            except (RayBoothError, OSError) as error:
                self._fail(job_id, error)
                continue
            self._encode_s[job_id] = time.perf_counter() - start
            step = state.train_step if state is not None else 0
            self._reporter.state(job_id, "running", train_step=step)
            jobs.append(job)
        return jobs

    def _train_or_split(
        self, base: Base, jobs: Sequence[SlotJob], *, may_split: bool = True
    ) -> None:
        """Trains the jobs together; out of memory, once more as two packs, one after the other."""
        from raybooth.fleet.shortage import is_out_of_memory, shortage
        from raybooth.model.resting import rest

        rest(base, text_encoders=not any(job.train.adapter.trains_text for job in jobs))
        try:
            self._train(base, jobs)
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        done = {*self._published, *self._failed, *self._reporter.cancelled()}
        left = {job.job_id: job for job in jobs if job.job_id not in done}
        told = shortage(base, [job.train for job in left.values()])
        parts = halves({name: job.train.num_rows for name, job in left.items()})
        if not may_split or not parts:
            for job_id in left:
                self._fail(job_id, told)
            return
        sizes = " + ".join(str(len(part)) for part in parts)
        self._note(f"{self._task.pack_id}: {told}; going on as {sizes}")
        for part in parts:
            self._train_or_split(base, [left[job_id] for job_id in part], may_split=False)

    def _train(self, base: Base, jobs: Sequence[SlotJob]) -> None:
        from raybooth.fleet.previewing import Previews
        from raybooth.fleet.validation import watch
        from raybooth.training.loop import train_pack

        root = self._task.folders.checkpoints
        subjects = {job_id: member.subject for job_id, member in self._members.items()}
        validation = watch(base, subjects, jobs, self._held_out, root)
        previews = Previews(
            base, subjects, self._held_out, self._store, self._task.revision, self._note
        )

        def publish(job: SlotJob, pack: Pack) -> None:
            previews.settle(job.job_id)
            self._publish(base, job, pack, validation)

        self._train_started = time.perf_counter()
        try:
            report = train_pack(
                base,
                jobs,
                checkpoint_root=root,
                on_report=lambda reports: self._on_report(reports, previews),
                should_stop=self._reporter.should_stop,
                on_finished=publish,
                cancelled=self._reporter.cancelled,
                validation=validation,
                on_checkpoint=previews.take,
            )
        finally:
            previews.close()
        for note in report.notes:
            self._note(note)

    def _note(self, text: str) -> None:
        self._reporter.send(NoteEvent(text))

    def _on_report(self, reports: Sequence[SlotReport], previews: Previews) -> None:
        for report in reports:
            if report.status == "failed":
                previews.settle(report.job_id)
                self._failed.append(report.job_id)
                reason = f"training failed: {report.error}"
                self._reporter.state(
                    report.job_id, "failed", error=reason, train_step=report.train_step
                )
            elif report.status != "cancelled" and math.isfinite(report.loss):
                step = report.job_id, report.train_step, report.loss
                self._reporter.step(*step, {name: getattr(report, name) for name in CURVES})

    def _publish(self, base: Base, job: SlotJob, pack: Pack, validation: Validation | None) -> None:
        from raybooth.fleet.publishing import publish_adapter

        self._reporter.state(job.job_id, "publishing")
        seconds = {
            "encode": round(self._encode_s[job.job_id], 3),
            "train": round(time.perf_counter() - self._train_started, 3),
        }
        try:
            record = publish_adapter(
                base,
                self._members[job.job_id].subject,
                job,
                pack,
                self._store,
                revision=self._task.revision,
                seconds=seconds,
                validation=validation,
            )
        except (RayBoothError, OSError, RuntimeError, ValueError) as error:
            self._fail(job.job_id, error)
            return
        self._is_published(job.job_id, record.reference)

    def _is_published(self, job_id: str, reference: str) -> None:
        """Says so, and removes what only an unfinished job needs."""
        self._published.append(job_id)
        shutil.rmtree(self._task.folders.checkpoints / job_id, ignore_errors=True)
        try:
            self._store.drop_preview(self._members[job_id].subject.subject_id)
        except StoreError as error:
            self._note(f"a preview stays: {error}")
        steps = self._members[job_id].subject.train.num_train_steps
        self._reporter.state(job_id, "published", reference=reference, train_step=steps)

    def _fail(self, job_id: str, error: Exception) -> None:
        self._failed.append(job_id)
        text = str(error) or type(error).__name__
        self._reporter.state(job_id, "failed", error=text)

    def _outcome(self) -> PackOutcome:
        done = {*self._published, *self._failed}
        stopped = tuple(job_id for job_id in self._members if job_id not in done)
        return PackOutcome(tuple(self._published), tuple(self._failed), stopped)
