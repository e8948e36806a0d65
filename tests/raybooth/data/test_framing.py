"""Buckets of equal area; a photo, its mask and its mirror image show the same place."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from raybooth.data.framing import (
    bucket_sizes,
    mask_of,
    nearest_size,
    pixels_of,
    plan_frame,
)

from .test_images import picture


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 32), (64, 16), (32, 8)])
def test_buckets_have_about_one_area_and_both_orientations(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert max(height, width) <= 2 * min(height, width)
        assert height * width <= resolution**2
        assert (min(height, width)) * (max(height, width) + step) > resolution**2


def test_buckets_of_stable_diffusion() -> None:
    standing = [size for size in bucket_sizes(512, 64) if size[0] >= size[1]]
    assert standing == [(512, 512), (576, 448), (640, 384)]


@pytest.mark.parametrize(
    ("photo", "expected"),
    [
        ((900, 900), (512, 512)),
        ((1200, 900), (576, 448)),
        ((900, 1600), (384, 640)),
        ((4000, 1000), (640, 384)),
        ((1000, 1010), (512, 512)),
    ],
)
def test_a_photo_goes_to_the_nearest_aspect(
    photo: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert nearest_size(photo, bucket_sizes(512, 64)) == expected


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("size", [(32, 32), (40, 24), (24, 40)])
def test_a_frame_lies_inside_of_the_resized_photo_and_covers_it(
    crop: str, size: tuple[int, int]
) -> None:
    for seed in range(6):
        frame = plan_frame((61, 83), size, crop, seed)  # type: ignore[arg-type]
        assert 0 <= frame.top <= frame.resized[0] - size[0]
        assert 0 <= frame.left <= frame.resized[1] - size[1]
        assert frame.resized[0] == size[0] or frame.resized[1] == size[1]
        assert pixels_of(picture(0, (83, 61)), frame).shape == (3, *size)


def test_the_mirror_image_is_the_same_crop_mirrored() -> None:
    photo = picture(3, (83, 61))
    plain = plan_frame((61, 83), (32, 32), "random", 5)
    mirrored = plan_frame((61, 83), (32, 32), "random", 5, flip=True)
    assert torch.equal(pixels_of(photo, mirrored), pixels_of(photo, plain).flip(-1))
    assert mirrored.top_left == (plain.top, plain.resized[1] - plain.left - 32)
    mask = Image.new("L", (83, 61), 0)
    mask.paste(255, (0, 0, 40, 61))
    assert torch.equal(mask_of(mask, mirrored, 4), mask_of(mask, plain, 4).flip(-1))


def test_a_mask_is_the_share_of_the_subject_in_each_latent_pixel() -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 6, 32))
    share_HW = mask_of(mask, plan_frame((32, 32), (32, 32), "center"), 4)
    assert share_HW.shape == (8, 8)
    assert share_HW[0].tolist() == [1.0, 0.5, 0, 0, 0, 0, 0, 0]
