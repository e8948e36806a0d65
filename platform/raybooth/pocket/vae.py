"""The pocket autoencoder: 64x64 pictures to 16x16 latents, trained on 32 px crops.

B batch, C channels, H = W picture, h = w latent (H / 4).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from raybooth.pocket.loop import Loop, LoopConfig, numbers
from raybooth.pocket.team import Team


@dataclass(frozen=True)
class VaeConfig:
    """The autoencoder's shape and training."""

    channels: tuple[int, ...] = (32, 64, 96)
    latent_channels: int = 8
    """With 4 the world's fine lines did not fit: 25.7 dB. With 8: see report.json."""
    layers: int = 1
    groups: int = 8
    crop: int = 32
    batch: int = 16
    clutter_share: float = 0.1
    kl_weight: float = 1e-4
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            8_000, 2_500, learning_rate=1.2e-3, warmup_steps=200, ema=0.995
        )
    )


def new_vae(config: VaeConfig, seed: int) -> Any:
    """A fresh AutoencoderKL whose log-variance starts at -6: at first a plain autoencoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        depth = len(config.channels)
        vae: Any = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            block_out_channels=config.channels,
            layers_per_block=config.layers,
            latent_channels=config.latent_channels,
            norm_num_groups=config.groups,
            sample_size=64,
        )
    k = config.latent_channels
    with torch.no_grad():
        vae.quant_conv.bias[k:] = -6.0
        vae.quant_conv.weight[:k] *= 1.5
        vae.quant_conv.weight[k:] *= 0.1
    return vae


def train_vae(
    vae: Any,
    config: VaeConfig,
    corpus: Path,
    state: Path,
    seed: int,
    progress: Callable[[Loop], None],
    team: Team,
) -> Loop:
    """Trains the autoencoder in place, up to its averaged weights; goes on from `state` if any."""
    loop = Loop(config.loop, [vae], state, team)
    loop.restore()
    pictures_NHWC = np.load(corpus / "pictures_NHWC.npy", mmap_mode="r")
    clutter_NHWC = np.load(corpus / "clutter_NHWC.npy", mmap_mode="r")
    vae.train()
    while loop.step < config.loop.steps:
        crops_BCHW = _crops(config, pictures_NHWC, clutter_NHWC, seed, loop.step).to(vae.device)
        parts = crops_BCHW.chunk(team.shares)
        rngs = [numbers(seed, f"z{i}", loop.step) for i in range(team.shares)]
        loop.update(
            [
                partial(_share_loss, vae, part, config, rng)
                for part, rng in zip(parts, rngs, strict=True)
            ],
            config.batch,
        )
        progress(loop)
    loop.swap()
    vae.eval()
    return loop


def _share_loss(vae: Any, true_BCHW: Tensor, config: VaeConfig, rng: torch.Generator) -> Tensor:
    with torch.autocast(true_BCHW.device.type, dtype=torch.bfloat16, cache_enabled=False):
        posterior = vae.encode(true_BCHW).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng).to(true_BCHW.device)
        out_BCHW = vae.decode(posterior.mean + posterior.std * noise).sample
    return vae_loss(
        out_BCHW.float(),
        true_BCHW,
        posterior.mean.float(),
        posterior.logvar.float(),
        config.kl_weight,
    )


def vae_loss(
    out_BCHW: Tensor, true_BCHW: Tensor, mean: Tensor, logvar: Tensor, kl_weight: float
) -> Tensor:
    """|y - x| + 0.5 |grad y - grad x| + (y - x)^2 + kl_weight KL(q(z|x) || N(0, 1))."""
    error = out_BCHW - true_BCHW
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (
        error[..., 1:, :] - error[..., :-1, :]
    ).abs().mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 0.5 * edges + 2.0 * (error**2).mean() + kl_weight * kl


@torch.no_grad()
def psnr(vae: Any, pictures_NHWC: Any) -> float:
    """Mean of -10 log10(mse) for pixels in [0, 1], after encoding (mean) and decoding."""
    values = []
    for i in range(0, len(pictures_NHWC), 32):
        true_BCHW = as_tensor(pictures_NHWC[i : i + 32]).to(vae.device)
        out_BCHW = vae.decode(vae.encode(true_BCHW).latent_dist.mean).sample.clamp(-1, 1)
        values += [
            -10 * math.log10(mse)
            for mse in (((out_BCHW - true_BCHW) / 2) ** 2).mean((1, 2, 3)).tolist()
        ]
    return sum(values) / len(values)


def as_tensor(pictures_NHWC: Any) -> Tensor:
    """Bytes [N, H, W, C] to floats in [-1, 1], [N, C, H, W]."""
    return (
        (torch.from_numpy(np.ascontiguousarray(pictures_NHWC)).float() / 127.5 - 1)
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def _crops(
    config: VaeConfig, pictures_NHWC: Any, clutter_NHWC: Any, seed: int, step: int
) -> Tensor:
    rng = numbers(seed, "vae", step)
    side = pictures_NHWC.shape[1]
    n_clutter = round(config.batch * config.clutter_share)
    corners = torch.randint(0, side - config.crop + 1, (config.batch, 2), generator=rng).tolist()
    flips = torch.rand(config.batch, generator=rng).tolist()
    crops = []
    for i, (y, x) in enumerate(corners):
        source = clutter_NHWC if i < n_clutter else pictures_NHWC
        j = int(torch.randint(0, len(source), (1,), generator=rng))
        crop = source[j, y : y + config.crop, x : x + config.crop]
        crops.append(crop[:, ::-1] if flips[i] < 0.5 else crop)
    return as_tensor(np.stack(crops))
