"""What is made of a subject's photos, and what lies beside them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raybooth.reading import Strict


class PhotosConfig(Strict):
    """Shape, flips, captions and masks of the instance images."""

    fit: Literal["square", "buckets"] = "square"
    """`buckets`: each photo keeps the nearest of the shapes of equal area, up to 2:1."""

    flip: bool = False
    """Cache every photo mirrored as well; not for subjects with letters or sides."""

    captions: bool = False
    """Read `<photo>.txt`, a template of {identifier} and {class_noun}; a photo without one has
    the instance prompt."""

    masks: bool = False
    """Read `<photo>.mask.png`, white where the subject is; a photo without one is all subject."""

    background_weight: float = Field(0.0, ge=0, lt=1)
    """Weight of the loss outside of the mask; 1 would be no mask."""

    @model_validator(mode="after")
    def _weight_needs_masks(self) -> Self:
        if self.background_weight and not self.masks:
            raise ValueError("background_weight has no effect without masks; set masks: true")
        return self
