"""Evaluations as Ray tasks, a subject each: as many at once as the cluster has room for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from raybooth.errors import ClusterError, RayBoothError
from raybooth.fleet.evaluation import EvaluationTask, evaluate_and_keep
from raybooth.fleet.launch import reason_of, total_capacity
from raybooth.fleet.planner import Capacity, Resources, resources_of

TELL_S = 0.5
"""Time from one word of progress to the next."""


def evaluate_on_cluster(
    tasks: Sequence[EvaluationTask],
    folder: Path,
    *,
    can_grow: bool,
    on_progress: Callable[[int], None],
) -> dict[str, str]:
    """Every task's report is in `folder`, or its subject is in the answer with the reason.

    A report is written by its own task, at once, so nothing that is done is lost when this
    process or another task dies. `on_progress` gets the number of pictures drawn. Raises
    ClusterError when no node could ever run a task, unless the cluster `can_grow`.
    """
    capacity = total_capacity()
    asked = [resources_of(task.resources, capacity) for task in tasks]
    for task, resources in zip(tasks, asked, strict=True):
        if not can_grow and not capacity.num_workers(resources):
            raise _no_room(task, resources, capacity)
    tally = ray.remote(num_cpus=0)(Tally).remote()
    running = {
        _evaluate.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus).remote(
            task, folder, resources, tally
        ): task.record.subject_id
        for task, resources in zip(tasks, asked, strict=True)
    }
    failed: dict[str, str] = {}
    drawn = -1
    try:
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=TELL_S)
            for ref in done:
                subject_id = running.pop(ref)
                try:
                    ray.get(ref)
                except (RayError, RayBoothError) as error:
                    failed[subject_id] = reason_of(error)
            if (total := ray.get(tally.total.remote())) != drawn:
                drawn = total
                on_progress(drawn)
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
    return failed


class Tally:
    """Pictures drawn of each subject; an actor that tasks tell, fire and forget."""

    def __init__(self) -> None:
        self._drawn: dict[str, int] = {}

    def tell(self, subject_id: str, num_pictures: int) -> None:
        """How many there are of this subject by now."""
        self._drawn[subject_id] = num_pictures

    def total(self) -> int:
        """How many there are in all."""
        return sum(self._drawn.values())


@ray.remote(max_retries=1)  # type: ignore[untyped-decorator]
def _evaluate(task: EvaluationTask, folder: Path, resources: Resources, tally: Any) -> None:
    import torch

    torch.set_num_threads(max(1, int(resources.num_cpus)))
    subject_id, told = task.record.subject_id, 0.0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if done == total or time.monotonic() - told >= TELL_S:
            told = time.monotonic()
            tally.tell.remote(subject_id, task.sampling.num_pictures * done // total)

    device = "cuda" if resources.num_gpus > 0 else "cpu"
    evaluate_and_keep(task, folder, device, on_step=tell)


def _no_room(task: EvaluationTask, asked: Resources, capacity: Capacity) -> ClusterError:
    cpus = max((node.num_cpus for node in capacity.nodes), default=0.0)
    gpus = max((node.num_gpus for node in capacity.nodes), default=0.0)
    return ClusterError(
        f"no node can evaluate {task.record.reference}, which asks {asked}",
        f"at most {cpus:g} CPU and {gpus:g} GPU on a node",
        "lower resources.num_cpus or num_gpus, or use a larger cluster",
    )
