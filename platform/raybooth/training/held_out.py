"""Photos that are kept back, and the noise at which their loss is always measured.

N images, T timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from raybooth.config import PriorConfig
from raybooth.data.batch import SlotBatch, make_slot_batches
from raybooth.data.encode import SubjectTensors
from raybooth.model.base import Base
from raybooth.training.job import SlotJob

MOST_ROWS = 16
"""Images of one forward of the loss."""


def hold_out(tensors: SubjectTensors, count: int) -> tuple[SubjectTensors, SubjectTensors | None]:
    """(all but the last `count` photos, those photos); crops of one photo stay together."""
    num_photos = len(tensors.photo_digests)
    assert 0 <= count < num_photos
    if count == 0:
        return tensors, None
    each = len(tensors.mean_NCHW) // num_photos
    cut = (num_photos - count) * each
    return _part(tensors, slice(None, cut), slice(None, -count)), _part(
        tensors, slice(cut, None), slice(-count, None)
    )


def fixed_batches(
    base: Base, job: SlotJob, tensors: SubjectTensors, latent_dtype: torch.dtype
) -> Iterator[Sequence[SlotBatch]]:
    """Every image at each of T fixed timesteps, with noise of its own.

    Neither noise nor timestep depends on the train step or on the pack.
    """
    config = job.train.validation
    rows = min(len(tensors.mean_NCHW), MOST_ROWS)
    no_prior = PriorConfig(num_images=0, loss_weight=0)
    train = job.train.model_copy(update={"batch_size": rows, "prior": no_prior})
    total = base.num_train_timesteps
    for place in range(config.num_timesteps):
        timestep = (2 * place + 1) * total // (2 * config.num_timesteps)
        batches = make_slot_batches(
            tensors,
            train,
            f"validation/{job.subject_id}",
            job.seed,
            place,
            num_train_timesteps=total,
            scaling_factor=base.scaling_factor,
            latent_dtype=latent_dtype,
        )
        yield [
            replace(batch, timesteps_B=torch.full_like(batch.timesteps_B, timestep))
            for batch in batches
        ]


def _part(tensors: SubjectTensors, samples: slice, photos: slice) -> SubjectTensors:
    mask_NHW = tensors.mask_NHW
    return replace(
        tensors,
        mean_NCHW=tensors.mean_NCHW[samples],
        std_NCHW=tensors.std_NCHW[samples],
        prompt_N=tensors.prompt_N[samples],
        size_N=tensors.size_N[samples],
        size_conditioning={k: rows[samples] for k, rows in tensors.size_conditioning.items()},
        mask_NHW=None if mask_NHW is None else mask_NHW[samples],
        photo_digests=tensors.photo_digests[photos],
    )
