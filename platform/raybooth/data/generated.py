"""What a generator of priors hands to the cache: bytes, as they go to disk.

C H W latent channels, height, width.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class GeneratedPrompt:
    """The class prompt's embedding, as safetensors bytes; a generator yields it once."""

    conditioning: bytes

    @classmethod
    def of(cls, conditioning: Mapping[str, Tensor]) -> GeneratedPrompt:
        """From tensors whose leading dimension is 1."""
        return cls(_tensor_bytes(conditioning))


@dataclass(frozen=True)
class GeneratedPrior:
    """One prior image that was just made."""

    index: int
    png: bytes
    latents: bytes

    @classmethod
    def of(
        cls, index: int, image: Image.Image, mean_CHW: Tensor, std_CHW: Tensor
    ) -> GeneratedPrior:
        """From a picture and its VAE posterior (not multiplied by the scaling factor)."""
        file = io.BytesIO()
        image.save(file, "PNG")
        return cls(index, file.getvalue(), _tensor_bytes({"mean": mean_CHW, "std": std_CHW}))


Generated = GeneratedPrompt | GeneratedPrior
Generate = Callable[[Sequence[int]], Iterable[Generated]]
"""Makes the prompt's embedding and the prior images of these indices, in any order."""


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
