"""Where a slot's own parameters lie in a bank row that may be wider than the slot's rank.

Shapes: P parameters of a padded bank row, N parameters of a slot.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from raybooth.model.bank import Bank
from raybooth.training.optim import blocks


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """row_P[index_N] is the slot site by site, down then up, then tokens, whatever the bank's rank.

    So states and 8-bit blocks are the same in every pack.
    """

    index_N: Tensor
    digest: str
    """Of the site names and shapes, in order."""
    text_start: int
    """Where the denoiser's parameters end and those of the words begin."""

    @property
    def size(self) -> int:
        """N, the denoiser's and the words' parameters each padded to whole 8-bit blocks."""
        return blocks(self.text_start) + blocks(self.index_N.shape[0] - self.text_start)

    @classmethod
    def of(cls, bank: Bank, rank: int) -> SlotLayout:
        """The layout of a slot of `rank` in `bank`."""
        device = bank.flat_SP.device
        places_P = torch.arange(bank.slot_size, dtype=torch.float64, device=device)
        tensors = bank.unflatten(places_P, rank)
        learned = bank.unflatten_tokens(places_P)
        parts = [part for pair in tensors.values() for part in pair] + [*learned.values()]
        shapes = [(name, [tuple(part.shape) for part in pair]) for name, pair in tensors.items()]
        shapes += [(name, [tuple(vectors.shape)]) for name, vectors in learned.items()]
        digest = hashlib.sha256(repr(shapes).encode()).hexdigest()
        index_N = torch.cat([part.flatten() for part in parts]).long()
        return cls(index_N, digest, int((index_N < bank.text_start).sum()))
