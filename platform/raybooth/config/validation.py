"""How a subject is watched while it trains, and which of its train steps is published."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raybooth.reading import Strict


class ValidationConfig(Strict):
    """Measurements between train steps; they draw from streams of their own and change nothing."""

    every_steps: int | None = Field(None, ge=1)
    """Train steps from one validation to the next; none: no validation. The last step always is."""

    held_out_images: int = Field(0, ge=0)
    """Photos (the last ones by name) that are not trained on; their loss is measured. With 0 the
    loss is that of the instance images themselves, and the record says so."""

    num_timesteps: int = Field(4, ge=1, le=100)
    """Timesteps at which the loss is measured, evenly spread, always the same noise."""

    samples: bool = False
    """Draw the sample prompts each time, always from the same seeds; published as pictures."""

    image_encoder: str | None = None
    """DINO or DINOv2 that judges the samples: `pocket`, a folder, or a Hub id as name@commit."""

    clip: str | None = None
    """CLIP that judges the samples, named likewise."""

    class_images: int = Field(4, ge=1)
    """Pictures of the class prompt that show drift; drawn when there is an image encoder."""

    max_drift: float = Field(0.25, gt=0, le=2)
    """Distance (1 - cosine) of the class pictures from the base's own that is told as drift."""

    keep: Literal["last", "best"] = "last"
    """Which train step is published."""

    best_by: Literal["loss", "dino"] = "loss"
    """The lowest loss, or the highest likeness that stays below that of two real photos."""

    patience: int | None = Field(None, ge=1)
    """Stop after so many validations without a better one; none: never."""

    @property
    def enabled(self) -> bool:
        """Whether anything is measured."""
        return self.every_steps is not None

    @model_validator(mode="after")
    def _options_have_effect(self) -> Self:
        changed = {
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        }
        if not self.enabled:
            if changed:
                named = ", ".join(sorted(changed))
                raise ValueError(f"{named} has no effect without every_steps; set it")
            return self
        judged = self.image_encoder is not None or self.clip is not None
        if judged and not self.samples:
            raise ValueError("image_encoder and clip judge samples; set samples: true")
        if self.image_encoder is None:
            for name in sorted(changed & {"class_images", "max_drift"}):
                raise ValueError(f"{name} has no effect without image_encoder; set it")
            if self.best_by == "dino":
                raise ValueError("best_by: dino needs an image_encoder; set it")
        if self.best_by == "dino" and self.keep == "last" and self.patience is None:
            raise ValueError("best_by has no effect with keep: last and no patience")
        return self
