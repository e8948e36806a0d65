"""Reads a fleet file, its photos, its base and the prior cache: everything wrong, or all jobs.

Loads no weights: a tokenizer, JSON configs and safetensors headers are enough.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.config.adapter import countable
from raybooth.errors import (
    BaseModelError,
    ConfigError,
    EncoderError,
    InputError,
    InputProblems,
    SubjectError,
)
from raybooth.fleet.machine import this_machine
from raybooth.fleet.memory import (
    BaseShape,
    is_target,
    read_base_shape,
)
from raybooth.fleet.photographs import (
    caption_problems,
    photo_problems,
    sidecar_problems,
    sidecar_warnings,
)
from raybooth.fleet.planner import PackMemory, PlanJob, PriorNeed
from raybooth.subject import Fleet, Subject, read_fleet

if TYPE_CHECKING:
    from raybooth.data.prior import PriorCache
    from raybooth.data.prior_key import PriorKey


@dataclass(frozen=True, slots=True)
class SubjectJob:
    """A subject that can be trained."""

    job_id: str
    subject: Subject
    prior_key: PriorKey | None
    num_prior_cached: int
    num_prior_damaged: int

    def plan_job(self, base_fingerprint: str, train_step: int = 0) -> PlanJob:
        """What the planner must know, `train_step` steps being done."""
        train = self.subject.train
        return PlanJob(
            job_id=self.job_id,
            base=base_fingerprint,
            method=train.method,
            resolution=train.resolution,
            precision=train.precision,
            gradient_checkpointing=train.gradient_checkpointing,
            targets=train.adapter.targets,
            rank=train.adapter.rank,
            batch_size=train.batch_size,
            num_steps_left=train.num_train_steps - train_step,
            prior=self._prior_need(),
            pack=train.pack,
            resources=train.resources,
            num_workers=train.full.num_workers,
            base_prediction=train.prior.kind == "base_prediction",
            text_targets=train.adapter.text_targets,
            identifier_tokens=train.adapter.identifier_tokens,
        )

    def _prior_need(self) -> PriorNeed | None:
        if self.prior_key is None:
            return None
        return PriorNeed(
            digest=self.prior_key.digest,
            class_prompt=self.prior_key.class_prompt,
            num_images=self.subject.train.prior.num_images,
            num_cached=self.num_prior_cached,
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """A fleet in which nothing is wrong."""

    fleet: Fleet
    base_folder: Path
    base_fingerprint: str
    shape: BaseShape
    jobs: tuple[SubjectJob, ...]
    warnings: tuple[str, ...]

    def pack_memory(self, *, has_gpus: bool) -> PackMemory:
        """Predicts the bytes of a worker on this base, in a cluster with or without GPUs."""
        from raybooth.fleet.prediction import worker_memory_bytes

        trains = {job.job_id: job.subject.train for job in self.jobs}

        def predict(jobs: Sequence[PlanJob]) -> int:
            if not jobs:
                return 0
            num_gpus = jobs[0].resources.num_gpus
            on_gpu = has_gpus if num_gpus is None else num_gpus > 0
            own = [trains[job.job_id] for job in jobs]
            return worker_memory_bytes(self.shape, own, on_gpu=on_gpu)

        return predict


def survey_fleet(path: Path, priors: PriorCache) -> Survey:
    """The fleet file at `path` and all that it names.

    Raises InputProblems that lists everything wrong with file, photos, words and base at once.
    """
    from raybooth.model.families import family_of
    from raybooth.model.fingerprint import fingerprint_base
    from raybooth.model.source import resolve_base
    from raybooth.model.tokens import load_tokenizer

    fleet, problems = read_fleet(path)
    folder: Path | None = None
    shape: BaseShape | None = None
    tokenizer: Any = None
    schedule: dict[str, Any] = {}
    if fleet is None:
        raise InputProblems(str(path), problems)
    try:
        folder = resolve_base(fleet.base, fleet.revision)
        shape = read_base_shape(folder)
        tokenizer = load_tokenizer(folder)
        schedule = family_of(folder).read_scheduler_config(folder)
    except InputError as error:
        problems.append(error)
    problems.extend(_tracking_problems(fleet))
    warnings: list[str] = []
    for subject in fleet.subjects:
        problems.extend(photo_problems(subject, shape))
        problems.extend(sidecar_problems(subject))
        warnings.extend(sidecar_warnings(subject))
        problems.extend(_matrix_problems(subject))
        problems.extend(_validation_problems(subject))
        if shape is not None:
            problems.extend(size_problems(subject.subject_id, subject.train.resolution, shape))
            problems.extend(_target_problems(subject, shape))
            problems.extend(_objective_problems(subject, schedule))
            warnings.extend(_size_warnings(subject, shape))
        if tokenizer is not None:
            problems.extend(_prompt_problems(subject, tokenizer))
            problems.extend(caption_problems(subject, tokenizer))
            warnings.extend(_identifier_warnings(subject, tokenizer))
    if problems or folder is None or shape is None:
        raise InputProblems(str(path), problems)
    fingerprint = fingerprint_base(folder)
    jobs = _jobs(fleet, fingerprint, priors)
    return Survey(fleet, folder, fingerprint, shape, jobs, tuple(dict.fromkeys(warnings)))


def size_problems(subject_id: str, side: int, shape: BaseShape) -> list[InputError]:
    """Why the base cannot make pictures of `side` pixels; an empty list when it can."""
    what = f"subject {subject_id!r}: the base cannot make this size"
    if side % shape.vae_scale_factor:
        return [BaseModelError(what, f"{side}", f"use a multiple of {shape.vae_scale_factor}")]
    if side < shape.least_side:
        return [BaseModelError(what, f"{side}", f"use at least {shape.least_side} pixels")]
    return []


def _tracking_problems(fleet: Fleet) -> list[InputError]:
    """Trackers whose package is not here."""
    missing = [name for name in fleet.tracking.trackers if find_spec(name) is None]
    what = "tracking.trackers names what is not installed"
    return [ConfigError(what, name, f"pip install 'raybooth[{name}]'") for name in missing]


def _validation_problems(subject: Subject) -> list[InputError]:
    """Too many photos held out, encoders that are not there."""
    from raybooth.fleet.held_out import held_out_problem

    config = subject.train.validation
    found = held_out_problem(subject)
    problems: list[InputError] = [] if found is None else [found]
    for source, part in ((config.image_encoder, "embedder"), (config.clip, "clip")):
        if source is not None:
            from raybooth.encoders import encoder_folder

            try:
                encoder_folder(source, part)
            except EncoderError as error:
                problems.append(error)
    return problems


def _matrix_problems(subject: Subject) -> list[InputError]:
    """Why this ZeRO stage, optimiser and offload cannot be trained on the devices asked for."""
    from raybooth.training.full_matrix import cell_of, reason_against

    num_gpus = subject.train.resources.num_gpus
    may_have_gpus = bool(os.environ.get("RAY_ADDRESS")) or this_machine().has_gpus
    on_gpu = may_have_gpus if num_gpus is None else num_gpus > 0
    reason = reason_against(cell_of(subject.train), "cuda" if on_gpu else "cpu")
    if reason is None:
        return []
    what = f"subject {subject.subject_id!r}: this combination cannot be trained"
    return [ConfigError(what, str(cell_of(subject.train)), reason)]


def _target_problems(subject: Subject, shape: BaseShape) -> list[InputError]:
    targets = subject.train.adapter.targets
    if isinstance(targets, str):
        return []
    what = f"subject {subject.subject_id!r}: adapter.targets"
    do = "name module suffixes, for example `to_q` or `ff.net.2`"
    unmatched = [
        suffix for suffix in targets if not any(is_target(name, suffix) for name in shape.denoiser)
    ]
    if not targets:
        return [ConfigError(f"{what} is empty", "no pattern", do)]
    return [ConfigError(f"{what} matches no layer of the base", repr(s), do) for s in unmatched]


def _objective_problems(subject: Subject, schedule: Mapping[str, Any]) -> list[InputError]:
    """An objective that does not suit the base's noise schedule."""
    try:
        if schedule:
            subject.train.objective.check_base(schedule)
    except ConfigError as error:
        what = f"subject {subject.subject_id!r}: {error.what}"
        return [ConfigError(what, error.found, error.do)]
    return []


