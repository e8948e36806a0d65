"""c_b = T(prompt_b): what each row's words mean, cached once, or encoded by its slot's adapter.

Shapes: B rows of a call, M different (slot, prompt) pairs of them, N prompts of a slot, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raybooth.config.adapter import learned_identifier
from raybooth.data.batch import SlotBatch
from raybooth.errors import ConfigError
from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.learned import spell_out, with_tokens
from raybooth.training.job import SlotJob


class Wording:
    """Conditioning of the rows of a pack; differentiable where text encoders or tokens train.

    Prior rows say the class prompt through their slot's own text adapter, as in diffusers'
    scripts with `--train_text_encoder`.
    """

    def __init__(self, base: Base, bank: Bank, jobs: Sequence[SlotJob]) -> None:
        """`jobs` of slots 1, 2, ..., in order; all train text, or none does."""
        self._base, self._bank = base, bank
        self._ids: dict[int, Mapping[str, Tensor]] = {}
        if jobs[0].train.adapter.trains_text:
            self._ids = {slot: _tokens(base, job) for slot, job in enumerate(jobs, 1)}

    def cached(self, batches: Sequence[SlotBatch]) -> dict[str, Tensor]:
        """Conditioning [B, ...] of all rows by the base's own text encoders, on the device."""
        return {  # fp32: a size of 1021 pixels is not a bf16 number
            name: torch.cat([b.conditioning[name] for b in batches]).to(self._base.device)
            for name in batches[0].conditioning
        }

    def trained(self, slots: Sequence[int], batches: Sequence[SlotBatch]) -> dict[str, Tensor]:
        """What takes the place of the cached, [B, ...], by the slots' own text encoders and tokens.

        Nothing where no slot trains text. `batches[i]` is one of slot `slots[i]`.
        """
        if not self._ids:
            return {}
        pairs = zip(slots, batches, strict=True)
        row_B = [(slot, place) for slot, batch in pairs for place in batch.prompt_B]
        said_M = list(dict.fromkeys(row_B))
        ids = {
            name: torch.stack([self._ids[slot][name][place] for slot, place in said_M])
            for name in self._ids[slots[0]]
        }
        with self._bank.text_routed(torch.tensor([slot for slot, _ in said_M])):
            encoded = self._base.family.condition(self._base.text_encoders, ids)
        numbers = {pair: number for number, pair in enumerate(said_M)}
        index_B = torch.tensor([numbers[pair] for pair in row_B], device=self._base.device)
        return {name: rows_M[index_B].to(self._base.dtype) for name, rows_M in encoded.items()}


def _tokens(base: Base, job: SlotJob) -> dict[str, Tensor]:
    """Ids [N + 1, T] of the instance prompts, then of the class prompt (NO_PROMPT is the last)."""
    prompts = (*job.tensors.prompts, job.class_prompt)
    if not job.tensors.prompts:
        raise ConfigError(f"{job.job_id} trains text without words", "no prompts", "encode it anew")
    tokenizers, number = base.tokenizers, job.train.adapter.identifier_tokens
    if number:
        name = learned_identifier(job.subject_id)
        tokenizers = with_tokens(tokenizers, name, number)
        prompts = tuple(spell_out(prompt, name, number) for prompt in prompts)
    return base.family.tokenize(tokenizers, prompts)
