"""Stable Diffusion 1.5 and SDXL with random weights, built on the device: no file is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from raybooth.config import TrainConfig
from raybooth.data.encode import SubjectTensors
from raybooth.data.prior import PriorTensors
from raybooth.fleet.memory import BaseShape
from raybooth.model.base import Base
from raybooth.model.families import FAMILIES
from raybooth.training.job import SlotJob

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
    "timestep_spacing": "leading",
}
SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TINY = {"block_out_channels": (32, 64, 64), "norm_num_groups": 8, "layers_per_block": 1}


@dataclass(frozen=True)
class Model:
    """One shape of base and the pictures to measure it at."""

    name: str
    unet: dict[str, Any]
    pooled: int
    """Width of the pooled text; 0 for a family without."""

    sides: tuple[int, ...]

    @property
    def context(self) -> int:
        return int(self.unet["cross_attention_dim"])


MODELS = (Model("SD1.5", SD15, 0, (512, 1024)), Model("SDXL", SDXL, 1280, (512, 1024)))
_TINY_SD = {**SD15, **TINY, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32}
_TINY_XL = {
    **SDXL,
    **TINY,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "transformer_layers_per_block": (1, 1, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
TINY_MODELS = (Model("SD, tiny", _TINY_SD, 0, (64,)), Model("SDXL, tiny", _TINY_XL, 32, (64,)))


def make_unet(model: Model, device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """Random weights, made where they stay."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return UNet2DConditionModel(**model.unet)
    finally:
        torch.set_default_dtype(default)


def make_base(model: Model, device: str, dtype: torch.dtype, folder: Path, *, tiny: bool) -> Base:
    """A frozen base without text encoders: its conditioning is drawn, too."""
    kind = "StableDiffusionXLPipeline" if model.pooled else "StableDiffusionPipeline"
    (family,) = (family for family in FAMILIES if family.pipeline_class == kind)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    small = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    with torch.device(device):
        vae = AutoencoderKL(**{**VAE, **(small if tiny else {})})
    return Base(
        name=model.name,
        folder=folder,
        fingerprint=model.name,
        family=family,
        denoiser=make_unet(model, device, dtype).eval().requires_grad_(False),
        vae=vae.eval().requires_grad_(False),
        text_encoders={},
        tokenizers={},
        scheduler_config=dict(SCHEDULE),
        negative_is_zeros=False,
        device=torch.device(device),
        dtype=dtype,
    )


def shape_of(base: Base) -> BaseShape:
    """What fleet/memory.py would read from the headers of a folder."""
    channels = tuple(base.denoiser.config.block_out_channels)  # type: ignore[union-attr,arg-type]
    return BaseShape(
        denoiser={name: tuple(p.shape) for name, p in base.denoiser.named_parameters()},
        num_other_parameters=sum(p.numel() for p in base.vae.parameters()),
        block_channels=channels,
        vae_scale_factor=base.vae_scale_factor,
        native_resolution=base.native_resolution,
    )


def conditioning(model: Model, rows: int = 1) -> dict[str, torch.Tensor]:
    """Drawn text, in fp32 on the CPU."""
    drawn = {"encoder_hidden_states": torch.randn(rows, 77, model.context)}
    if model.pooled:
        drawn["text_embeds"] = torch.randn(rows, model.pooled)
    return drawn


def make_job(
    model: Model, base: Base, side: int, index: int, *, precision: str, checkpointing: bool
) -> SlotJob:
    """One instance row and one prior row a train step, rank 4 on the attention."""
    train = TrainConfig.model_validate(
        {
            "resolution": side,
            "num_train_steps": 1_000_000,
            "precision": precision,
            "gradient_checkpointing": checkpointing,
            "prior": {"num_images": 4},
        }
    )
    latent = side // base.vae_scale_factor
    shape = (4, base.latent_channels, latent, latent)
    sizes = base.family.size_conditioning((side, side), (0, 0), (side, side))

    def posterior() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(shape), torch.full(shape, 0.1)

    prior = PriorTensors(*posterior(), {**conditioning(model), **sizes}, ())
    tensors = SubjectTensors(
        *posterior(),
        conditioning(model),
        prior,
        (),
        size_conditioning={name: row.repeat(4, 1) for name, row in sizes.items()},
    )
    return SlotJob(f"job-{index}", f"subject-{index}", index, train, tensors)
