"""What decides how an engine rounds, read from the process that it runs in."""

from __future__ import annotations

import hashlib
from importlib.metadata import version

import torch

from raybooth import __version__
from raybooth.config import EngineConfig, Precision
from raybooth.model.base import Base
from raybooth.model.generation import GENERATOR_VERSION
from raybooth.store import FullRecord
from raybooth_serving.pictures.receipt import EngineFingerprint

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def fingerprint_full(base_fingerprint: str, record: FullRecord) -> str:
    """Of a base whose parts a full fine-tune has replaced."""
    digests = "".join(f"\0{name} {file.sha256}" for name, file in sorted(record.files.items()))
    return hashlib.sha256(f"{base_fingerprint}{digests}".encode()).hexdigest()


def fingerprint_engine(base: Base, config: EngineConfig) -> EngineFingerprint:
    """What decides the rounding of an engine of `config` over `base`, in this process."""
    parameter = next(base.denoiser.parameters())
    if parameter.device.type == "cuda":
        device = torch.cuda.get_device_name(parameter.device)
    else:
        device = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return EngineFingerprint(
        raybooth=__version__,
        torch=torch.__version__,
        diffusers=version("diffusers"),
        transformers=version("transformers"),
        device=device,
        dtype=next(name for name, dtype in DTYPES.items() if dtype == parameter.dtype),
        threads=torch.get_num_threads(),
        rank=config.max_rank,
        targets=config.targets,
        generator=GENERATOR_VERSION,
    )
