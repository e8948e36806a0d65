"""Shows a running fleet: a live table on a terminal, plain lines elsewhere, JSON on request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from raybooth.fleet.events import Event, NoteEvent, PackEvent, PriorEvent, StateEvent, StepEvent
from raybooth.fleet.progress import JobProgress, Progress
from raybooth.fleet.queue import JobState

if TYPE_CHECKING:
    from rich.console import Group

STEP_LINE_S = 5.0
"""Plain lines and JSON tell a subject's train steps at most this often."""

_COLORS: Mapping[JobState, str] = {
    "queued": "dim",
    "waiting_prior": "yellow",
    "running": "cyan",
    "publishing": "magenta",
    "published": "green",
    "failed": "red",
    "cancelled": "red",
}


class View(Protocol):
    """Somewhere to show a fleet."""

    def start(self, progress: Progress) -> None:
        """The fleet is planned; training begins."""

    def show(self, event: Event) -> None:
        """An event, already part of the progress."""

    def close(self) -> None:
        """Training has ended, for whatever reason."""


def view_for(stream: TextIO, *, as_json: bool) -> View:
    """JSON lines if asked, a table on a terminal, plain lines elsewhere."""
    if as_json:
        return JsonView(stream)
    return TableView(stream) if stream.isatty() else LineView(stream)


class JsonView:
    """One JSON object a line: `event` names the kind, the rest its figures."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._told = _Rhythm(STEP_LINE_S / 5)

    def start(self, progress: Progress) -> None:
        self._progress = progress
        for job in progress.jobs.values():
            self._print("job", _job_figures(job))

    def show(self, event: Event) -> None:
        match event:
            case StepEvent():
                job = self._progress.jobs.get(event.job_id)
                if job and (self._told.is_due(event.job_id) or _is_last(job)):
                    self._print("step", _job_figures(job))
            case StateEvent():
                if job := self._progress.jobs.get(event.job_id):
                    self._print("job", _job_figures(job))
            case PriorEvent():
                if prior := self._progress.priors.get(event.digest):
                    self._print("prior", asdict(prior))
            case PackEvent():
                self._print("pack", asdict(event))
            case NoteEvent():
                self._print("note", asdict(event))

    def close(self) -> None:
        if hasattr(self, "_progress"):
            published = [job.reference or job.subject_id for job in self._progress.published]
            failed = {job.subject_id: job.error for job in self._progress.failed}
            unfinished = [job.subject_id for job in self._progress.unfinished]
            seconds = round(time.time() - self._progress.started, 3)
            figures = {"published": published, "failed": failed, "unfinished": unfinished}
            self._print("end", {**figures, "seconds": seconds})

    def _print(self, event: str, figures: Mapping[str, Any]) -> None:
        line = {"event": event, "time": round(time.time(), 3), **figures}
        print(json.dumps(line), file=self._stream, flush=True)


class LineView:
    """Plain lines, one for each change and one for each subject's steps now and then."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._told = _Rhythm(STEP_LINE_S)

    def start(self, progress: Progress) -> None:
        self._progress = progress

    def show(self, event: Event) -> None:
        text = line_of(event, self._progress, self._told)
        if text:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


