"""The receipt of an image: all that makes it again, and nothing about who asked.

It comes with every image, in the answer and inside the picture file. Whoever has it, the base and
the adapters can draw the same bytes on the same kind of machine: `raybooth replay`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from raybooth.config import Precision


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class UsedAdapter(_Frozen):
    """One subject of the image."""

    reference: str
    """`subject@version`, the version that was served."""

    sha256: dict[str, str]
    """Of each of its files."""

    scale: float


class UsedBase(_Frozen):
    """The frozen model under the image."""

    name: str
    revision: str | None = None
    fingerprint: str


class EngineFingerprint(_Frozen):
    """What decides how numbers are rounded: engines that agree in all of it draw the same bytes."""

    raybooth: str
    torch: str
    diffusers: str
    transformers: str
    device: str
    dtype: Precision
    threads: int
    """Of the CPU; a row's place in a batch can matter where it is no power of two."""

    rank: int
    """To which the bank pads every adapter."""

    targets: Literal["attention", "all"] | tuple[str, ...]
    generator: int

    def differences(self, other: EngineFingerprint) -> dict[str, tuple[str, str]]:
        """(own, other's) of each part that differs, by name."""
        pairs = zip(self, other, strict=True)
        return {name: (str(own), str(its)) for (name, own), (_, its) in pairs if own != its}


class Receipt(_Frozen):
    """How one image was drawn."""

    version: Literal[1] = 1
    prompt: str | None = None
    negative_prompt: str | None = None
    """None: the file keeps no prompts (pictures.keep_prompt: false); `prompts_sha256` tells."""

    prompts_sha256: str
    seed: int
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float
    solver: str
    width: int
    height: int
    adapter_scale: float
    zero_terminal_snr: bool
    adapters: tuple[UsedAdapter, ...]
    base: UsedBase
    buckets: tuple[tuple[int, int], ...]
    """The bucket trace: (rows of the denoiser's call, denoise steps in it), in order."""

    output_format: Literal["png", "webp", "jpeg"]
    output_compression: int
    pixels_sha256: str
    """Of the RGB levels as drawn, before any compression."""

    engine: EngineFingerprint

    def without_prompts(self) -> Self:
        """The same receipt for a file that is to keep no prompts."""
        return self.model_copy(update={"prompt": None, "negative_prompt": None})

    def json_text(self) -> str:
        """One line of ASCII; what is None is left out."""
        values = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(values, separators=(",", ":"))


def hash_prompts(prompt: str, negative_prompt: str) -> str:
    """SHA-256 of both, each where it belongs."""
    return hashlib.sha256(json.dumps([prompt, negative_prompt]).encode()).hexdigest()
