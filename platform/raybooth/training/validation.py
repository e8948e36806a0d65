"""Validation of packs between train steps: nothing of the training is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from raybooth.data.encode import SubjectTensors
from raybooth.model.base import Base
from raybooth.model.sampler import generate
from raybooth.training.held_out import fixed_batches
from raybooth.training.job import SlotJob, SlotReport
from raybooth.training.pack import Pack
from raybooth.training.watched import Images, ValidationTask, Watched, sample_requests
from raybooth.validation_record import ValidationPoint, ValidationRecord


class Validation:
    """All validated jobs of one pack; the loop tells it of every train step."""

    def __init__(
        self,
        base: Base,
        tasks: Sequence[ValidationTask],
        root: Path,
        on_point: Callable[[str, ValidationPoint, Images], None] = lambda job_id, point, images: (
            None
        ),
    ) -> None:
        """`root`/<job_id>/validation holds the history; `on_point` gets every new point."""
        self._jobs = {task.job.job_id: Watched(task, root) for task in tasks}
        self._base, self._on_point = base, on_point

    def resume(self, pack: Pack) -> None:
        """Take up the history of every slot from where its weights stand; ends what had ended."""
        for job_id, watched in self._jobs.items():
            watched.resume(pack.state(job_id).train_step)
            if watched.is_over and job_id in pack.active:
                pack.finish(job_id)

    def after_step(self, pack: Pack, reports: Sequence[SlotReport]) -> list[SlotReport]:
        """Measure the slots that are due; the reports, `finished` where patience ran out."""
        told = []
        for report in reports:
            watched = self._jobs.get(report.job_id)
            if watched is not None and _is_due(watched, report):
                point, images = watched.measure(_InPack(self._base, pack, watched.task.job))
                self._on_point(report.job_id, point, images)
                if watched.is_over and report.status == "running":
                    report = replace(report, status=pack.finish(report.job_id))
            told.append(report)
        return told

    def settle(self, pack: Pack, job_id: str) -> None:
        """Put the weights that are to be published into the finished job's slot."""
        watched = self._jobs.get(job_id)
        weights = None if watched is None else watched.best_weights()
        if weights is not None:
            pack.take_weights(job_id, weights["flat_N"])

    def record(self, job_id: str) -> ValidationRecord | None:
        """What goes into the published record; None for a job that is not validated."""
        watched = self._jobs.get(job_id)
        return None if watched is None else watched.record()

    def pictures(self, job_id: str) -> dict[str, Path]:
        """Each validation's samples, as files to publish, in order."""
        watched = self._jobs.get(job_id)
        return {} if watched is None else watched.pictures()


def fixed_loss(base: Base, pack: Pack, job: SlotJob, tensors: SubjectTensors) -> float:
    """Mean instance loss of every image at T fixed timesteps, each with noise of its own."""
    dtype = pack.bank.flat_SP.dtype
    losses = [
        pack.instance_loss(job.job_id, batches)
        for batches in fixed_batches(base, job, tensors, dtype)
    ]
    return sum(losses) / len(losses)


class _InPack:
    """One job of a pack, as it is measured."""

    def __init__(self, base: Base, pack: Pack, job: SlotJob) -> None:
        self._base, self._pack, self._job = base, pack, job
        self._state = pack.state(job.job_id)

    @property
    def train_step(self) -> int:
        return self._state.train_step

    def loss(self, tensors: SubjectTensors) -> float:
        return fixed_loss(self._base, self._pack, self._job, tensors)

    def draw(self, prompts: Sequence[str]) -> Images:
        slot = self._pack.slot(self._job.job_id)
        text = self._pack.text_adapter(self._job.job_id)
        requests = sample_requests(self._job, prompts, of_base=False, slot=slot, text=text)
        return generate(self._base, self._pack.bank, requests)

    def draw_base(self, prompts: Sequence[str]) -> Images:
        requests = sample_requests(self._job, prompts, of_base=True)
        return generate(self._base, self._pack.bank, requests)

    def weights(self) -> dict[str, Tensor]:
        return {"flat_N": self._state.flat_N}


def _is_due(watched: Watched, report: SlotReport) -> bool:
    is_last = report.status == "finished"
    alive = is_last or report.status == "running"
    return alive and watched.is_due(report.train_step, is_last=is_last)
