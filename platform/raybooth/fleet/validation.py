"""What a pack's worker validates: each subject's words, photos and encoders (no ray)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from raybooth.data.encode import SubjectTensors
from raybooth.encoders import load_clip, load_image_encoder
from raybooth.evaluation import Words
from raybooth.fleet.held_out import held_out_problem
from raybooth.model.base import Base
from raybooth.subject import Subject
from raybooth.training.job import SlotJob
from raybooth.training.validation import Validation, ValidationTask, hold_out


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
        config, subject = job.train.validation, subjects[job.job_id]
        if not config.enabled:
            continue
        if config.image_encoder is not None and config.image_encoder not in image_encoders:
            loaded = load_image_encoder(config.image_encoder, base.device)
            image_encoders[config.image_encoder] = loaded
        if config.clip is not None and config.clip not in clips:
            clips[config.clip] = load_clip(config.clip, base.device)
        words = Words(subject.identifier, subject.class_noun)
        prompts = subject.train.samples.prompts
        tasks.append(
            ValidationTask(
                job=job,
                held_out=held_out[job.job_id],
                prompts=subject.sample_prompts,
                plain_prompts=tuple(words.plain(template) for template in prompts),
                class_prompt=subject.class_prompt,
                photos=subject.images,
                image_encoder=image_encoders.get(config.image_encoder or ""),
                clip=clips.get(config.clip or ""),
            )
        )
    return Validation(base, tasks, root) if tasks else None
