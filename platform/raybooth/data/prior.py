"""The prior cache: class images, latents and prompt embedding, by content, made once (no ray)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth.data.prior_key import PriorKey, image_seed, prior_key

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

__all__ = ["PriorCache", "PriorKey", "PriorReport", "PriorStatus", "image_seed", "prior_key"]


@dataclass(frozen=True)
class GeneratedPrompt:
    """The class prompt's embedding, as safetensors bytes; a generator yields it once, first."""

    conditioning: bytes

    @classmethod
    def of(cls, conditioning: Mapping[str, Tensor]) -> GeneratedPrompt:
        """From tensors whose leading dimension is 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class GeneratedPrior:
    """One prior image that was just made, as the bytes that go to disk."""

    index: int
    png: bytes
    latents: bytes

    @classmethod
    def of(
        cls, index: int, image: Image.Image, mean_CHW: Tensor, std_CHW: Tensor
    ) -> GeneratedPrior:
        """From a picture and its VAE posterior (not multiplied by the scaling factor)."""
        raise NotImplementedError


Generate = Callable[[Sequence[int]], Iterable[GeneratedPrompt | GeneratedPrior]]
"""Makes the prompt's embedding and the prior images of these indices, in any order."""
OnProgress = Callable[[int, int], None]
"""Called with (images that are there, images wanted)."""


@dataclass(frozen=True)
class PriorStatus:
    """What the cache holds of one key."""

    num_whole: int
    num_damaged: int
    size_bytes: int


@dataclass(frozen=True)
class PriorReport:
    """What `ensure` found and did."""

    num_cached: int
    num_generated: int
    num_damaged: int
    seconds: float


@dataclass(frozen=True)
class PriorTensors:
    """A prior as training wants it (N images, posterior without the scaling factor, fp32)."""

    mean_NCHW: Tensor
    std_NCHW: Tensor
    conditioning: dict[str, Tensor]
    image_digests: tuple[str, ...]


@dataclass(frozen=True)
class PriorEntry:
    """One prior of the cache, for people."""

    digest: str
    key: PriorKey | None
    base_name: str
    status: PriorStatus
    used_at: float


class PriorCache:
    """Priors under `root`, shared by every process and node that sees the folder."""

    def __init__(
        self, root: Path, *, lease_expiry_s: float = 120.0, heartbeat_s: float = 5.0
    ) -> None:
        self.root = root

    def status(self, key: PriorKey) -> PriorStatus:
        """How much of this prior is there and whole (every checksum is checked)."""
        raise NotImplementedError

    def ensure(
        self,
        key: PriorKey,
        num_images: int,
        generate: Generate,
        on_progress: OnProgress | None = None,
        *,
        base_name: str = "",
    ) -> PriorReport:
        """The prior holds images 0 .. num_images-1 after this; only what is missing is generated."""
        raise NotImplementedError

    def load(self, key: PriorKey, num_images: int) -> PriorTensors:
        """Images 0 .. num_images-1 as latents, checked; raises PriorError when not all are there."""
        raise NotImplementedError

    def entries(self) -> list[PriorEntry]:
        """Every prior of the cache, by class prompt."""
        raise NotImplementedError

    def gc(
        self,
        *,
        older_than: timedelta | None = None,
        keep: Iterable[str] | None = None,
        dry_run: bool = False,
    ) -> list[PriorEntry]:
        """Deletes priors unused for `older_than` and not in `keep` (digests); returns them."""
        raise NotImplementedError
