"""A published model put on its base: its adapter in a bank, or its weights in their places."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raybooth.config import EngineConfig
from raybooth.errors import BaseModelError
from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.compose import Share, compose, compose_words, composed_rank
from raybooth.model.full_weights import load_full
from raybooth.model.learned import load_learned
from raybooth.model.lora import denoiser_part, find_sites, load_adapter, text_part
from raybooth.model.text_adapter import TextAdapter, load_text_adapter
from raybooth.store import LEARNED, WEIGHTS, AdapterRecord, FullRecord, Record


def take_on(base: Base, record: Record, folder: Path) -> Bank | None:
    """The adapter of `folder` in slot 1, at the rank that a server's bank has by default.

    So its pictures have the server's bytes. A full fine-tune takes the place of the base's own
    weights and needs no bank. Raises BaseModelError when it was trained on another base.
    """
    _check_base(base, record)
    if isinstance(record, FullRecord):
        load_full(base, folder, record.parts)
        return None
    targets: Any = record.targets
    bank = Bank(
        base.denoiser,
        sites=find_sites(base.denoiser, targets),
        rank=max(record.rank, EngineConfig().max_rank),
        num_slots=1,
        device=base.device,
    )
    bank.write(1, denoiser_part(load_adapter(folder / WEIGHTS)))
    return bank


def take_on_several(
    base: Base, parts: Sequence[tuple[AdapterRecord, Path, float]]
) -> tuple[Bank, TextAdapter | None]:
    """Adapters (record, folder, scale) as one in slot 1, scales folded in, and what prompts mean.

    Raises BaseModelError as `take_on`, RequestError for subjects that do not go together.
    """
    shares, sites = [], {}
    for record, folder, scale in parts:
        _check_base(base, record)
        targets: Any = record.targets
        sites.update({site.key: site for site in find_sites(base.denoiser, targets)})
        learned = (load_learned(folder / LEARNED),) if LEARNED in record.files else ()
        tensors = load_adapter(folder / WEIGHTS)
        snr = record.zero_terminal_snr
        shares.append(Share(record.reference, tensors, learned, scale, snr))
    tensors, words = compose(shares), compose_words(shares)
    own, pairs = denoiser_part(tensors), text_part(tensors)
    bank = Bank(
        base.denoiser,
        sites=list(sites.values()),
        rank=max(composed_rank(own), EngineConfig().max_rank),
        num_slots=1,
        device=base.device,
    )
    bank.write(1, own)
    return bank, TextAdapter(base, pairs, *words) if pairs or words else None


def text_of(base: Base, record: Record, folder: Path) -> TextAdapter | None:
    """What prompts mean to the published subject, where not what they mean to the base."""
    if not isinstance(record, AdapterRecord):
        return None
    learned = folder / LEARNED if LEARNED in record.files else None
    return load_text_adapter(base, load_adapter(folder / WEIGHTS), learned)


def _check_base(base: Base, record: Record) -> None:
    if record.base.fingerprint != base.fingerprint:
        raise BaseModelError(
            f"{record.reference} was trained on another base",
            f"{record.base.name} {record.base.fingerprint[:12]}, not {base.fingerprint[:12]}",
            "name its own base with --base",
        )