def _size_warnings(subject: Subject, shape: BaseShape) -> list[str]:
    side, native = subject.train.resolution, shape.native_resolution
    if native / 2 < side < native * 2:
        return []
    return [f"subject {subject.subject_id!r}: resolution {side} is far from the base's {native}"]


def _prompt_problems(subject: Subject, tokenizer: Any) -> list[InputError]:
    """Prompts that the text encoder would cut."""
    from raybooth.model.tokens import cut_tokens

    problems: list[InputError] = []
    prompts = [("instance prompt", subject.instance_prompt)]
    if subject.train.prior.loss_weight:
        prompts.append(("class prompt", subject.class_prompt))
    prompts.extend(("sample prompt", prompt) for prompt in subject.sample_prompts)
    for kind, prompt in prompts:
        number = subject.train.adapter.identifier_tokens
        if cut := cut_tokens(tokenizer, countable(prompt, subject.identifier, number)):
            what = f"subject {subject.subject_id!r}: its {kind} is too long"
            found = f"{len(cut)} tokens that would be cut: {' '.join(cut)}"
            problems.append(SubjectError(what, found, "shorten it"))
    return problems


def _identifier_warnings(subject: Subject, tokenizer: Any) -> list[str]:
    from raybooth.model.tokens import token_split

    tokens = token_split(tokenizer, subject.identifier)
    if len(tokens) == 1 or subject.train.adapter.identifier_tokens:
        return []
    split = " + ".join(tokens) or "nothing"
    return [
        f"subject {subject.subject_id!r}: identifier {subject.identifier!r} is {len(tokens)} "
        f"tokens ({split}); a single rare token such as sks is learned better"
    ]


def _jobs(fleet: Fleet, fingerprint: str, priors: PriorCache) -> tuple[SubjectJob, ...]:
    from raybooth.data.prior_key import prior_key

    found: dict[str, tuple[int, int]] = {}
    jobs = []
    for subject in fleet.subjects:
        key, cached, damaged = None, 0, 0
        if subject.train.prior.num_images:
            key = prior_key(subject.train, subject.class_prompt, fingerprint)
            if key.digest not in found:
                status = priors.status(key)
                found[key.digest] = (status.num_whole, status.num_damaged)
            cached, damaged = found[key.digest]
        job_id = f"{subject.subject_id}-{subject.digest(fingerprint)[:12]}"
        jobs.append(SubjectJob(job_id, subject, key, cached, damaged))
    return tuple(jobs)
