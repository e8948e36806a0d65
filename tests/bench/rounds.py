"""Paired rounds: contenders take turns in one process, and only ratios within a round count."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of doing the same work; `run` does it once, `units` says how much that is."""

    name: str
    run: Callable[[], None]
    units: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Units per second of each round, and the ratio to the round's reference."""

    name: str
    per_s: list[float]
    ratios: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.per_s)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True, slots=True)
class BenchReport:
    """One bench: what was compared, in which unit, against which contender."""

    title: str
    unit: str
    reference: str
    command: str
    rows: list[Measured]
    notes: list[str] = field(default_factory=list)

    def table(self) -> TableReport:
        """As it is printed and written."""
        heads = ("", self.unit, f"ratio to {self.reference}", "lowest - highest")
        rows = [
            (
                row.name,
                f"{row.median:.3g}",
                f"{row.ratio:.2f}",
                f"{min(row.ratios):.2f} - {max(row.ratios):.2f}",
            )
            for row in self.rows
        ]
        return TableReport(self.title, self.command, heads, rows, self.notes)


@dataclass(frozen=True, slots=True)
class TableReport:
    """One bench whose rows are words and figures of their own."""

    title: str
    command: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)


def measure(
    title: str,
    unit: str,
    contenders: list[Contender],
    reference: str,
    rounds: int,
    command: str,
    notes: list[str] | None = None,
    warm_up: bool = True,
) -> BenchReport:
    """Each contender once to warm up, then `rounds` rounds in alternating order."""
    for contender in contenders if warm_up else []:
        contender.run()
    per_s: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for index in range(rounds):
        for contender in contenders if index % 2 == 0 else reversed(contenders):
            started = time.perf_counter()
            contender.run()
            per_s[contender.name].append(contender.units / (time.perf_counter() - started))
    return BenchReport(title, unit, reference, command, _ratios(per_s, reference), notes or [])


def _ratios(per_s: Mapping[str, list[float]], reference: str) -> list[Measured]:
    rows = []
    for name, values in per_s.items():
        ratios = [value / base for value, base in zip(values, per_s[reference], strict=True)]
        rows.append(Measured(name, values, ratios))
    return rows


def most_bytes(work: Callable[[], None]) -> int:
    """Bytes that torch's CPU allocator held at most during `work`, beyond those held before."""
    gc.collect()  # or what an earlier contender left would be freed within the count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    now = most = 0
    assert profiled.profiler is not None
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = f"{len(names)} x {names[0].split(':', 1)[1].strip()}" if names else cpu
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": cpu,
        "gpu": gpu,
        "load": f"{os.getloadavg()[2]:.1f} processes on average in the last 15 minutes",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }
