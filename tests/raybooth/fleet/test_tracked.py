"""Curves are a subject's, go on where they ended, and no tracker can hurt a training."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.raybooth.fleet.fleets import Mailbox, pack_task, survey_of, write_fleet
from tests.raybooth.fleet.test_rounds import Recorder

from raybooth.config import TrackingConfig
from raybooth.errors import InputProblems
from raybooth.fleet.events import NoteEvent, StateEvent, StepEvent
from raybooth.fleet.progress import Progress
from raybooth.fleet.survey import Survey
from raybooth.fleet.task import Folders
from raybooth.fleet.tracked import Lane, tracked
from raybooth.fleet.worker import train_pack_fn
from raybooth.tracking import RunIdentity


@pytest.fixture
def survey(tmp_path: Path, tiny_base: Path, folders: Folders) -> Survey:
    train = {"validation": {"every_steps": 2}}
    return survey_of(write_fleet(tmp_path, tiny_base, {"rex": {}, "tom": {}}, train), folders)


def curve(home: Path, job_id: str, name: str = "loss") -> list[int]:
    """Train steps of a curve, as TensorBoard reads them."""
    events = EventAccumulator(str(home / "tracking" / "tensorboard" / "raybooth" / job_id))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


def test_a_pack_becomes_one_run_for_each_subject(survey: Survey, folders: Folders) -> None:
    home, mailbox, shown = folders.store.parent, Mailbox(), Recorder()
    train_pack_fn({"task": pack_task(survey, folders), "monitor": mailbox})
    events = mailbox.monitor.drain()
    view = tracked(shown, survey, home)
    view.start(Progress([]))
    for event in events:
        view.show(event)
    view.close()
    assert shown.events == events
    assert shown.closed
    for job in survey.jobs:
        told = [e for e in events if isinstance(e, StepEvent) and e.job_id == job.job_id]
        steps = [event.train_step for event in told]
        assert curve(home, job.job_id) == steps
        assert steps[-1] == 4
        assert {"instance_loss", "grad_norm", "learning_rate"} <= told[0].curves.keys()
        assert curve(home, job.job_id, "grad_norm") == steps
        place = home / "tracking" / "tensorboard" / "raybooth" / job.job_id
        run = EventAccumulator(str(place))
        run.Reload()
        assert [image.step for image in run.Images("samples")] == [4]
        (text,) = run.Tensors("config/text_summary")
        assert [e.step for e in run.Scalars("validation/loss")] == [2, 4]
        assert job.subject.subject_id.encode() in text.tensor_proto.string_val[0]


def test_a_resumed_job_goes_on_with_its_curve_and_tells_no_step_twice(
    survey: Survey, folders: Folders
) -> None:
    home, (rex, tom) = folders.store.parent, (job.job_id for job in survey.jobs)
    first = tracked(Recorder(), survey, home)
    for step in (2, 4, 6):
        first.show(StepEvent(rex, step, 0.5))
    first.show(StateEvent(rex, "running", train_step=4))  # its worker was killed, and is back
    for step in (5, 6, 7):
        first.show(StepEvent(rex, step, 0.5))
    first.show(StepEvent(tom, 1, float("nan")))
    first.close()
    second = tracked(Recorder(), survey, home)  # the same command again
    for step in (6, 7, 8):
        second.show(StepEvent(rex, step, 0.5))
    second.show(StepEvent("a-stranger", 1, 0.5))
    second.close()
    assert curve(home, rex) == [2, 4, 6, 7, 8]
    places = {place.name for place in (home / "tracking" / "tensorboard" / "raybooth").iterdir()}
    assert places == {rex, tom}


def test_what_is_published_already_is_not_told_again(survey: Survey, folders: Folders) -> None:
    home, rex = folders.store.parent, survey.jobs[0].job_id
    train_pack_fn({"task": pack_task(survey, folders, ["rex"]), "monitor": Mailbox()})
    for told in (False, True, True):
        view = tracked(Recorder(), survey, home)
        if told:
            view.show(StepEvent(rex, 4, 0.5))
        view.show(StateEvent(rex, "published", reference="rex@1"))
        view.close()
        assert (home / "tracking" / "tensorboard").exists() == told
    run = EventAccumulator(str(home / "tracking" / "tensorboard" / "raybooth" / rex))
    run.Reload()
    assert (len(run.Scalars("loss")), len(run.Images("samples"))) == (1, 1)


def test_a_tracker_that_fails_is_told_once_and_costs_nothing_else(
    survey: Survey, folders: Folders
) -> None:
    home, shown = folders.store.parent, Recorder()
    (home / "tracking").mkdir(parents=True)
    (home / "tracking" / "tensorboard").write_text("a file where a folder should be")
    rex, tom = (job.job_id for job in survey.jobs)
    view = tracked(shown, survey, home)
    for step in range(1, 50):
        view.show(StepEvent(rex, step, 0.5))
        view.show(StepEvent(tom, step, 0.5))
    view.show(StateEvent(rex, "failed", error="the loss is nan"))
    view.close()
    (note,) = [event.text for event in shown.events if isinstance(event, NoteEvent)]
    assert note.startswith("tracking by tensorboard ended, training goes on: ")
    assert len(shown.events) == 2 * 49 + 2
    assert shown.closed


def test_a_tracker_that_hangs_is_left_behind(tmp_path: Path) -> None:
    asked, answer = threading.Event(), threading.Event()

    def hang(identity: RunIdentity, new: bool) -> None:
        asked.set()
        answer.wait(60)

    lane = Lane("slow", hang, tmp_path)  # type: ignore[arg-type]
    lane.point(RunIdentity("rex-1", "rex", {}), 1, {"loss": 0.5})
    assert asked.wait(10)
    lane.finish()
    lane.join(0.05)
    assert lane.new_trouble() == "slow does not answer; it was left behind"
    assert lane.new_trouble() is None
    answer.set()


def test_no_trackers_and_trackers_that_are_not_installed(
    tmp_path: Path, tiny_base: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_fleet(tmp_path, tiny_base, {"rex": {}})
    text = path.read_text().replace('{"base"', '{"tracking": {"trackers": []}, "base"')
    path.write_text(text)
    shown = Recorder()
    survey = survey_of(path, folders)
    assert survey.fleet.tracking == TrackingConfig(trackers=())
    assert tracked(shown, survey, tmp_path) is shown
    path.write_text(text.replace("[]", '["wandb"]'))
    monkeypatch.setattr("raybooth.fleet.survey.find_spec", lambda name: None)
    with pytest.raises(InputProblems, match=r"pip install 'raybooth\[wandb\]'"):
        survey_of(path, folders)
