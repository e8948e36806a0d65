"""Stable Diffusion 1.x and 2.x: a U-Net steered by the last hidden state of one CLIP text encoder.

Shapes: B rows, C latent channels, H W latent size, N prompts, T tokens (77), D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from raybooth.errors import BaseModelError
from raybooth.model.fingerprint import WEIGHTS, read_json, weight_files

PREDICTION_TYPES = ("epsilon", "v_prediction")
_DO = "get a whole safetensors copy of the base"


class StableDiffusion:
    """The family of diffusers' StableDiffusionPipeline."""

    name = "stable-diffusion"
    pipeline_classes: tuple[str, ...] = ("StableDiffusionPipeline",)
    weight_folders: tuple[str, ...] = ("unet", "vae", "text_encoder")

    def load_denoiser(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """`unet/`; refuses inpainting and other U-Nets that take more than latents."""
        unet: nn.Module = _load_diffusers(UNet2DConditionModel, folder, "unet", dtype)
        config: Any = unet.config
        if config.in_channels != config.out_channels or config.time_cond_proj_dim is not None:
            found = f"{config.in_channels} channels in, {config.out_channels} out"
            do = "use the plain text-to-image base"
            raise BaseModelError("the base's U-Net takes more than latents and text", found, do)
        return unet

    def load_vae(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """`vae/`."""
        vae: nn.Module = _load_diffusers(AutoencoderKL, folder, "vae", dtype)
        return vae

    def load_text_encoders(self, folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
        """`text_encoder/`, its keys with or without `text_model.` (transformers 5.6 dropped it)."""
        part = folder / "text_encoder"
        try:
            config = CLIPTextConfig.from_pretrained(part, local_files_only=True)
            with torch.random.fork_rng(devices=[]):
                encoder: nn.Module = CLIPTextModel(config)
            state = {}
            for file in weight_files(part, WEIGHTS["text_encoder"]):
                state.update(load_file(file))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise BaseModelError(f"{part} cannot be loaded", _one_line(error), _DO) from error
        own = encoder.state_dict()
        prefix = "text_model." if next(iter(own)).startswith("text_model.") else ""
        state = {
            prefix + key.removeprefix("text_model."): tensor
            for key, tensor in state.items()
            if not key.endswith("embeddings.position_ids")
        }
        _check_keys(part, own.keys() - state.keys(), state.keys() - own.keys())
        try:
            encoder.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise BaseModelError(f"{part} cannot be loaded", _one_line(error), _DO) from error
        return {"text_encoder": encoder.to(dtype)}

    def load_tokenizers(self, folder: Path) -> dict[str, Any]:
        """`tokenizer/`, CLIP's byte-level BPE with a bounded length."""
        part = folder / "tokenizer"
        if not (part / "vocab.json").is_file() and not (part / "tokenizer.json").is_file():
            raise BaseModelError(
                f"{part} has no vocabulary", "no vocab.json or tokenizer.json", _DO
            )
        try:
            tokenizer = CLIPTokenizer.from_pretrained(part, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BaseModelError(f"{part} cannot be loaded", _one_line(error), _DO) from error
        if tokenizer.model_max_length > 10_000:
            what = f"{part} does not say how many tokens fit"
            raise BaseModelError(what, "no model_max_length in tokenizer_config.json", _DO)
        return {"tokenizer": tokenizer}

    def read_scheduler_config(self, folder: Path) -> dict[str, Any]:
        """`scheduler/`, with what StableDiffusionPipeline forces: steps_offset 1, no clipping."""
        file = folder / "scheduler" / "scheduler_config.json"
        config = read_json(file)
        prediction = config.setdefault("prediction_type", "epsilon")
        if prediction not in PREDICTION_TYPES:
            do = f"this version trains {' and '.join(PREDICTION_TYPES)}"
            raise BaseModelError("the base's prediction type is not known", repr(prediction), do)
        if "beta_schedule" not in config and "trained_betas" not in config:
            what = f"{file} is not a schedule of betas"
            raise BaseModelError(what, str(config.get("_class_name")), "use an SD 1.x or 2.x base")
        return {**config, "steps_offset": 1, "clip_sample": False}

    def tokenize(self, tokenizers: Mapping[str, Any], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`text_encoder`: ids [N, T], padded to T or cut there; `text_encoder.mask`: the words."""
        tokenizer = tokenizers["tokenizer"]
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {"text_encoder": tokens.input_ids, "text_encoder.mask": tokens.attention_mask}

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


def _load_diffusers(kind: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    try:
        model, info = kind.from_pretrained(
            folder,
            subfolder=part,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"{folder / part} cannot be loaded", _one_line(error), _DO) from error
    _check_keys(folder / part, set(info["missing_keys"]), set(info["unexpected_keys"]))
    return model


def _check_keys(part: Path, missing: set[str], unexpected: set[str]) -> None:
    for word, keys in (("lacks", missing), ("has unknown", unexpected)):
        if keys:
            found = f"{min(keys)}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}"
            raise BaseModelError(f"{part} {word} tensors", found, _DO)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
