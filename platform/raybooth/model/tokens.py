"""What a base's tokenizer makes of words (no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raybooth.model.families import family_of


def load_tokenizer(folder: Path) -> Any:
    """The first tokenizer of the base in `folder`, without loading weights."""
    return next(iter(family_of(folder).load_tokenizers(folder).values()))


def token_split(tokenizer: Any, text: str) -> list[str]:
    """The tokens that `text` becomes, as people read them: `["z", "e", "b", "r", "a"]`."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)
    words = [tokenizer.convert_tokens_to_string([piece]) for piece in pieces]
    return [word.strip().removesuffix("</w>") for word in words]


def cut_tokens(tokenizer: Any, prompt: str) -> list[str]:
    """The tokens at the end of `prompt` that do not fit and would be cut; empty when all fit."""
    room = int(tokenizer.model_max_length) - 2  # start and end of text
    return token_split(tokenizer, prompt)[room:]
