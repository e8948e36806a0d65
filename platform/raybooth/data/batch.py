"""The rows of one slot in one train step: a pure function of (seed, subject, train step).

B batch rows, N images, C H W latent channels, height, width.
"""

from __future__ import annotations

import hashlib
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
    """Instance rows, then as many prior rows (none without a prior)."""

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    timesteps_B: Tensor
    conditioning: dict[str, Tensor]
    is_prior_B: Tensor


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
    """latents = (mean + std * noise) * scaling_factor, t ~ U{0..T-1} of each row.

    The VAE posterior is sampled anew each step and each row has its own timestep, as in
    diffusers' scripts (Ruiz et al. 2023). Drawn in fp32 on the CPU, then cast, so that neither
    the pack, nor the device, nor an interruption changes a bit.
    """
    B, prior = train.batch_size, tensors.prior
    if train.prior.num_images == 0:
        prior = None
    elif prior is None:
        found = f"{train.prior.num_images} prior images asked for, none given"
        raise PriorError(f"subject {subject_id!r} has no prior", found, "make the prior first")
    num_prior = len(prior.mean_NCHW) if prior is not None else 0
    plan = plan_batch(seed, subject_id, train_step, B, len(tensors.mean_NCHW), num_prior)
    instance = torch.tensor(plan.instance_indices)
    mean_BCHW, std_BCHW = tensors.mean_NCHW[instance], tensors.std_NCHW[instance]
    conditioning = {
        name: row.repeat_interleave(B, dim=0) for name, row in tensors.instance_conditioning.items()
    }
    if prior is not None:
        chosen = torch.tensor(plan.prior_indices)
        mean_BCHW = torch.cat([mean_BCHW, prior.mean_NCHW[chosen]])
        std_BCHW = torch.cat([std_BCHW, prior.std_NCHW[chosen]])
        conditioning = {
            name: torch.cat([rows, prior.conditioning[name].repeat_interleave(B, dim=0)])
            for name, rows in conditioning.items()
        }
    vae_BCHW = torch.randn(
        mean_BCHW.shape, generator=stream(seed, subject_id, train_step, "vae"), dtype=torch.float32
    )
    noise_BCHW = torch.randn(
        mean_BCHW.shape,
        generator=stream(seed, subject_id, train_step, "noise"),
        dtype=torch.float32,
    )
    timesteps_B = torch.randint(
        0,
        num_train_timesteps,
        (len(mean_BCHW),),
        generator=stream(seed, subject_id, train_step, "timestep"),
    )
    latents_BCHW = (mean_BCHW.float() + std_BCHW.float() * vae_BCHW) * scaling_factor
    return SlotBatch(
        latents_BCHW=latents_BCHW.to(latent_dtype),
        noise_BCHW=noise_BCHW.to(latent_dtype),
        timesteps_B=timesteps_B,
        conditioning=conditioning,
        is_prior_B=torch.arange(len(mean_BCHW)) >= B,
    )


def _in_order(
    places: range, num_images: int, seed: int, subject_id: str, purpose: str
) -> tuple[int, ...]:
    orders: dict[int, list[int]] = {}
    for epoch in sorted({place // num_images for place in places}):
        generator = stream(seed, subject_id, epoch, purpose)
        orders[epoch] = torch.randperm(num_images, generator=generator).tolist()
    return tuple(orders[place // num_images][place % num_images] for place in places)
