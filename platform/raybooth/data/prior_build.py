"""Makes a prior in this process, with the batched sampler that serves requests.

B rows, C H W channels, height, width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from raybooth.data.generated import Generated, GeneratedPrior, GeneratedPrompt
from raybooth.data.images import to_pixels
from raybooth.data.prior import OnProgress, PriorCache, PriorReport
from raybooth.data.prior_key import PriorKey, image_seed
from raybooth.errors import PriorError

if TYPE_CHECKING:
    from raybooth.model.base import Base


def build_prior(
    base: Base,
    cache: PriorCache,
    key: PriorKey,
    num_images: int,
    on_progress: OnProgress | None = None,
    *,
    max_rows: int = 16,
) -> PriorReport:
    """The cache holds `num_images` of this prior after this, made here when they are missing."""

    def generate(indices: Sequence[int]) -> Iterator[Generated]:
        return sample_prior(base, key, indices, max_rows=max_rows)

    return cache.ensure(key, num_images, generate, on_progress, base_name=base.name)


def sample_prior(
    base: Base, key: PriorKey, indices: Sequence[int], *, max_rows: int = 16
) -> Iterator[Generated]:
    """The class prompt's embedding, then the images of `indices`, each with seed f(key, i)."""
    from raybooth.model.base import encode_images, encode_prompts
    from raybooth.model.sampler import SampleRequest, generate

    _check_made_by(base, key)
    prompt = encode_prompts(base, [key.class_prompt])
    size = (key.resolution, key.resolution)
    prompt.update(base.family.size_conditioning(size, (0, 0), size))
    yield GeneratedPrompt.of({name: tensor.float() for name, tensor in prompt.items()})
    for start in range(0, len(indices), max_rows):
        chunk = indices[start : start + max_rows]
        requests = [
            SampleRequest(
                prompt=key.class_prompt,
                negative_prompt=key.negative_prompt,
                seed=image_seed(key, index),
                num_inference_steps=key.num_inference_steps,
                guidance_scale=key.guidance_scale,
                solver=key.solver,
                height=key.resolution,
                width=key.resolution,
            )
            for index in chunk
        ]
        pictures = generate(base, None, requests, max_rows=max_rows)
        for index, picture in zip(chunk, pictures, strict=True):
            pixels_BCHW = to_pixels(picture, key.resolution, "center")[None]
            mean_BCHW, std_BCHW = encode_images(base, pixels_BCHW)
            yield GeneratedPrior.of(index, picture, mean_BCHW[0], std_BCHW[0])


def _check_made_by(base: Base, key: PriorKey) -> None:
    """A prior must be what its key says, or another subject would trust it."""
    from raybooth.model.generation import GENERATOR_VERSION

    dtype = str(base.dtype).removeprefix("torch.")
    for name, wanted, found in (
        ("base", key.base_fingerprint, base.fingerprint),
        ("dtype", key.dtype, dtype),
        ("generator version", key.generator_version, GENERATOR_VERSION),
    ):
        if wanted != found:
            what = f"the prior {key.class_prompt!r} cannot be made here: its {name} is {wanted}"
            raise PriorError(what, str(found), "load the base that the key names")
