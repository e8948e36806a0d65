"""`raybooth evaluate` finds the photos, judges fresh samples, and says what it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.encoders import write_tiny_encoders
from tests.raybooth.fleet.fleets import Mailbox, pack_task, survey_of, write_fleet
from tests.tiny import write_tiny_base

from raybooth.cli import main
from raybooth.fleet.queue import Queue
from raybooth.fleet.task import Folders
from raybooth.fleet.worker import train_pack_fn
from raybooth.home import home, store_folder
from raybooth.store import Store

VALIDATION = {"every_steps": 2, "held_out_images": 1, "samples": True, "keep": "best"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(a base, an image encoder, a CLIP)."""
    folder = tmp_path_factory.mktemp("evaluate")
    return write_tiny_base(folder / "base"), *write_tiny_encoders(folder)


def publish(tmp_path: Path, base: Path, encoder: Path) -> Path:
    """rex@1 in the store, validated on the way; returns the folder of its photos."""
    validation = {**VALIDATION, "image_encoder": str(encoder)}
    path = write_fleet(tmp_path, base, {"rex": {"validation": validation}})
    folders = Folders.of_home()
    survey = survey_of(path, folders)
    job = survey.jobs[0]
    photos = [str(photo) for photo in job.subject.images]
    Queue(home() / "fleet.db").submit(
        job.job_id, fleet="f", subject_id="rex", num_train_steps=4, spec={"photos": photos}
    )
    train_pack_fn({"task": pack_task(survey, folders), "monitor": Mailbox()})
    return job.subject.images[0].parent


def test_a_subject_is_evaluated_with_its_own_photos(
    tmp_path: Path, made: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, image, clip = made
    photos = publish(tmp_path, base, image)
    few = ["--images", "2", "--class-images", "2", "--image-encoder", str(image), "--clip"]
    words = ["evaluate", "rex", "--json", *few, str(clip)]
    capsys.readouterr()
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["subject"] == "rex@1"
    assert {"dino", "clip_i", "clip_t", "pres", "div", "ceiling"} <= first.keys()
    assert all(-1 <= first[key] <= 1 for key in ("dino", "clip_i", "clip_t", "pres"))
    assert first["ceiling"]["dino"] < 1
    assert first["num_instance_images"] == 3
    assert main([*words, "--photos", str(photos)]) == 0
    assert json.loads(capsys.readouterr().out) == first
    next(photos.glob("*.png")).write_bytes(b"another")
    assert main(words) == 2
    assert "--photos" in capsys.readouterr().err


def test_what_was_validated_is_in_the_record(tmp_path: Path, made: tuple[Path, Path, Path]) -> None:
    base, image, _ = made
    publish(tmp_path, base, image)
    store = Store(store_folder())
    record = store.fetch("rex@1")
    assert record.validation is not None
    assert record.validation.loss_of == "held-out photos"
    assert [point.train_step for point in record.validation.points] == [2, 4]
    assert record.validation.held_out == (record.photos[-1].sha256,)
    assert len(record.photos) == 3
    assert record.validation.published_step == record.validation.best_step
    pictures = [name for name in record.files if name.startswith("validation-")]
    assert len(pictures) == 2
    assert store.verify("rex@1") == []


def test_other_bases_need_encoders_named(
    tmp_path: Path, made: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path, made[0], made[1])
    assert main(["evaluate", "rex"]) == 2
    assert "--image-encoder" in capsys.readouterr().err
    assert main(["evaluate", "rex", "--images", "0"]) == 2
    assert "--images is out of range" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("validation", "says"),
    [
        ({"every_steps": 1, "held_out_images": 3}, "leaves nothing to train on"),
        (
            {"every_steps": 1, "samples": True, "clip": "no such"},
            "no encoder is called 'no such'",
        ),
        ({"keep": "best"}, "keep has no effect without every_steps"),
        ({"every_steps": 1, "clip": "pocket"}, "judge samples"),
        ({"every_steps": 1, "max_drift": 0.1}, "without image_encoder"),
        ({"every_steps": 1, "best_by": "dino"}, "needs an image_encoder"),
    ],
)
def test_check_names_what_validation_cannot_do(
    tmp_path: Path,
    made: tuple[Path, Path, Path],
    validation: dict[str, object],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_fleet(tmp_path, made[0], {"rex": {"validation": validation}})
    assert main(["check", str(path)]) == 2
    assert says in capsys.readouterr().err
