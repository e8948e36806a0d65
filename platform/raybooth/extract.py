"""A full fine-tune as an adapter of a bank; its record says what was lost.

T timesteps, N prompts, C H W latents.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from raybooth import __version__
from raybooth.config import EngineConfig
from raybooth.errors import BaseModelError, InputError
from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.extract import Extraction, extract, fixed_outputs, fixed_timesteps
from raybooth.model.full_weights import load_full, part_file, read_full
from raybooth.model.lora import (
    AdapterTensors,
    denoiser_part,
    find_sites,
    save_adapter,
    text_part,
)
from raybooth.model.text_adapter import load_text_adapter
from raybooth.store import (
    WEIGHTS,
    AdapterRecord,
    ExtractRecord,
    FullRecord,
    ModelRecord,
    OutputLoss,
    Record,
    Store,
)

MOST_RANK = 256
"""Of any serving bank."""


@dataclass(frozen=True, slots=True)
class ExtractRequest:
    """What is to be extracted of which model."""

    source: FullRecord
    rank: int
    energy: float | None = None
    """Share of the sites' energy to keep with as low a rank as will do; None: `rank` itself."""

    targets: Literal["attention", "all"] = "all"
    subject_id: str | None = None
    """Whose version it becomes; None: the same subject's."""

    @property
    def published_as(self) -> str:
        """The subject id."""
        return self.subject_id or self.source.subject_id

    @property
    def files(self) -> dict[str, str]:
        """sha256 of the source's weights."""
        names = [part_file(part) for part in self.source.parts]
        return {name: self.source.files[name].sha256 for name in names}

    @property
    def job_id(self) -> str:
        """Of all that decides the adapter."""
        decided = [self.files, self.rank, self.energy, self.targets]
        digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
        return f"{self.published_as}-extract-{digest[:12]}"


def extract_request(
    source: Record,
    rank: int = EngineConfig().max_rank,
    energy: float | None = None,
    targets: Literal["attention", "all"] = "all",
    subject_id: str | None = None,
) -> ExtractRequest:
    """The request, checked; raises InputError for an adapter or values out of range."""
    if isinstance(source, AdapterRecord):
        found = f"rank {source.rank}"
        if source.extracted is not None:
            found += f", extracted from {source.extracted.source}"
        do = "name a full fine-tune"
        raise InputError(f"{source.reference} is an adapter already", found, do)
    if not 1 <= rank <= MOST_RANK:
        raise InputError("the rank is out of range", str(rank), f"use 1 to {MOST_RANK}")
    if energy is not None and not 0 < energy < 1:
        raise InputError("the energy is out of range", str(energy), "use a share, as 0.95")
    return ExtractRequest(source, rank, energy, targets, subject_id)


def extract_adapter(
    base: Base, request: ExtractRequest, folder: Path
) -> tuple[AdapterRecord, AdapterTensors]:
    """The adapter of the full fine-tune in `folder`, its loss measured, not published yet.

    `base` is the model's own, and holds the full fine-tune's weights afterwards. Raises
    BaseModelError for another base or damaged weights, InputError as `extract`.
    """
    source, start = request.source, time.perf_counter()
    if source.base.fingerprint != base.fingerprint:
        raise BaseModelError(
            f"{source.reference} was trained on another base",
            f"{source.base.name} {source.base.fingerprint[:12]}, not {base.fingerprint[:12]}",
            "name its own base with --base",
        )
    tuned = read_full(base, folder, source.parts)
    found = extract(base, tuned, targets=request.targets, rank=request.rank, energy=request.energy)
    outputs = _output_losses(base, request, found, folder)
    measured = ExtractRecord(
        source=source.reference,
        files=request.files,
        sites={key: float(f"{error:.4g}") for key, error in found.site_errors.items()},
        sites_error=found.sites_error,
        total_error=found.total_error,
        outside_energy=found.outside_share,
        outputs=outputs,
        fidelity=None,
    )
    told = {name: getattr(source, name) for name in ModelRecord.model_fields}
    record = AdapterRecord(
        **{
            **told,
            "subject_id": request.published_as,
            "version": 0,
            "job_id": request.job_id,
            "num_parameters": sum(p.numel() for pair in found.tensors.values() for p in pair),
            "validation": None,
            "seconds": {"extract": round(time.perf_counter() - start, 3)},
            "versions": {**source.versions, "raybooth": __version__},
            "files": {},
        },
        rank=found.rank,
        targets=request.targets,
        text_targets=request.targets if text_part(found.tensors) else None,
        extracted=measured,
    )
    return record, found.tensors


def publish_extract(store: Store, record: AdapterRecord, tensors: AdapterTensors) -> AdapterRecord:
    """The extracted adapter as a new version of its subject."""
    with tempfile.TemporaryDirectory(prefix="raybooth-") as name:
        weights = Path(name) / WEIGHTS
        save_adapter(weights, tensors, 1.0)
        return store.publish(record, {WEIGHTS: weights})


def _output_losses(
    base: Base, request: ExtractRequest, found: Extraction, folder: Path
) -> tuple[OutputLoss, ...]:
    """Base, adapter and full fine-tune on the same noise, in this order: the last one stays."""
    source = request.source
    prompts = [source.instance_prompt, source.class_prompt]
    plain_TNCHW = fixed_outputs(base, prompts)
    bank = Bank(
        base.denoiser,
        sites=find_sites(base.denoiser, request.targets),
        rank=found.rank,
        num_slots=1,
        device=base.device,
    )
    try:
        bank.write(1, denoiser_part(found.tensors))
        text = load_text_adapter(base, found.tensors, None)
        extract_TNCHW = fixed_outputs(base, prompts, bank, text)
    finally:
        bank.detach()
    load_full(base, folder, source.parts)
    full_TNCHW = fixed_outputs(base, prompts)
    return tuple(
        OutputLoss(timestep=timestep, of_output=_apart(e, f, f), of_move=_apart(e, f, f - b))
        for timestep, e, f, b in zip(
            fixed_timesteps(base), extract_TNCHW, full_TNCHW, plain_TNCHW, strict=True
        )
    )


def _apart(one: Tensor, other: Tensor, unit: Tensor) -> float:
    """|| one - other || / || unit ||; 0 where nothing moved at all."""
    apart = float(torch.linalg.vector_norm((one - other).double()))
    return apart / float(torch.linalg.vector_norm(unit.double())) if apart else 0.0
