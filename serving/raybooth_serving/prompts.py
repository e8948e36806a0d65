"""Prompt embeddings, encoded at batch 1 and kept: `embedding = f(base, prompt)`, no more."""

from __future__ import annotations

from collections import OrderedDict

from raybooth.model.base import Base, encode_prompts
from raybooth.model.families import Conditioning
from raybooth_serving.metrics import EngineMetrics


class PromptCache:
    """Embeddings by prompt, least recently used out; one thread at a time may encode."""

    def __init__(self, base: Base, max_prompts: int, metrics: EngineMetrics) -> None:
        self.base = base
        self.max_prompts = max_prompts
        self.metrics = metrics
        self._embeddings: OrderedDict[str, Conditioning] = OrderedDict()

    def encode(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt, leading dimension 1."""
        found = self._embeddings.get(prompt)
        if found is not None:
            self._embeddings.move_to_end(prompt)
            self.metrics.prompt_hits += 1
            return found
        self.metrics.prompt_encodes += 1
        embedding = encode_prompts(self.base, [prompt])
        self._embeddings[prompt] = embedding
        while len(self._embeddings) > self.max_prompts:
            self._embeddings.popitem(last=False)
        return embedding
