"""The published denoisers, without their weights: their attention sites are diffusers' scripts'."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from raybooth.model.lora import adapter_parameters, find_sites, init_pair, to_diffusers_keys

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
WEIGHTS = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}


@pytest.mark.parametrize(
    ("name", "config", "num_tensors", "num_parameters"),
    [
        ("sd15", SD15, 256, 797_184),
        ("sd21", SD21, 256, 829_952),
        ("sdxl", SDXL, 1_120, 5_806_080),
    ],
)
def test_attention_at_rank_four_has_the_tensors_of_diffusers_scripts(
    name: str, config: dict[str, Any], num_tensors: int, num_parameters: int
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert sum(weight.numel() for weight in unet.parameters()) == WEIGHTS[name]
    sites = find_sites(unet, "attention")
    state = to_diffusers_keys({s.name: init_pair(s, 4, torch.Generator()) for s in sites}, 1.0)
    assert len(state) == num_tensors
    assert sum(tensor.numel() for tensor in state.values()) == num_parameters
    assert adapter_parameters(sites, 4) == num_parameters
    assert all(key.startswith("unet.") for key in state)
