"""What differs between kinds of base: files, words to conditioning, one call of the denoiser.

A new kind is one file here and one line in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raybooth.errors import BaseModelError
from raybooth.model.families.stable_diffusion import StableDiffusion

Conditioning = Mapping[str, Tensor]
"""What steers the denoiser besides latents and timesteps; each tensor is batch-first."""


class Family(Protocol):
    """One kind of base. Stateless: every part comes in by argument."""

    name: str
    pipeline_classes: tuple[str, ...]
    weight_folders: tuple[str, ...]
    """Subfolders of a base that hold weights."""

    def load_denoiser(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The denoiser of the base in `folder`, every weight from its file."""

    def load_vae(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The image encoder and decoder."""

    def load_text_encoder(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The text encoder."""

    def load_tokenizer(self, folder: Path) -> Any:
        """The tokenizer, without weights."""

    def read_scheduler_config(self, folder: Path) -> dict[str, Any]:
        """The noise schedule; BaseModelError when this family cannot train or sample it."""

    def encode_prompts(
        self, tokenizer: Any, text_encoder: nn.Module, prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        """Conditioning of each prompt, encoded one at a time and stacked."""

    def predict(
        self, denoiser: nn.Module, latents_BCHW: Tensor, timesteps_B: Tensor, cond: Conditioning
    ) -> Tensor:
        """One call of the denoiser."""


FAMILIES: tuple[Family, ...] = (StableDiffusion(),)


def find_family(pipeline_class: str) -> Family:
    """The family of a model_index.json's `_class_name`; BaseModelError when there is none."""
    for family in FAMILIES:
        if pipeline_class in family.pipeline_classes:
            return family
    raise BaseModelError(
        "the base is of a kind that this version does not train",
        pipeline_class or "no _class_name in model_index.json",
        "this version trains Stable Diffusion 1.x and 2.x (StableDiffusionPipeline)",
    )
