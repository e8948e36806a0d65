"""Full runs of the tiny base: jobs, fresh copies of the base, and workers in processes."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.raybooth.training.jobs import draw_tensors

from raybooth.config import TrainConfig, merge
from raybooth.errors import PeerLostError
from raybooth.model.base import Base, load_base
from raybooth.training.full import FullRun
from raybooth.training.full_loop import train_full
from raybooth.training.full_validation import FullValidation
from raybooth.training.job import SlotJob
from raybooth.training.watched import ValidationTask

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
    return SlotJob("robot-job", "robot", 0, train, tensors, class_prompt=CLASS_PROMPT)


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
    run = FullRun(fresh(base), job)
    norms = []
    while not run.is_finished:
        norms.append(run.step().grad_norm)
    curve = run.curve
    run.close()
    return curve, norms


def resumed_and_whole(
    base: Base, stage: int, world: int, root: Path
) -> list[tuple[list[tuple[float, float, float]], dict[str, Any]]]:
    """Curve and weights of a run stopped after its second step, and of one that was not."""
    job = full_job(full={"zero_stage": stage, "num_workers": world, "text_encoder": True})
    stops = iter([False, True])
    stopped = train_full(
        fresh(base), job, checkpoint_root=root / "halved", should_stop=lambda: next(stops)
    )
    assert stopped.weights is None
    ended = [train_full(fresh(base), job, checkpoint_root=root / name) for name in ("halved", "w")]
    return [(list(outcome.curve), outcome.weights or {}) for outcome in ended]


TWO_WORKERS: list[dict[str, Any]] = [
    {"full": {"zero_stage": 0, "text_encoder": True}},
    {"full": {"zero_stage": 1}, "batch_size": 3},
    {"full": {"zero_stage": 2, "gradient_accumulation": 2}, "precision": "bf16"},
    {"full": {"zero_stage": 3, "text_encoder": True, "offload": "all"}},
    {"full": {"zero_stage": 3}, "optimizer": {"name": "adamw8bit"}},
]
WATCHED: dict[str, Any] = {
    "num_train_steps": 9,
    "optimizer": {"learning_rate": 0.3},  # diverges
    "validation": {"every_steps": 1, "num_timesteps": 2, "keep": "best", "patience": 1},
}


def watched_whole_and_resumed(base: Base, world: int, root: Path) -> dict[str, Any]:
    """A watched run under ZeRO 3, and one stopped after its second step and taken up again."""
    full = {"zero_stage": 3, "num_workers": world, "text_encoder": True}
    job = full_job(**WATCHED, full=full)
    found: dict[str, Any] = {"steps": [], "weights": [], "records": []}
    for name, stop_after in (("whole", 0), ("halved", 2), ("halved", 0)):
        own = fresh(base)
        validation = FullValidation(own, ValidationTask(job), root / name)
        outcome = train_full(
            own,
            job,
            checkpoint_root=root / name,
            on_report=lambda report: found["steps"].append(report.train_step),
            should_stop=(n + 1 == stop_after for n in range(9)).__next__,
            validation=validation,
        )
        if outcome.weights:
            found["weights"].append(outcome.weights)
            found["records"].append(validation.record().model_dump())
    return found


def worker(
    rank: int, world: int, meeting: str, base_folder: str, cells: list[Any], out: str
) -> None:
    """One of `world` processes: every cell, then all leave but the first, which writes losses,
    norms, and what it is told when the others are gone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    base = load_base(base_folder)
    found = [losses_of(base, full_job(**cell)) for cell in cells]
    folder = Path(out)
    resumed = [resumed_and_whole(base, stage, world, folder / str(stage)) for stage in (2, 3)]
    torch.save(watched_whole_and_resumed(base, world, folder / "watched"), folder / f"rank-{rank}")
    if rank > 0:
        os._exit(0)  # the first worker goes on and meets nobody
    reason = "nobody was missed"
    try:
        job = full_job(full={"num_workers": world})
        train_full(fresh(base), job, checkpoint_root=folder / "checkpoints")
    except PeerLostError as error:
        reason = str(error)
    torch.save((found, reason, resumed), folder / "out")
    os._exit(0)  # a process group that broke cannot be ended
