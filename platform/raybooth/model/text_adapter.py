"""c = T(prompt) as a subject (or several) means it: LoRA of the text encoders, learned tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from raybooth.errors import BaseModelError
from raybooth.model.bank import Bank
from raybooth.model.base import Base, encode_prompts
from raybooth.model.learned import (
    LearnedTokens,
    load_learned,
    token_names,
    token_sites,
    with_tokens,
)
from raybooth.model.lora import AdapterTensors, find_text_sites, text_part


class TextAdapter:
    """What one adapter changes between words and conditioning; the base itself stays as it is."""

    def __init__(self, base: Base, tensors: AdapterTensors, *learned: LearnedTokens) -> None:
        """Of `tensors`, the text encoders' pairs. Raises BaseModelError when they do not fit."""
        self.pairs = text_part(tensors)
        self.learned = learned
        self._base = base
        num_tokens = sum(words.num_tokens for words in learned)
        self._token_sites = token_sites(base, num_tokens)
        sites = {site.part: site.width for site in self._token_sites}
        for words in learned:
            shapes = {part: tuple(vectors.shape) for part, vectors in words.vectors.items()}
            if shapes != {part: (words.num_tokens, width) for part, width in sites.items()}:
                do = "load it over the base that it was trained with"
                raise BaseModelError("the learned tokens do not fit this base", str(shapes), do)
            tokenizers = with_tokens(self._base.tokenizers, words.name, words.num_tokens)
            self._base = replace(self._base, tokenizers=tokenizers)
        self._vectors = {
            part: torch.cat([words.vectors[part] for words in learned]) for part in sites
        }

    @property
    def base(self) -> Base:
        """The base whose tokenizers know the learned tokens."""
        return self._base

    def spell_out(self, prompt: str) -> str:
        """`prompt` with every learned token in it."""
        tokens = {words.name: token_names(words.name, words.num_tokens) for words in self.learned}
        if not tokens:
            return prompt
        longest_first = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        return re.sub(longest_first, lambda found: " ".join(tokens[found[0]]), prompt)

    def encode(self, prompt: str, scale: float = 1.0) -> Mapping[str, Tensor]:
        """Conditioning [1, ...] of one prompt, the LoRA times `scale`; one thread at a time."""
        prompt = self.spell_out(prompt)
        sites = find_text_sites(self._base.text_encoders, ("*",)) if self.pairs else ()
        bank = Bank(
            None,
            sites=[site for site in sites if site.key in self.pairs],
            rank=max((pair.rank for pair in self.pairs.values()), default=1),
            num_slots=1,
            device=self._base.device,
            text_encoders=self._base.text_encoders,
            token_sites=self._token_sites,
        )
        try:
            bank.write(1, self.pairs, learned=self._vectors)
            with bank.text_routed(torch.tensor([1]), torch.tensor([scale])):
                return encode_prompts(self._base, [prompt])
        finally:
            bank.detach()


def load_text_adapter(
    base: Base, tensors: AdapterTensors, learned_file: Path | None
) -> TextAdapter | None:
    """The text adapter of published files; None where prompts mean what the base means."""
    learned = load_learned(learned_file) if learned_file is not None else None
    if learned is None and not text_part(tensors):
        return None
    return TextAdapter(base, tensors, *([] if learned is None else [learned]))
