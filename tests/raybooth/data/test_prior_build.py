"""Prior images are the sampler's, their latents the VAE's, their embedding the text encoder's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raybooth.data.images import to_pixels
from raybooth.data.prior import PriorCache, PriorKey, image_seed
from raybooth.data.prior_build import build_prior
from raybooth.errors import PriorError
from raybooth.model.base import Base, encode_images, encode_prompts
from raybooth.model.sampler import GENERATOR_VERSION, SampleRequest, generate


@pytest.fixture
def key(tiny_base: Base) -> PriorKey:
    return PriorKey(
        base_fingerprint=tiny_base.fingerprint,
        class_prompt="a photo of a dog",
        negative_prompt="blue",
        solver="ddim",
        num_inference_steps=3,
        guidance_scale=4.0,
        resolution=32,
        dtype="float32",
        generator_version=GENERATOR_VERSION,
    )


def pictures(root: Path, key: PriorKey) -> list[np.ndarray]:
    paths = sorted((root / key.digest / "images").iterdir())
    return [np.asarray(Image.open(path)).astype(int) for path in paths]


def test_images_are_the_samplers_own(tiny_base: Base, key: PriorKey, tmp_path: Path) -> None:
    cache = PriorCache(tmp_path)
    seen: list[tuple[int, int]] = []
    report = build_prior(tiny_base, cache, key, 5, lambda *p: seen.append(p), max_rows=2)
    assert (report.num_cached, report.num_generated) == (0, 5)
    assert seen[-1] == (5, 5)
    for index, found in enumerate(pictures(tmp_path, key)):
        request = SampleRequest(
            prompt="a photo of a dog",
            negative_prompt="blue",
            seed=image_seed(key, index),
            num_inference_steps=3,
            guidance_scale=4.0,
            solver="ddim",
            height=32,
            width=32,
        )
        (alone,) = generate(tiny_base, None, [request])
        assert np.abs(found - np.asarray(alone).astype(int)).max() <= 1
    entry = cache.entries()[0]
    assert (entry.key, entry.base_name) == (key, tiny_base.name)


def test_latents_and_embedding_are_the_bases_own(
    tiny_base: Base, key: PriorKey, tmp_path: Path
) -> None:
    cache = PriorCache(tmp_path)
    build_prior(tiny_base, cache, key, 3)
    tensors = cache.load(key, 3)
    for index, path in enumerate(sorted((tmp_path / key.digest / "images").iterdir())):
        with Image.open(path) as image:
            mean_BCHW, std_BCHW = encode_images(tiny_base, to_pixels(image, 32, "center")[None])
        assert torch.equal(tensors.mean_NCHW[index], mean_BCHW[0])
        assert torch.equal(tensors.std_NCHW[index], std_BCHW[0])
    for name, expected in encode_prompts(tiny_base, ["a photo of a dog"]).items():
        assert torch.equal(tensors.conditioning[name], expected)


def test_rows_and_growth_change_at_most_a_rounding(
    tiny_base: Base, key: PriorKey, tmp_path: Path
) -> None:
    build_prior(tiny_base, PriorCache(tmp_path / "a"), key, 6, max_rows=8)
    grown = PriorCache(tmp_path / "b")
    build_prior(tiny_base, grown, key, 2, max_rows=1)
    report = build_prior(tiny_base, grown, key, 6, max_rows=2)
    assert (report.num_cached, report.num_generated) == (2, 4)
    at_once, in_parts = pictures(tmp_path / "a", key), pictures(tmp_path / "b", key)
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(at_once, in_parts, strict=True))
    assert len({image.tobytes() for image in at_once}) == 6


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("base_fingerprint", "0" * 64, "its base"),
        ("dtype", "bfloat16", "its dtype"),
        ("generator_version", 999, "its generator version"),
    ],
)
def test_a_base_that_does_not_match_the_key_is_refused(
    tiny_base: Base, key: PriorKey, tmp_path: Path, field: str, value: object, name: str
) -> None:
    other = dataclasses.replace(key, **{field: value})  # type: ignore[arg-type]
    cache = PriorCache(tmp_path)
    with pytest.raises(PriorError, match=name):
        build_prior(tiny_base, cache, other, 1)
    assert cache.status(other).num_whole == 0
