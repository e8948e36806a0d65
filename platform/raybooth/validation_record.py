"""What validation found, point by point, as it stands in `record.json`."""

from __future__ import annotations

from typing import Literal

from raybooth.reading import Strict


class ValidationPoint(Strict):
    """One validation; None is what was not measured."""

    train_step: int
    loss: float
    """Mean over images and fixed timesteps, at fixed noise."""

    dino: float | None = None
    clip_i: float | None = None
    clip_t: float | None = None
    pres: float | None = None
    drift: float | None = None
    """1 - cosine of class pictures with the base's own of the same seeds."""

    copying: bool = False
    """Samples are nearer to the photos than the photos are to each other."""

    drifting: bool = False
    """Drift is above its limit."""


class ValidationRecord(Strict):
    """All points of a subject's training, and which train step was published."""

    loss_of: Literal["held-out photos", "instance images"]
    held_out: tuple[str, ...]
    """sha256 of each held-out photo."""

    ceiling_dino: float | None
    """Mean cosine of two instance images; None without an image encoder."""

    base_pres: float | None
    """Mean cosine of the base's own class pictures with the instance images: where `pres` began."""

    points: tuple[ValidationPoint, ...]
    best_step: int
    published_step: int
    stopped_early: bool
    encoders: dict[str, str]
    """sha256 of each encoder's weights."""
