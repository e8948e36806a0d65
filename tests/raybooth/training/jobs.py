"""Jobs with drawn latents and embeddings for the tiny base, and the distances that tests bound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raybooth.config import TrainConfig, merge
from raybooth.data.encode import SubjectTensors
from raybooth.data.prior import PriorTensors
from raybooth.model.lora import AdapterTensors
from raybooth.training.job import SlotJob

TRAIN: dict[str, Any] = {
    "resolution": 32,
    "num_train_steps": 6,
    "adapter": {"rank": 4, "targets": "all"},
    "optimizer": {"learning_rate": 1e-3},
    "prior": {"num_images": 5, "loss_weight": 1.0},
    "checkpoint": {"every_steps": 2},
}


def make_job(subject_id: str = "robot", seed: int = 0, **overrides: Any) -> SlotJob:
    """A job of a subject whose images are a function of its id."""
    train = TrainConfig.model_validate(merge(TRAIN, overrides))
    return SlotJob(f"{subject_id}-job", subject_id, seed, train, draw_tensors(subject_id))


def four_jobs(**overrides: Any) -> list[SlotJob]:
    """Different rates, ranks, alphas, batch sizes, priors, schedules; two leave early."""
    each: list[dict[str, Any]] = [
        {"optimizer": {"learning_rate": 2e-3}, "prior": {"loss_weight": 0.5}},
        {"adapter": {"rank": 2, "alpha": 6.0}, "num_train_steps": 3, "batch_size": 2},
        {
            "adapter": {"rank": 8},
            "optimizer": {"schedule": "cosine", "warmup_steps": 2, "max_grad_norm": 1e-4},
            "objective": {"snr_gamma": 5.0},
            "batch_size": 2,
        },
        {
            "prior": {"num_images": 0, "loss_weight": 0.0},
            "optimizer": {"weight_decay": 0.3, "betas": (0.8, 0.95), "schedule": "linear"},
            "num_train_steps": 5,
        },
    ]
    names = ("robot", "vase", "dog-1", "cat")
    return [
        make_job(name, seed, **merge(overrides, changes))
        for seed, (name, changes) in enumerate(zip(names, each, strict=True))
    ]


def draw_tensors(subject_id: str) -> SubjectTensors:
    """Latents of four photos and five prior images, embeddings of two prompts."""
    generator = torch.Generator().manual_seed(sum(subject_id.encode()))

    def images(number: int) -> tuple[Tensor, Tensor]:
        mean = torch.randn(number, 4, 8, 8, generator=generator)
        return mean, 0.1 * torch.rand(number, 4, 8, 8, generator=generator)

    def embedding() -> dict[str, Tensor]:
        return {"encoder_hidden_states": torch.randn(1, 77, 32, generator=generator)}

    prior = PriorTensors(*images(5), embedding(), tuple(f"prior-{i}" for i in range(5)))
    photos = tuple(f"{subject_id}-{i}" for i in range(4))
    return SubjectTensors(*images(4), embedding(), prior, photos)


def spoil(job: SlotJob) -> SlotJob:
    """The same job with a photo whose latents are not numbers."""
    mean_NCHW = job.tensors.mean_NCHW.clone()
    mean_NCHW[1, 0, 3, 3] = float("nan")
    return replace(job, tensors=replace(job.tensors, mean_NCHW=mean_NCHW))


def flatten(adapter: AdapterTensors) -> Tensor:
    """All numbers of an adapter in the order of their names."""
    return torch.cat(
        [part.flatten().double() for name in sorted(adapter) for part in adapter[name]]
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())


def largest(found: Iterable[float], expected: Iterable[float]) -> float:
    """Largest relative difference of two series of numbers."""
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(found, expected, strict=True))
