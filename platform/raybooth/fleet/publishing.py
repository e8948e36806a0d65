"""Turns a finished slot into a published model: weights, sample pictures, record."""

from __future__ import annotations

import hashlib
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raybooth.fleet.sheet import contact_sheet
from raybooth.model.learned import save_learned
from raybooth.model.lora import save_adapter
from raybooth.model.sampler import SampleRequest, generate
from raybooth.store import (
    LEARNED,
    SAMPLES,
    WEIGHTS,
    AdapterRecord,
    BaseRecord,
    PhotoRecord,
    PriorRecord,
    Store,
)

if TYPE_CHECKING:
    from PIL import Image

    from raybooth.data.prior import PriorTensors
    from raybooth.model.bank import Bank
    from raybooth.model.base import Base
    from raybooth.model.learned import LearnedTokens
    from raybooth.model.lora import AdapterTensors
    from raybooth.model.text_adapter import TextAdapter
    from raybooth.subject import Subject
    from raybooth.training.checkpoint import SlotState
    from raybooth.training.job import SlotJob
    from raybooth.training.pack import Pack
    from raybooth.training.validation import Validation

CURVE_POINTS = 200
"""Most points of a published loss curve."""

LIBRARIES = ("raybooth", "torch", "diffusers", "transformers", "ray")


def publish_adapter(
    base: Base,
    subject: Subject,
    job: SlotJob,
    pack: Pack,
    store: Store,
    *,
    revision: str | None,
    seconds: Mapping[str, float],
    validation: Validation | None = None,
) -> AdapterRecord:
    """The job's adapter as a new version of its subject; raises StoreError, leaving nothing.

    The scale alpha / rank is folded into the weights. The sample pictures come from the slot
    in the bank, so they are what serving will show.
    """
    adapter = pack.adapter(job.job_id)
    start = time.perf_counter()
    text = pack.text_adapter(job.job_id)
    learned = pack.learned(job.job_id)
    images = draw_samples(base, subject, pack.bank, pack.slot(job.job_id), text)
    sheet = contact_sheet(images, subject.sample_prompts) if images else None
    sampled_s = round(time.perf_counter() - start, 3)
    watched = validation.record(job.job_id) if validation is not None else None
    record = adapter_record(
        base,
        subject,
        job,
        pack.state(job.job_id),
        adapter,
        learned,
        held_out=watched.held_out if watched is not None else (),
        revision=revision,
        seconds={**seconds, "samples": sampled_s},
    ).model_copy(update={"validation": watched})
    with tempfile.TemporaryDirectory(prefix="raybooth-") as name:
        files = adapter_files(Path(name), adapter, learned, subject.train.adapter.scale)
        if sheet is not None:
            files[SAMPLES] = Path(name) / SAMPLES
            sheet.save(files[SAMPLES])
        if validation is not None:
            files |= validation.pictures(job.job_id)
        return store.publish(record, files)


def adapter_record(
    base: Base,
    subject: Subject,
    job: SlotJob,
    state: SlotState,
    adapter: AdapterTensors,
    learned: LearnedTokens | None,
    *,
    held_out: Sequence[str],
    revision: str | None,
    seconds: Mapping[str, float],
) -> AdapterRecord:
    """What is to be said of the job's adapter at `state`; `held_out` are digests of photos."""
    return AdapterRecord(
        subject_id=subject.subject_id,
        job_id=job.job_id,
        class_noun=subject.class_noun,
        identifier=subject.identifier,
        instance_prompt=subject.instance_prompt,
        class_prompt=subject.class_prompt,
        base=BaseRecord(name=base.name, fingerprint=base.fingerprint, revision=revision),
        rank=subject.train.adapter.rank,
        targets=subject.train.adapter.targets,
        text_targets=subject.train.adapter.text_targets,
        identifier_tokens=subject.train.adapter.identifier_tokens,
        num_parameters=sum(part.numel() for pair in adapter.values() for part in pair)
        + sum(vectors.numel() for vectors in (learned.vectors.values() if learned else ())),
        train=subject.train.model_dump(mode="json"),
        photos=tuple(
            PhotoRecord(name=path.name, sha256=digest)
            for path, digest in zip(
                subject.images, (*job.tensors.photo_digests, *held_out), strict=True
            )
        ),
        prior=prior_record(job.tensors.prior, subject, base),
        loss_curve=thinned(state.curve_T3[:, 0].tolist()),
        num_train_steps=state.train_step,
        seconds=dict(seconds),
        versions=versions(),
    )


def adapter_files(
    folder: Path, adapter: AdapterTensors, learned: LearnedTokens | None, scale: float
) -> dict[str, Path]:
    """The adapter's files, written to `folder`, `scale` folded in; by their published names."""
    files = {WEIGHTS: folder / WEIGHTS}
    save_adapter(files[WEIGHTS], adapter, scale)
    if learned is not None:
        files[LEARNED] = folder / LEARNED
        save_learned(files[LEARNED], learned)
    return files


def draw_samples(
    base: Base, subject: Subject, bank: Bank | None, slot: int, text: TextAdapter | None = None
) -> list[Image.Image]:
    """The subject's sample prompts, drawn by its slot with the subject's own seed."""
    config, side = subject.train.samples, subject.train.resolution
    requests = [
        SampleRequest(
            prompt=prompt,
            seed=subject.seed,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            solver=config.solver,
            height=side,
            width=side,
            slot=slot,
            zero_terminal_snr=subject.train.objective.zero_terminal_snr,
            text=text,
        )
        for prompt in subject.sample_prompts
    ]
    with torch.no_grad():
        return generate(base, bank, requests)


def thinned(losses: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """(train step, loss) at CURVE_POINTS even places at most, first and last step among them."""
    last = len(losses)
    if last <= CURVE_POINTS:
        steps = list(range(1, last + 1))
    else:
        places = range(CURVE_POINTS)
        steps = [1 + round(place * (last - 1) / (CURVE_POINTS - 1)) for place in places]
    return tuple((step, float(f"{losses[step - 1]:.6g}")) for step in steps)


def versions() -> dict[str, str]:
    """Versions of what made the model."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def prior_record(prior: PriorTensors | None, subject: Subject, base: Base) -> PriorRecord | None:
    """Which prior images took part; None without a prior."""
    from raybooth.data.prior_key import prior_key

    if prior is None:
        return None
    digests = "\n".join(prior.image_digests).encode()
    return PriorRecord(
        key=prior_key(subject.train, subject.class_prompt, base.fingerprint).digest,
        num_images=len(prior.image_digests),
        sha256=hashlib.sha256(digests).hexdigest(),
    )
