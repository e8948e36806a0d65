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
    from raybooth.model.text_adapter import TextAdapter
    from raybooth.subject import Subject
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
    learned = text.learned[0] if text is not None and text.learned else None
    images = draw_samples(base, subject, pack.bank, pack.slot(job.job_id), text)
    sheet = contact_sheet(images, subject.sample_prompts) if images else None
    sampled_s = round(time.perf_counter() - start, 3)
    state = pack.state(job.job_id)
    watched = validation.record(job.job_id) if validation is not None else None
    held_out = watched.held_out if watched is not None else ()
    record = AdapterRecord(
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
        validation=watched,
        seconds={**seconds, "samples": sampled_s},
        versions=versions(),
    )
    with tempfile.TemporaryDirectory(prefix="raybooth-") as name:
        weights, samples = Path(name) / WEIGHTS, Path(name) / SAMPLES
        save_adapter(weights, adapter, subject.train.adapter.scale)
        files = {WEIGHTS: weights}
        if learned is not None:
            files[LEARNED] = Path(name) / LEARNED
            save_learned(files[LEARNED], learned)
        if sheet is not None:
            sheet.save(samples)
            files[SAMPLES] = samples
        if validation is not None:
            files |= validation.pictures(job.job_id)
        return store.publish(record, files)


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