class TableView:
    """A table that is drawn over itself: one row a subject, the priors above it."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream

    def start(self, progress: Progress) -> None:
        from rich.console import Console
        from rich.live import Live

        self._progress = progress
        self._notes: list[str] = []
        self._console = Console(file=self._stream)
        self._live = Live(
            get_renderable=self._draw, console=self._console, refresh_per_second=4, transient=False
        )
        self._live.start()

    def show(self, event: Event) -> None:
        if isinstance(event, NoteEvent):
            self._notes = [*self._notes[-3:], event.text]

    def close(self) -> None:
        if hasattr(self, "_live"):
            self._live.stop()

    def _draw(self) -> Group:
        return draw(self._progress, self._notes)


def draw(progress: Progress, notes: list[str]) -> Group:
    """The table of this moment."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = []
    for prior in progress.priors.values():
        state = "cached" if prior.num_cached >= prior.num_wanted else "generating"
        state = "made" if state == "generating" and prior.num_done >= prior.num_wanted else state
        text = f"prior  {prior.class_prompt!r}  {prior.num_done}/{prior.num_wanted}  {state}"
        head.append(Text(text, style="yellow" if state == "generating" else "dim"))
    table = Table(expand=False)
    table.add_column("subject")
    table.add_column("pack", style="dim")
    table.add_column("state")
    for name in ("step", "loss", "images/s", "ETA"):
        table.add_column(name, justify="right")
    for job in progress.jobs.values():
        state = job.note or job.reference or job.state.replace("_", " ")
        table.add_row(
            job.subject_id,
            job.pack or "",
            Text(state, style=_COLORS[job.state]),
            f"{job.train_step}/{job.num_train_steps}",
            "" if job.loss is None else f"{job.loss:.4f}",
            "" if job.images_per_s is None else f"{job.images_per_s:.1f}",
            clock_text(job.eta_s),
        )
    done, total = len(progress.published), len(progress.jobs)
    failed = f", {len(progress.failed)} failed" if progress.failed else ""
    elapsed = clock_text(time.time() - progress.started)
    foot = f"{done}/{total} published{failed}  {progress.images_per_s:.1f} images/s  {elapsed}"
    return Group(*head, table, Text(foot), *(Text(note, style="dim") for note in notes))


def line_of(event: Event, progress: Progress, told: _Rhythm) -> str | None:
    """The plain line of an event, None when it is not worth one."""
    match event:
        case StepEvent():
            job = progress.jobs.get(event.job_id)
            if job is None or not (told.is_due(event.job_id) or _is_last(job)):
                return None
            speed = f"  {job.images_per_s:.1f} images/s" if job.images_per_s else ""
            eta = f"  ETA {clock_text(job.eta_s)}" if job.eta_s else ""
            steps = f"step {job.train_step}/{job.num_train_steps}"
            return f"{job.subject_id}: {steps}  loss {event.loss:.4f}{speed}{eta}"
        case StateEvent():
            job = progress.jobs.get(event.job_id)
            if job is None:
                return None
            reference = f" as {event.reference}" if event.reference else ""
            reason = f": {event.error}" if event.error else ""
            return f"{job.subject_id}: {event.state.replace('_', ' ')}{reference}{reason}"
        case PriorEvent():
            prior = progress.priors.get(event.digest)
            whole = event.num_done >= event.num_wanted
            if prior is None or not (whole or told.is_due(event.digest)):
                return None
            return f"prior {prior.class_prompt!r}: {event.num_done}/{event.num_wanted}"
        case PackEvent():
            process = f" as process {event.process}" if event.process else ""
            text = f": {event.text}" if event.text else ""
            return f"{event.pack_id}: {event.state}{process}{text}"
        case NoteEvent():
            return event.text


def clock_text(seconds: float | None) -> str:
    """`1:02:03` or `2:03`; empty when not known."""
    if seconds is None:
        return ""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Rhythm:
    """Says now and then that it is time, by name."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._last: dict[str, float] = {}

    def is_due(self, name: str) -> bool:
        now = time.monotonic()
        if now - self._last.get(name, -1e9) < self._every_s:
            return False
        self._last[name] = now
        return True


def _is_last(job: JobProgress) -> bool:
    return job.train_step >= job.num_train_steps


def _job_figures(job: JobProgress) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "subject_id": job.subject_id,
        "state": job.state,
        "pack": job.pack,
        "train_step": job.train_step,
        "num_train_steps": job.num_train_steps,
        "loss": job.loss,
        "images_per_s": job.images_per_s,
        "eta_s": job.eta_s,
        "reference": job.reference,
        "error": job.error,
    }
