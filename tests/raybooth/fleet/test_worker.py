"""A pack's worker publishes what it can, fails what it must alone, and resumes bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.raybooth.fleet.fleets import WITH_PRIOR, Mailbox, pack_task, survey_of, write_fleet

from raybooth.data.prior import PriorCache
from raybooth.data.prior_build import build_prior
from raybooth.errors import BaseModelError
from raybooth.fleet.events import Event, Orders, PackEvent, StateEvent, StepEvent
from raybooth.fleet.task import Folders, PackTask
from raybooth.fleet.worker import train_pack_fn
from raybooth.model.base import load_base
from raybooth.model.lora import load_adapter
from raybooth.store import SAMPLES, WEIGHTS, Store


def train(task: PackTask, mailbox: Mailbox | None = None) -> dict[str, list[str]]:
    return train_pack_fn({"task": task, "monitor": mailbox or Mailbox()})


def states(events: list[Event], job_id: str) -> list[str]:
    return [e.state for e in events if isinstance(e, StateEvent) and e.job_id == job_id]


def reasons(events: list[Event]) -> dict[str, str]:
    return {e.job_id: e.error for e in events if isinstance(e, StateEvent) and e.error is not None}


def weights(folders: Folders, reference: str) -> dict[str, torch.Tensor]:
    adapter = load_adapter(Store(folders.store).folder(reference) / WEIGHTS)
    return {f"{name}.{i}": part for name, pair in adapter.items() for i, part in enumerate(pair)}


@pytest.fixture
def fleet(tmp_path: Path, tiny_base: Path) -> Path:
    return write_fleet(tmp_path, tiny_base, {"rex": {}, "tom": {"class_noun": "cat"}})


def test_every_subject_of_a_pack_is_published(fleet: Path, folders: Folders) -> None:
    survey = survey_of(fleet, folders)
    mailbox = Mailbox()
    rex, tom = (job.job_id for job in survey.jobs)
    done = train(pack_task(survey, folders), mailbox)
    assert done == {"published": [rex, tom], "failed": [], "stopped": []}
    events = mailbox.monitor.drain()
    assert isinstance(events[0], PackEvent)
    assert states(events, rex) == ["running", "publishing", "published"]
    steps = [e for e in events if isinstance(e, StepEvent) and e.job_id == rex]
    assert steps[-1].train_step == 4
    assert math.isfinite(steps[-1].loss)
    assert not any(folders.checkpoints.iterdir())


def test_the_record_tells_how_the_model_was_made(fleet: Path, folders: Folders) -> None:
    survey = survey_of(fleet, folders)
    train(pack_task(survey, folders))
    record = Store(folders.store).fetch("rex")
    job = survey.jobs[0]
    assert record.job_id == job.job_id
    assert record.instance_prompt == "a photo of sks dog"
    assert record.base.fingerprint == survey.base_fingerprint
    assert record.train == job.subject.train.model_dump(mode="json")
    assert [photo.name for photo in record.photos] == ["0.png", "1.png", "2.png"]
    assert record.prior is None
    assert [step for step, _ in record.loss_curve] == [1, 2, 3, 4]
    assert record.num_parameters == sum(part.numel() for part in weights(folders, "rex").values())
    assert {"torch", "diffusers", "ray", "python"} <= set(record.versions)
    assert {"encode", "train", "samples"} <= set(record.seconds)
    assert Store(folders.store).verify("rex") == []
    with Image.open(Store(folders.store).folder("rex") / SAMPLES) as sheet:
        assert min(sheet.size) >= 128


def test_a_subject_without_sample_prompts_is_published_without_samples(
    tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    fleet = write_fleet(tmp_path, tiny_base, {"rex": {"samples": {"prompts": []}}})
    train(pack_task(survey_of(fleet, folders), folders))
    assert set(Store(folders.store).fetch("rex").files) == {WEIGHTS}


def test_the_prior_takes_part_and_is_recorded(
    tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    fleet = write_fleet(tmp_path, tiny_base, {"rex": {"prior": WITH_PRIOR}, "tom": {}})
    survey = survey_of(fleet, folders)
    key = survey.jobs[0].prior_key
    assert key is not None
    build_prior(load_base(str(tiny_base)), PriorCache(folders.priors), key, 2)
    done = train(pack_task(survey, folders))
    assert len(done["published"]) == 2
    record = Store(folders.store).fetch("rex")
    assert record.prior is not None
    assert (record.prior.key, record.prior.num_images) == (key.digest, 2)
    assert Store(folders.store).fetch("tom").prior is None


def test_a_prior_that_is_not_there_fails_its_subject_alone(
    tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    fleet = write_fleet(tmp_path, tiny_base, {"rex": {"prior": WITH_PRIOR}, "tom": {}})
    survey = survey_of(fleet, folders)
    mailbox = Mailbox()
    rex, tom = (job.job_id for job in survey.jobs)
    assert train(pack_task(survey, folders), mailbox) == {
        "published": [tom],
        "failed": [rex],
        "stopped": [],
    }
    assert "prior" in reasons(mailbox.monitor.drain())[rex]


def test_a_photo_that_is_gone_fails_its_subject_alone(fleet: Path, folders: Folders) -> None:
    survey = survey_of(fleet, folders)
    gone = survey.jobs[0].subject.images[1]
    gone.unlink()
    mailbox = Mailbox()
    done = train(pack_task(survey, folders), mailbox)
    assert done["failed"] == [survey.jobs[0].job_id]
    assert done["published"] == [survey.jobs[1].job_id]
    assert gone.name in reasons(mailbox.monitor.drain())[survey.jobs[0].job_id]


def test_a_loss_that_is_not_a_number_fails_its_subject_alone(
    tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    wild = {"optimizer": {"learning_rate": 1e30}}
    fleet = write_fleet(tmp_path, tiny_base, {"rex": wild, "tom": {}})
    survey = survey_of(fleet, folders)
    mailbox = Mailbox()
    done = train(pack_task(survey, folders), mailbox)
    assert done["failed"] == [survey.jobs[0].job_id]
    assert done["published"] == [survey.jobs[1].job_id]
    assert "loss is" in reasons(mailbox.monitor.drain())[survey.jobs[0].job_id]


def test_a_store_that_cannot_be_written_fails_the_job_and_keeps_its_training(
    fleet: Path, folders: Folders
) -> None:
    survey = survey_of(fleet, folders)
    folders.store.mkdir(parents=True)
    (folders.store / "rex").write_text("in the way")
    mailbox = Mailbox()
    done = train(pack_task(survey, folders), mailbox)
    rex, tom = (job.job_id for job in survey.jobs)
    assert (done["failed"], done["published"]) == ([rex], [tom])
    assert "could not be published" in reasons(mailbox.monitor.drain())[rex]
    assert list((folders.checkpoints / rex).glob("step-*"))
    (folders.store / "rex").unlink()
    assert sorted(train(pack_task(survey, folders))["published"]) == [rex, tom]


def test_what_is_published_is_skipped(fleet: Path, folders: Folders) -> None:
    survey = survey_of(fleet, folders)
    train(pack_task(survey, folders, ["rex"]))
    mailbox = Mailbox()
    assert len(train(pack_task(survey, folders), mailbox)["published"]) == 2
    assert Store(folders.store).versions("rex") == [1]
    events = mailbox.monitor.drain()
    assert states(events, survey.jobs[0].job_id) == ["published"]


def test_what_failed_in_this_run_is_not_tried_again(fleet: Path, folders: Folders) -> None:
    survey = survey_of(fleet, folders)
    rex, tom = (job.job_id for job in survey.jobs)
    mailbox = Mailbox()
    mailbox.monitor.push([StateEvent(rex, "failed", "a reason")])
    assert train(pack_task(survey, folders), mailbox) == {
        "published": [tom],
        "failed": [rex],
        "stopped": [],
    }


class StopsAt(Mailbox):
    """Orders a stop once a train step is reported."""

    def __getattr__(self, name: str) -> Any:
        if name == "push" and any(isinstance(e, StepEvent) for e in self.monitor._events):
            self.monitor.give(Orders(stop=True))
        return super().__getattr__(name)


def test_a_stopped_pack_resumes_bit_for_bit(
    tmp_path: Path, tiny_base: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raybooth.fleet.reporter.FLUSH_S", 0.0)
    fleet = write_fleet(tmp_path, tiny_base, {"rex": {}, "tom": {"class_noun": "cat"}})
    survey = survey_of(fleet, folders)
    jobs = [job.job_id for job in survey.jobs]
    stopped = train(pack_task(survey, folders), StopsAt())
    assert stopped == {"published": [], "failed": [], "stopped": jobs}
    assert all(list((folders.checkpoints / job_id).glob("step-*.json")) for job_id in jobs)
    mailbox = Mailbox()
    assert train(pack_task(survey, folders), mailbox)["published"] == jobs
    first = next(e for e in mailbox.monitor.drain() if isinstance(e, StateEvent))
    assert first.train_step is not None
    assert 0 < first.train_step < 4

    undisturbed = Folders.at(tmp_path / "undisturbed")
    train(pack_task(survey_of(fleet, undisturbed), undisturbed))
    for reference in ("rex", "tom"):
        once, twice = weights(undisturbed, reference), weights(folders, reference)
        assert once.keys() == twice.keys()
        assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_cancelled_job_leaves_the_pack(
    tmp_path: Path, tiny_base: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raybooth.fleet.reporter.FLUSH_S", 0.0)
    fleet = write_fleet(tmp_path, tiny_base, {"rex": {}, "tom": {"class_noun": "cat"}})
    survey = survey_of(fleet, folders)
    rex, tom = (job.job_id for job in survey.jobs)
    mailbox = Mailbox()
    mailbox.monitor.give(Orders(cancelled=frozenset({rex})))
    done = train(pack_task(survey, folders), mailbox)
    assert done == {"published": [tom], "failed": [], "stopped": [rex]}


def test_a_checkpoint_of_another_config_fails_its_job_alone(
    fleet: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raybooth.fleet.reporter.FLUSH_S", 0.0)
    survey = survey_of(fleet, folders)
    rex, tom = (job.job_id for job in survey.jobs)
    train(pack_task(survey, folders, ["tom"]), StopsAt())
    (folders.checkpoints / tom).rename(folders.checkpoints / rex)
    mailbox = Mailbox()
    done = train(pack_task(survey, folders), mailbox)
    assert (done["failed"], done["published"]) == ([rex], [tom])
    assert "another configuration" in reasons(mailbox.monitor.drain())[rex]


def test_another_base_than_planned_is_refused(fleet: Path, folders: Folders) -> None:
    from dataclasses import replace

    task = replace(pack_task(survey_of(fleet, folders), folders), base_fingerprint="0" * 64)
    with pytest.raises(BaseModelError, match="not the one that this fleet was planned for"):
        train(task)
