"""Priors made by Ray tasks: one coordinator that holds the lease, workers that sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from raybooth.data.prior import PriorReport
from raybooth.data.prior_key import PriorKey


@dataclass(frozen=True)
class PriorTask:
    """One prior to make on the cluster."""

    base: str
    revision: str | None
    cache_root: Path
    key: PriorKey
    num_images: int
    num_workers: int = 1
    """Sampling tasks that share the missing images."""
    num_cpus: float = 1.0
    """Of each sampling task; also its number of torch threads, rounded up."""
    num_gpus: float = 0.0
    """Of each sampling task; above 0 it samples on `cuda`."""
    max_rows: int = 16


@ray.remote(num_cpus=0)
def generate_prior(task: PriorTask, progress: Any = None) -> PriorReport:
    """Fills the cache with `task`'s prior: `ray.get(generate_prior.remote(task, actor))`.

    Takes no CPU itself: it holds the lease and waits for its sampling tasks, which take
    `task.num_cpus` and `task.num_gpus` each, and only when something is missing.
    `progress` is an actor handle; `progress.report_prior.remote(digest, done, wanted)` is sent to it,
    fire and forget.
    """
    raise NotImplementedError
