"""Priors made by Ray tasks: one coordinator that holds the lease, workers that sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raybooth.data.generated import Generated
from raybooth.data.prior import PriorCache, PriorReport
from raybooth.data.prior_build import build_prior, sample_prior
from raybooth.data.prior_key import PriorKey
from raybooth.errors import PriorError, RayBoothError

__all__ = ["PriorTask", "build_prior", "generate_prior"]


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
    """Images denoised together."""


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
def generate_prior(task: PriorTask, progress: Any = None) -> PriorReport:
    """Fills the cache with `task`'s prior: `ray.get(generate_prior.remote(task, actor))`.

    Takes no CPU itself: it holds the lease and waits for its sampling tasks, which take
    `task.num_cpus` and `task.num_gpus` each, and only when something is missing. `progress` is an
    actor handle that is sent `report_prior(digest, num_done, num_images)`, fire and forget.
    """
    last: list[int] = []

    def tell(num_done: int, num_images: int) -> None:
        if progress is not None and last != [num_done]:
            last[:] = [num_done]
            progress.report_prior.remote(task.key.digest, num_done, num_images)

    def generate(indices: Sequence[int]) -> Iterator[Generated]:
        return _sample_on_cluster(task, indices)

    cache = PriorCache(task.cache_root)
    return cache.ensure(task.key, task.num_images, generate, tell, base_name=task.base)


@ray.remote(num_returns="streaming")  # type: ignore[untyped-decorator]
def _sample(task: PriorTask, indices: Sequence[int]) -> Iterator[Generated]:
    """One worker's share, each image sent off as soon as it is made."""
    import torch

    from raybooth.model.base import load_base

    torch.set_num_threads(max(1, math.ceil(task.num_cpus)))
    device = "cuda" if task.num_gpus > 0 else "cpu"
    dtype: torch.dtype = getattr(torch, task.key.dtype)
    base = load_base(task.base, revision=task.revision, device=device, dtype=dtype)
    yield from sample_prior(base, task.key, indices, max_rows=task.max_rows)


def _sample_on_cluster(task: PriorTask, indices: Sequence[int]) -> Iterator[Generated]:
    """What the workers make, in the order in which it arrives."""
    num_workers = max(1, min(task.num_workers, math.ceil(len(indices) / task.max_rows)))
    remote = _sample.options(num_cpus=task.num_cpus, num_gpus=task.num_gpus)
    running = [remote.remote(task, indices[worker::num_workers]) for worker in range(num_workers)]
    try:
        while running:
            ready, _ = ray.wait(running, num_returns=1, fetch_local=False)
            for results in ready:
                try:
                    yield ray.get(next(results))
                except StopIteration:
                    running.remove(results)
                except RayTaskError as error:
                    raise _cause(error, task) from error
                except RayError as error:
                    raise _worker_lost(error, task) from error
    finally:
        for results in running:
            ray.cancel(results, force=False)


def _cause(error: RayTaskError, task: PriorTask) -> RayBoothError:
    """The error of the sampling task itself, as if it had happened here."""
    cause = error.cause
    return cause if isinstance(cause, RayBoothError) else _worker_lost(error, task)


def _worker_lost(error: RayError, task: PriorTask) -> PriorError:
    what = f"a worker that made the prior {task.key.class_prompt!r} failed"
    found = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return PriorError(what, found, "what is whole was kept; run the same command again")
