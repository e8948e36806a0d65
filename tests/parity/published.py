"""DreamBooth as published (Ruiz et al. 2023, section 3; the equations of diffusers' scripts).

    x0 = sample(VAE posterior) * scaling;  x_t = add_noise(x0, eps, t);  c = text encoder(ids)
    pred = U(x_t, t, c);  y = eps | velocity;  (pred_i, pred_c) = halves of pred, as of y
    loss = mse(pred_i, y_i) + lambda * mse(pred_c, y_c)

Instance rows come first, as many class rows after them. Nothing of RayBooth's is used here.
Shapes: B rows, C H W latents, T tokens, D text width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one train step, for all its rows."""

    vae_BCHW: Tensor
    eps_BCHW: Tensor
    t_B: Tensor


class Published:
    """One subject's training of a LoRA on the attention of a U-Net."""

    def __init__(self, folder: Path, *, rank: int, lr: float, dtype: torch.dtype) -> None:
        self.dtype = dtype
        index = json.loads((folder / "model_index.json").read_text())
        self.is_sdxl = "XL" in index["_class_name"]
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(dtype)
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        suffixes = ("", "_2") if self.is_sdxl else ("",)
        kinds: list[Any] = [CLIPTextModel, CLIPTextModelWithProjection]
        self.tokenizers = [
            CLIPTokenizer.from_pretrained(folder, subfolder=f"tokenizer{s}") for s in suffixes
        ]
        self.text_encoders = [
            kind.from_pretrained(folder, subfolder=f"text_encoder{s}")
            for kind, s in zip(kinds, suffixes, strict=False)
        ]
        self.unet.requires_grad_(False)
        config = LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=ATTENTION
        )
        self.unet.add_adapter(config)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.to(dtype)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-2)

    def pair(self, site: str) -> tuple[Tensor, Tensor]:
        """A and B of one layer."""
        layer: Any = self.unet.get_submodule(site)
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    @torch.no_grad()
    def encode_text(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        """c [1, T, D]; for SDXL penultimate states of both encoders, and the pooled text."""
        states, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(
                prompt,
                truncation=True,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids
            if not self.is_sdxl:
                return encoder(ids, attention_mask=None)[0], None
            out = encoder(ids, output_hidden_states=True, return_dict=False)
            states.append(out[-1][-2])
            pooled = out[0]
        return torch.cat(states, dim=-1), pooled

    @torch.no_grad()
    def encode_pixels(self, pixels_BCHW: Tensor, vae_BCHW: Tensor) -> Tensor:
        """x0: one sample of each picture's posterior."""
        x0 = []
        for pixels_CHW, noise_CHW in zip(pixels_BCHW, vae_BCHW, strict=True):
            posterior = self.vae.encode(pixels_CHW[None]).latent_dist
            x0.append(posterior.mean + posterior.std * noise_CHW)
        return torch.cat(x0) * self.vae.config.scaling_factor

    def loss(
        self, pixels_BCHW: Tensor, draws: Draws, prompts: list[str], prior_loss_weight: float | None
    ) -> Tensor:
        """`prompts` of the instance and, with a weight, of the class."""
        x0 = self.encode_pixels(pixels_BCHW, draws.vae_BCHW).to(self.dtype)
        eps = draws.eps_BCHW.to(self.dtype)
        noisy = self.scheduler.add_noise(x0, eps, draws.t_B)
        rows_each = len(x0) // len(prompts)
        encoded = [self.encode_text(prompt) for prompt in prompts]
        c = torch.cat([states.repeat(rows_each, 1, 1) for states, _ in encoded])
        added = None
        if self.is_sdxl:
            side = float(pixels_BCHW.shape[-1])
            pooled = torch.cat([p.repeat(rows_each, 1) for _, p in encoded if p is not None])
            time_ids = torch.tensor([[side, side, 0.0, 0.0, side, side]]).repeat(len(x0), 1)
            added = {"text_embeds": pooled.to(self.dtype), "time_ids": time_ids}
        pred = self.unet(noisy, draws.t_B, c.to(self.dtype), added_cond_kwargs=added).sample
        target = eps
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(x0, eps, draws.t_B)
        if prior_loss_weight is None:
            return F.mse_loss(pred, target)
        (pred_i, pred_c), (target_i, target_c) = pred.chunk(2), target.chunk(2)
        return F.mse_loss(pred_i, target_i) + prior_loss_weight * F.mse_loss(pred_c, target_c)

    def step(self, loss: Tensor, max_grad_norm: float) -> None:
        """Backward, one clip over all parameters, AdamW."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        self.optimizer.step()
