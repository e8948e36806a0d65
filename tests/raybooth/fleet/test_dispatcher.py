"""A fleet through Ray Train: killed workers resume, lost packs fail alone, stops are clean."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.raybooth.fleet.fleets import WITH_PRIOR, Mailbox, pack_task, survey_of, write_fleet

from raybooth.fleet.events import Event, NoteEvent, PackEvent, PriorEvent, StateEvent, StepEvent
from raybooth.fleet.progress import Progress
from raybooth.fleet.queue import Queue
from raybooth.fleet.rounds import FleetReport, Stop, train_fleet
from raybooth.fleet.task import Folders
from raybooth.fleet.worker import train_pack_fn
from raybooth.model.lora import load_adapter
from raybooth.store import WEIGHTS, Store

pytestmark = pytest.mark.ray

STEPS = 300
"""Enough that a worker is still busy when what it must meet comes, on a quick machine too."""
TRAIN: dict[str, Any] = {
    "num_train_steps": STEPS,
    "checkpoint": {"every_steps": 5},
    "resources": {"num_cpus": 1, "num_gpus": 0},
}


class Watcher:
    """A view that remembers events and acts on them."""

    def __init__(self, act: Callable[[Watcher, Event], None] = lambda watcher, event: None) -> None:
        self.events: list[Event] = []
        self.processes: dict[str, int] = {}
        self.killed: list[str] = []
        self._act = act

    def start(self, progress: Progress) -> None:
        self.progress = progress

    def show(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, PackEvent) and event.process is not None:
            self.processes[event.pack_id] = event.process
        self._act(self, event)

    def close(self) -> None:
        self.closed = True

    def kill(self, subject_id: str) -> None:
        """SIGKILL to the worker of the subject's pack, once."""
        job = next(job for job in self.progress.jobs.values() if job.subject_id == subject_id)
        if subject_id not in self.killed and job.pack in self.processes:
            self.killed.append(subject_id)
            os.kill(self.processes[job.pack], signal.SIGKILL)

    def steps(self, subject_id: str) -> list[int]:
        """Train steps that were told of, in order."""
        ids = {job.job_id for job in self.progress.jobs.values() if job.subject_id == subject_id}
        return [e.train_step for e in self.events if isinstance(e, StepEvent) and e.job_id in ids]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders.at(tmp_path_factory.mktemp("dispatcher") / "state")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Three packs, for packs of one kind forgive their worker as often."""
    subjects = {
        "rex": {"prior": WITH_PRIOR, "pack": {"max_failures": 2}},
        "fido": {"prior": WITH_PRIOR, "pack": {"max_failures": 1}, "num_train_steps": 5},
        "doom": {"class_noun": "cat", "pack": {"max_failures": 0}},
    }
    return write_fleet(tmp_path_factory.mktemp("fleet"), tiny_base, subjects, TRAIN)


def train(fleet: Path, folders: Folders, view: Watcher, stop: Stop | None = None) -> FleetReport:
    folders.store.parent.mkdir(parents=True, exist_ok=True)
    queue = Queue(folders.store.parent / "fleet.db")
    return train_fleet(survey_of(fleet, folders), queue, folders, view, stop)


def weights(folders: Folders, reference: str) -> dict[str, torch.Tensor]:
    adapter = load_adapter(Store(folders.store).folder(reference) / WEIGHTS)
    return {f"{name}.{i}": part for name, pair in adapter.items() for i, part in enumerate(pair)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def undisturbed(fleet: Path, folders: Folders, subject_id: str, root: Path) -> Folders:
    """The subject trained in this process, without Ray, from the same prior."""
    apart = replace(Folders.at(root), priors=folders.priors)
    task = pack_task(survey_of(fleet, apart), apart, [subject_id])
    train_pack_fn(
        {"task": replace(task, resources=replace(task.resources, num_cpus=1)), "monitor": Mailbox()}
    )
    return apart


def test_a_killed_worker_resumes_and_a_lost_pack_fails_alone(
    ray_session: Any, fleet: Path, folders: Folders, tmp_path: Path
) -> None:
    def act(watcher: Watcher, event: Event) -> None:
        if isinstance(event, StepEvent) and watcher.steps("doom"):
            watcher.kill("doom")
        if isinstance(event, StepEvent) and any(step > 5 for step in watcher.steps("rex")):
            watcher.kill("rex")

    view = Watcher(act)
    report = train(fleet, folders, view)

    assert sorted(view.killed) == ["doom", "rex"]
    assert sorted(report.published) == ["fido@1", "rex@1"]
    assert list(report.failed) == ["doom"]
    assert report.unfinished == ()
    assert "worker process died" in report.failed["doom"]
    jobs = {job.subject_id: job for job in Queue(folders.store.parent / "fleet.db").jobs()}
    assert (jobs["rex"].state, jobs["rex"].train_step) == ("published", STEPS)
    assert (jobs["doom"].state, jobs["doom"].error) == ("failed", report.failed["doom"])
    assert {job.lease_owner for job in jobs.values()} == {None}
    assert Store(folders.store).previewed() == []

    # the prior of both dogs was made once
    priors = [e for e in view.events if isinstance(e, PriorEvent)]
    assert len({e.digest for e in priors}) == 1
    assert [e.num_done for e in priors] == sorted(e.num_done for e in priors)

    # the killed one went on from its checkpoint, to the very same weights
    resumed = [
        e.train_step
        for e in view.events
        if isinstance(e, StateEvent) and e.job_id == jobs["rex"].job_id and e.state == "running"
    ]
    assert resumed[0] == 0
    assert resumed[-1] is not None
    assert 0 < resumed[-1] < STEPS
    apart = undisturbed(fleet, folders, "rex", tmp_path / "apart")
    assert same(weights(folders, "rex"), weights(apart, "rex"))


def test_a_stop_leaves_checkpoints_and_the_same_command_resumes(
    ray_session: Any, fleet: Path, folders: Folders, tmp_path: Path
) -> None:
    """Goes on from the test before: rex and fido are published, doom failed."""
    assert Store(folders.store).subjects() == ["fido", "rex"]
    stop = Stop()

    def act(watcher: Watcher, event: Event) -> None:
        if isinstance(event, StepEvent) and not stop.asked():
            stop.ask()

    view = Watcher(act)
    report = train(fleet, folders, view, stop)
    assert report.unfinished == ("doom",)
    assert sorted(report.published) == ["fido@1", "rex@1"]
    assert any(isinstance(e, NoteEvent) and "stopping" in e.text for e in view.events)
    (job,) = (j for j in Queue(folders.store.parent / "fleet.db").jobs() if j.subject_id == "doom")
    assert (job.state, job.lease_owner) == ("queued", None)
    assert list((folders.checkpoints / job.job_id).glob("step-*.json"))
    assert Store(folders.store).previewed() == ["doom"]

    view = Watcher()
    report = train(fleet, folders, view)
    assert sorted(report.published) == ["doom@1", "fido@1", "rex@1"]
    assert (report.failed, report.unfinished) == ({}, ())
    assert {e.pack_id for e in view.events if isinstance(e, PackEvent)} == {"pack-1"}
    first = next(e for e in view.events if isinstance(e, StateEvent) and e.state == "running")
    assert first.train_step is not None
    assert first.train_step > 0
    apart = undisturbed(fleet, folders, "doom", tmp_path / "apart")
    assert same(weights(folders, "doom"), weights(apart, "doom"))
    assert not any(folders.checkpoints.iterdir())
    assert Store(folders.store).previewed() == []


def test_a_prior_that_cannot_be_made_fails_those_who_need_it(
    ray_session: Any, tmp_path: Path, tiny_base: Path
) -> None:
    fleet = write_fleet(tmp_path, tiny_base, {"rex": {"prior": WITH_PRIOR}}, TRAIN)
    folders = Folders.at(tmp_path / "state")
    folders.priors.parent.mkdir(parents=True)
    folders.priors.write_text("in the way")
    report = train(fleet, folders, Watcher())
    assert report.published == ()
    assert "its prior could not be made" in report.failed["rex"]
