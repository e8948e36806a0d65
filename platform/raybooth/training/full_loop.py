"""The loop of one full run on one of its workers: resume, step, checkpoint; no Ray."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from raybooth.errors import PeerLostError
from raybooth.model.base import Base
from raybooth.training.full import FullReport, FullRun
from raybooth.training.full_state import FullWriter, load_full_state
from raybooth.training.full_validation import FullValidation
from raybooth.training.job import SlotJob
from raybooth.training.loop import job_fields


@dataclass(frozen=True, slots=True)
class FullOutcome:
    """How a full run ended on this worker."""

    weights: dict[str, dict[str, Tensor]] | None
    """By part, on the first worker, once trained to the end; None when stopped."""
    curve: tuple[tuple[float, float, float], ...]
    notes: tuple[str, ...]
    """Damaged checkpoints that were passed over."""
    seconds: float
    """Spent in train steps alone."""


def train_full(
    base: Base,
    job: SlotJob,
    *,
    checkpoint_root: Path,
    on_start: Callable[[int], None] = lambda train_step: None,
    on_report: Callable[[FullReport], None] = lambda report: None,
    should_stop: Callable[[], bool] = lambda: False,
    validation: FullValidation | None = None,
) -> FullOutcome:
    """Train one subject on every worker of the default process group, from its checkpoint on.

    A stop of any worker stops all after a last checkpoint. `validation` measures between train
    steps, may end the run early, and chooses the weights. Raises TrainingError when the loss is
    not finite or another worker failed, PeerLostError when one is gone, CheckpointError when a
    state cannot be read or written.
    """
    folder, fields = checkpoint_root / job.job_id, job_fields(base, job)
    with _peers():
        state, notes = load_full_state(folder, fields)
        is_over = validation is not None and validation.start(state.train_step if state else 0)
        run = FullRun(base, job, state=state)
        if is_over:
            run.finish()
        on_start(run.train_step)
        try:
            seconds = _train(
                run,
                FullWriter(folder, fields, dist.get_rank(), job.train.checkpoint),
                on_report,
                should_stop,
                validation,
            )
            weights = run.weights() if run.is_finished else None
            if weights is not None and validation is not None:
                weights = validation.settle(weights)
            return FullOutcome(weights, tuple(run.curve), notes, seconds)
        finally:
            run.close()


def _train(
    run: FullRun,
    writer: FullWriter,
    on_report: Callable[[FullReport], None],
    should_stop: Callable[[], bool],
    validation: FullValidation | None,
) -> float:
    """Train steps to the end or a stop, every state on disk; returns their seconds."""
    seconds, stopped = 0.0, False
    with writer:
        while not run.is_finished and not stopped:
            start = time.perf_counter()
            report = run.step(should_stop=should_stop(), trouble=writer.trouble())
            seconds += time.perf_counter() - start
            if validation is not None and validation.after_step(run):
                run.finish()
            stopped = report.should_stop
            on_report(report)
            if writer.is_due(report.train_step) or stopped or run.is_finished:
                writer.save(run.state())
        writer.flush()
        if (trouble := writer.trouble()) is not None:
            raise trouble
    return seconds


@contextmanager
def _peers() -> Iterator[None]:
    """Says in words when the process group broke: gloo and NCCL raise bare RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _BROKEN.search(str(error)):
            raise
        found = str(error).strip().splitlines()[0][:200]
        do = "run the same command again: it goes on from its last checkpoint"
        raise PeerLostError("a worker of this full run was lost", found, do) from error


_BROKEN = re.compile(r"gloo|nccl|connection (closed|reset)", re.IGNORECASE)
