"""Stable Diffusion 1.x and 2.x: a U-Net steered by the last hidden state of one CLIP text encoder.

Shapes: B rows, C latent channels, H W latent size, N prompts, T tokens (77), D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.errors import BaseModelError
from raybooth.model.families.clip import clip_tokens, load_clip, load_clip_tokenizer
from raybooth.model.families.weights import load_diffusers
from raybooth.model.files import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PREDICTION_TYPES = ("epsilon", "v_prediction")
_MORE_THAN_TEXT = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")


class StableDiffusion:
    """The family of diffusers' StableDiffusionPipeline."""

    name = "stable-diffusion"
    title = "Stable Diffusion 1.x and 2.x (StableDiffusionPipeline)"
    pipeline_class = "StableDiffusionPipeline"
    weight_folders: tuple[str, ...] = ("unet", "vae", "text_encoder")
    tokenizer_folders: tuple[str, ...] = ("tokenizer",)

    def load_denoiser(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """`unet/`; refuses inpainting and other U-Nets that take more than latents and text."""
        unet = load_unet(folder, dtype)
        for name in _MORE_THAN_TEXT:
            if (kind := unet.config.get(name)) is not None:
                refuse_unet("the base's U-Net takes more than latents and text", f"{name} {kind}")
        denoiser: nn.Module = unet
        return denoiser

    def load_vae(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """`vae/`."""
        from diffusers import AutoencoderKL

        vae = load_diffusers(AutoencoderKL, folder, "vae", dtype)
        if vae.config.get("latents_mean") is not None:
            what = "the base's VAE shifts its latents, which this version does not know"
            raise BaseModelError(what, "latents_mean in vae/config.json", "use another base")
        encoder: nn.Module = vae
        return encoder

    def load_text_encoders(self, folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
        """`text_encoder/`."""
        return {"text_encoder": load_clip(folder / "text_encoder", dtype)}

    def load_tokenizers(self, folder: Path) -> dict[str, Any]:
        """`tokenizer/`."""
        return {"tokenizer": load_clip_tokenizer(folder / "tokenizer")}

    def read_scheduler_config(self, folder: Path) -> dict[str, Any]:
        """`scheduler/`, with what StableDiffusionPipeline forces: steps_offset 1, no clipping."""
        return {**read_betas(folder), "steps_offset": 1}

    def negative_is_zeros(self, folder: Path) -> bool:
        """Never: no negative prompt is the empty prompt."""
        return False

    def tokenize(self, tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`text_encoder`: ids [N, T], padded to T or cut there; `text_encoder.mask`: the words."""
        ids_NT, mask_NT = clip_tokens(tokenizers["tokenizer"], prompts)
        return {"text_encoder": ids_NT, "text_encoder.mask": mask_NT}

    def condition(
        self, text_encoders: Mapping[str, nn.Module], ids: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """{"encoder_hidden_states": [N, T, D]}: the last hidden state."""
        encoder: Any = text_encoders["text_encoder"]
        device = next(encoder.parameters()).device
        use_mask = getattr(encoder.config, "use_attention_mask", False)
        mask_NT = ids["text_encoder.mask"].to(device) if use_mask else None
        ids_NT = ids["text_encoder"].to(device)
        return {"encoder_hidden_states": encoder(ids_NT, attention_mask=mask_NT)[0]}

    def size_conditioning(
        self,
        original_hw: tuple[int, int],
        crop_top_left: tuple[int, int],
        target_hw: tuple[int, int],
    ) -> dict[str, Tensor]:
        """Nothing: this U-Net is not told how large a picture was."""
        return {}

    def predict(
        self,
        denoiser: nn.Module,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        cond: Mapping[str, Tensor],
    ) -> Tensor:
        """m = U(x, t, c): noise or velocity, in the denoiser's dtype."""
        dtype = next(denoiser.parameters()).dtype
        states_BTD = cond["encoder_hidden_states"].to(dtype)
        out: tuple[Tensor, ...] = denoiser(
            latents_BCHW.to(dtype),
            timesteps_B,
            encoder_hidden_states=states_BTD,
            return_dict=False,
        )
        return out[0]


def load_unet(folder: Path, dtype: torch.dtype) -> Any:
    """`unet/`; refuses those of inpainting, InstructPix2Pix and latent consistency models."""
    from diffusers import UNet2DConditionModel

    unet = load_diffusers(UNet2DConditionModel, folder, "unet", dtype)
    config: Any = unet.config
    if config.in_channels != config.out_channels:
        found = f"{config.in_channels} channels in, {config.out_channels} out"
        refuse_unet("the base's U-Net takes more than latents and text", found)
    if config.time_cond_proj_dim is not None:
        refuse_unet("the base's U-Net is distilled to a guidance scale", "time_cond_proj_dim")
    return unet


def refuse_unet(what: str, found: str) -> None:
    """Raises BaseModelError."""
    raise BaseModelError(what, found, "use the plain text-to-image base")


def read_betas(folder: Path) -> dict[str, Any]:
    """`scheduler/`, a schedule of betas without clipping; BaseModelError for any other."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    prediction = config.setdefault("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        do = f"this version trains {' and '.join(PREDICTION_TYPES)}"
        raise BaseModelError("the base's prediction type is not known", repr(prediction), do)
    if "beta_schedule" not in config and "trained_betas" not in config:
        what = f"{file} is not a schedule of betas"
        raise BaseModelError(what, str(config.get("_class_name")), "use another base")
    return {**config, "clip_sample": False}
