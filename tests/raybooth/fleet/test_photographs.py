"""`raybooth check` names every photo, caption and mask that cannot be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.raybooth.fleet.fleets import write_fleet
from tests.tiny import write_tiny_base

from raybooth.data.prior import PriorCache
from raybooth.errors import InputProblems
from raybooth.fleet.survey import Survey, survey_fleet


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("photographs") / "base")


def survey(folder: Path, base: Path, **overrides: Any) -> Survey:
    fleet = folder / "fleet.yaml"
    if not fleet.exists():
        write_fleet(folder, base, {"rex": overrides})
    return survey_fleet(fleet, PriorCache(folder / "priors"))


def problems(folder: Path, base: Path, **overrides: Any) -> list[str]:
    with pytest.raises(InputProblems) as caught:
        survey(folder, base, **overrides)
    return [str(problem) for problem in caught.value.problems]


def beside(tmp_path: Path, base: Path, **overrides: Any) -> Path:
    """The photos' folder of a fleet that is written but not surveyed."""
    write_fleet(tmp_path, base, {"rex": overrides})
    return tmp_path / "photos" / "rex"


def test_captions_masks_and_buckets_are_surveyed_and_part_of_the_job(
    tmp_path: Path, base: Path
) -> None:
    photos = {"captions": True, "masks": True, "fit": "buckets", "flip": True}
    folder = beside(tmp_path, base, photos=photos)
    (folder / "0.txt").write_text("a red {identifier} {class_noun}", encoding="utf-8")
    Image.new("L", (64, 64), 255).save(folder / "0.mask.png")
    (job,) = survey(tmp_path, base).jobs
    assert [image.name for image in job.subject.images] == ["0.png", "1.png", "2.png"]
    assert job.subject.caption(job.subject.images[0]) == "a red sks dog"
    assert job.subject.caption(job.subject.images[1]) == "a photo of sks dog"
    ids = {job.job_id}
    (folder / "0.txt").write_text("a blue {identifier} {class_noun}", encoding="utf-8")
    ids.add(survey(tmp_path, base).jobs[0].job_id)
    Image.new("L", (64, 64), 200).save(folder / "0.mask.png")
    ids.add(survey(tmp_path, base).jobs[0].job_id)
    assert len(ids) == 3


def test_everything_wrong_beside_photos_is_listed_at_once(tmp_path: Path, base: Path) -> None:
    folder = beside(tmp_path, base, photos={"captions": True, "masks": True})
    (folder / "0.txt").write_bytes("größer".encode("latin-1"))
    (folder / "1.txt").write_text("a {colour} dog", encoding="utf-8")
    (folder / "2.txt").write_text("zebra " * 40, encoding="utf-8")
    Image.new("L", (63, 64), 255).save(folder / "0.mask.png")
    Image.new("L", (64, 64), 0).save(folder / "1.mask.png")
    (folder / "2.mask.png").write_bytes(b"no picture")
    found = "\n".join(problems(tmp_path, base))
    for expected in (
        "0.txt is not UTF-8",
        "1.txt has unknown braces",
        "2.txt is too long",
        "0.mask.png has another size than its photo",
        "63x64, the photo 64x64",
        "1.mask.png shows no subject",
        "2.mask.png is not a JPEG, PNG or WebP picture",
    ):
        assert expected in found
    assert found.count("subject 'rex'") == 6


def test_options_without_files_are_refused_and_files_without_options_warned_of(
    tmp_path: Path, base: Path
) -> None:
    found = "\n".join(problems(tmp_path, base, photos={"captions": True, "masks": True}))
    assert "photos.captions has no effect" in found
    assert "photos.masks has no effect" in found
    other = tmp_path / "other"
    folder = beside(other, base)
    (folder / "0.txt").write_text("words", encoding="utf-8")
    Image.new("L", (64, 64), 255).save(folder / "0.mask.png")
    (warning, second) = survey(other, base).warnings[:2]
    assert "photos.captions: true" in warning
    assert "photos.masks: true" in second


def test_a_photo_too_small_for_its_bucket_is_refused(tmp_path: Path, base: Path) -> None:
    folder = beside(tmp_path, base, photos={"fit": "buckets"})
    Image.radial_gradient("L").resize((40, 23)).convert("RGB").save(folder / "0.png")
    (found,) = problems(tmp_path, base)
    assert "0.png is too small for its bucket 40x24" in found
    Image.radial_gradient("L").resize((40, 24)).convert("RGB").save(folder / "0.png")
    survey(tmp_path, base)


def test_base_prediction_needs_no_prior(tmp_path: Path, base: Path) -> None:
    found = survey(tmp_path, base, prior={"kind": "base_prediction", "loss_weight": 1.0})
    (job,) = found.jobs
    assert job.prior_key is None
    plan = job.plan_job(found.base_fingerprint)
    assert plan.prior is None
    assert plan.num_rows == 2


def test_an_objective_that_does_not_suit_the_base_is_refused(tmp_path: Path, base: Path) -> None:
    (found,) = problems(tmp_path, base, objective={"zero_terminal_snr": True})
    assert "subject 'rex': objective.zero_terminal_snr cannot be trained" in found
