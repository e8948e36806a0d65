"""A whole base in Stable Diffusion's layout, of random weights: small enough for every test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = (
    *("a", "photo", "of", "the", "on", "in", "dog", "cat", "robot", "vase"),
    *("red", "blue", "beach", "snow", "jungle", "sks", "ohwx"),
)
"""Words that are one token; any other is spelled by its letters."""

RESOLUTION = 32
"""Pixels of a side: 8 latents of 4 pixels."""


def write_tiny_base(
    folder: Path, *, prediction_type: str = "epsilon", zero_snr: bool = False, seed: int = 0
) -> Path:
    """`folder`, holding a pipeline that diffusers loads: random weights, a function of `seed`."""
    folder = Path(folder)
    tokenizer = write_tiny_tokenizer(folder / "tokenizer_source")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=_unet(),
            scheduler=_scheduler(prediction_type, zero_snr),
            safety_checker=None,
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in (folder / "tokenizer_source").iterdir():
        file.unlink()
    (folder / "tokenizer_source").rmdir()
    return folder


def write_tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with 77 positions that knows WORDS as single tokens."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0] if len(word) > 1 else word + "</w>"
        for place, letter in enumerate(word[1:], 2):
            right = letter + ("</w>" if place == len(word) else "")
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: place for place, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def _unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    for name, weight in unet.named_parameters():
        if name.endswith("to_out.0.weight"):
            weight.data.mul_(6.0)  # a random text encoder moves a random UNet too little to see
    return unet


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=RESOLUTION,
    )


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=32,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _scheduler(prediction_type: str, zero_snr: bool) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
    )
