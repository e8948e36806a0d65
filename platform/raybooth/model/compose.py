"""Several subjects in one picture: y = W x + sum_i s_i B_i A_i x, exactly, as ONE adapter.

    A = [A_1; A_2; ...]   B = [s_1 B_1, s_2 B_2, ...]   so that   B A = sum_i s_i B_i A_i

Ranks add up where subjects share a site; a site of one subject alone keeps its rank. It is what
diffusers' `set_adapters([...], [s_1, s_2, ...])` computes one after the other, and the `cat` of
PEFT's `add_weighted_adapter`; the text encoders' pairs are summed in the same way. Learned words
stand side by side. A plain identifier (`sks`) is the same word to all subjects: a prompt that
says it calls every one of them, so subjects for one picture had better learn words of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raybooth.errors import RequestError
from raybooth.model.learned import LearnedTokens, token_names
from raybooth.model.lora import AdapterTensors, LoraPair


@dataclass(frozen=True, eq=False)
class Share:
    """One subject's share of a picture."""

    name: str
    """How messages call it."""

    tensors: AdapterTensors
    """Of the denoiser and the text encoders."""

    learned: tuple[LearnedTokens, ...] = ()
    scale: float = 1.0
    zero_terminal_snr: bool = False
    """Whether the subject was trained on that noise schedule."""


def compose(shares: Sequence[Share]) -> AdapterTensors:
    """One adapter that moves every site as all `shares` together do, their scales folded into B.

    Raises RequestError for subjects of different noise schedules.
    """
    for share in shares:
        if share.zero_terminal_snr != shares[0].zero_terminal_snr:
            what = f"{shares[0].name} and {share.name} do not go together"
            found = "noise schedules with and without zero_terminal_snr"
            raise RequestError(what, found, "ask for them one by one")
    sites = dict.fromkeys(site for share in shares for site in share.tensors)
    return {
        site: _joined([(s.tensors[site], s.scale) for s in shares if site in s.tensors])
        for site in sites
    }


def compose_words(shares: Sequence[Share]) -> tuple[LearnedTokens, ...]:
    """The learned words of all `shares`; raises RequestError where two mean one word."""
    owners: dict[str, str] = {}
    words: list[LearnedTokens] = []
    for share in shares:
        for learned in share.learned:
            for token in token_names(learned.name, learned.num_tokens):
                if token in owners:
                    what = f"{owners[token]} and {share.name} have learned the same word"
                    do = "leave one of them out, or train one as another subject"
                    raise RequestError(what, token, do)
                owners[token] = share.name
            words.append(learned)
    return tuple(words)


def composed_rank(tensors: AdapterTensors) -> int:
    """The highest rank of any site; 0 without sites."""
    return max((pair.rank for pair in tensors.values()), default=0)


def _joined(pairs: Sequence[tuple[LoraPair, float]]) -> LoraPair:
    down = torch.cat([pair.down for pair, _ in pairs])
    return LoraPair(down, torch.cat([pair.up * scale for pair, scale in pairs], dim=1))
