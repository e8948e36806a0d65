"""What this machine has: the capacity that an embedded Ray offers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from raybooth.fleet.planner import Capacity, NodeCapacity

GPU_MEMORY_GB: Mapping[str, int] = {
    "T4": 16,
    "V100": 16,
    "A10G": 24,
    "L4": 24,
    "L40S": 48,
    "A100": 40,
    "A100-40G": 40,
    "A100-80G": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}
"""Least memory of a GPU that Ray calls so."""


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


def gpu_memory_bytes(resources: Mapping[str, float]) -> int | None:
    """Memory of a node's GPUs by the accelerator type in its Ray resources; None if not known."""
    for name, size in GPU_MEMORY_GB.items():
        if f"accelerator_type:{name}" in resources:
            return size * 10**9
    return None


def _num_gpus() -> int:
    """NVIDIA devices, or those that CUDA_VISIBLE_DEVICES leaves."""
    present = len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    names = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return min(present, len(names))


def prepare_environment() -> None:
    """Settings that Ray reads when it is imported: quiet, quick, no open doors.

    A local Ray gets a token of its own that no file holds; what the caller has set stays.
    """
    local = not os.environ.get("RAY_ADDRESS")
    for name, value in {**SETTINGS, **(LOCAL_SETTINGS if local else {})}.items():
        os.environ.setdefault(name, value)
    if local and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_killing_policy_by_group": "true",  # out of memory: the worker, not its helpers
    "TOKENIZERS_PARALLELISM": "false",
}
LOCAL_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # this machine is not taken away
    "RAY_TRAIN_METRICS_ENABLED": "0",  # nobody scrapes it
    "RAY_worker_niceness": "0",  # Ray's 15 would give way to anything else that runs
    "RAY_worker_maximum_startup_concurrency": "8",  # no warning about a pack's own processes
}
WORKER_SETTINGS = tuple(name for name in SETTINGS if not name.startswith("RAY_worker"))
"""Settings that the processes of a fleet read."""
