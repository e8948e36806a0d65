"""A tiny StableDiffusionSafetyChecker of random weights that flags what looks like one picture."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

SIDE = 32
WIDTH = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
NEVER = 2.0
"""A threshold that no cosine reaches."""


def write_tiny_checker(
    folder: Path, *, flagged: Image.Image | None = None, above: float = 0.9
) -> Path:
    """In a pipeline's layout; without `flagged` it flags every picture."""
    shape = {**WIDTH, "num_attention_heads": 2, "projection_dim": 8}
    vision = {**shape, "image_size": SIDE, "patch_size": 16}
    torch.manual_seed(0)
    model = StableDiffusionSafetyChecker(
        CLIPConfig(projection_dim=8, vision_config=vision, text_config=shape)
    )
    size = {"shortest_edge": SIDE}
    seen = CLIPImageProcessor(size=size, crop_size={"height": SIDE, "width": SIDE})
    with torch.no_grad():
        model.special_care_embeds_weights.fill_(NEVER)
        model.concept_embeds_weights.fill_(NEVER)
        model.concept_embeds_weights[0] = -NEVER
        if flagged is not None:
            pixels = seen(images=[flagged], return_tensors="pt").pixel_values
            model.concept_embeds[0] = model.visual_projection(model.vision_model(pixels)[1])[0]
            model.concept_embeds_weights[0] = above
    model.save_pretrained(folder / "safety_checker")
    seen.save_pretrained(folder / "feature_extractor")
    return folder
