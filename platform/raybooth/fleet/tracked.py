"""A fleet's events as curves, pictures and files in its trackers, by subject.

It is a view around the view that people see, in the process that dispatches: training waits for no
tracker, and a worker that is killed and resumes changes nothing. Each tracker has a thread of its
own; its first error is told once, and costs the fleet that tracker and nothing else.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from raybooth.config.tracking import TrackerName, TrackingConfig
from raybooth.fleet.events import Event, NoteEvent, StateEvent, StepEvent
from raybooth.fleet.live import View
from raybooth.fleet.progress import Progress
from raybooth.store import RECORD, SAMPLES, AdapterRecord, Store
from raybooth.tracking import Ending, Points, Run, RunIdentity, open_run
from raybooth.validation_record import ValidationRecord

if TYPE_CHECKING:
    from raybooth.fleet.survey import SubjectJob, Survey

MAX_WAITING = 10_000
"""Points that wait for a slow tracker; further ones are left out of its curves."""

CLOSE_S = 30.0
"""Time that trackers have to send what they hold when a fleet ends."""

Opener = Callable[[RunIdentity, bool], Run]


def tracked(view: View, survey: Survey, home: Path) -> View:
    """`view`, with the trackers of the survey's fleet beside it."""
    config = survey.fleet.tracking
    folder = (config.folder or home / "tracking").absolute()
    lanes = [
        Lane(name, partial(_open, name, config, folder), folder / "steps" / name)
        for name in config.trackers
    ]
    identities = {
        job.job_id: RunIdentity(job.job_id, job.subject.subject_id, _config(survey, job))
        for job in survey.jobs
    }
    return TrackedView(view, lanes, identities, Store(home / "models")) if lanes else view


class TrackedView:
    """Shows a fleet, and tells every lane."""

    def __init__(
        self, view: View, lanes: Iterable[Lane], identities: Mapping[str, RunIdentity], store: Store
    ) -> None:
        self._view, self._lanes, self._store = view, list(lanes), store
        self._identities = identities

    def start(self, progress: Progress) -> None:
        self._view.start(progress)

    def show(self, event: Event) -> None:
        self._view.show(event)
        match event:
            case StepEvent() if event.job_id in self._identities:
                values = {"loss": event.loss, **event.curves}
                for lane in self._lanes:
                    lane.point(self._identities[event.job_id], event.train_step, values)
            case StateEvent(state="published") if event.job_id in self._identities:
                self._publish(self._identities[event.job_id], event.reference)
            case StateEvent(state="failed") if event.job_id in self._identities:
                for lane in self._lanes:
                    lane.end(self._identities[event.job_id], "failed")
        self._tell()

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_S
        for lane in self._lanes:
            lane.finish()
        for lane in self._lanes:
            lane.join(max(0.0, deadline - time.monotonic()))
        self._tell()
        self._view.close()

    def _publish(self, identity: RunIdentity, reference: str | None) -> None:
        if reference is None:
            return
        record, folder = self._store.fetch(reference), self._store.folder(reference)
        names = [RECORD]
        if isinstance(record, AdapterRecord):  # every weight of a base is too much to upload
            names += [name for name in record.files if name != SAMPLES]
        result = Result(
            record.num_train_steps or 0,
            folder / SAMPLES if SAMPLES in record.files else None,
            _points(record.validation),
            [folder / name for name in names],
        )
        for lane in self._lanes:
            lane.publish(identity, result)

    def _tell(self) -> None:
        for lane in self._lanes:
            if trouble := lane.new_trouble():
                self._view.show(NoteEvent(trouble))


@dataclass(frozen=True, slots=True)
class Result:
    """What a published subject leaves in its run."""

    train_step: int
    samples: Path | None
    validation: Points
    files: Sequence[Path]


