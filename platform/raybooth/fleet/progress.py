"""The state of a fleet as people see it: steps, losses, speed and time left of every subject."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from raybooth.fleet.events import Event, NoteEvent, PackEvent, PriorEvent, StateEvent, StepEvent
from raybooth.fleet.planner import FleetPlan
from raybooth.fleet.queue import ACTIVE, JobState

SPEED_WINDOW_S = 20.0


@dataclass(slots=True)
class JobProgress:
    """One subject's row."""

    job_id: str
    subject_id: str
    num_train_steps: int
    num_rows: int
    """Images (instance and prior) of one train step."""

    state: JobState = "queued"
    train_step: int = 0
    loss: float | None = None
    error: str | None = None
    reference: str | None = None
    pack: str | None = None
    note: str = ""
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def steps_per_s(self) -> float | None:
        """Train steps a second over the last moments; None before two events."""
        if self.state != "running" or len(self._recent) < 2:
            return None
        (first, start), (last, end) = self._recent[0], self._recent[-1]
        return (end - start) / (last - first) if last > first and end > start else None

    @property
    def images_per_s(self) -> float | None:
        """Images that took part in training a second."""
        speed = self.steps_per_s
        return None if speed is None else speed * self.num_rows

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last train step at the present speed."""
        speed = self.steps_per_s
        return None if not speed else (self.num_train_steps - self.train_step) / speed

    def stepped(self, event: StepEvent) -> None:
        """Takes in a finished train step."""
        if event.train_step < self.train_step:  # resumed from a checkpoint
            self._recent.clear()
        self.train_step, self.loss = event.train_step, event.loss
        self._recent.append((event.time, event.train_step))
        while event.time - self._recent[0][0] > SPEED_WINDOW_S:
            self._recent.popleft()


@dataclass(slots=True)
class PriorProgress:
    """One prior of the plan."""

    digest: str
    class_prompt: str
    num_wanted: int
    num_done: int
    num_cached: int


class Progress:
    """Everything that the live view shows; changed by events alone."""

    def __init__(self, jobs: Iterable[JobProgress]) -> None:
        self.started = time.time()
        self.jobs = {job.job_id: job for job in jobs}
        self.priors: dict[str, PriorProgress] = {}

    def take_plan(self, plan: FleetPlan) -> None:
        """The priors of a plan, with what the cache holds of them."""
        for prior in plan.priors:
            num_cached = min(prior.need.num_cached, prior.need.num_images)
            self.priors[prior.need.digest] = PriorProgress(
                digest=prior.need.digest,
                class_prompt=prior.need.class_prompt,
                num_wanted=prior.need.num_images,
                num_done=num_cached,
                num_cached=num_cached,
            )

    def apply(self, event: Event) -> None:
        """Takes an event in."""
        match event:
            case StepEvent() if event.job_id in self.jobs:
                self.jobs[event.job_id].stepped(event)
            case StateEvent() if event.job_id in self.jobs:
                job = self.jobs[event.job_id]
                job.state, job.error, job.note = event.state, event.error, ""
                job.reference = event.reference or job.reference
                if event.train_step is not None:
                    job.train_step = event.train_step
            case PriorEvent() if event.digest in self.priors:
                self.priors[event.digest].num_done = event.num_done
            case PackEvent() | NoteEvent() | _:
                pass

    @property
    def published(self) -> list[JobProgress]:
        return [job for job in self.jobs.values() if job.state == "published"]

    @property
    def failed(self) -> list[JobProgress]:
        return [job for job in self.jobs.values() if job.state == "failed"]

    @property
    def unfinished(self) -> list[JobProgress]:
        return [job for job in self.jobs.values() if job.state in ACTIVE]

    @property
    def images_per_s(self) -> float:
        """Of the whole fleet."""
        return sum(job.images_per_s or 0.0 for job in self.jobs.values())
