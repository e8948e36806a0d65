"""One subject of a pack: what it is told, and what each train step answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raybooth.config import TrainConfig
from raybooth.data.encode import SubjectTensors

Status = Literal["running", "finished", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class SlotJob:
    """One subject to train: its words are in `tensors` already."""

    job_id: str
    subject_id: str
    seed: int
    train: TrainConfig
    tensors: SubjectTensors
    class_noun: str = ""
    class_prompt: str = ""
    """Both are read where text encoders or tokens train."""


@dataclass(frozen=True, slots=True)
class SlotReport:
    """What one train step did to one slot."""

    job_id: str
    train_step: int
    """Train steps done."""
    loss: float
    instance_loss: float
    prior_loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    status: Status
    error: str | None = None
