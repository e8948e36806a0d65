"""What the denoiser is asked to learn, and what it must not forget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from raybooth.config.words import Solver
from raybooth.errors import ConfigError
from raybooth.reading import Strict

VelocityWeight = Literal["over_snr_plus_one", "plus_one"]


class ObjectiveConfig(Strict):
    """What the denoiser is asked to predict, and how timesteps are weighted."""

    snr_gamma: float | None = Field(None, gt=0)
    """Min-SNR gamma (Hang et al. 2023); weights instance rows only, never prior rows."""

    velocity_weight: VelocityWeight = "over_snr_plus_one"
    """Min-SNR of a base that predicts velocity: `over_snr_plus_one` is min(SNR, g) / (SNR + 1),
    the paper's; `plus_one` is min(SNR, g) / SNR + 1, that of diffusers' SDXL scripts."""

    offset_noise: float = Field(0.0, ge=0, le=1)
    """Noise of one value a channel added to the noise, times this (diffusers' scripts: 0.1)."""

    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise (Lin et al. 2023); for
    bases that predict velocity. The adapter is then sampled on that schedule too."""

    @model_validator(mode="after")
    def _options_have_effect(self) -> Self:
        if self.velocity_weight != "over_snr_plus_one" and self.snr_gamma is None:
            raise ValueError("velocity_weight has no effect without snr_gamma; set both")
        return self

    def check_base(self, scheduler_config: Mapping[str, Any]) -> None:
        """Raises ConfigError when an option makes no sense for a base of this noise schedule."""
        kind = str(scheduler_config["prediction_type"])
        found = f"a base that predicts {kind}"
        if self.velocity_weight != "over_snr_plus_one" and kind != "v_prediction":
            what = f"objective.velocity_weight: {self.velocity_weight} has no effect"
            raise ConfigError(what, found, "remove it; it weights v_prediction")
        if self.zero_terminal_snr and kind != "v_prediction":
            what = "objective.zero_terminal_snr cannot be trained"
            do = "remove it, or use a base of v_prediction: pure noise leaves no epsilon to learn"
            raise ConfigError(what, found, do)
        if self.zero_terminal_snr and scheduler_config.get("rescale_betas_zero_snr"):
            what = "objective.zero_terminal_snr has no effect"
            raise ConfigError(what, "a base whose own schedule ends at zero SNR", "remove it")


class PriorConfig(Strict):
    """Prior preservation (Ruiz et al. 2023, DreamBooth, section 3.3)."""

    kind: Literal["images", "base_prediction"] = "images"
    """`images`: learn prior images of the class as they were drawn. `base_prediction`: on the
    instance's own noisy latents under the class prompt, keep predicting what the base predicts
    there; no prior images at all."""

    num_images: int = Field(100, ge=0)
    """Prior images of the class; 0 trains without a prior. None with base_prediction."""

    loss_weight: float = Field(1.0, ge=0)
    """Lambda of the prior term."""

    negative_prompt: str = ""
    solver: Solver = "ddim"
    num_inference_steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=1, le=50)

    @model_validator(mode="before")
    @classmethod
    def _base_prediction_has_no_images(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "base_prediction":
            return {"num_images": 0, **values}
        return values

    @model_validator(mode="after")
    def _weight_needs_a_prior(self) -> Self:
        if self.kind == "base_prediction":
            self._check_base_prediction()
        elif (self.loss_weight > 0) != (self.num_images > 0):
            raise ValueError(
                f"loss_weight is {self.loss_weight} but num_images is {self.num_images}; "
                "set both to 0 to train without a prior, or both above 0"
            )
        return self

    def _check_base_prediction(self) -> None:
        if self.loss_weight == 0:
            raise ValueError("kind: base_prediction needs a loss_weight above 0")
        fields = type(self).model_fields
        for name in ("negative_prompt", "solver", "num_inference_steps", "guidance_scale"):
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} has no effect with kind: base_prediction; remove it")
        if self.num_images:
            raise ValueError(
                f"num_images is {self.num_images} but kind is base_prediction, which reads none; "
                "set it to 0"
            )
