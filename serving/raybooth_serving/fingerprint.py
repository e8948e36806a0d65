"""What decides how an engine rounds, read from the process that it runs in."""

from __future__ import annotations

from importlib.metadata import version

import torch

from raybooth import __version__
from raybooth.config import EngineConfig, Precision
from raybooth.model.base import Base
from raybooth.model.generation import GENERATOR_VERSION
from raybooth_serving.receipt import EngineFingerprint

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


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
