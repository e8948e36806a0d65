"""The pocket denoiser and its text encoder, trained together on latents made once.

B batch, N pictures, C latent channels, h = w latent size, T = 77 tokens, D text width.
v-prediction with zero terminal SNR, so sampling starts from pure noise (Lin et al., "Common
Diffusion Noise Schedules and Sample Steps are Flawed", 2023).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from raybooth.pocket.loop import Loop, LoopConfig, numbers
from raybooth.pocket.team import Team
from raybooth.pocket.tokenizer import LENGTH
from raybooth.pocket.vae import as_tensor


@dataclass(frozen=True)
class DenoiserConfig:
    """Shapes of the denoiser and of the text encoder, and their training."""

    channels: tuple[int, ...] = (64, 128)
    layers: int = 1
    heads: int = 4
    groups: int = 16
    text_width: int = 128
    text_layers: int = 3
    batch: int = 32
    caption_dropout: float = 0.1
    centre_weight: float = 1.5
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=12_000, decay_steps=3_000))


def new_scheduler() -> DDIMScheduler:
    """The base's noise schedule, as its scheduler_config.json says it."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def new_denoiser(config: DenoiserConfig, latent_channels: int, latent_size: int, seed: int) -> Any:
    """A fresh UNet with cross-attention at its inner level only."""
    outer = len(config.channels) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            layers_per_block=config.layers,
            block_out_channels=config.channels,
            down_block_types=("DownBlock2D",) * outer + ("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * outer,
            cross_attention_dim=config.text_width,
            attention_head_dim=config.heads,
            norm_num_groups=config.groups,
        )


def new_text_encoder(config: DenoiserConfig, tokens: int, seed: int) -> Any:
    """A fresh CLIP text encoder over this many tokens; the last two are start and end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=tokens,
                hidden_size=config.text_width,
                intermediate_size=4 * config.text_width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                projection_dim=config.text_width,
                bos_token_id=tokens - 2,
                eos_token_id=tokens - 1,
                pad_token_id=tokens - 1,
            )
        )


@torch.no_grad()
def encode_corpus(
    vae: Any, corpus: Path, path: Path, progress: Callable[[int, int], None], batch: int = 128
) -> None:
    """Writes every picture's latents: posterior mean, float16, unscaled; whole or not at all."""
    pictures_NHWC = np.load(corpus / "pictures_NHWC.npy", mmap_mode="r")
    parts = []
    device = vae.device.type
    for i in range(0, len(pictures_NHWC), batch):
        with torch.autocast(device, dtype=torch.bfloat16):
            posterior = vae.encode(
                as_tensor(pictures_NHWC[i : i + batch]).to(vae.device)
            ).latent_dist
        parts.append(posterior.mean.half().cpu())
        progress(min(i + batch, len(pictures_NHWC)), len(pictures_NHWC))
    latents_NChw = torch.cat(parts)
    beside = path.with_suffix(".partial")
    with beside.open("wb") as file:
        np.save(file, latents_NChw.numpy())
    beside.replace(path)


def train_denoiser(
    denoiser: Any,
    text_encoder: Any,
    config: DenoiserConfig,
    latents_NChw: Tensor,
    tokens_NT: Tensor,
    empty_T: Tensor,
    state: Path,
    seed: int,
    progress: Callable[[Loop], None],
    team: Team,
) -> Loop:
    """Trains both in place towards E |v_theta(z_t, t, c) - v|^2, up to their averaged weights.

    latents_NChw are scaled to unit variance; goes on from `state` if it exists.
    """
    device = denoiser.device
    loop = Loop(config.loop, (denoiser, text_encoder), state, team)
    loop.restore()
    alphas = new_scheduler().alphas_cumprod.to(device)
    weight_hw = centre_weights(latents_NChw.shape[-1], config.centre_weight).to(device)
    denoiser.set_attn_processor(AttnProcessor() if device.type == "cpu" else AttnProcessor2_0())
    denoiser.train()
    text_encoder.train()

    def share_loss(noisy: Tensor, target: Tensor, timesteps_B: Tensor, tokens_BT: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
            text_BTD = text_encoder(tokens_BT).last_hidden_state
            v = denoiser(noisy, timesteps_B, text_BTD).sample
        loss: Tensor = (weight_hw * (v.float() - target) ** 2).mean()
        return loss

    while loop.step < config.loop.steps:
        rng = numbers(seed, "unet", loop.step)
        rows_B = epoch_rows(len(latents_NChw), config.batch, seed, loop.step)
        clean = latents_NChw[rows_B].float()
        tokens_BT = tokens_NT[rows_B].clone()
        tokens_BT[torch.rand(config.batch, generator=rng) < config.caption_dropout] = empty_T
        order_B = torch.randperm(config.batch, generator=rng)
        timesteps_B = (
            ((order_B + torch.rand(1, generator=rng)) * 1000 / config.batch).long().clamp(0, 999)
        )
        noise = torch.randn(clean.shape, generator=rng).to(device)
        clean, timesteps_B = clean.to(device), timesteps_B.to(device)
        a_B = alphas[timesteps_B].view(-1, 1, 1, 1)
        noisy, target = (
            a_B.sqrt() * clean + (1 - a_B).sqrt() * noise,
            a_B.sqrt() * noise - (1 - a_B).sqrt() * clean,
        )
        parts = zip(
            *(t.chunk(team.shares) for t in (noisy, target, timesteps_B, tokens_BT.to(device))),
            strict=True,
        )
        loop.update([partial(share_loss, *part) for part in parts], config.batch)
        progress(loop)
    loop.swap()
    denoiser.eval()
    text_encoder.eval()
    return loop


def centre_weights(size: int, extra: float) -> Tensor:
    """w = 1 + 2 extra exp(-r^2 / 0.35), scaled to mean 1: objects live in the centre."""
    axis = torch.linspace(-1, 1, size)
    r2_hw = axis[None, :] ** 2 + (axis[:, None] - 0.1) ** 2
    weight_hw = 1 + extra * 2 * torch.exp(-r2_hw / 0.35)
    weighted: Tensor = weight_hw / weight_hw.mean()
    return weighted


def epoch_rows(n: int, batch: int, seed: int, step: int) -> Tensor:
    """The rows of this train step: each epoch is a permutation, a function of (seed, epoch)."""
    per_epoch = n // batch
    epoch, i = divmod(step, per_epoch)
    return torch.randperm(n, generator=numbers(seed, "epoch", epoch))[i * batch : (i + 1) * batch]
