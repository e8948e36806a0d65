"""Kohya's names: diffusers reads each back as the layer that it came from, SD 1.5 and SDXL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from raybooth.model.kohya import KohyaNames, to_kohya_keys
from raybooth.model.lora import LoraPair, find_sites

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""stabilityai/stable-diffusion-xl-base-1.0."""


def unet(folder: Path, config: dict[str, Any], index: dict[str, Any]) -> UNet2DConditionModel:
    """A U-Net without weights; its config and the pipeline's index lie in `folder`."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(dict(model.config)))
    (folder / "model_index.json").write_text(json.dumps(index))
    return model


def pairs(keys: list[str]) -> dict[str, LoraPair]:
    return {key: LoraPair(torch.zeros(1, 1), torch.zeros(1, 1)) for key in keys}


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_diffusers_finds_every_layer(kind: str, targets: Any, tmp_path: Path) -> None:
    is_xl = kind == "sdxl"
    index: dict[str, Any] = {"text_encoder": []} | ({"text_encoder_2": []} if is_xl else {})
    config = SDXL if is_xl else {"attention_head_dim": 8, "cross_attention_dim": 768}
    model = unet(tmp_path, config, index)
    keys = [site.name for site in find_sites(model, targets)]
    texts = ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    texts += ["text_encoder_2.text_model.encoder.layers.1.mlp.fc1"] if is_xl else []
    names = KohyaNames.of_base(tmp_path)
    state = to_kohya_keys(pairs([*keys, *texts]), names)
    pipeline: Any = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    found, alphas = pipeline.lora_state_dict(dict(state), unet_config=model.config)
    layers = {_plain(key) for key in found}
    assert layers == {*(f"unet.{key}" for key in keys), *map(_plain, texts)}
    assert len(alphas) == len(keys) + len(texts)
    assert names.by_name(keys).keys() >= {names.written(key) for key in keys}


def test_sdxl_has_the_names_of_its_first_code(tmp_path: Path) -> None:
    unet(tmp_path, SDXL, {"text_encoder_2": []})
    names = KohyaNames.of_base(tmp_path)
    expected = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        ),
        "mid_block.attentions.0.proj_in": "lora_unet_middle_block_1_proj_in",
        "mid_block.resnets.1.conv1": "lora_unet_middle_block_2_in_layers_2",
        "up_blocks.0.attentions.2.proj_out": "lora_unet_output_blocks_2_1_proj_out",
        "up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
        "down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
        "up_blocks.2.resnets.0.conv_shortcut": "lora_unet_output_blocks_6_0_skip_connection",
        "conv_in": "lora_unet_input_blocks_0_0",
        "text_encoder.text_model.encoder.layers.0.mlp.fc2": (
            "lora_te1_text_model_encoder_layers_0_mlp_fc2"
        ),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": (
            "lora_te2_text_model_encoder_layers_0_mlp_fc2"
        ),
    }
    assert {key: names.written(key) for key in expected} == expected
    both = names.by_name(["conv_in"])
    assert both == {"lora_unet_input_blocks_0_0": "conv_in", "lora_unet_conv_in": "conv_in"}


def _plain(key: str) -> str:
    """A key of diffusers' converted state as a layer."""
    for ending in (".lora_linear_layer", ".lora", "_lora", ".lora_A", ".lora_B"):
        key = key.partition(f"{ending}.")[0]
    for early in ("to_q", "to_k", "to_v"):
        key = key.replace(f"self_attn.{early}", f"self_attn.{early[-1]}_proj")
    return (
        key.replace(".processor", "")
        .replace("to_out", "to_out.0")
        .replace("to_out.0.0", "to_out.0")
    )
