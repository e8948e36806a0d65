"""The rows of one slot in one train step: a pure function of (seed, subject, train step).

B batch rows, N images, C H W latent channels, height, width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raybooth.config import TrainConfig
from raybooth.data.encode import SubjectTensors
from raybooth.errors import PriorError


@dataclass(frozen=True)
class BatchPlan:
    """Which images one slot reads in one train step."""

    instance_indices: tuple[int, ...]
    prior_indices: tuple[int, ...]


@dataclass(frozen=True)
class SlotBatch:
    """Rows of one latent size: instance rows, then prior rows (none without a prior)."""

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    timesteps_B: Tensor
    conditioning: dict[str, Tensor]
    is_prior_B: Tensor
    prompt_B: tuple[int, ...]
    """Each instance row's place in the subject's prompts; NO_PROMPT of prior rows."""

    weight_BHW: Tensor | None = None
    """Weight of each latent pixel in its row's error; none means 1."""

    from_base: bool = False
    """The target of prior rows is what the base predicts on them (the null adapter)."""


NO_PROMPT = -1


def stream(seed: int, subject_id: str, train_step: int, purpose: str) -> torch.Generator:
    """A CPU generator that belongs to these four values alone (sha256-derived seed)."""
    text = f"raybooth stream\n{seed}\n{subject_id}\n{train_step}\n{purpose}"
    derived = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator("cpu").manual_seed(derived)


def plan_batch(
    seed: int, subject_id: str, train_step: int, batch_size: int, num_instance: int, num_prior: int
) -> BatchPlan:
    """Images in seeded order, each once an epoch; train steps count from 0.

    Row j of train step k is number k * batch_size + j of an endless sequence of permutations,
    one an epoch; instance and prior images have sequences of their own. `num_prior` 0: no prior.
    """
    first = train_step * batch_size
    places = range(first, first + batch_size)
    return BatchPlan(
        _in_order(places, num_instance, seed, subject_id, "order"),
        _in_order(places, num_prior, seed, subject_id, "prior order") if num_prior else (),
    )


def make_slot_batch(
    tensors: SubjectTensors,
    train: TrainConfig,
    subject_id: str,
    seed: int,
    train_step: int,
    *,
    num_train_timesteps: int,
    scaling_factor: float,
    latent_dtype: torch.dtype = torch.float32,
) -> SlotBatch:
    """The rows of a train step of a subject whose photos have one size (see make_slot_batches)."""
    (batch,) = make_slot_batches(
        tensors,
        train,
        subject_id,
        seed,
        train_step,
        num_train_timesteps=num_train_timesteps,
        scaling_factor=scaling_factor,
        latent_dtype=latent_dtype,
    )
    return batch


def make_slot_batches(
    tensors: SubjectTensors,
    train: TrainConfig,
    subject_id: str,
    seed: int,
    train_step: int,
    *,
    num_train_timesteps: int,
    scaling_factor: float,
    latent_dtype: torch.dtype = torch.float32,
) -> tuple[SlotBatch, ...]:
    """The rows of a train step, by latent size: latents = (mean + std * noise) * scaling_factor.

    t ~ U{0..T-1} of each row. The VAE posterior is sampled anew each step and each row has its
    own timestep, as in diffusers' scripts (Ruiz et al. 2023). Drawn in fp32 on the CPU, then cast,
    so that neither the pack, nor the device, nor an interruption changes a bit.
    """
    rows = _plan_rows(tensors, train, subject_id, seed, train_step)
    draws = {
        purpose: stream(seed, subject_id, train_step, purpose)
        for purpose in ("vae", "noise", "offset noise", "timestep")
    }
    timesteps = torch.randint(0, num_train_timesteps, (len(rows),), generator=draws["timestep"])
    by_size: dict[torch.Size, list[int]] = {}
    for place, row in enumerate(rows):
        by_size.setdefault(row.mean_CHW.shape, []).append(place)
    batches = []
    for shape, places in by_size.items():
        own = [rows[place] for place in places]
        drawn = (len(own), *shape)
        vae_BCHW = torch.randn(drawn, generator=draws["vae"], dtype=torch.float32)
        noise_BCHW = torch.randn(drawn, generator=draws["noise"], dtype=torch.float32)
        if train.objective.offset_noise:
            offset_BC11 = torch.randn((*drawn[:2], 1, 1), generator=draws["offset noise"])
            noise_BCHW = noise_BCHW + train.objective.offset_noise * offset_BC11
        mean_BCHW = torch.stack([row.mean_CHW for row in own]).float()
        std_BCHW = torch.stack([row.std_CHW for row in own]).float()
        batch = SlotBatch(
            latents_BCHW=((mean_BCHW + std_BCHW * vae_BCHW) * scaling_factor).to(latent_dtype),
            noise_BCHW=noise_BCHW.to(latent_dtype),
            timesteps_B=timesteps[places],
            conditioning=_stacked([row.conditioning for row in own]),
            is_prior_B=torch.tensor([row.prompt == NO_PROMPT for row in own]),
            prompt_B=tuple(row.prompt for row in own),
            weight_BHW=_pixel_weights(own, train, latent_dtype),
        )
        if train.prior.kind == "base_prediction":
            batch = _with_class_rows(batch, tensors, subject_id)
        batches.append(batch)
    return tuple(batches)


