"""Prompt embeddings, encoded at batch 1 and kept: `embedding = f(base, adapter, prompt)`."""

from __future__ import annotations

from collections import OrderedDict

from raybooth.model.base import Base, encode_prompts
from raybooth.model.families import Conditioning
from raybooth_serving.loader import HostAdapter
from raybooth_serving.metrics import EngineMetrics


class PromptCache:
    """Embeddings by prompt, least recently used out; one thread at a time may encode."""

    def __init__(self, base: Base, max_prompts: int, metrics: EngineMetrics) -> None:
        self.base = base
        self.max_prompts = max_prompts
        self.metrics = metrics
        self._embeddings: OrderedDict[tuple[object, ...], Conditioning] = OrderedDict()

    def encode(
        self, prompt: str, adapter: HostAdapter | None = None, scale: float = 1.0
    ) -> Conditioning:
        """The conditioning of one prompt, leading dimension 1.

        An adapter that changes what words mean has entries of its own, by its scale.
        """
        text = adapter.text if adapter is not None else None
        key = (prompt,) if text is None or adapter is None else (prompt, adapter.name, scale)
        found = self._embeddings.get(key)
        if found is not None:
            self._embeddings.move_to_end(key)
            self.metrics.prompt_hits += 1
            return found
        self.metrics.prompt_encodes += 1
        embedding = (
            encode_prompts(self.base, [prompt]) if text is None else text.encode(prompt, scale)
        )
        self._embeddings[key] = embedding
        while len(self._embeddings) > self.max_prompts:
            self._embeddings.popitem(last=False)
        return embedding
