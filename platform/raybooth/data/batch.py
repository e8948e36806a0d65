"""The rows of one slot in one train step: a pure function of (seed, subject, train step).

B batch rows, N images, C H W latent channels, height, width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raybooth.config import TrainConfig
from raybooth.data.encode import SubjectTensors


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
    raise NotImplementedError


def plan_batch(
    seed: int, subject_id: str, train_step: int, batch_size: int, num_instance: int, num_prior: int
) -> BatchPlan:
    """Images in seeded order, each once an epoch; train steps count from 0."""
    raise NotImplementedError


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
    """latents = (mean + std * noise) * scaling_factor, t ~ U{0..T-1} of each row."""
    raise NotImplementedError
