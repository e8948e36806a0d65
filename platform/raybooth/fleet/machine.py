"""What this machine has: the capacity that an embedded Ray offers."""

from __future__ import annotations

import os
from pathlib import Path

from raybooth.fleet.planner import Capacity, NodeCapacity


def this_machine() -> Capacity:
    """CPUs and memory that this process may use, GPUs that it may see; asks no GPU anything."""
    node = NodeCapacity(
        num_cpus=float(len(os.sched_getaffinity(0))),
        num_gpus=float(_num_gpus()),
        memory_bytes=memory_bytes(),
    )
    return Capacity((node,))


def memory_bytes() -> int:
    """Memory of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def _num_gpus() -> int:
    """NVIDIA devices, or those that CUDA_VISIBLE_DEVICES leaves."""
    present = len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    names = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return min(present, len(names))
