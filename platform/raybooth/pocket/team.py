"""Training over several processes of one machine, each with one share of every batch after another.

Shares decide the numbers, processes only the speed: two processes with two shares give bit for bit
what one process gives. Processes, because threads of one Python wait for each other at every
operation, and OpenMP threads collapse on a busy machine.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn


@dataclass(frozen=True)
class Team:
    """This process's place: it computes the shares rank, rank + size, ... of each batch."""

    shares: int = 1
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and tells its progress."""
        return self.rank == 0

    def mine(self) -> range:
        """The shares that this process computes."""
        return range(self.rank, self.shares, self.size)

    def add(self, values: Tensor) -> None:
        """Replaces the values by their sum over all processes."""
        if self.size > 1:
            distributed.all_reduce(values)

    def wait(self) -> None:
        """Goes on when every process has come here."""
        if self.size > 1:
            distributed.barrier()


def run_together(task: Callable[[Team], None], shares: int, size: int) -> None:
    """Runs the task in `size` processes, or right here if that is one; fails if any fails."""
    if size == 1:
        task(Team(shares))
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        spawn(_member, (task, shares, size, meeting), nprocs=size)  # type: ignore[no-untyped-call]


def _member(rank: int, task: Callable[[Team], None], shares: int, size: int, meeting: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(hours=4)
    )
    try:
        task(Team(shares, rank, size))
    finally:
        distributed.destroy_process_group()