@dataclass(frozen=True)
class _Row:
    """One image that a train step reads."""

    mean_CHW: Tensor
    std_CHW: Tensor
    conditioning: dict[str, Tensor]
    """Without a leading dimension."""
    prompt: int
    mask_HW: Tensor | None = None


def _plan_rows(
    tensors: SubjectTensors, train: TrainConfig, subject_id: str, seed: int, train_step: int
) -> list[_Row]:
    B, prior = train.batch_size, tensors.prior
    if train.prior.num_images == 0:
        prior = None
    elif prior is None:
        found = f"{train.prior.num_images} prior images asked for, none given"
        raise PriorError(f"subject {subject_id!r} has no prior", found, "make the prior first")
    num_prior = len(prior.mean_NCHW) if prior is not None else 0
    plan = plan_batch(seed, subject_id, train_step, B, len(tensors.mean_NCHW), num_prior)
    rows = [_instance_row(tensors, index) for index in plan.instance_indices]
    if prior is not None:
        conditioning = {name: row[0] for name, row in prior.conditioning.items()}
        rows += [
            _Row(prior.mean_NCHW[index], prior.std_NCHW[index], conditioning, NO_PROMPT)
            for index in plan.prior_indices
        ]
    return rows


def _instance_row(tensors: SubjectTensors, index: int) -> _Row:
    prompt = tensors.prompt_N[index] if tensors.prompt_N else 0
    height, width = tensors.size_N[index] if tensors.size_N else tensors.mean_NCHW.shape[2:]
    mask_NHW = tensors.mask_NHW
    return _Row(
        tensors.mean_NCHW[index, :, :height, :width],
        tensors.std_NCHW[index, :, :height, :width],
        {
            **{name: rows[prompt] for name, rows in tensors.instance_conditioning.items()},
            **{name: rows[index] for name, rows in tensors.size_conditioning.items()},
        },
        prompt,
        None if mask_NHW is None else mask_NHW[index, :height, :width],
    )


def _pixel_weights(rows: Sequence[_Row], train: TrainConfig, dtype: torch.dtype) -> Tensor | None:
    """background + (1 - background) * mask, divided by its mean; 1 on prior rows."""
    if not train.photos.masks:
        return None
    background = train.photos.background_weight
    weights = []
    for row in rows:
        if row.mask_HW is None:
            weights.append(torch.ones(row.mean_CHW.shape[1:], dtype=torch.float64))
        else:
            weight_HW = background + (1.0 - background) * row.mask_HW.double()
            weights.append(weight_HW / weight_HW.mean())
    return torch.stack(weights).to(dtype)


def _with_class_rows(batch: SlotBatch, tensors: SubjectTensors, subject_id: str) -> SlotBatch:
    """The same noisy latents once more, under the class prompt."""
    if not tensors.class_conditioning:
        what = f"subject {subject_id!r} has no embedding of its class prompt"
        raise PriorError(what, "none", "encode the subject with prior.kind: base_prediction")
    B = len(batch.is_prior_B)
    class_rows = dict(batch.conditioning)
    for name, row in tensors.class_conditioning.items():
        class_rows[name] = row.repeat_interleave(B, dim=0)
    weight_BHW = batch.weight_BHW
    if weight_BHW is not None:
        weight_BHW = torch.cat([weight_BHW, torch.ones_like(weight_BHW)])
    return SlotBatch(
        latents_BCHW=batch.latents_BCHW.repeat(2, 1, 1, 1),
        noise_BCHW=batch.noise_BCHW.repeat(2, 1, 1, 1),
        timesteps_B=batch.timesteps_B.repeat(2),
        conditioning={
            name: torch.cat([rows, class_rows[name]]) for name, rows in batch.conditioning.items()
        },
        is_prior_B=torch.arange(2 * B) >= B,
        prompt_B=(*batch.prompt_B, *[NO_PROMPT] * B),
        weight_BHW=weight_BHW,
        from_base=True,
    )


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _in_order(
    places: range, num_images: int, seed: int, subject_id: str, purpose: str
) -> tuple[int, ...]:
    orders: dict[int, list[int]] = {}
    for epoch in sorted({place // num_images for place in places}):
        generator = stream(seed, subject_id, epoch, purpose)
        orders[epoch] = torch.randperm(num_images, generator=generator).tolist()
    return tuple(orders[place // num_images][place % num_images] for place in places)
