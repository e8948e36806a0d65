"""Progress follows events; the views tell it as a table, as lines and as JSON."""

from __future__ import annotations

import io
import json

import pytest

from raybooth.fleet.events import NoteEvent, PackEvent, PriorEvent, StateEvent, StepEvent
from raybooth.fleet.live import JsonView, LineView, TableView, clock_text, draw, view_for
from raybooth.fleet.planner import FleetPlan, PriorNeed, PriorPlan
from raybooth.fleet.progress import JobProgress, Progress


@pytest.fixture
def progress() -> Progress:
    jobs = [JobProgress("rex-1", "rex", 10, 2), JobProgress("tom-1", "tom", 20, 4)]
    progress = Progress(jobs)
    need = PriorNeed("d1", "a photo of a dog", 100, 40)
    progress.take_plan(FleetPlan((), (PriorPlan(need, ("rex-1",)),)))
    return progress


def test_speed_and_time_left_come_from_recent_steps(progress: Progress) -> None:
    rex = progress.jobs["rex-1"]
    progress.apply(StateEvent("rex-1", "running", train_step=2))
    assert (rex.steps_per_s, rex.eta_s) == (None, None)
    progress.apply(StepEvent("rex-1", 3, 0.5, time=100.0))
    progress.apply(StepEvent("rex-1", 5, 0.4, time=101.0))
    assert (rex.steps_per_s, rex.images_per_s, rex.eta_s) == (2.0, 4.0, 2.5)
    assert (rex.train_step, rex.loss) == (5, 0.4)


def test_old_steps_do_not_count_for_speed(progress: Progress) -> None:
    rex = progress.jobs["rex-1"]
    progress.apply(StateEvent("rex-1", "running"))
    for step, moment in ((1, 0.0), (2, 100.0), (4, 101.0)):
        progress.apply(StepEvent("rex-1", step, 0.5, time=moment))
    assert rex.steps_per_s == 2.0


def test_a_resumed_job_forgets_its_former_speed(progress: Progress) -> None:
    rex = progress.jobs["rex-1"]
    progress.apply(StateEvent("rex-1", "running"))
    for step, moment in ((8, 10.0), (9, 11.0), (5, 12.0)):
        progress.apply(StepEvent("rex-1", step, 0.5, time=moment))
    assert rex.steps_per_s is None
    assert rex.train_step == 5


def test_jobs_are_told_apart_by_how_they_ended(progress: Progress) -> None:
    progress.apply(StateEvent("rex-1", "published", reference="rex@1"))
    progress.apply(StateEvent("tom-1", "failed", error="the loss is nan"))
    assert [job.reference for job in progress.published] == ["rex@1"]
    assert [job.error for job in progress.failed] == ["the loss is nan"]
    assert progress.unfinished == []


def test_events_about_others_are_passed_over(progress: Progress) -> None:
    for event in (StateEvent("x", "failed", "no"), StepEvent("x", 1, 0.1), PriorEvent("x", 1, 2)):
        progress.apply(event)
    assert len(progress.unfinished) == 2
    assert progress.priors["d1"].num_done == 40


def test_json_is_one_object_a_line(progress: Progress) -> None:
    stream = io.StringIO()
    view = JsonView(stream)
    view.start(progress)
    events = (
        StateEvent("rex-1", "running"),
        StepEvent("rex-1", 10, 0.25),
        PriorEvent("d1", 60, 100),
        PackEvent("pack-1", "started"),
        NoteEvent("a note"),
        StateEvent("rex-1", "published", reference="rex@1"),
        StateEvent("tom-1", "failed", error="a reason"),
    )
    for event in events:
        progress.apply(event)
        view.show(event)
    view.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    kinds = ["job", "job", "job", "step", "prior", "pack", "note", "job", "job", "end"]
    assert [line["event"] for line in lines] == kinds
    assert lines[3]["train_step"] == 10
    assert lines[3]["loss"] == 0.25
    assert (lines[4]["num_done"], lines[4]["num_wanted"]) == (60, 100)
    assert lines[-1]["published"] == ["rex@1"]
    assert lines[-1]["failed"] == {"tom": "a reason"}
    assert lines[-1]["unfinished"] == []


def test_lines_tell_changes_and_not_every_step(progress: Progress) -> None:
    stream = io.StringIO()
    view = LineView(stream)
    view.start(progress)
    for step in range(1, 11):
        event = StepEvent("rex-1", step, 0.5)
        progress.apply(event)
        view.show(event)
    for last in (
        StateEvent("rex-1", "published", reference="rex@1"),
        StateEvent("tom-1", "failed", error="disk full"),
        PriorEvent("d1", 100, 100),
        PackEvent("pack-1", "started", process=7),
        NoteEvent("a note"),
    ):
        progress.apply(last)
        view.show(last)
    view.close()
    assert stream.getvalue().splitlines() == [
        "rex: step 1/10  loss 0.5000",
        "rex: step 10/10  loss 0.5000",
        "rex: published as rex@1",
        "tom: failed: disk full",
        "prior 'a photo of a dog': 100/100",
        "pack-1: started as process 7",
        "a note",
    ]


def test_the_table_has_one_row_a_subject_and_the_priors_above(progress: Progress) -> None:
    from rich.console import Console

    progress.apply(StateEvent("rex-1", "running"))
    progress.apply(StepEvent("rex-1", 3, 0.5, time=100.0))
    progress.apply(StepEvent("rex-1", 5, 0.4321, time=101.0))
    progress.apply(StateEvent("tom-1", "published", reference="tom@3", train_step=20))
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(draw(progress, ["a note"]))
    text = capture.get()
    assert "prior  'a photo of a dog'  40/100  generating" in text
    rex = next(line for line in text.splitlines() if " rex " in line)
    assert all(word in rex for word in ("running", "5/10", "0.4321", "4.0", "0:02"))
    assert "tom@3" in text
    assert "1/2 published" in text
    assert "a note" in text


def test_a_table_is_for_terminals_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(view_for(Terminal(), as_json=False), TableView)
    assert isinstance(view_for(Terminal(), as_json=True), JsonView)
    assert isinstance(view_for(io.StringIO(), as_json=False), LineView)


def test_closing_a_view_that_never_started_is_harmless() -> None:
    for view in (JsonView(io.StringIO()), LineView(io.StringIO()), TableView(io.StringIO())):
        view.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0.4, "0:00"), (75, "1:15"), (3723, "1:02:03")]
)
def test_clock_text(seconds: float | None, text: str) -> None:
    assert clock_text(seconds) == text
