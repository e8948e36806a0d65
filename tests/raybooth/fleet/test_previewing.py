"""A running pack's newest checkpoints can be sampled; they go when their jobs end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.raybooth.fleet.fleets import Mailbox, pack_task, survey_of, write_fleet
from tests.raybooth.fleet.test_worker import StopsAt, train
from tests.raybooth.test_store import a_record

from raybooth.config import TrainConfig, parse_config
from raybooth.errors import InputError, NotPublishedError
from raybooth.fleet.events import NoteEvent, StateEvent
from raybooth.fleet.ledger import Heartbeat, JobLedger
from raybooth.fleet.progress import JobProgress, Progress
from raybooth.fleet.queue import JobState, Queue
from raybooth.fleet.task import Folders
from raybooth.model.base import load_base
from raybooth.model.lora import load_adapter
from raybooth.model.published import take_on, text_of
from raybooth.model.sampler import SampleRequest, generate
from raybooth.previews import POINTER
from raybooth.store import LEARNED, WEIGHTS, Store


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers hear a stop at their next train step."""
    monkeypatch.setattr("raybooth.fleet.reporter.FLUSH_S", 0.0)


def test_a_stopped_run_leaves_a_preview_and_publishing_takes_it_away(
    tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    tokens = {"adapter": {"rank": 2, "targets": "attention", "identifier_tokens": 2}}
    held = {"validation": {"every_steps": 4, "held_out_images": 1}}
    fleet = write_fleet(tmp_path, tiny_base, {"mug": held}, train=tokens)
    survey = survey_of(fleet, folders)
    (job,) = survey.jobs
    store = Store(folders.store)
    store.publish_preview(a_record("mug", "crashed"), {WEIGHTS: Path(__file__)})
    task = pack_task(survey, folders)
    assert train(task, StopsAt())["stopped"] == [job.job_id]

    record = store.fetch("mug@preview")
    assert record.job_id == job.job_id  # the crashed job's is superseded
    assert store.subjects() == []
    assert store.verify("mug@preview") == []
    assert set(record.files) == {WEIGHTS, LEARNED}
    assert len(record.photos) == 3
    newest = max((folders.checkpoints / job.job_id).glob("step-*.safetensors"))
    assert newest.name.startswith(f"step-{record.num_train_steps:08d}")
    state, pairs = load_file(newest), load_adapter(store.folder("mug@preview") / WEIGHTS)
    parts = torch.cat([part.flatten() for pair in pairs.values() for part in pair])
    flat_N = state["flat_N"][: len(parts)]  # in another order; alpha is the rank: scale 1
    assert torch.equal(parts.sort().values, flat_N.sort().values)

    base = load_base(str(tiny_base))
    folder = store.folder(record.reference)
    text, bank = text_of(base, record, folder), take_on(base, record, folder)
    request = SampleRequest("a photo of <mug> dog", num_inference_steps=2, slot=1, text=text)
    assert generate(base, bank, [request])[0].size == (32, 32)

    assert train(task)["published"] == [job.job_id]
    assert store.subjects() == ["mug"]
    with pytest.raises(NotPublishedError, match="no such preview now"):
        store.fetch("mug@preview")
    assert not list((store.root / "mug").glob("preview*"))


def test_previews_can_be_left_out(tmp_path: Path, tiny_base: Path, folders: Folders) -> None:
    quiet = {"checkpoint": {"every_steps": 1, "preview": False}}
    fleet = write_fleet(tmp_path, tiny_base, {"rex": quiet, "tom": {}})
    train(pack_task(survey_of(fleet, folders), folders), StopsAt())
    assert Store(folders.store).previewed() == ["tom"]


def test_a_preview_that_cannot_be_written_is_told_and_fails_nobody(
    tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    survey = survey_of(write_fleet(tmp_path, tiny_base, {"rex": {}}), folders)
    (folders.store / "rex" / POINTER).mkdir(parents=True)
    mailbox = Mailbox()
    assert train(pack_task(survey, folders), mailbox)["failed"] == []
    notes = [e.text for e in mailbox.monitor.drain() if isinstance(e, NoteEvent)]
    assert any("rex: no new preview" in note and POINTER in note for note in notes)
    assert any("a preview stays" in note for note in notes)
    assert Store(folders.store).versions("rex") == [1]


@pytest.mark.parametrize("ended", ["failed", "cancelled", "published", "queued"])
def test_the_ledger_takes_an_ended_jobs_preview_away(
    tmp_path: Path, folders: Folders, ended: JobState
) -> None:
    store, queue = Store(folders.store), Queue(tmp_path / "fleet.db")
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    store.publish_preview(a_record("rex", "rex-1"), {WEIGHTS: weights})
    progress = Progress(JobProgress(name, "rex", 4, 1) for name in ("rex-1", "rex-2"))
    for job_id in ("rex-1", "rex-2"):
        queue.submit(job_id, fleet="f", subject_id="rex", num_train_steps=4, spec={})
    queue.claim(["rex-1", "rex-2"], "us")
    with Heartbeat(queue, "us") as heartbeat:
        ledger = JobLedger(queue, store, progress, "us", heartbeat)
        ledger.apply(StateEvent("rex-2", "failed", error="another job's end"))
        assert store.previewed() == ["rex"]
        ledger.apply(StateEvent("rex-1", "running"))
        ledger.apply(StateEvent("rex-1", ended, error="why" if ended == "failed" else None))
    assert store.previewed() == (["rex"] if ended == "queued" else [])


def test_full_runs_have_no_previews() -> None:
    full: dict[str, Any] = {"method": "full", "optimizer": {"learning_rate": 1e-6}}
    assert not parse_config(TrainConfig, full, "here").previews
    assert parse_config(TrainConfig, {}, "here").previews
    with pytest.raises(InputError, match=r"checkpoint\.preview needs method: lora"):
        parse_config(TrainConfig, {**full, "checkpoint": {"preview": True}}, "here")
