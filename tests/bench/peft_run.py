"""One subject as a plain diffusers + PEFT script trains it: the program a fleet is compared with.

Loads the base, draws its own prior images, trains a LoRA, saves it. No code of RayBooth's is used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor

ALL = [
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--class-noun", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True, help="instance rows of a step")
    parser.add_argument("--prior-images", type=int, required=True)
    parser.add_argument("--prior-steps", type=int, required=True)
    parser.add_argument("--prior-batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(options.base, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor

    def latents_of(pictures: list[Image.Image]) -> Tensor:
        arrays = [np.asarray(picture.convert("RGB").resize((side, side))) for picture in pictures]
        pixels = torch.from_numpy(np.stack(arrays)).float().permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            return pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor

    def embedding_of(prompt: str) -> Tensor:
        ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            return pipe.text_encoder(ids).last_hidden_state

    class_prompt = f"a photo of a {options.class_noun}"
    prior: list[Image.Image] = []
    while len(prior) < options.prior_images:
        count = min(options.prior_batch, options.prior_images - len(prior))
        drawn = pipe([class_prompt] * count, num_inference_steps=options.prior_steps)
        prior.extend(drawn.images)
    photos = [Image.open(path) for path in sorted(options.photos.iterdir())]
    instance_latents, prior_latents = latents_of(photos), latents_of(prior)
    instance = embedding_of(f"a photo of sks {options.class_noun}")
    conditioning = torch.cat(
        [
            instance.expand(options.rows, -1, -1),
            embedding_of(class_prompt).expand(options.rows, -1, -1),
        ]
    )
    unet = pipe.unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=options.rank,
            lora_alpha=options.rank,
            init_lora_weights="gaussian",
            target_modules=ALL,
        )
    )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    unet.train()
    for _ in range(options.steps):
        picks = torch.randint(len(instance_latents), (options.rows,))
        prior_picks = torch.randint(len(prior_latents), (options.rows,))
        latents = torch.cat([instance_latents[picks], prior_latents[prior_picks]])
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        error = (unet(noisy, timesteps, conditioning).sample - target).square().mean((1, 2, 3))
        loss = error[: options.rows].mean() + error[options.rows :].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(options.out, unet_lora_layers=state)


if __name__ == "__main__":
    main()
