"""Untrained encoders in transformers' own folders, small enough for every test."""

from __future__ import annotations

from pathlib import Path

from raybooth.pocket.evaluators import EvaluatorsConfig, new_clip, new_embedder, save_evaluator
from raybooth.pocket.tokenizer import write_tokenizer

TINY = EvaluatorsConfig(width=32, layers=2)


def write_tiny_encoders(folder: Path) -> tuple[Path, Path]:
    """(a Dinov2Model, a CLIPModel), untrained, with their processors."""
    from transformers import CLIPTokenizer

    image, clip = folder / "image", folder / "clip"
    save_evaluator(new_embedder(TINY), image)
    write_tokenizer(clip)
    save_evaluator(new_clip(TINY, CLIPTokenizer.from_pretrained(clip)), clip)
    return image, clip