class Lane:
    """One tracker's runs, worked off in order by one thread."""

    def __init__(self, name: str, opener: Opener, marks: Path) -> None:
        self._name, self._open, self._marks = name, opener, marks
        self._runs: dict[str, Run] = {}
        self._done: dict[str, int | None] = {}
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._trouble: str | None = None
        self._is_told = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def point(self, identity: RunIdentity, train_step: int, values: Mapping[str, float]) -> None:
        """A point of each curve, unless this train step was told before, in any process."""
        if self._waiting.qsize() < MAX_WAITING:
            self._put(partial(self._log, identity, train_step, values))

    def publish(self, identity: RunIdentity, result: Result) -> None:
        """The result's picture, validation and files; the run has ended well."""
        self._put(partial(self._publish, identity, result))

    def end(self, identity: RunIdentity, ending: Ending) -> None:
        """The run has ended."""
        self._put(partial(self._close, identity, ending))

    def finish(self) -> None:
        """Runs that are open are left, to be gone on with; nothing more is taken."""
        self._put(self._leave)
        self._waiting.put(None)

    def join(self, timeout_s: float) -> None:
        """Waits until all is told, but not longer than this."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._trouble = f"{self._name} does not answer; it was left behind"

    def new_trouble(self) -> str | None:
        """What went wrong, the first time that it is asked for."""
        if self._trouble is None or self._is_told:
            return None
        self._is_told = True
        return self._trouble

    def _put(self, action: Callable[[], None]) -> None:
        if self._trouble is None:
            self._waiting.put(action)

    # In the thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (action := self._next()) is not None:
                action()
        except Exception as error:  # noqa: BLE001  whatever a tracker raises, training goes on
            text = " ".join(str(error).split())[:300] or type(error).__name__
            self._trouble = f"tracking by {self._name} ended, training goes on: {text}"

    def _next(self) -> Callable[[], None] | None:
        try:
            return self._waiting.get_nowait()
        except Empty:
            for run in self._runs.values():
                run.flush()
            return self._waiting.get()

    def _log(self, identity: RunIdentity, train_step: int, values: Mapping[str, float]) -> None:
        last = self._last(identity.job_id)
        if last is None or train_step <= last:
            return
        run = self._run(identity)
        self._mark(identity.job_id, train_step)  # first: killed here, a point lacks, none doubles
        run.scalars(train_step, {k: v for k, v in values.items() if math.isfinite(v)})

    def _publish(self, identity: RunIdentity, result: Result) -> None:
        if not self._last(identity.job_id):  # told already, or trained where nobody told
            return
        run = self._run(identity)
        self._mark(identity.job_id, None)
        if result.samples is not None:
            run.picture("samples", result.train_step, result.samples)
        run.validation(result.validation)
        run.artifacts(result.files)
        self._close(identity, "published")

    def _close(self, identity: RunIdentity, ending: Ending) -> None:
        if run := self._runs.pop(identity.job_id, None):
            run.flush()
            run.close(ending)

    def _leave(self) -> None:
        while self._runs:
            _, run = self._runs.popitem()
            run.flush()
            run.close("left")

    def _run(self, identity: RunIdentity) -> Run:
        if identity.job_id not in self._runs:
            is_new = self._last(identity.job_id) == 0
            self._runs[identity.job_id] = self._open(identity, is_new)
        return self._runs[identity.job_id]

    def _last(self, job_id: str) -> int | None:
        """The last train step that was told, 0 before the first, None when all was."""
        if job_id not in self._done:
            path = self._marks / f"{job_id}.json"
            self._done[job_id] = json.loads(path.read_bytes()) if path.is_file() else 0
        return self._done[job_id]

    def _mark(self, job_id: str, train_step: int | None) -> None:
        self._marks.mkdir(parents=True, exist_ok=True)
        staging = self._marks / f".{job_id}"
        staging.write_text(json.dumps(train_step), "utf-8")
        staging.replace(self._marks / f"{job_id}.json")
        self._done[job_id] = train_step


def _open(
    tracker: TrackerName, config: TrackingConfig, folder: Path, identity: RunIdentity, new: bool
) -> Run:
    return open_run(tracker, config, folder, identity, new=new)


def _config(survey: Survey, job: SubjectJob) -> dict[str, Any]:
    """The subject's words and its train config as resolved."""
    subject = job.subject
    return {
        "subject": subject.subject_id,
        "class_noun": subject.class_noun,
        "identifier": subject.identifier,
        "instance_prompt": subject.instance_prompt,
        "base": survey.fleet.base,
        "base_fingerprint": survey.base_fingerprint,
        "photos": [path.name for path in subject.images],
        "train": subject.train.model_dump(mode="json"),
    }


def _points(validation: ValidationRecord | None) -> Points:
    """Every figure that was measured between train steps."""
    if validation is None:
        return []
    points = []
    for point in validation.points:
        figures = point.model_dump(exclude={"train_step"}, exclude_none=True)
        points.append((point.train_step, {name: float(value) for name, value in figures.items()}))
    return points
