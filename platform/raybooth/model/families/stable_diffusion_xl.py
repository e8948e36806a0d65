"""Stable Diffusion XL (Podell et al. 2023): a U-Net steered by two text encoders and by sizes.

Shapes: B rows, C latent channels, H W latent size, N prompts, T tokens (77), D width of both text
encoders together, E width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.errors import BaseModelError
from raybooth.model.families.clip import clip_tokens, load_clip, load_clip_tokenizer
from raybooth.model.families.stable_diffusion import (
    StableDiffusion,
    load_unet,
    read_betas,
    refuse_unet,
)
from raybooth.model.files import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

NUM_TIME_IDS = 6
_ENCODERS = ("text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")


class StableDiffusionXL(StableDiffusion):
    """The family of diffusers' StableDiffusionXLPipeline; VAE as in Stable Diffusion."""

    name = "stable-diffusion-xl"
    title = "Stable Diffusion XL (StableDiffusionXLPipeline)"
    pipeline_class = "StableDiffusionXLPipeline"
    weight_folders: tuple[str, ...] = ("unet", "vae", *_ENCODERS)
    tokenizer_folders: tuple[str, ...] = _TOKENIZERS

    def load_denoiser(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """`unet/`; refuses refiners, inpainting and InstructPix2Pix."""
        unet = load_unet(folder, dtype)
        first, second = (read_json(folder / part / "config.json") for part in _ENCODERS)
        config: Any = unet.config
        if config.addition_embed_type != "text_time":
            found = f"addition_embed_type {config.addition_embed_type}"
            refuse_unet("the base's U-Net takes no sizes", found)
        pooled = int(second.get("projection_dim", 512))
        taken, given = (
            config.projection_class_embeddings_input_dim,
            NUM_TIME_IDS * config.addition_time_embed_dim + pooled,
        )
        if taken != given:
            what = "the base's U-Net takes another count of sizes, as a refiner's does"
            refuse_unet(what, f"{taken} wide instead of {given}")
        taken, given = config.cross_attention_dim, first["hidden_size"] + second["hidden_size"]
        if taken != given:
            what = "the base's U-Net does not fit its two text encoders, as a refiner's does not"
            refuse_unet(what, f"{taken} wide instead of {given}")
        denoiser: nn.Module = unet
        return denoiser

    def load_text_encoders(self, folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
        """`text_encoder/`, and `text_encoder_2/` with its projection."""
        first, second = _ENCODERS
        return {
            first: load_clip(folder / first, dtype),
            second: load_clip(folder / second, dtype, projected=True),
        }

    def load_tokenizers(self, folder: Path) -> dict[str, Any]:
        """`tokenizer/` and `tokenizer_2/`, which pad to one length."""
        tokenizers = {part: load_clip_tokenizer(folder / part) for part in _TOKENIZERS}
        lengths = {part: tokenizer.model_max_length for part, tokenizer in tokenizers.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{part} {length}" for part, length in lengths.items())
            raise BaseModelError("the base's tokenizers differ in length", found)
        return tokenizers

    def read_scheduler_config(self, folder: Path) -> dict[str, Any]:
        """`scheduler/` as it is; StableDiffusionXLPipeline forces nothing."""
        return read_betas(folder)

    def negative_is_zeros(self, folder: Path) -> bool:
        """`force_zeros_for_empty_prompt` of the pipeline; true if model_index.json is silent."""
        index = read_json(folder / "model_index.json")
        return bool(index.get("force_zeros_for_empty_prompt", True))

    def tokenize(self, tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Ids [N, T] of either text encoder, padded to T or cut there."""
        pairs = zip(_ENCODERS, _TOKENIZERS, strict=True)
        return {encoder: clip_tokens(tokenizers[key], prompts)[0] for encoder, key in pairs}

    def condition(
        self, text_encoders: Mapping[str, nn.Module], ids: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """`encoder_hidden_states` [N, T, D]: both penultimate states, in the order of the encoders;
        `text_embeds` [N, E]: the second's pooled and projected text."""
        import torch

        states = []
        for key in _ENCODERS:
            encoder: Any = text_encoders[key]
            ids_NT = ids[key].to(next(encoder.parameters()).device)
            out = encoder(ids_NT, output_hidden_states=True)
            states.append(out.hidden_states[-2])
        return {
            "encoder_hidden_states": torch.cat(states, dim=-1),
            "text_embeds": out.text_embeds,
        }

    def size_conditioning(
        self,
        original_hw: tuple[int, int],
        crop_top_left: tuple[int, int],
        target_hw: tuple[int, int],
    ) -> dict[str, Tensor]:
        """`time_ids` [1, 6]: pixels of the original, top and left of the crop, size of the crop."""
        import torch

        sizes = [*original_hw, *crop_top_left, *target_hw]
        return {"time_ids": torch.tensor([sizes], dtype=torch.float32)}

    def predict(
        self,
        denoiser: nn.Module,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        cond: Mapping[str, Tensor],
    ) -> Tensor:
        """m = U(x, t, c, pooled c, sizes): noise or velocity, in the denoiser's dtype."""
        dtype = next(denoiser.parameters()).dtype
        added = {"text_embeds": cond["text_embeds"].to(dtype), "time_ids": cond["time_ids"]}
        out: tuple[Tensor, ...] = denoiser(
            latents_BCHW.to(dtype),
            timesteps_B,
            encoder_hidden_states=cond["encoder_hidden_states"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return out[0]
