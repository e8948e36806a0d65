"""Photos: what cannot be trained on is refused by name, the rest becomes square pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from raybooth.errors import SubjectError
from raybooth.subject import photo_digest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_photos", "load_photo", "photo_digest", "pixel_digest", "to_pixels"]


def check_photos(
    paths: Sequence[Path], *, resolution: int, min_images: int, subject_id: str
) -> list[SubjectError]:
    """Everything wrong with a subject's photos, each naming its file; an empty list is good."""
    raise NotImplementedError


def load_photo(path: Path) -> Image.Image:
    """The photo as RGB, upright; raises SubjectError when it is not a whole picture."""
    raise NotImplementedError


def pixel_digest(image: Image.Image) -> str:
    """sha256 of size and RGB pixels; equal for one picture in two lossless formats."""
    raise NotImplementedError


def to_pixels(
    image: Image.Image, resolution: int, crop: Literal["center", "random"], seed: int = 0
) -> Tensor:
    """pixels_CHW in [-1, 1]: shorter side resized (LANCZOS), then a square crop."""
    raise NotImplementedError
