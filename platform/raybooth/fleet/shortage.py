"""Out of memory: how it is told from other errors, what is said, how much was there."""

from __future__ import annotations

import gc
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raybooth.errors import TrainingError
from raybooth.fleet.memory import read_base_shape
from raybooth.fleet.prediction import worker_tensor_bytes

if TYPE_CHECKING:
    import torch

    from raybooth.config import TrainConfig
    from raybooth.model.base import Base

_ALLOCATORS = (
    *("can't allocate memory", "not enough memory", "out of memory", "bad_alloc"),
    "can't start new thread",
)
"""What a plain RuntimeError says where torch finds no memory, or Python none for a stack."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: Python's, torch's on a CPU, or CUDA's."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _ALLOCATORS)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process could still take on `device`; gives back torch's own cache first."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    free = _field("/proc/meminfo", "MemAvailable")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - _field("/proc/self/status", "VmSize"))
    return max(0, free)


def shortage(base: Base, trains: Sequence[TrainConfig]) -> TrainingError:
    """What to tell the subjects of a pack that ran out of memory, its own tensors being freed."""
    on_gpu = base.device.type != "cpu"
    free = free_bytes(base.device)
    levers = ["lower resolution, batch_size or adapter.rank", "raise the memory of a worker"]
    if len(trains) > 1:
        levers.insert(0, f"set pack.max_subjects below {len(trains)}")
    if not trains[0].gradient_checkpointing:
        levers.insert(0, "set gradient_checkpointing: true")
    return TrainingError(
        f"out of {'GPU ' if on_gpu else ''}memory with {len(trains)} subject(s) in the pack",
        f"{_gib(predicted_bytes(base, trains))} predicted for it, {_gib(free)} free without it",
        ", ".join(levers[:-1]) + f", or {levers[-1]}",
    )


def predicted_bytes(base: Base, trains: Sequence[TrainConfig]) -> int:
    """What a pack of these subjects adds to its base at the peak."""
    on_gpu = base.device.type != "cpu"
    return worker_tensor_bytes(read_base_shape(base.folder), trains, on_gpu=on_gpu)


def _field(path: str, name: str) -> int:
    """Bytes of a line `name: 123 kB`."""
    for line in Path(path).read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{path} has no {name}")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
