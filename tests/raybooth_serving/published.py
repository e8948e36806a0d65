"""Adapters of random weights, strong enough to be seen, published for a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raybooth.model.base import Base, load_base
from raybooth.model.full_weights import save_full
from raybooth.model.lora import AdapterTensors, LoraPair, find_sites, init_pair, save_adapter
from raybooth.store import WEIGHTS, AdapterRecord, BaseRecord, FullRecord, Store

COMMON: dict[str, Any] = {
    "job_id": "job",
    "class_noun": "dog",
    "identifier": "sks",
    "instance_prompt": "a photo of sks dog",
    "class_prompt": "a photo of a dog",
    "num_parameters": 1,
    "train": {},
    "photos": (),
    "prior": None,
    "loss_curve": (),
    "num_train_steps": 1,
    "seconds": {},
    "versions": {},
}
"""What every record says."""


def random_adapter(base: Base, seed: int, rank: int = 2) -> AdapterTensors:
    """An adapter on every site of the `all` preset, A and B both random."""
    generator = torch.Generator().manual_seed(seed)
    tensors: AdapterTensors = {}
    for site in find_sites(base.denoiser, "all"):
        down = init_pair(site, rank, generator).down
        up = torch.randn(site.up_shape(rank), generator=generator) * 0.2
        tensors[site.name] = LoraPair(down, up)
    return tensors


def publish(
    store: Store,
    base: Base,
    subject_id: str,
    seed: int,
    *,
    rank: int = 2,
    fingerprint: str | None = None,
    tensors: AdapterTensors | None = None,
) -> AdapterRecord:
    """A new version of `subject_id` in `store`."""
    store.root.mkdir(parents=True, exist_ok=True)
    path = store.root / f".{subject_id}-{seed}.safetensors"
    save_adapter(path, random_adapter(base, seed, rank) if tensors is None else tensors, 1.0)
    record = AdapterRecord(
        subject_id=subject_id,
        job_id=f"{subject_id}-test",
        class_noun="robot",
        identifier="sks",
        instance_prompt="a photo of sks robot",
        class_prompt="a photo of a robot",
        base=BaseRecord(name="tiny", fingerprint=fingerprint or base.fingerprint),
        rank=rank,
        targets="all",
        num_parameters=1,
        train={},
        photos=(),
        prior=None,
        loss_curve=(),
        num_train_steps=1,
        seconds={},
        versions={},
    )
    published = store.publish(record, {WEIGHTS: path})
    path.unlink()
    return published


def publish_full(store: Store, folder: Path, subject_id: str, seed: int) -> FullRecord:
    """The base of `folder` with moved weights in its denoiser and its text encoder."""
    base = load_base(str(folder))
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for part, module in (("unet", base.denoiser), ("text_encoder", base.text_encoder)):
        state = {name: value.clone() for name, value in module.state_dict().items()}
        for value in state.values():
            if value.is_floating_point():
                value += (
                    torch.randn(value.shape, generator=generator) * value.std().nan_to_num() / 4
                )
        tuned[part] = state
    files = store.root.parent / f"weights-{subject_id}"
    files.mkdir(parents=True)
    known = BaseRecord(name=str(folder), fingerprint=base.fingerprint)
    record = FullRecord(**{**COMMON, "subject_id": subject_id}, base=known, parts=tuple(tuned))
    return store.publish(record, save_full(files, tuned))


def weights_of(store: Store, record: AdapterRecord) -> Path:
    """The published weights file."""
    return store.folder(record.reference) / WEIGHTS
