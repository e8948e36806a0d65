"""Prompt embeddings, encoded at batch 1 and kept: `c = T(prompt)` of a base and an adapter."""

from __future__ import annotations

from threading import Lock
from typing import NamedTuple

from raybooth.model.base import Base, encode_prompts
from raybooth.model.families import Conditioning
from raybooth_serving.engine.loader import HostAdapter, is_of
from raybooth_serving.engine.shelf import Shelf
from raybooth_serving.metrics import EngineMetrics


class PromptKey(NamedTuple):
    """All that an embedding depends on."""

    base: str
    """Fingerprint."""

    adapter: str
    """References and contents, with their scales; empty where the base's own words hold."""

    scale: float
    prompt: str


class PromptCache:
    """Embeddings in host memory, least recently used out; any thread may ask, one encodes."""

    def __init__(
        self, base: Base, *, max_prompts: int, max_bytes: int, metrics: EngineMetrics
    ) -> None:
        self.base = base
        self.metrics = metrics
        self._shelf: Shelf[PromptKey, Conditioning] = Shelf(max_prompts, max_bytes, _size)
        self._encoding = Lock()

    def encode(
        self, prompt: str, adapter: HostAdapter | None = None, scale: float = 1.0
    ) -> Conditioning:
        """The conditioning of one prompt, leading dimension 1, on the CPU.

        An adapter that changes what words mean has entries of its own, by its scale.
        """
        name = ""
        if adapter is None or adapter.text is None:
            adapter, scale = None, 1.0
        else:
            name = adapter.name
        key = PromptKey(self.base.fingerprint, name, scale, prompt)
        try:
            return self._shelf.get(key, lambda: self._encode(prompt, adapter, scale))
        finally:
            self._count()

    def forget(self, subject_id: str) -> None:
        """Let go of all that a subject's words have come to mean."""
        self._shelf.drop(lambda key: is_of(key.adapter, subject_id))
        self._count()

    def _encode(self, prompt: str, adapter: HostAdapter | None, scale: float) -> Conditioning:
        """Under a lock: a text adapter hangs on the base's own text encoders while it encodes."""
        with self._encoding:
            if adapter is None or adapter.text is None:
                encoded: Conditioning = encode_prompts(self.base, [prompt])
            else:
                encoded = adapter.text.encode(prompt, scale)
            return {name: tensor.cpu() for name, tensor in encoded.items()}

    def _count(self) -> None:
        report = self._shelf.report()
        self.metrics.prompt_hits, self.metrics.prompt_encodes = report.hits, report.makes
        self.metrics.prompt_bytes = report.size_bytes


def _size(conditioning: Conditioning) -> int:
    return sum(tensor.nbytes for tensor in conditioning.values())
