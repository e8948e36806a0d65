"""What a worker validates: each subject's words, photos and encoders (no ray)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from raybooth.data.encode import SubjectTensors
from raybooth.encoders import ClipEncoder, ImageEncoder, load_clip, load_image_encoder
from raybooth.evaluation import Words
from raybooth.fleet.held_out import held_out_problem
from raybooth.model.base import Base
from raybooth.subject import Subject
from raybooth.training.full_validation import FullValidation
from raybooth.training.held_out import hold_out
from raybooth.training.job import SlotJob
from raybooth.training.validation import Validation
from raybooth.training.watched import ValidationTask


def split_photos(
    subject: Subject, tensors: SubjectTensors
) -> tuple[SubjectTensors, SubjectTensors | None]:
    """(what is trained on, what is held out)."""
    if (problem := held_out_problem(subject)) is not None:
        raise problem
    return hold_out(tensors, subject.train.validation.held_out_images)


def watch(
    base: Base,
    subjects: Mapping[str, Subject],
    jobs: Sequence[SlotJob],
    held_out: Mapping[str, SubjectTensors | None],
    root: Path,
) -> Validation | None:
    """The validation of the jobs that ask for it, by job id; each encoder is loaded once."""
    image_encoders, clips = {}, {}
    tasks = []
    for job in jobs:
        config = job.train.validation
        if not config.enabled:
            continue
        if config.image_encoder is not None and config.image_encoder not in image_encoders:
            loaded = load_image_encoder(config.image_encoder, base.device)
            image_encoders[config.image_encoder] = loaded
        if config.clip is not None and config.clip not in clips:
            clips[config.clip] = load_clip(config.clip, base.device)
        tasks.append(
            _task(
                job,
                subjects[job.job_id],
                held_out[job.job_id],
                image_encoders.get(config.image_encoder or ""),
                clips.get(config.clip or ""),
            )
        )
    return Validation(base, tasks, root) if tasks else None


def watch_full(
    base: Base,
    subject: Subject,
    job: SlotJob,
    held_out: SubjectTensors | None,
    root: Path,
    *,
    is_first: bool,
) -> FullValidation | None:
    """The validation of a full run that asks for it; the first worker alone loads encoders."""
    config, image_encoder, clip = job.train.validation, None, None
    if not config.enabled:
        return None
    if is_first and config.image_encoder is not None:
        image_encoder = load_image_encoder(config.image_encoder, base.device)
    if is_first and config.clip is not None:
        clip = load_clip(config.clip, base.device)
    return FullValidation(base, _task(job, subject, held_out, image_encoder, clip), root)


def _task(
    job: SlotJob,
    subject: Subject,
    held_out: SubjectTensors | None,
    image_encoder: ImageEncoder | None,
    clip: ClipEncoder | None,
) -> ValidationTask:
    words = Words(subject.identifier, subject.class_noun)
    return ValidationTask(
        job=job,
        held_out=held_out,
        prompts=subject.sample_prompts,
        plain_prompts=tuple(words.plain(template) for template in subject.train.samples.prompts),
        class_prompt=subject.class_prompt,
        photos=subject.images,
        image_encoder=image_encoder,
        clip=clip,
    )
