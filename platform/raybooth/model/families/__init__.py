"""What differs between kinds of base: files, words to conditioning, one call of the denoiser.

A new kind is one file here and one line in FAMILIES. Neither torch nor diffusers is imported before
a part is loaded: which family a folder is of, its files and its tokens cost milliseconds.

Shapes: B rows, N prompts, T tokens, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raybooth.errors import BaseModelError
from raybooth.model.families.stable_diffusion import StableDiffusion
from raybooth.model.families.stable_diffusion_xl import StableDiffusionXL
from raybooth.model.files import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Conditioning = Mapping[str, "Tensor"]
"""What steers the denoiser besides latents and timesteps; each tensor is batch-first."""


class Family(Protocol):
    """One kind of base. Stateless: every part comes in by argument."""

    name: str
    title: str
    """As people call it, with the pipeline class that writes its folder."""

    pipeline_class: str
    """`_class_name` of its model_index.json."""

    weight_folders: tuple[str, ...]
    """Subfolders of a base that hold weights."""

    tokenizer_folders: tuple[str, ...]
    """In the order of the text encoders."""

    def load_denoiser(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The denoiser of the base in `folder`, every weight from its file."""

    def load_vae(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The image encoder and decoder."""

    def load_text_encoders(self, folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
        """The text encoders, by folder."""

    def load_tokenizers(self, folder: Path) -> dict[str, Any]:
        """The tokenizers, by folder, without weights, in the order of the text encoders."""

    def read_scheduler_config(self, folder: Path) -> dict[str, Any]:
        """The noise schedule; BaseModelError when this family cannot train or sample it."""

    def negative_is_zeros(self, folder: Path) -> bool:
        """Whether the conditioning of no negative prompt is zeros, not that of an empty prompt."""

    def tokenize(self, tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids [N, T] by text encoder, on the CPU; `<text encoder>.mask` where one is used."""

    def condition(
        self, text_encoders: Mapping[str, nn.Module], ids: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Conditioning [N, ...] of tokenized prompts, differentiable in the text encoders."""

    def size_conditioning(
        self,
        original_hw: tuple[int, int],
        crop_top_left: tuple[int, int],
        target_hw: tuple[int, int],
    ) -> dict[str, Tensor]:
        """What a picture's size adds to its conditioning, leading dimension 1; often nothing.

        Pixels: the picture as it was, where the crop begins (top, left), and the crop's own size.
        """

    def predict(
        self, denoiser: nn.Module, latents_BCHW: Tensor, timesteps_B: Tensor, cond: Conditioning
    ) -> Tensor:
        """One call of the denoiser."""


FAMILIES: tuple[Family, ...] = (StableDiffusion(), StableDiffusionXL())


def find_family(pipeline_class: str) -> Family:
    """The family of a model_index.json's `_class_name`; BaseModelError when there is none."""
    for family in FAMILIES:
        if pipeline_class == family.pipeline_class:
            return family
    raise BaseModelError(
        "the base is of a kind that this version does not train",
        pipeline_class or "no _class_name in model_index.json",
        f"this version trains {' and '.join(family.title for family in FAMILIES)}",
    )


def family_of(folder: Path) -> Family:
    """The family of the base in `folder`, by its model_index.json."""
    if not (folder / "model_index.json").is_file():
        classes = " or ".join(family.pipeline_class for family in FAMILIES)
        raise BaseModelError(
            f"{folder} is not a base in diffusers' layout",
            "no model_index.json",
            f"give the folder that `save_pretrained` of a {classes} wrote",
        )
    return find_family(str(read_json(folder / "model_index.json").get("_class_name", "")))
