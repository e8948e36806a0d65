"""Validation of full runs: no bit moves, all workers agree, stops change nothing, best is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.encoders import write_tiny_encoders
from tests.raybooth.training.full_jobs import WATCHED, fresh, full_job, one_process_group

from raybooth.data.batch import make_slot_batches
from raybooth.encoders import load_clip, load_image_encoder
from raybooth.errors import RequestError
from raybooth.model.base import Base
from raybooth.pocket import world
from raybooth.training import objective
from raybooth.training.full_loop import FullOutcome, train_full
from raybooth.training.full_validation import FullValidation
from raybooth.training.held_out import hold_out
from raybooth.training.watched import ValidationTask
from raybooth.validation_record import ValidationRecord

EVERY_1 = {"every_steps": 1, "num_timesteps": 2}
DIVERGES = {"learning_rate": 0.3}


@pytest.fixture(autouse=True)
def _alone() -> None:
    one_process_group()


def watched(
    base: Base, job: Any, root: Path, *, stop_after: int | None = None, **task: Any
) -> tuple[FullOutcome, ValidationRecord]:
    """A run with validation on a base of its own, and what it found."""
    own = fresh(base)
    validation = FullValidation(own, ValidationTask(job, **task), root)
    steps: list[int] = []
    outcome = train_full(
        own,
        job,
        checkpoint_root=root,
        on_report=lambda report: steps.append(report.train_step),
        should_stop=lambda: len(steps) + 1 == stop_after,
        validation=validation,
    )
    return outcome, validation.record()


def assert_same_weights(found: FullOutcome, expected: FullOutcome) -> None:
    assert found.weights is not None
    assert expected.weights is not None
    for part, state in expected.weights.items():
        for name, value in state.items():
            assert torch.equal(found.weights[part][name], value), name


def test_no_bit_of_the_run_depends_on_validation_nor_on_a_stop(base: Base, tmp_path: Path) -> None:
    full = {"text_encoder": True, "zero_stage": 2}
    plain = train_full(fresh(base), full_job(full=full), checkpoint_root=tmp_path / "plain")
    judged = {**EVERY_1, "samples": True, "keep": "last", "patience": 3}
    job = full_job(full=full, validation=judged, samples={"num_inference_steps": 2})
    task: dict[str, Any] = {"prompts": ("a photo of sks robot",)}
    whole, expected = watched(base, job, tmp_path / "whole", **task)
    assert whole.curve == plain.curve
    assert_same_weights(whole, plain)
    assert [point.train_step for point in expected.points] == [1, 2, 3]
    for stop_after in (2, None):
        resumed, found = watched(base, job, tmp_path / "halved", stop_after=stop_after, **task)
    assert found == expected
    assert_same_weights(resumed, plain)


def test_the_loss_is_that_of_the_weights_as_they_stand(base: Base, tmp_path: Path) -> None:
    """Every held-out image at both timesteps with the fixed noise, by plain torch."""
    job = full_job(validation={**EVERY_1, "held_out_images": 1}, num_train_steps=1)
    kept, held_out = hold_out(job.tensors, 1)
    assert held_out is not None
    job = replace(job, tensors=kept)
    outcome, record = watched(base, job, tmp_path, held_out=held_out)
    assert (record.loss_of, record.held_out) == ("held-out photos", ("robot-3",))
    assert outcome.weights is not None
    own = fresh(base)
    own.denoiser.load_state_dict(outcome.weights["unet"])
    alpha_bar_T = objective.alphas_cumprod(base.scheduler_config)
    train = job.train.model_copy(
        update={"batch_size": 1, "prior": job.train.prior.model_copy(update={"num_images": 0})}
    )
    losses = []
    for place, timestep in enumerate((250, 750)):
        (batch,) = make_slot_batches(
            held_out,
            train,
            "validation/robot",
            0,
            place,
            num_train_timesteps=1000,
            scaling_factor=base.scaling_factor,
        )
        t_B = torch.tensor([timestep])
        noisy = objective.add_noise(batch.latents_BCHW, batch.noise_BCHW, alpha_bar_T[t_B])
        with torch.no_grad():
            predicted = own.family.predict(own.denoiser, noisy, t_B, batch.conditioning)
        losses.append(float((predicted - batch.noise_BCHW).square().mean()))
    assert record.points[0].loss == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_keep_best_publishes_the_best_point_and_patience_ends_the_run(
    base: Base, tmp_path: Path
) -> None:
    best = {**EVERY_1, "keep": "best", "patience": 2}
    job = full_job(optimizer=DIVERGES, validation=best, num_train_steps=9)
    outcome, record = watched(base, job, tmp_path / "run")
    losses = [point.loss for point in record.points]
    assert record.best_step == record.published_step == losses.index(min(losses)) + 1
    assert record.stopped_early
    assert len(outcome.curve) == len(losses) == record.best_step + 2 < 9
    again, found = watched(base, job, tmp_path / "run")  # nothing is left to train
    assert found == record
    assert again.curve == outcome.curve
    assert_same_weights(again, outcome)
    short = full_job(optimizer=DIVERGES, num_train_steps=9)
    stopped = train_full(
        fresh(base),
        short,
        checkpoint_root=tmp_path / "short",
        should_stop=iter([False] * (record.best_step - 1) + [True]).__next__,
    )
    assert stopped.curve == outcome.curve[: record.best_step]


def test_encoders_judge_samples_and_tell_copying_and_drift(base: Base, tmp_path: Path) -> None:
    image, clip = write_tiny_encoders(tmp_path / "encoders")
    photos = world.subject_photos(world.draw_instance("v"), 3, "v")
    for place, photo in enumerate(photos):
        photo.save(tmp_path / f"{place}.png")
    judged = {**EVERY_1, "samples": True, "image_encoder": str(image), "clip": str(clip)}
    job = full_job(
        num_train_steps=2,
        full={"text_encoder": True},
        validation={**judged, "max_drift": 1e-9, "class_images": 1, "best_by": "dino"}
        | {"keep": "best"},
        samples={"num_inference_steps": 2},
    )
    task: dict[str, Any] = {
        "prompts": ("a photo of sks robot",),
        "plain_prompts": ("a photo of a robot",),
        "class_prompt": "a photo of a robot",
        "photos": tuple(tmp_path / f"{place}.png" for place in range(3)),
        "image_encoder": load_image_encoder(str(image)),
        "clip": load_clip(str(clip)),
    }
    _, record = watched(base, job, tmp_path / "run", **task)
    assert set(record.encoders) == {"image_encoder", "clip"}
    assert record.ceiling_dino is not None
    assert record.base_pres is not None
    for point in record.points:
        assert None not in (point.dino, point.clip_i, point.clip_t, point.pres, point.drift)
        assert point.drifting  # the limit is nothing
        assert point.copying == (point.dino is not None and point.dino > record.ceiling_dino)


def test_what_cannot_be_measured_is_told(base: Base, tmp_path: Path) -> None:
    job = full_job(validation={**EVERY_1, "samples": True})
    job = replace(job, train=job.train.model_copy(update={"resolution": 13}))
    with pytest.raises(RequestError, match="cannot make images of this size"):
        watched(base, job, tmp_path, prompts=("a photo of sks robot",))


def test_two_workers_under_zero_3_agree_and_resume_bit_for_bit(
    base: Base, two_workers: Path, tmp_path: Path
) -> None:
    first, second = (torch.load(two_workers / f"rank-{rank}") for rank in range(2))
    assert first["steps"] == second["steps"]  # both ended early, at the same train step
    assert second["weights"] == second["records"] == []
    whole, resumed = (ValidationRecord.model_validate(one) for one in first["records"])
    assert whole == resumed
    assert whole.stopped_early
    for part, state in first["weights"][0].items():
        for name, value in state.items():
            assert torch.equal(value, first["weights"][1][part][name]), name
    one = full_job(**WATCHED, full={"text_encoder": True})
    _, alone = watched(base, one, tmp_path)
    losses = [point.loss for point in alone.points]
    assert whole.points[0].loss == pytest.approx(losses[0], rel=1e-4)
    assert [point.loss for point in whole.points] == pytest.approx(losses, rel=1e-2)  # diverging
