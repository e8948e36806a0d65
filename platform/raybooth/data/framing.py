"""What a photo shows once it is resized, cropped and mirrored; shapes of equal area.

C channels, H height, W width in pixels; sizes are (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

Crop = Literal["center", "random"]
Size = tuple[int, int]

MAX_BUCKET_ASPECT = 2.0
"""Longer side over shorter side of the longest bucket; a longer photo is cropped to it."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A photo is resized to `resized`, cropped to `size` from (top, left), then mirrored."""

    resized: Size
    top: int
    left: int
    size: Size
    flip: bool

    @property
    def top_left(self) -> tuple[int, int]:
        """Where the crop begins in the resized photo as it is shown, mirrored or not."""
        if not self.flip:
            return self.top, self.left
        return self.top, self.resized[1] - self.left - self.size[1]

    def cut(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """`image` in this frame."""
        height, width = self.resized
        if image.size != (width, height):
            image = image.resize((width, height), resample)
        right, bottom = self.left + self.size[1], self.top + self.size[0]
        image = image.crop((self.left, self.top, right, bottom))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image


def plan_frame(photo: Size, size: Size, crop: Crop, seed: int = 0, *, flip: bool = False) -> Frame:
    """The smallest resize of a photo that covers `size`, and the place of its crop.

    For squares: sizes and offsets of torchvision's Resize and CenterCrop, as in diffusers'
    scripts. `seed` decides the place of a random crop alone; mirrored or not, it shows the same.
    """
    import torch

    (height, width), (rows, columns) = photo, size
    if rows * width >= columns * height:
        resized = (rows, rows * width // height)
    else:
        resized = (columns * height // width, columns)
    spare_rows, spare_columns = resized[0] - rows, resized[1] - columns
    if crop == "center":
        return Frame(resized, round(spare_rows / 2.0), round(spare_columns / 2.0), size, flip)
    generator = torch.Generator("cpu").manual_seed(seed)
    top = int(torch.randint(0, spare_rows + 1, (1,), generator=generator))
    left = int(torch.randint(0, spare_columns + 1, (1,), generator=generator))
    return Frame(resized, top, left, size, flip)


def bucket_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """Shapes of about resolution^2 pixels and never more, sides multiples of `step`, up to 2:1.

    For each height the widest shape that fits, and each shape lying as well as standing.
    """
    area = resolution * resolution
    found: set[Size] = set()
    for height in range(step, resolution + 1, step):
        width = area // height // step * step
        if width <= height * MAX_BUCKET_ASPECT:
            found |= {(height, width), (width, height)}
    return tuple(sorted(found))


def nearest_size(photo: Size, sizes: Sequence[Size]) -> Size:
    """The size of the nearest aspect, by the ratio of ratios; of two, the larger."""
    aspect = math.log(photo[1] / photo[0])

    def distance(size: Size) -> tuple[float, int, Size]:
        away = abs(math.log(size[1] / size[0]) - aspect)
        return round(away, 9), -size[0] * size[1], size

    return min(sizes, key=distance)


def pixels_of(image: Image.Image, frame: Frame) -> Tensor:
    """pixels_CHW in [-1, 1] of an RGB photo (LANCZOS)."""
    import torch

    shown = frame.cut(image, Image.Resampling.LANCZOS).convert("RGB")
    pixels_HWC = torch.from_numpy(np.array(shown, dtype=np.uint8))
    return pixels_HWC.permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)


def mask_of(mask: Image.Image, frame: Frame, factor: int) -> Tensor:
    """Share of the subject in [0, 1] of each latent pixel [H / factor, W / factor]."""
    import torch

    shown = frame.cut(mask, Image.Resampling.BILINEAR)
    share_HW = torch.from_numpy(np.array(shown, dtype=np.uint8)).float().div(255)
    return torch.nn.functional.avg_pool2d(share_HW[None], factor)[0]
