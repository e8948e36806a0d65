"""Photos and prompt of a subject as tensors, cached on disk by content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth.data.prior import PriorCache, PriorTensors
from raybooth.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from raybooth.model.base import Base


@dataclass(frozen=True)
class SubjectTensors:
    """All that training one subject reads (N = photos x crops_per_image, fp32, on the CPU)."""

    mean_NCHW: Tensor
    std_NCHW: Tensor
    instance_conditioning: dict[str, Tensor]
    """Of the instance prompt, leading dimension 1."""
    prior: PriorTensors | None
    photo_digests: tuple[str, ...]


def encode_subject(
    base: Base, subject: Subject, cache_root: Path, *, priors: PriorCache | None = None
) -> SubjectTensors:
    """The subject's posterior latents and embedding, from `cache_root` when they are there.

    `priors` must hold the subject's prior (make it first) when the subject has one.
    """
    raise NotImplementedError
