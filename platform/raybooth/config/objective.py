"""What the denoiser is asked to learn, and what it must not forget."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from raybooth.config.words import Solver
from raybooth.reading import Strict


class ObjectiveConfig(Strict):
    """What the denoiser is asked to predict, and how timesteps are weighted."""

    snr_gamma: float | None = Field(None, gt=0)
    """Min-SNR gamma (Hang et al. 2023); weights instance rows only, never prior rows."""


class PriorConfig(Strict):
    """Prior preservation (Ruiz et al. 2023, DreamBooth, section 3.3)."""

    num_images: int = Field(100, ge=0)
    """Prior images of the class; 0 trains without a prior."""

    loss_weight: float = Field(1.0, ge=0)
    """Lambda of the prior term."""

    negative_prompt: str = ""
    solver: Solver = "ddim"
    num_inference_steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=1, le=50)

    @model_validator(mode="after")
    def _weight_needs_images(self) -> Self:
        if (self.loss_weight > 0) != (self.num_images > 0):
            raise ValueError(
                f"loss_weight is {self.loss_weight} but num_images is {self.num_images}; "
                "set both to 0 to train without a prior, or both above 0"
            )
        return self
