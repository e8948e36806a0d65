"""Numbers that train in CLIP text encoders, and the bytes that these keep for backward.

Tensor by tensor, as in activations.py: a layer keeps the inputs of its two LayerNorms, q, k, v,
what attention returns, what goes into its activation, and the inputs of its trained layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from raybooth.config.adapter import matches_target
from raybooth.fleet.activations import TEXT_TOKENS, Dims


@dataclass(frozen=True, slots=True)
class TextShape:
    """One text encoder of a base."""

    weights: Mapping[str, Dims]
    is_quick: bool = True
    """Its activation is x sigmoid(1.7 x), which keeps one tensor more than a GELU."""

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(dims) for dims in self.weights.values())

    @property
    def width(self) -> int:
        """Of a token's embedding."""
        return next(d[1] for name, d in self.weights.items() if "token_embedding" in name)

    def adapter_parameters(self, targets: Sequence[str], rank: int) -> int:
        """Parameters of a LoRA on the linear layers that these patterns name."""
        return sum(rank * sum(dims) for _, dims in self._sites(targets))

    def activation_bytes(
        self, targets: Sequence[str] | None, rank: int, rows: int, item: int
    ) -> int:
        """Bytes kept by a forward of `rows` prompts; with `targets` None every layer trains."""
        names = self.weights if targets is None else {name for name, _ in self._sites(targets)}
        numbers = 2 * self.width  # the last LayerNorm's input, and what leaves it
        for name, dims in self.weights.items():
            layer = _LAYER.search(name)
            if layer is None or len(dims) < 2:
                continue
            width = dims[1]
            if layer[1] == "self_attn.q_proj":
                inputs = ("q_proj", "k_proj", "v_proj")
                keeps = any(name.replace("q_proj", other) in names for other in inputs)
                numbers += (6 + keeps) * width
            elif layer[1] == "mlp.fc1":
                numbers += (name in names) * width + (1 + self.is_quick) * dims[0]
            elif layer[1] == "mlp.fc2":
                numbers += (name in names) * width
            if targets is not None:
                numbers += (name in names) * rank
        return numbers * rows * TEXT_TOKENS * item

    def checkpointed_bytes(self, rows: int, item: int) -> int:
        """As `activation_bytes` where every layer trains and keeps its input alone."""
        layers = sum(name.endswith("self_attn.q_proj.weight") for name in self.weights)
        whole = self.activation_bytes(None, 0, rows, item)
        return layers * self.width * rows * TEXT_TOKENS * item + whole // max(1, layers)

    def _sites(self, targets: Sequence[str]) -> Iterator[tuple[str, Dims]]:
        """Linear layers by pattern; patterns speak of the classic `text_model....`."""
        is_classic = any(name.startswith(_CLASSIC) for name in self.weights)
        for name, dims in self.weights.items():
            if len(dims) == 2 and "embedding" not in name:
                site = ("" if is_classic else _CLASSIC) + name.removesuffix(".weight")
                if any(matches_target(site, pattern) for pattern in targets):
                    yield name, dims


_CLASSIC = "text_model."
_LAYER = re.compile(r"layers\.\d+\.(.+)\.weight")
