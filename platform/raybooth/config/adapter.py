"""The low-rank adapter of one subject."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raybooth.reading import Strict


class AdapterConfig(Strict):
    """The low-rank adapter of one subject (Hu et al. 2021, LoRA)."""

    rank: int = Field(4, ge=1, le=256)
    """Rank r of every site."""

    alpha: float | None = Field(None, gt=0)
    """Scale is alpha / rank; none means alpha = rank, as in diffusers' scripts."""

    targets: Literal["attention", "all"] | tuple[str, ...] = "attention"
    """`attention` (to_q, to_k, to_v, to_out.0), `all` (with feed-forward, projections and
    convolutions), or a list of module-name suffixes."""

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
