"""Any base: a pretrained text-to-image model in diffusers' layout, frozen, with a fingerprint.

Shapes: B rows or images, C channels, H W size, N prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from raybooth.errors import BaseModelError
from raybooth.model import tokens
from raybooth.model.families import Conditioning, Family, family_of
from raybooth.model.files import WEIGHTS, weight_files
from raybooth.model.fingerprint import fingerprint_base
from raybooth.model.source import resolve_base
from raybooth.model.tokens import load_tokenizer

__all__ = [
    "Base",
    "Conditioning",
    "Family",
    "cut_tokens",
    "decode_latents",
    "encode_images",
    "encode_prompts",
    "fingerprint_base",
    "load_base",
    "load_tokenizer",
    "predict",
    "resolve_base",
    "token_split",
]


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen pretrained model: every part in eval mode, no part with gradients."""

    name: str
    folder: Path
    fingerprint: str
    family: Family
    denoiser: nn.Module
    vae: nn.Module
    text_encoders: dict[str, nn.Module]
    """By folder: `text_encoder`, and `text_encoder_2` where the base has two."""

    tokenizers: dict[str, Any]
    """By folder, in the order of the text encoders: `tokenizer`, `tokenizer_2`."""

    scheduler_config: dict[str, Any]
    negative_is_zeros: bool
    """Whether no negative prompt means zeros for conditioning, not that of the empty prompt."""

    device: torch.device
    dtype: torch.dtype

    @property
    def text_encoder(self) -> nn.Module:
        """The first text encoder."""
        return next(iter(self.text_encoders.values()))

    @property
    def tokenizer(self) -> Any:
        """The first tokenizer."""
        return next(iter(self.tokenizers.values()))

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: `epsilon` or `v_prediction`."""
        return str(self.scheduler_config["prediction_type"])

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(_config(self.vae).latent_channels)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a latent's side."""
        return 1 << (len(_config(self.vae).block_out_channels) - 1)

    @property
    def least_side(self) -> int:
        """Pixels of one latent pixel at the bottom of the denoiser."""
        return self.vae_scale_factor << (len(_config(self.denoiser).block_out_channels) - 1)

    @property
    def native_resolution(self) -> int:
        """Pixels of a side that the denoiser was trained at."""
        size = _config(self.denoiser).sample_size
        return int(size if isinstance(size, int) else size[0]) * self.vae_scale_factor

    @property
    def scaling_factor(self) -> float:
        """Latents of the denoiser = latents of the VAE times this."""
        return float(_config(self.vae).scaling_factor)

    @property
    def num_train_timesteps(self) -> int:
        """Places in the noise schedule."""
        return int(self.scheduler_config.get("num_train_timesteps", 1000))


def load_base(
    source: str,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Base:
    """The base that `source` means, frozen, on `device`, its denoiser in `dtype`.

    VAE and text encoder are fp32 on a CPU; on a GPU they have `dtype`, the VAE fp32 under fp16.
    Raises BaseModelError when parts are missing, pickled, damaged, or of an unknown kind.
    """
    folder = resolve_base(source, revision)
    device = torch.device(device)
    family = family_of(folder)
    for part in family.weight_folders:
        weight_files(folder / part, WEIGHTS[part])
    scheduler_config = family.read_scheduler_config(folder)
    tokenizers = family.load_tokenizers(folder)
    fingerprint = fingerprint_base(folder)
    side_dtype = torch.float32 if device.type == "cpu" else dtype
    vae_dtype = torch.float32 if side_dtype == torch.float16 else side_dtype
    text_encoders = family.load_text_encoders(folder, side_dtype)
    for tokenizer, text_encoder in zip(tokenizers.values(), text_encoders.values(), strict=True):
        positions = _config(text_encoder).max_position_embeddings
        if tokenizer.model_max_length > positions:
            found = f"{tokenizer.model_max_length} tokens, {positions} positions"
            raise BaseModelError("the base's tokenizer does not fit its text encoder", found)
    return Base(
        name=source,
        folder=folder,
        fingerprint=fingerprint,
        family=family,
        denoiser=_frozen(family.load_denoiser(folder, dtype), device),
        vae=_frozen(family.load_vae(folder, vae_dtype), device),
        text_encoders={key: _frozen(part, device) for key, part in text_encoders.items()},
        tokenizers=tokenizers,
        scheduler_config=scheduler_config,
        negative_is_zeros=family.negative_is_zeros(folder),
        device=device,
        dtype=dtype,
    )


def token_split(base_or_tokenizer: Any, text: str) -> list[str]:
    """The tokens that `text` becomes, as people read them: `["z", "e", "b", "r", "a"]`."""
    return tokens.token_split(_tokenizer(base_or_tokenizer), text)


def cut_tokens(base_or_tokenizer: Any, prompt: str) -> list[str]:
    """The tokens at the end of `prompt` that do not fit and would be cut; empty when all fit."""
    return tokens.cut_tokens(_tokenizer(base_or_tokenizer), prompt)


@torch.no_grad()
def encode_prompts(base: Base, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Conditioning [N, ...] of each prompt, encoded at batch 1 so that neighbours cannot matter."""
    family, encoded = base.family, []
    for prompt in prompts:
        ids = family.tokenize(base.tokenizers, [prompt])
        encoded.append(family.condition(base.text_encoders, ids))
    return {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}


@torch.no_grad()
def encode_images(base: Base, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior for pixels in [-1, 1], not yet scaled.

    One image at a time, fp32 out, so that neighbours cannot matter.
    """
    parameter = next(base.vae.parameters())
    means, stds = [], []
    for pixels_CHW in pixels_BCHW.to(parameter.device, parameter.dtype):
        posterior = cast(Any, base.vae).encode(pixels_CHW[None]).latent_dist
        means.append(posterior.mean.float())
        stds.append(posterior.std.float())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def decode_latents(base: Base, latents_BCHW: Tensor) -> Tensor:
    """uint8 pixels [B, H, W, 3] of the denoiser's latents, one image at a time, on the CPU."""
    parameter = next(base.vae.parameters())
    images = []
    for latents_CHW in latents_BCHW.to(parameter.device, parameter.dtype):
        latents_1CHW = latents_CHW[None] / base.scaling_factor
        pixels = cast(Any, base.vae).decode(latents_1CHW, return_dict=False)[0][0]
        unit = (pixels * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu()
        images.append((unit * 255).round().to(torch.uint8))
    return torch.stack(images)


def predict(
    base: Base, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning
) -> Tensor:
    """One call of the denoiser: noise or velocity [B, C, H, W]; timesteps may be fractions."""
    return base.family.predict(base.denoiser, latents_BCHW, timesteps_B, conditioning)


def _tokenizer(base_or_tokenizer: Any) -> Any:
    return base_or_tokenizer.tokenizer if isinstance(base_or_tokenizer, Base) else base_or_tokenizer


def _frozen(module: nn.Module, device: torch.device) -> nn.Module:
    return module.to(device).eval().requires_grad_(False)


def _config(module: nn.Module) -> Any:
    return module.config
