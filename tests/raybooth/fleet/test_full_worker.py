"""A full run's worker publishes what was trained, stops, resumes bit for bit, fails in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.raybooth.fleet.fleets import WITH_PRIOR, Mailbox, pack_task, survey_of, write_fleet
from tests.raybooth.training.full_jobs import one_process_group

from raybooth import cli
from raybooth.config import merge
from raybooth.data.prior import PriorCache
from raybooth.data.prior_build import build_prior
from raybooth.errors import BaseModelError, InputProblems, RequestError
from raybooth.fleet.events import Event, Orders, StateEvent, StepEvent
from raybooth.fleet.full_worker import train_full_fn
from raybooth.fleet.survey import Survey
from raybooth.fleet.task import Folders
from raybooth.model.base import load_base
from raybooth.store import SAMPLES, FullRecord, Store
from raybooth_serving.names.catalog import Catalog, KnownBase

FULL: dict[str, Any] = {
    "method": "full",
    "adapter": {"rank": 4, "targets": "attention"},  # the defaults: a full run has none
    "full": {"text_encoder": True, "zero_stage": 2},
}


@pytest.fixture(autouse=True)
def _alone() -> None:
    one_process_group()


def full_survey(
    folder: Path, base: Path, folders: Folders, train: dict[str, Any] | None = None
) -> Survey:
    return survey_of(write_fleet(folder, base, {"rex": {}}, merge(FULL, train or {})), folders)


def train(survey: Survey, folders: Folders, mailbox: Mailbox) -> dict[str, list[str]]:
    return train_full_fn({"task": pack_task(survey, folders), "monitor": mailbox})


def states(events: list[Event]) -> list[str]:
    return [event.state for event in events if isinstance(event, StateEvent)]


def test_a_full_subject_is_published_and_drawn_and_not_served(
    tmp_path: Path, tiny_base: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = full_survey(tmp_path, tiny_base, folders, {"prior": WITH_PRIOR})
    job = survey.jobs[0]
    assert job.prior_key is not None
    build_prior(load_base(str(tiny_base)), PriorCache(folders.priors), job.prior_key, 2)
    mailbox = Mailbox()
    assert train(survey, folders, mailbox)["published"] == [job.job_id]
    events = mailbox.monitor.drain()
    assert states(events) == ["running", "publishing", "published"]
    assert [e.train_step for e in events if isinstance(e, StepEvent)][-1] == 4
    assert not any(folders.checkpoints.iterdir())
    store = Store(folders.store)
    record = store.fetch("rex")
    assert isinstance(record, FullRecord)
    assert record.parts == ("unet", "text_encoder")
    assert set(record.files) == {"unet.safetensors", "text_encoder.safetensors", SAMPLES}
    assert record.base.fingerprint == survey.base_fingerprint
    assert [step for step, _ in record.loss_curve] == [1, 2, 3, 4]
    assert store.verify("rex") == []
    assert [found.reference for found in store.records()] == ["rex@1"]

    catalog = Catalog(store, [KnownBase("tiny", survey.base_fingerprint)])
    assert [card.id for card in catalog.cards(with_versions=True)] == ["tiny"]
    with pytest.raises(BaseModelError, match="is a full fine-tune, not an adapter"):
        catalog.resolve("rex")

    monkeypatch.setenv("RAYBOOTH_HOME", str(folders.store.parent))
    out = tmp_path / "rex.png"
    command = ["generate", "rex", "a photo of sks dog", "--seed", "5", "--steps", "2"]
    assert cli.main([*command, "-o", str(out)]) == 0
    plain = tmp_path / "plain.png"
    by_base = ["generate", str(tiny_base), *command[2:], "-o", str(plain)]
    assert cli.main([*by_base, "--base", str(tiny_base)]) == 0
    assert Image.open(out).tobytes() != Image.open(plain).tobytes()
    assert cli.main([*command, "-o", str(out), "--adapter-scale", "0.5"]) == RequestError.exit_code


def test_a_stopped_run_goes_on_bit_for_bit_and_its_validation_is_in_the_record(
    tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    watched = {"every_steps": 2, "held_out_images": 1, "samples": True, "keep": "best"}
    survey = full_survey(tmp_path, tiny_base, folders, {"validation": watched})
    stopping = Mailbox()
    stopping.monitor.give(Orders(stop=True))
    assert train(survey, folders, stopping)["stopped"] == [survey.jobs[0].job_id]
    assert train(survey, folders, Mailbox())["published"] == [survey.jobs[0].job_id]
    elsewhere = Folders.at(tmp_path / "elsewhere")
    assert train(survey, elsewhere, Mailbox())["published"] == [survey.jobs[0].job_id]
    record, other = (Store(where.store).fetch("rex@1") for where in (folders, elsewhere))
    assert record.validation is not None
    assert record.validation == other.validation
    assert [point.train_step for point in record.validation.points] == [2, 4]
    assert record.validation.held_out == (record.photos[-1].sha256,)
    assert len(record.photos) == 3
    assert len([name for name in record.files if name.startswith("validation-")]) == 2
    for part in ("unet", "text_encoder"):
        found, expected = (
            load_file(Store(where.store).folder("rex") / f"{part}.safetensors")
            for where in (folders, elsewhere)
        )
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    again = Mailbox()
    assert train(survey, folders, again)["published"] == [survey.jobs[0].job_id]
    assert states(again.monitor.drain()) == ["published"]
    assert Store(folders.store).versions("rex") == [1]


def test_a_full_run_that_cannot_be_trained_fails_with_its_reason(
    tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    wild = {"optimizer": {"learning_rate": 1e30}, "full": {"zero_stage": 0}}
    survey = full_survey(tmp_path, tiny_base, folders, wild)
    mailbox = Mailbox()
    assert train(survey, folders, mailbox)["failed"] == [survey.jobs[0].job_id]
    reasons = [e.error for e in mailbox.monitor.drain() if isinstance(e, StateEvent) and e.error]
    assert "is not finite" in reasons[0]
    assert train(survey, folders, mailbox)["failed"] == [survey.jobs[0].job_id]
    survey.jobs[0].subject.images[1].unlink()
    gone = Mailbox()
    train(survey, Folders.at(tmp_path / "elsewhere"), gone)
    reasons = [e.error for e in gone.monitor.drain() if isinstance(e, StateEvent) and e.error]
    assert "1.png" in reasons[0]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_check_refuses_paged_states_where_no_gpu_is(
    method: str, tmp_path: Path, tiny_base: Path, folders: Folders
) -> None:
    values: dict[str, Any] = {
        "optimizer": {"name": "paged_adamw8bit"},
        "resources": {"num_gpus": 0},
    }
    train = merge(FULL, values) if method == "full" else values
    with pytest.raises(InputProblems, match="paged states need CUDA's unified memory"):
        survey_of(write_fleet(tmp_path, tiny_base, {"rex": {}}, train), folders)
