"""Published subjects are skipped without Ray; jobs that others train are watched, not trained."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.raybooth.fleet.fleets import Mailbox, pack_task, survey_of, write_fleet

from raybooth.fleet.events import Event, StateEvent
from raybooth.fleet.progress import Progress
from raybooth.fleet.queue import Queue
from raybooth.fleet.rounds import Stop, train_fleet
from raybooth.fleet.task import Folders
from raybooth.fleet.worker import train_pack_fn

OTHER = "another-host/1/1"


class Recorder:
    """A view that keeps what it is shown."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def start(self, progress: Progress) -> None:
        self.progress = progress

    def show(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def queue(folders: Folders) -> Queue:
    folders.store.parent.mkdir(parents=True)
    return Queue(folders.store.parent / "fleet.db")


def test_a_published_fleet_is_done_at_once(
    tmp_path: Path, tiny_base: Path, folders: Folders, queue: Queue
) -> None:
    survey = survey_of(write_fleet(tmp_path, tiny_base, {"rex": {}}), folders)
    train_pack_fn({"task": pack_task(survey, folders), "monitor": Mailbox()})
    view = Recorder()
    report = train_fleet(survey, queue, folders, view)
    assert (report.published, report.failed, report.unfinished) == (("rex@1",), {}, ())
    job = queue.get(survey.jobs[0].job_id)
    assert (job.state, job.train_step, job.lease_owner) == ("published", 4, None)
    assert view.closed


def test_jobs_that_another_trains_are_watched_until_they_end(
    tmp_path: Path, tiny_base: Path, folders: Folders, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raybooth.fleet.rounds.WATCH_S", 0.05)
    subjects = {"rex": {}, "tom": {"class_noun": "cat"}}
    survey = survey_of(write_fleet(tmp_path, tiny_base, subjects), folders)
    rex, tom = (job.job_id for job in survey.jobs)
    for job_id in (rex, tom):
        queue.submit(job_id, fleet="f", subject_id="x", num_train_steps=4, spec={})
        queue.move(job_id, "running")
    assert queue.claim([rex, tom], OTHER, 3600) == (rex, tom)

    def train_elsewhere() -> None:
        time.sleep(0.3)
        queue.progress({rex: (2, 0.5)})
        train_pack_fn({"task": pack_task(survey, folders, ["rex"]), "monitor": Mailbox()})
        queue.move(rex, "publishing", owner=OTHER)
        queue.move(rex, "published", owner=OTHER)
        queue.move(tom, "failed", owner=OTHER, error="the loss is nan")

    other = threading.Thread(target=train_elsewhere)
    other.start()
    view = Recorder()
    report = train_fleet(survey, queue, folders, view)
    other.join()
    assert report.published == ("rex@1",)
    assert report.failed == {"tom": "the loss is nan"}
    assert {e.state for e in view.events if isinstance(e, StateEvent)} == {"published", "failed"}
    assert queue.get(rex).lease_owner == OTHER
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_a_stop_before_anything_started_leaves_everything_unfinished(
    tmp_path: Path, tiny_base: Path, folders: Folders, queue: Queue
) -> None:
    survey = survey_of(write_fleet(tmp_path, tiny_base, {"rex": {}}), folders)
    stop = Stop()
    stop.ask()
    report = train_fleet(survey, queue, folders, Recorder(), stop)
    assert (report.published, report.failed, report.unfinished) == ((), {}, ("rex",))
    assert queue.get(survey.jobs[0].job_id).lease_owner is None


def test_the_first_ctrl_c_asks_and_the_second_interrupts() -> None:
    stop = Stop()
    stop.ask(signal.SIGINT, None)
    assert stop.asked()
    with pytest.raises(KeyboardInterrupt):
        stop.ask(signal.SIGINT, None)


def test_signals_are_given_back(
    tmp_path: Path, tiny_base: Path, folders: Folders, queue: Queue
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = Stop()
    stop.ask()
    survey = survey_of(write_fleet(tmp_path, tiny_base, {"rex": {}}), folders)
    train_fleet(survey, queue, folders, Recorder(), stop)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
