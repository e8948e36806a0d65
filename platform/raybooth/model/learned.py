"""A learned identifier: new token embeddings (Gal et al. 2022, An Image is Worth One Word).

Shapes: N learned tokens, D token width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from raybooth.errors import BaseModelError
from raybooth.model.base import Base
from raybooth.model.lora import TokenSite
from raybooth.model.tensor_file import TensorFile, read_tensors

NOISE = 0.1
"""Standard deviation of a fresh token's noise, in that of the embedding it starts from."""

_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""Keys of a file for a base with two text encoders, as diffusers' scripts and others write it."""


@dataclass(frozen=True, eq=False)
class LearnedTokens:
    """The embeddings [N, D] of one identifier, by text encoder."""

    name: str
    """What prompts say; the tokens are `name`, `name_1`, ... as in diffusers."""
    vectors: Mapping[str, Tensor]

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(next(iter(self.vectors.values())))


def token_sites(base: Base, num_tokens: int) -> tuple[TokenSite, ...]:
    """Where `num_tokens` learned tokens go in each text encoder of `base`; none for 0."""
    if num_tokens == 0:
        return ()
    pairs = zip(base.text_encoders.items(), base.tokenizers.values(), strict=True)
    return tuple(
        TokenSite(part, num_tokens, _table(encoder).shape[1], len(tokenizer))
        for (part, encoder), tokenizer in pairs
    )


def init_tokens(
    base: Base, words: str, num_tokens: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Fresh embeddings: those of the tokens of `words`, in turn, with a little seeded noise."""
    vectors: dict[str, Tensor] = {}
    pairs = zip(base.text_encoders.items(), base.tokenizers.values(), strict=True)
    for (part, encoder), tokenizer in pairs:
        ids = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
        if not ids:
            raise BaseModelError("no token to start a learned identifier from", repr(words))
        chosen = torch.tensor([ids[place % len(ids)] for place in range(num_tokens)])
        table = _table(encoder)
        start_ND = table[chosen.to(table.device)].detach().cpu()
        noise_ND = torch.randn(start_ND.shape, generator=generator, dtype=torch.float32)
        scale_N1 = NOISE * start_ND.float().std(1, keepdim=True)
        vectors[part] = start_ND + (noise_ND * scale_N1).to(start_ND.dtype)
    return vectors


def with_tokens(tokenizers: Mapping[str, Any], name: str, num_tokens: int) -> dict[str, Any]:
    """Copies of the tokenizers that know `name`, `name_1`, ... after all that they knew.

    Raises BaseModelError when the base has a token of that name.
    """
    extended = {key: copy.deepcopy(tokenizer) for key, tokenizer in tokenizers.items()}
    for tokenizer in extended.values():
        for token in token_names(name, num_tokens):
            if token in tokenizer.get_vocab():
                raise BaseModelError("the base has a token of that name", token)
            tokenizer.add_tokens(token)
    return extended


def token_names(name: str, num_tokens: int) -> list[str]:
    """`name`, `name_1`, ..., `name_<N - 1>`."""
    return [name, *(f"{name}_{place}" for place in range(1, num_tokens))]


def spell_out(prompt: str, name: str, num_tokens: int) -> str:
    """`prompt` with all tokens of the identifier where it says `name`, as diffusers does."""
    return prompt.replace(name, " ".join(token_names(name, num_tokens)))


def save_learned(path: Path, learned: LearnedTokens) -> None:
    """`path`, a safetensors file for diffusers' `load_textual_inversion`.

    One text encoder: `{name: [N, D]}`. Two: `{"clip_l": ..., "clip_g": ...}`, each to be loaded
    into its own encoder with `token_names` (the name is in the metadata).
    """
    vectors = {p: v.detach().to("cpu", torch.float32) for p, v in learned.vectors.items()}
    if len(vectors) == 1:
        state = {learned.name: next(iter(vectors.values())).contiguous()}
    else:
        state = {_KEYS[part]: tokens_ND.contiguous() for part, tokens_ND in vectors.items()}
    save_file(state, path, metadata={"format": "pt", "token": learned.name})


def load_learned(path: Path, name: str | None = None) -> LearnedTokens:
    """The tokens of a file that `save_learned`, or one of diffusers' scripts, wrote.

    `name` says what prompts call them where the file does not. Raises BaseModelError when it is
    damaged, of another kind, or without a name.
    """
    return learned_of(read_tensors(path), str(path), name)


def learned_of(file: TensorFile, source: str, name: str | None = None) -> LearnedTokens:
    """As `load_learned`, of a file in memory; `source` is what errors call it."""
    state, name = file.tensors, file.said.get("token", name)
    parts = {key: part for part, key in _KEYS.items()}
    if state and state.keys() <= parts.keys():
        vectors = {parts[key]: tensor for key, tensor in state.items()}
    elif len(state) == 1:
        key, tensor = next(iter(state.items()))
        name, vectors = key, {"text_encoder": tensor}
    else:
        raise BaseModelError(f"{source} holds no learned tokens", ", ".join(sorted(state)[:5]))
    if name is None:
        raise BaseModelError(f"{source} does not name its tokens", "no `token` in its metadata")
    return LearnedTokens(name, {p: v.float().reshape(-1, v.shape[-1]) for p, v in vectors.items()})


def _table(text_encoder: Any) -> Tensor:
    return cast(Tensor, text_encoder.get_input_embeddings().weight)
