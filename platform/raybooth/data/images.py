"""Photos: what cannot be trained on is refused by name, the rest becomes square pixels.

C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from raybooth.data.framing import Size, nearest_size, pixels_of, plan_frame
from raybooth.errors import SubjectError
from raybooth.sidecar import mask_file
from raybooth.subject import photo_digest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_photos", "load_mask", "load_photo", "photo_digest", "pixel_digest", "to_pixels"]

MAX_PIXELS = 80_000_000
"""A photo with more is refused before it is decoded (below PIL's own alarm at 89 million)."""
MAX_ASPECT = 4.0
"""Longer side over shorter side; a square crop of more shows a splinter of the photo."""
FORMATS = ("JPEG", "PNG", "WEBP")

_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What PIL's decoders raise on damaged files."""


def check_photos(
    paths: Sequence[Path],
    *,
    resolution: int,
    min_images: int,
    subject_id: str,
    sizes: Sequence[Size] = (),
    masks: bool = False,
) -> list[SubjectError]:
    """Everything wrong with a subject's photos, each naming its file; an empty list is good.

    `sizes` are the buckets that photos go into (none: the square of `resolution`). Every photo
    is really decoded, with `masks` its mask too. A duplicate does not count towards `min_images`.
    """
    problems: list[SubjectError] = []
    first_of: dict[str, Path] = {}
    num_duplicates = 0
    for path in paths:
        try:
            image = load_photo(path)
        except SubjectError as error:
            problems.append(
                SubjectError(f"{_whose(subject_id)}{error.what}", error.found, error.do)
            )
            continue
        digest = pixel_digest(image)
        if digest in first_of:
            num_duplicates += 1
            what = f"{_whose(subject_id)}{path} is a duplicate"
            found = f"the same pixels as {first_of[digest]}"
            problems.append(SubjectError(what, found, "remove one of them"))
            continue
        first_of[digest] = path
        problems.extend(_size_problems(image, path, resolution, sizes, subject_id))
        if masks and mask_file(path).exists():
            try:
                load_mask(mask_file(path), image)
            except SubjectError as error:
                what = f"{_whose(subject_id)}{error.what}"
                problems.append(SubjectError(what, error.found, error.do))
    num_photos = len(paths) - num_duplicates
    if not paths:
        what, do = f"{_whose(subject_id)}there are no photos", f"give at least {min_images}"
        problems.append(SubjectError(what, "", do))
    elif num_photos < min_images:
        what = f"{_whose(subject_id)}there are too few different photos"
        do = f"give at least {min_images}, or lower min_images"
        problems.append(SubjectError(what, str(num_photos), do))
    return problems


def load_photo(path: Path) -> Image.Image:
    """The photo as 8-bit RGB, upright by its EXIF orientation.

    Transparency is composited on white, 16-bit grey is scaled by 1/257 (not clipped), CMYK is
    converted; colour profiles are not applied, as in diffusers. Raises SubjectError, naming the
    file, when it is not a whole JPEG, PNG or WebP picture of at most MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise _bomb(path, f"{width}x{height} pixels")
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":
                    do = "save one frame as a picture"
                    raise SubjectError(f"{path} is an animation", f"{frames} frames", do)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(path, str(error)) from error
    except _DECODE_ERRORS as error:
        raise _unreadable(path, error) from error


def pixel_digest(image: Image.Image) -> str:
    """sha256 of size and RGB pixels; equal for one picture in two lossless formats."""
    size = f"{image.width}x{image.height}\n".encode()
    return hashlib.sha256(size + image.convert("RGB").tobytes()).hexdigest()


def to_pixels(
    image: Image.Image, resolution: int, crop: Literal["center", "random"], seed: int = 0
) -> Tensor:
    """pixels_CHW in [-1, 1]: shorter side resized (LANCZOS), then a square crop.

    Sizes, offsets and arithmetic are those of diffusers' LoRA script (torchvision's Resize,
    CenterCrop, ToTensor, Normalize(0.5)); `seed` decides the place of a random crop alone.
    """
    size = (resolution, resolution)
    return pixels_of(image, plan_frame((image.height, image.width), size, crop, seed))


def load_mask(path: Path, photo: Image.Image) -> Image.Image:
    """The mask as 8-bit grey, upright: white where the subject is.

    Raises SubjectError, naming the file, when it is no picture, of another size than the upright
    photo, or black all over.
    """
    mask = load_photo(path).convert("L")
    if mask.size != photo.size:
        found = f"{mask.width}x{mask.height}, the photo {photo.width}x{photo.height}"
        do = "draw it on the photo, upright, without resizing"
        raise SubjectError(f"the mask {path} has another size than its photo", found, do)
    if mask.getextrema() == (0, 0):
        do = "paint the subject white, or remove the file"
        raise SubjectError(f"the mask {path} shows no subject", "black all over", do)
    return mask


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """PIL's own conversion clips at 255; 65535 / 257 is 255 exactly."""
    values_HW = np.asarray(image).astype(np.int64)
    grey_HW = ((values_HW + 128) // 257).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey_HW[values_HW == key] = 255
    return Image.fromarray(grey_HW).convert("RGB")


def _size_problems(
    image: Image.Image, path: Path, resolution: int, sizes: Sequence[Size], subject_id: str
) -> list[SubjectError]:
    problems: list[SubjectError] = []
    short, long = min(image.size), max(image.size)
    found = f"{image.width}x{image.height}"
    if long > MAX_ASPECT * short:
        what = f"{_whose(subject_id)}{path} is too long and thin"
        do = f"crop it to at most {MAX_ASPECT:g}:1"
        problems.append(SubjectError(what, found, do))
    size = (resolution, resolution)
    if sizes:
        size = nearest_size((image.height, image.width), sizes)
    if image.height < size[0] or image.width < size[1]:
        wanted = f"resolution {resolution}" if not sizes else f"its bucket {size[1]}x{size[0]}"
        what = f"{_whose(subject_id)}{path} is too small for {wanted}"
        do = "give a larger photo (it is never enlarged), or lower the resolution"
        problems.append(SubjectError(what, found, do))
    return problems


def _unreadable(path: Path, error: BaseException) -> SubjectError:
    found = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return SubjectError(f"{path} does not exist", "", "check the path")
    if isinstance(error, PermissionError | IsADirectoryError):
        return SubjectError(f"{path} cannot be read", error.strerror or found, "check the file")
    if path.is_file() and path.stat().st_size == 0:
        return SubjectError(f"{path} is empty", "0 bytes", "give the photo again")
    if isinstance(error, UnidentifiedImageError):
        what, found = f"{path} is not a JPEG, PNG or WebP picture", "other or damaged contents"
        return SubjectError(what, found, "save it as one of these")
    return SubjectError(f"{path} is truncated or damaged", found, "give the photo again")


def _bomb(path: Path, found: str) -> SubjectError:
    what = f"{path} has more than {MAX_PIXELS:,} pixels"
    return SubjectError(what, found, "make it smaller")


def _whose(subject_id: str) -> str:
    return f"subject {subject_id!r}: "
