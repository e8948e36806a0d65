"""Validation changes no bit of a training, survives kills, and keeps the step that it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.encoders import write_tiny_encoders
from tests.raybooth.training.jobs import draw_tensors, four_jobs, make_job
from tests.raybooth.training.test_loop import numbers, states

from raybooth.encoders import load_clip, load_image_encoder
from raybooth.model.base import Base
from raybooth.pocket import world
from raybooth.training.held_out import hold_out
from raybooth.training.job import SlotJob
from raybooth.training.loop import PackReport, train_pack
from raybooth.training.pack import Pack
from raybooth.training.validation import Validation, fixed_loss
from raybooth.training.watched import ValidationTask
from raybooth.validation_record import ValidationRecord

EVERY_2 = {"every_steps": 2, "num_timesteps": 2}


def run(
    base: Base,
    jobs: Sequence[SlotJob],
    root: Path,
    stop_after: int | None = None,
    **task: Any,
) -> tuple[PackReport, Validation]:
    """Train with validation of every job that asks for it."""
    tasks = [ValidationTask(job, **task) for job in jobs if job.train.validation.enabled]
    validation = Validation(base, tasks, root)
    steps: list[int] = []
    report = train_pack(
        base,
        jobs,
        checkpoint_root=root,
        on_report=lambda reports: steps.append(1),
        should_stop=lambda: len(steps) == stop_after,
        validation=validation,
    )
    return report, validation


def record(validation: Validation, job: SlotJob) -> ValidationRecord:
    found = validation.record(job.job_id)
    assert found is not None
    return found


def test_no_bit_of_any_slot_depends_on_validation(base: Base, tmp_path: Path) -> None:
    plain = four_jobs()
    watched = four_jobs(validation={**EVERY_2, "samples": True, "keep": "best"})
    train_pack(base, plain, checkpoint_root=tmp_path / "plain")
    run(base, watched, tmp_path / "watched", prompts=("a photo of sks dog",))
    expected = states(base, plain, tmp_path / "plain")
    found = states(base, watched, tmp_path / "watched")
    for job in plain:
        pairs = zip(numbers(found[job.job_id]), numbers(expected[job.job_id]), strict=True)
        assert all(torch.equal(left, right) for left, right in pairs)


def test_resumed_anew_at_every_train_step_finds_the_same_record(base: Base, tmp_path: Path) -> None:
    jobs = [make_job("robot", validation={**EVERY_2, "keep": "best"}), make_job("vase")]
    _, whole = run(base, jobs, tmp_path / "whole")
    expected = record(whole, jobs[0])
    assert [point.train_step for point in expected.points] == [2, 4, 6]
    resumed = whole
    for _ in range(7):
        _, resumed = run(base, jobs, tmp_path / "resumed", stop_after=1)
    assert record(resumed, jobs[0]) == expected
    assert resumed.record(jobs[1].job_id) is None


def test_points_after_the_resumed_state_are_measured_again(base: Base, tmp_path: Path) -> None:
    job = make_job("robot", validation=EVERY_2)
    validation = Validation(base, [ValidationTask(job)], tmp_path)
    pack = Pack(base, [job])
    for _ in range(4):
        validation.after_step(pack, pack.step())
    pack.close()
    fresh = Pack(base, [job])  # no checkpoint was written
    again = Validation(base, [ValidationTask(job)], tmp_path)
    again.resume(fresh)
    for _ in range(2):
        again.after_step(fresh, fresh.step())
    fresh.close()
    assert record(again, job).points == record(validation, job).points[:1]


def test_the_loss_is_fixed_and_the_same_in_every_pack(base64: Base) -> None:
    jobs = four_jobs(validation=EVERY_2)
    alone = Pack(base64, jobs[:1])
    first = fixed_loss(base64, alone, jobs[0], jobs[0].tensors)
    assert fixed_loss(base64, alone, jobs[0], jobs[0].tensors) == first
    alone.step()
    stepped = fixed_loss(base64, alone, jobs[0], jobs[0].tensors)
    assert stepped != first
    alone.close()
    together = Pack(base64, jobs)
    together.step()
    found = fixed_loss(base64, together, jobs[0], jobs[0].tensors)
    together.close()
    assert found == pytest.approx(stepped, rel=1e-10)


def test_keep_best_publishes_the_weights_of_the_best_point(base: Base, tmp_path: Path) -> None:
    job = make_job(
        "robot",
        optimizer={"learning_rate": 0.3},  # diverges
        validation={"every_steps": 1, "keep": "best"},
    )
    seen: dict[int, torch.Tensor] = {}

    class Spy(Validation):
        def after_step(self, pack: Pack, reports: Any) -> Any:
            told = super().after_step(pack, reports)
            seen[reports[0].train_step] = pack.state(job.job_id).flat_N
            return told

    validation = Spy(base, [ValidationTask(job)], tmp_path)
    published: list[torch.Tensor] = []
    train_pack(
        base,
        [job],
        checkpoint_root=tmp_path,
        on_finished=lambda job, pack: published.append(pack.state(job.job_id).flat_N),
        validation=validation,
    )
    found = record(validation, job)
    losses = [point.loss for point in found.points]
    assert found.best_step == found.published_step == losses.index(min(losses)) + 1
    assert found.best_step < len(losses)
    assert torch.equal(published[0], seen[found.best_step])


def test_patience_ends_a_job_early_and_its_neighbour_goes_on(base: Base, tmp_path: Path) -> None:
    impatient = make_job(
        "robot",
        optimizer={"learning_rate": 0.3},
        validation={"every_steps": 1, "patience": 1},
    )
    neighbour = make_job("vase")
    report, validation = run(base, [impatient, neighbour], tmp_path)
    assert set(report.finished) == {"robot-job", "vase-job"}
    found = record(validation, impatient)
    assert found.stopped_early
    assert found.points[-1].train_step < impatient.train.num_train_steps
    assert states(base, [neighbour], tmp_path)["vase-job"].train_step == 6
    report, again = run(base, [impatient, neighbour], tmp_path)
    assert report.num_subject_steps == 0
    assert record(again, impatient) == found


def test_held_out_photos_leave_the_training_and_give_the_loss(base: Base, tmp_path: Path) -> None:
    tensors = draw_tensors("robot")
    kept, held_out = hold_out(tensors, 1)
    assert held_out is not None
    assert (kept.photo_digests, held_out.photo_digests) == (
        ("robot-0", "robot-1", "robot-2"),
        ("robot-3",),
    )
    assert torch.equal(held_out.mean_NCHW, tensors.mean_NCHW[3:])
    assert len(kept.mean_NCHW) == 3
    assert hold_out(tensors, 0) == (tensors, None)
    job = replace(make_job("robot", validation=EVERY_2), tensors=kept)
    _, validation = run(base, [job], tmp_path / "held", held_out=held_out)
    found = record(validation, job)
    assert (found.loss_of, found.held_out) == ("held-out photos", ("robot-3",))
    _, validation = run(base, [job], tmp_path / "own")
    own = record(validation, job)
    assert (own.loss_of, own.held_out) == ("instance images", ())
    assert own.points[0].loss != found.points[0].loss


def test_encoders_judge_samples_and_tell_copying_and_drift(base: Base, tmp_path: Path) -> None:
    image, clip = write_tiny_encoders(tmp_path / "encoders")
    photos = world.subject_photos(world.draw_instance("v"), 3, "v")
    for place, photo in enumerate(photos):
        photo.save(tmp_path / f"{place}.png")
    judged = {**EVERY_2, "samples": True, "image_encoder": str(image), "clip": str(clip)}
    job = make_job(
        "robot",
        validation={**judged, "max_drift": 1e-9, "class_images": 1},
        samples={"num_inference_steps": 2},
    )
    task: dict[str, Any] = {
        "prompts": ("a photo of sks robot", "sks"),
        "plain_prompts": ("a photo of a robot", "a"),
        "class_prompt": "a photo of a robot",
        "photos": tuple(tmp_path / f"{place}.png" for place in range(3)),
        "image_encoder": load_image_encoder(str(image)),
        "clip": load_clip(str(clip)),
    }
    _, validation = run(base, [job], tmp_path / "run", **task)
    found = record(validation, job)
    assert set(found.encoders) == {"image_encoder", "clip"}
    assert len(validation.pictures(job.job_id)) == 3 * 2
    assert found.ceiling_dino is not None
    assert found.base_pres is not None
    for point in found.points:
        assert None not in (point.dino, point.clip_i, point.clip_t, point.pres, point.drift)
        assert point.drifting  # the limit is nothing
        assert point.copying == (point.dino is not None and point.dino > found.ceiling_dino)
    _, again = run(base, [job], tmp_path / "run", **task)  # nothing is left to train
    assert record(again, job) == found
