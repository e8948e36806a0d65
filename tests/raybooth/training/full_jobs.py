"""Full runs of the tiny base: jobs, fresh copies of the base, and workers in processes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.raybooth.training.jobs import draw_tensors

from raybooth.config import TrainConfig, merge
from raybooth.model.base import Base, load_base
from raybooth.training.full import FullRun
from raybooth.training.pack import SlotJob

CLASS_PROMPT = "a photo of a robot"
TRAIN: dict[str, Any] = {
    "method": "full",
    "resolution": 32,
    "num_train_steps": 3,
    "batch_size": 2,
    "optimizer": {"learning_rate": 1e-3},
    "prior": {"num_images": 5, "loss_weight": 0.7},
    "checkpoint": {"every_steps": 2},
}


def full_job(**overrides: Any) -> SlotJob:
    """A full run of the subject `robot`."""
    train = TrainConfig.model_validate(merge(TRAIN, overrides))
    tensors = replace(draw_tensors("robot"), prompts=("a photo of sks robot",))
    return SlotJob("robot-job", "robot", 0, train, tensors)


def fresh(base: Base) -> Base:
    """The base with weights of its own, so that a run may move them."""
    return replace(
        base, denoiser=deepcopy(base.denoiser), text_encoders=deepcopy(base.text_encoders)
    )


def one_process_group() -> None:
    """A process group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def losses_of(base: Base, job: SlotJob) -> tuple[list[tuple[float, float, float]], list[float]]:
    """Losses and gradient norms of a whole run."""
    run = FullRun(fresh(base), job, CLASS_PROMPT)
    norms = []
    while not run.is_finished:
        norms.append(run.step().grad_norm)
    curve = run.curve
    run.close()
    return curve, norms


def worker(
    rank: int, world: int, meeting: str, base_folder: str, cells: list[Any], out: str
) -> None:
    """One of `world` processes: every cell, its losses and norms written by the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    base = load_base(base_folder)
    found = [losses_of(base, full_job(**cell)) for cell in cells]
    if rank == 0:
        torch.save(found, Path(out))
    dist.barrier()
    dist.destroy_process_group()
