"""What happens inside the workers of one subject's full run (no ray): the first one speaks."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch.distributed as dist

from raybooth.errors import BaseModelError, PeerLostError, RayBoothError
from raybooth.fleet.events import NoteEvent, PackEvent
from raybooth.fleet.reporter import Reporter
from raybooth.fleet.task import PackTask
from raybooth.store import Store

if TYPE_CHECKING:
    from raybooth.data.encode import SubjectTensors
    from raybooth.model.base import Base
    from raybooth.training.full import FullReport
    from raybooth.training.full_loop import FullOutcome
    from raybooth.training.full_validation import FullValidation
    from raybooth.training.job import SlotJob

Result = TypeVar("Result")


def train_full_fn(config: dict[str, Any]) -> dict[str, list[str]]:
    """The worker function of Ray Train: `config["task"]` trained by the whole process group.

    Safe to be killed at any moment and called again: a published job is skipped, another goes on
    from its latest whole checkpoint. A lost worker is raised, for Ray Train starts all again.
    """
    reporter = Reporter(config["monitor"])
    try:
        return FullWorker(config["task"], reporter).run()
    finally:
        reporter.close()


class FullWorker:
    """One worker of a full run, from photos to the published model."""

    def __init__(self, task: PackTask, reporter: Reporter) -> None:
        self._task, self._reporter = task, reporter
        (member,) = task.members
        self._job_id, self._subject = member.job_id, member.subject
        self._store = Store(task.folders.store)
        self._is_first = dist.get_rank() == 0

    def run(self) -> dict[str, list[str]]:
        """Trains and publishes the subject; says in which of three ways it ended."""
        if self._is_first:
            self._reporter.send(PackEvent(self._task.pack_id, "started", process=os.getpid()))
        state = self._agreed(self._known() if self._is_first else None)
        if state is None:
            try:
                state = self._train()
            except PeerLostError:
                raise
            except (RayBoothError, OSError) as error:
                state = "failed"
                if self._is_first:
                    self._reporter.state(self._job_id, "failed", error=str(error))
        ways: dict[str, list[str]] = {"published": [], "failed": [], "stopped": []}
        ways[state].append(self._job_id)
        return ways

    def _known(self) -> str | None:
        """How the job ended in an earlier life of this run."""
        if self._job_id in self._reporter.failed():
            return "failed"
        record = self._store.published_job(self._subject.subject_id, self._job_id)
        if record is None:
            return None
        self._is_published(record.reference)
        return "published"

    def _train(self) -> str:
        from raybooth.training.full_loop import train_full

        base = self._together(self._load_base)
        start = time.perf_counter()
        job, validation = self._watched(base, self._encode(base))
        seconds = {"encode": round(time.perf_counter() - start, 3)}
        outcome = train_full(
            base,
            job,
            checkpoint_root=self._task.folders.checkpoints,
            on_start=self._on_start,
            on_report=self._on_report,
            should_stop=self._should_stop,
            validation=validation,
        )
        if self._is_first:
            for note in outcome.notes:
                self._reporter.send(NoteEvent(note))
        if outcome.weights is None:
            return "stopped"
        if self._is_first:
            self._publish(base, job, outcome, seconds, validation)
        return "published"

    def _load_base(self) -> Base:
        import torch

        from raybooth.model.base import load_base

        task = self._task
        torch.set_num_threads(max(1, int(task.resources.num_cpus)))
        # Ray Train lets the workers of a node see all of its GPUs.
        device = f"cuda:{os.environ['LOCAL_RANK']}" if task.resources.num_gpus else "cpu"
        base = load_base(task.base, revision=task.revision, device=device)
        if base.fingerprint != task.base_fingerprint:
            raise BaseModelError(
                f"the base {task.base} is not the one that this fleet was planned for",
                f"fingerprint {base.fingerprint[:12]}, planned {task.base_fingerprint[:12]}",
                "have every node see the same weights",
            )
        return base

    def _encode(self, base: Base) -> SlotJob:
        """The subject's tensors, by the first worker; the others read what it cached."""
        from raybooth.data.encode import encode_subject
        from raybooth.data.prior import PriorCache
        from raybooth.training.job import SlotJob

        folders, subject = self._task.folders, self._subject

        def encode() -> SubjectTensors:
            return encode_subject(base, subject, folders.encoded, priors=PriorCache(folders.priors))

        first = self._together(lambda: encode() if self._is_first else None)
        tensors = self._together(lambda: encode() if first is None else first)
        return SlotJob(
            self._job_id,
            subject.subject_id,
            subject.seed,
            subject.train,
            tensors,
            class_prompt=subject.class_prompt,
        )

    def _watched(self, base: Base, job: SlotJob) -> tuple[SlotJob, FullValidation | None]:
        """(the job without the photos that are held out, what measures it)."""
        from raybooth.fleet.validation import split_photos, watch_full

        subject, root = self._subject, self._task.folders.checkpoints

        def watched() -> tuple[SlotJob, FullValidation | None]:
            tensors, held_out = split_photos(subject, job.tensors)
            kept = replace(job, tensors=tensors)
            return kept, watch_full(base, subject, kept, held_out, root, is_first=self._is_first)

        return self._together(watched)

    def _publish(
        self,
        base: Base,
        job: SlotJob,
        outcome: FullOutcome,
        seconds: dict[str, float],
        validation: FullValidation | None,
    ) -> None:
        from raybooth.fleet.full_publishing import publish_full

        assert outcome.weights is not None
        self._reporter.state(self._job_id, "publishing")
        record = publish_full(
            base,
            self._subject,
            job,
            outcome.weights,
            [loss for loss, _, _ in outcome.curve],
            self._store,
            revision=self._task.revision,
            seconds={**seconds, "train": round(outcome.seconds, 3)},
            validation=validation,
        )
        self._is_published(record.reference)

    def _is_published(self, reference: str) -> None:
        """Says so, and removes what only an unfinished job needs."""
        shutil.rmtree(self._task.folders.checkpoints / self._job_id, ignore_errors=True)
        steps = self._subject.train.num_train_steps
        self._reporter.state(self._job_id, "published", reference=reference, train_step=steps)

    def _on_start(self, train_step: int) -> None:
        if self._is_first:
            self._reporter.state(self._job_id, "running", train_step=train_step)

    def _on_report(self, report: FullReport) -> None:
        if self._is_first:
            self._reporter.step(self._job_id, report.train_step, report.loss)

    def _should_stop(self) -> bool:
        if not self._is_first:
            return False
        return self._reporter.should_stop() or self._job_id in self._reporter.cancelled()

    def _together(self, action: Callable[[], Result]) -> Result:
        """What this worker's action returns; an error of any worker is raised by all of them."""
        try:
            result, error = action(), None
        except (RayBoothError, OSError) as problem:
            result, error = None, problem
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, error)
        for first in filter(None, said):
            raise first
        return cast(Result, result)

    def _agreed(self, value: Any) -> Any:
        """What the first worker says."""
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]
