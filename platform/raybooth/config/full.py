"""Every weight of the denoiser, and of the text encoder if asked: a full fine-tune."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raybooth.reading import Strict


class FullConfig(Strict):
    """A full fine-tune under DeepSpeed ZeRO (Rajbhandari et al. 2020); the VAE stays frozen."""

    text_encoder: bool = False
    """Train the base's text encoders as well."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the workers share out: 0 nothing, 1 optimiser states, 2 and gradients, 3 and weights."""

    offload: Literal["none", "optimizer", "all"] = "none"
    """What lives in the host's memory: the optimiser (stage 1 to 3), or weights too (stage 3)."""

    num_workers: int = Field(1, ge=1, le=64)
    """Workers that split the rows of each train step; the result does not depend on it."""

    gradient_accumulation: int = Field(1, ge=1, le=64)
    """Parts in which each worker takes its rows, one after another; same result, less memory."""

    @model_validator(mode="after")
    def _offload_needs_a_stage(self) -> Self:
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload: {self.offload} needs zero_stage {least} at least, not {self.zero_stage}"
            )
        return self
