"""Turns a finished full run into a published model: the weights that moved, samples, record."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth.fleet.publishing import draw_samples, prior_record, thinned, versions
from raybooth.fleet.sheet import contact_sheet
from raybooth.model.base import load_base
from raybooth.model.full_weights import load_full, save_full
from raybooth.store import SAMPLES, BaseRecord, FullRecord, PhotoRecord, Store

if TYPE_CHECKING:
    from torch import Tensor

    from raybooth.model.base import Base
    from raybooth.subject import Subject
    from raybooth.training.full_validation import FullValidation
    from raybooth.training.job import SlotJob


def publish_full(
    base: Base,
    subject: Subject,
    job: SlotJob,
    weights: Mapping[str, Mapping[str, Tensor]],
    losses: Sequence[float],
    store: Store,
    *,
    revision: str | None,
    seconds: Mapping[str, float],
    validation: FullValidation | None = None,
) -> FullRecord:
    """The trained parts as a new version of their subject; raises StoreError, leaving nothing.

    The sample pictures come from the saved files over the base as it was, so they are what
    `raybooth generate` will show.
    """
    watched = validation.record() if validation is not None else None
    held_out = watched.held_out if watched is not None else ()
    with tempfile.TemporaryDirectory(prefix="raybooth-") as name:
        files = save_full(Path(name), weights)
        start = time.perf_counter()
        fresh = load_base(base.name, revision=revision, device=base.device)
        load_full(fresh, Path(name), weights)
        images = draw_samples(fresh, subject, None, 0)
        if images:
            files[SAMPLES] = Path(name) / SAMPLES
            contact_sheet(images, subject.sample_prompts).save(files[SAMPLES])
        sampled_s = round(time.perf_counter() - start, 3)
        record = FullRecord(
            subject_id=subject.subject_id,
            job_id=job.job_id,
            class_noun=subject.class_noun,
            identifier=subject.identifier,
            instance_prompt=subject.instance_prompt,
            class_prompt=subject.class_prompt,
            base=BaseRecord(name=base.name, fingerprint=base.fingerprint, revision=revision),
            parts=tuple(weights),
            num_parameters=sum(v.numel() for part in weights.values() for v in part.values()),
            train=subject.train.model_dump(mode="json"),
            photos=tuple(
                PhotoRecord(name=path.name, sha256=digest)
                for path, digest in zip(
                    subject.images, (*job.tensors.photo_digests, *held_out), strict=True
                )
            ),
            prior=prior_record(job.tensors.prior, subject, base),
            loss_curve=thinned(losses),
            num_train_steps=len(losses),
            validation=watched,
            seconds={**seconds, "samples": sampled_s},
            versions=versions(),
        )
        if validation is not None:
            files |= validation.pictures()
        return store.publish(record, files)
