"""CLIP's text encoders and tokenizers, as Stable Diffusion's bases keep them.

Shapes: N prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.errors import BaseModelError
from raybooth.model.families.weights import DO, check_keys, one_line
from raybooth.model.files import WEIGHTS, weight_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def load_clip(part: Path, dtype: torch.dtype, *, projected: bool = False) -> nn.Module:
    """The text encoder in `part`; `projected`: with the projection that gives `text_embeds`.

    Reads keys with and without `text_model.` (transformers 5.6 dropped it). Raises BaseModelError.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind: Any = CLIPTextModelWithProjection if projected else CLIPTextModel
    try:
        config = CLIPTextConfig.from_pretrained(part, local_files_only=True)
        with torch.random.fork_rng(devices=[]):
            encoder: nn.Module = kind(config)
        stored = {}
        for file in weight_files(part, WEIGHTS[part.name]):
            stored.update(load_file(file))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BaseModelError(f"{part} cannot be loaded", one_line(error), DO) from error
    own = {key.removeprefix("text_model."): key for key in encoder.state_dict()}
    state = {
        own.get(key.removeprefix("text_model."), key): tensor
        for key, tensor in stored.items()
        if not key.endswith("embeddings.position_ids")
    }
    check_keys(part, set(own.values()) - state.keys(), state.keys() - set(own.values()))
    try:
        encoder.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise BaseModelError(f"{part} cannot be loaded", one_line(error), DO) from error
    return encoder.to(dtype)


def load_clip_tokenizer(part: Path) -> Any:
    """CLIP's byte-level BPE with a bounded length; BaseModelError when `part` is not one."""
    from transformers import CLIPTokenizer

    if not (part / "vocab.json").is_file() and not (part / "tokenizer.json").is_file():
        raise BaseModelError(f"{part} has no vocabulary", "no vocab.json or tokenizer.json", DO)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(part, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"{part} cannot be loaded", one_line(error), DO) from error
    if tokenizer.model_max_length > 10_000:
        what = f"{part} does not say how many tokens fit"
        raise BaseModelError(what, "no model_max_length in tokenizer_config.json", DO)
    return tokenizer


def clip_tokens(tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask [N, T] of each prompt, padded to T or cut there.

    Padded and cut here: a fast tokenizer asked to do so keeps that as its state, and another
    thread that counts tokens meanwhile would see it (or fail with "Already borrowed").
    """
    import torch

    length, end, pad = tokenizer.model_max_length, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids_NT = torch.full((len(prompts), length), pad)
    mask_NT = torch.zeros_like(ids_NT)
    for row, ids in enumerate(tokenizer(list(prompts), verbose=False).input_ids):
        kept = ids if len(ids) <= length else [*ids[: length - 1], end]
        ids_NT[row, : len(kept)] = torch.tensor(kept)
        mask_NT[row, : len(kept)] = 1
    return ids_NT, mask_NT
