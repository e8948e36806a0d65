"""Makes a prior in this process, with the batched sampler that serves requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from raybooth.data.prior import (
    GeneratedPrior,
    GeneratedPrompt,
    OnProgress,
    PriorCache,
    PriorReport,
)
from raybooth.data.prior_key import PriorKey

if TYPE_CHECKING:
    from raybooth.model.base import Base


def build_prior(
    base: Base,
    cache: PriorCache,
    key: PriorKey,
    num_images: int,
    on_progress: OnProgress | None = None,
    *,
    max_rows: int = 16,
) -> PriorReport:
    """The cache holds `num_images` of this prior after this, made here when they are missing."""
    raise NotImplementedError


def sample_prior(
    base: Base, key: PriorKey, indices: Sequence[int], *, max_rows: int = 16
) -> Iterator[GeneratedPrompt | GeneratedPrior]:
    """The class prompt's embedding, then the images of `indices`, each with seed f(key, i)."""
    raise NotImplementedError
