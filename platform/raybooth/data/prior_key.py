"""What a prior is made of, and therefore what it is called (no torch)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

from raybooth.config import Precision, TrainConfig
from raybooth.model.generation import GENERATOR_VERSION

DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Number format in which the base makes the prior of a subject trained in a precision."""


@dataclass(frozen=True)
class PriorKey:
    """All that decides a prior's pixels; two subjects with equal keys share one prior."""

    base_fingerprint: str
    class_prompt: str
    negative_prompt: str
    solver: str
    num_inference_steps: int
    guidance_scale: float
    resolution: int
    dtype: str
    """`float32`, `bfloat16` or `float16`."""
    generator_version: int

    @cached_property
    def digest(self) -> str:
        """sha256 over every field, hexadecimal; the name of the prior's folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def image_seed(key: PriorKey, index: int) -> int:
    """f(key, i): the seed of prior image `index`, in [0, 2^63), however many images there are."""
    data = hashlib.sha256(f"raybooth prior\n{key.digest}\n{index}".encode()).digest()
    return int.from_bytes(data[:8], "big") >> 1


def prior_key(train: TrainConfig, class_prompt: str, base_fingerprint: str) -> PriorKey:
    """The key of the prior that a subject trained by `train` needs.

    `class_prompt` is the subject's own (`subject.class_prompt`, words filled in).
    """
    prior = train.prior
    return PriorKey(
        base_fingerprint=base_fingerprint,
        class_prompt=class_prompt,
        negative_prompt=prior.negative_prompt,
        solver=prior.solver,
        num_inference_steps=prior.num_inference_steps,
        guidance_scale=float(prior.guidance_scale),
        resolution=train.resolution,
        dtype=DTYPES[train.precision],
        generator_version=GENERATOR_VERSION,
    )
