"""A whole fleet from file to published models, in rounds: claim what is free, plan, dispatch.

Jobs that another `raybooth train` holds are watched; if it dies, the next round takes them.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType

from raybooth.fleet.events import Event, NoteEvent, StateEvent
from raybooth.fleet.ledger import Heartbeat, JobLedger
from raybooth.fleet.live import View
from raybooth.fleet.planner import plan_fleet
from raybooth.fleet.progress import JobProgress, Progress
from raybooth.fleet.queue import ACTIVE, JobRecord, Queue, this_owner
from raybooth.fleet.survey import SubjectJob, Survey
from raybooth.fleet.task import Folders
from raybooth.store import Store

WATCH_S = 1.0


@dataclass(frozen=True, slots=True)
class FleetReport:
    """How a fleet ended."""

    published: tuple[str, ...]
    """`subject@version`, those that were there already included."""
    failed: dict[str, str]
    """Reason by subject."""
    unfinished: tuple[str, ...]
    """Subjects that a stop left; the same command goes on with them."""


class Stop:
    """Set by the first Ctrl-C (or SIGTERM); the second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def asked(self) -> bool:
        """Whether the fleet should stop."""
        return self._asked.is_set()

    def ask(self, number: int | None = None, frame: FrameType | None = None) -> None:
        """Stop cleanly; asked again, stop at once."""
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()


def train_fleet(
    survey: Survey, queue: Queue, folders: Folders, view: View, stop: Stop | None = None
) -> FleetReport:
    """Every subject of the survey is published, failed with a reason, or left for the next time."""
    stop = stop or Stop()
    with _signals(stop), ExitStack() as context:
        rounds = _Rounds(survey, queue, folders, view, stop, context)
        context.callback(view.close)
        rounds.run()
        return rounds.report()


class _Rounds:
    def __init__(
        self,
        survey: Survey,
        queue: Queue,
        folders: Folders,
        view: View,
        stop: Stop,
        context: ExitStack,
    ) -> None:
        self._survey, self._queue, self._folders = survey, queue, folders
        self._view, self._stop, self._context = view, stop, context
        self._owner = this_owner()
        self._store = Store(folders.store)
        self._jobs = {job.job_id: job for job in survey.jobs}
        self._progress = Progress(self._submit(job) for job in survey.jobs)
        self._ledger = JobLedger(
            queue,
            self._store,
            self._progress,
            self._owner,
            context.enter_context(Heartbeat(queue, self._owner)),
        )
        self._tried: set[str] = set()
        self._can_grow: bool | None = None

    def run(self) -> None:
        self._view.start(self._progress)
        while not self._stop.asked():
            ours, others = self._claim()
            if ours:
                self._dispatch(ours)
                self._tried.update(ours)
                self._queue.release(self._owner, ours)
            elif others:
                self._watch(others)
            else:
                return

    def report(self) -> FleetReport:
        progress = self._progress
        return FleetReport(
            published=tuple(job.reference or job.subject_id for job in progress.published),
            failed={job.subject_id: job.error or "failed" for job in progress.failed},
            unfinished=tuple(job.subject_id for job in progress.unfinished),
        )

    def _submit(self, job: SubjectJob) -> JobProgress:
        subject = job.subject
        record = self._queue.submit(
            job.job_id,
            fleet=str(self._survey.fleet.source),
            subject_id=subject.subject_id,
            num_train_steps=subject.train.num_train_steps,
            spec={
                "base": self._survey.fleet.base,
                "base_fingerprint": self._survey.base_fingerprint,
                "class_noun": subject.class_noun,
                "identifier": subject.identifier,
                "photos": [str(path) for path in subject.images],
                "train": subject.train.model_dump(mode="json"),
            },
        )
        rows = subject.train.batch_size * (2 if job.prior_key is not None else 1)
        return JobProgress(
            job.job_id,
            subject.subject_id,
            subject.train.num_train_steps,
            rows,
            train_step=record.train_step,
        )

    def _claim(self) -> tuple[list[str], list[str]]:
        """(jobs that are ours to train now, jobs that others train)."""
        open_ids = [job_id for job_id in self._jobs if self._is_to_do(job_id)]
        claimed = self._queue.claim(open_ids, self._owner)
        ours = []
        for job_id in claimed:
            reference = self._ledger.published_reference(job_id)
            if reference is None:
                self._requeue(job_id)
                ours.append(job_id)
                continue
            steps = self._progress.jobs[job_id].num_train_steps
            self._tell(StateEvent(job_id, "published", reference=reference, train_step=steps))
            self._queue.release(self._owner, [job_id])
        return ours, [job_id for job_id in open_ids if job_id not in claimed]

    def _is_to_do(self, job_id: str) -> bool:
        return job_id not in self._tried and self._progress.jobs[job_id].state in ACTIVE

    def _requeue(self, job_id: str) -> None:
        """A job that was left in the middle, or that failed in an earlier run, starts again."""
        if self._queue.get(job_id).state != "queued":
            self._queue.move(job_id, "queued", owner=self._owner)

    def _dispatch(self, job_ids: Sequence[str]) -> None:
        from raybooth.fleet.dispatcher import Dispatcher
        from raybooth.fleet.launch import cluster, total_capacity

        if self._can_grow is None:
            self._tell(NoteEvent("starting Ray"))
            self._can_grow = self._context.enter_context(cluster())
        fingerprint = self._survey.base_fingerprint
        steps = {job_id: self._queue.get(job_id).train_step for job_id in job_ids}
        capacity = total_capacity()
        plan = plan_fleet(
            [self._jobs[job_id].plan_job(fingerprint, steps[job_id]) for job_id in job_ids],
            capacity,
            self._survey.pack_memory(has_gpus=capacity.has_gpus),
            can_grow=self._can_grow,
        )
        self._progress.take_plan(plan)
        dispatcher = Dispatcher(
            self._survey,
            plan,
            self._ledger,
            self._folders,
            self._view,
            can_grow=self._can_grow,
        )
        dispatcher.run(self._stop.asked)

    def _watch(self, job_ids: Sequence[str]) -> None:
        """Shows what others do with these jobs, until one of them is free or ended."""
        for job_id in job_ids:
            record = self._queue.get(job_id)
            job = self._progress.jobs[job_id]
            job.train_step, job.loss, job.note = record.train_step, record.loss, "elsewhere"
            if record.state in ACTIVE:
                continue
            event = StateEvent(job_id, record.state, record.error, self._reference(record))
            self._progress.apply(event)
            self._view.show(event)
        time.sleep(WATCH_S)

    def _reference(self, record: JobRecord) -> str | None:
        return self._ledger.published_reference(record.job_id)

    def _tell(self, event: Event) -> None:
        if self._ledger.apply(event):
            self._view.show(event)


@contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask `stop`, for as long as the context lasts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, stop.ask) for number in _STOPPING}
    try:
        yield
    finally:
        for number, action in earlier.items():
            signal.signal(number, action)


_STOPPING = (signal.SIGINT, signal.SIGTERM)
