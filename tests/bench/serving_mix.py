"""Mixed subjects under seeded arrivals: our engine against three ways of others, on one clock."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file

from raybooth.config import EngineConfig
from raybooth.model.base import load_base
from raybooth.model.lora import AdapterTensors, LoraPair, Site, find_sites, save_adapter
from tests.bench.arrivals import Arrival, Ran, Served, bursts, poisson, quantile
from tests.bench.mix_engine import Endpoint, Ours
from tests.bench.mix_peers import (
    GUIDANCE,
    MAX_ROWS,
    STEPS,
    Merged,
    MixedByPeft,
    State,
    Swapping,
    System,
)
from tests.bench.rounds import TableReport

SUBJECTS = (1, 4, 16, 64)
NUM = 16
"""Requests of one turn of Poisson arrivals."""

BURST = 16
"""Requests of one burst, a turn."""

LOAD = 0.8
"""Arrivals a second, in images/s that swapping makes of a burst of as many subjects."""

SWEEP = (1.2,)
"""Also measured with SWEPT subjects."""

SWEPT = 16

RANK = 16
NUM_SLOTS = 16
LEVELS = 1
"""Pictures of two systems may differ by this."""

HEADS = (
    *("subjects", "system", "images per busy s", "ratio", "first step p50 / p95, s"),
    *("p50, s", "p95, s", "p99, s", "p99 ratio"),
)


@dataclass(slots=True)
class Cell:
    """All turns of one system at one kind of arrivals."""

    served: list[Served] = field(default_factory=list)
    busy_s: float = 0.0

    def add(self, ran: Ran) -> None:
        """One more turn."""
        self.served += ran.served
        self.busy_s += ran.busy_s

    @property
    def per_busy_s(self) -> float:
        """Images for each second of computing."""
        return len(self.served) / self.busy_s

    def done(self, share: float) -> float:
        """A quantile of the latencies, seconds."""
        return quantile([each.done_s for each in self.served], share)

    def first(self, share: float) -> float:
        """A quantile of the times to the first denoise step, seconds."""
        return quantile([each.first_step_s for each in self.served], share)


Cells = dict[tuple[str, int, str], Cell]
"""By kind of arrivals, subjects, system."""


def run(rounds: int) -> list[TableReport]:
    """Every number of subjects and kind of arrivals; systems take turns within each round."""
    diffusers_logging.set_verbosity_error()
    base = load_base("pocket")
    sites = find_sites(base.denoiser, "all")
    adapters = [_adapter(sites, seed) for seed in range(max(SUBJECTS))]
    cells: Cells = {}
    notes = []
    with tempfile.TemporaryDirectory() as name:
        states = _states(Path(name), adapters)
        config = EngineConfig(num_slots=NUM_SLOTS, max_rank=RANK, calibrate=True)
        endpoint = Endpoint(base, Path(name) / "models", adapters, config)
        merged, mixed = Merged(base, states), MixedByPeft(base, states)
        ours, plain = Ours(endpoint), Ours(endpoint, plain=True)
        for subjects in SUBJECTS:
            swapping = Swapping(base, states[:subjects])
            systems: list[System] = [swapping, merged, mixed, ours, plain]
            capacity = _capacity(systems[0], subjects)
            notes.append(f"{subjects} subjects: load 1 is {capacity:.2f} images/s.")
            if subjects == 4:
                notes += _same_pictures(systems[:-1])
            _measure(systems, subjects, capacity, rounds, cells)
        endpoint.close()
    return _reports(cells, notes, f"python -m tests.bench serving_mix --rounds {rounds}")


def _measure(
    systems: Sequence[System], subjects: int, capacity: float, rounds: int, cells: Cells
) -> None:
    for index in range(rounds):
        seed = 100 * index + subjects
        kinds = {
            f"Poisson {LOAD}": poisson(LOAD * capacity, NUM, subjects, seed),
            "burst": bursts(1.0, BURST, BURST, subjects, seed),
        }
        for load in SWEEP if subjects == SWEPT else ():
            kinds[f"Poisson {load}"] = poisson(load * capacity, NUM, subjects, seed)
        for kind, arrivals in kinds.items():
            for system in systems if index % 2 == 0 else reversed(systems):
                cell = cells.setdefault((kind, subjects, system.name), Cell())
                cell.add(system.run(arrivals))
                print(
                    f"{kind}, {subjects} subjects, {system.name}: {cell.per_busy_s:.2f} images a "
                    f"busy s, p50 {cell.done(0.5):.2f} s, p99 {cell.done(0.99):.2f} s",
                    flush=True,
                )


def _capacity(system: System, subjects: int) -> float:
    """Images/s of requests that are all there at once, after one to warm up."""
    system.run([Arrival(0.0, 0, 0)])
    return BURST / system.run(bursts(1.0, BURST, BURST, subjects, seed=0)).busy_s


def _same_pictures(systems: Sequence[System]) -> list[str]:
    """Four subjects' pictures of every system, against the first's one by one."""
    arrivals = [Arrival(float(100 * index), index, index) for index in range(4)]
    expected = _pixels(systems[0].run(arrivals))
    subjects = min(
        float(np.abs(expected[0] - other).mean())
        for other in _pixels(systems[0].run([Arrival(0.0, 1, 0), Arrival(0.0, 2, 0)]))
    )
    notes = [f"The same seed with another subject: {subjects:.0f} levels away on average."]
    together = [Arrival(0.0, index, index) for index in range(4)]
    for system in systems:
        levels = int(np.abs(_pixels(system.run(together)) - expected).max())
        assert levels <= LEVELS, f"{system.name} draws other pictures: {levels} levels away"
        notes.append(f"{system.name}: pictures at most {levels} of 255 levels from one by one.")
    return notes


def _pixels(ran: Ran) -> np.ndarray:
    """[N, H, W, 3] in the order of arrival."""
    ordered = sorted(ran.served, key=lambda each: (each.arrival.at_s, each.arrival.subject))
    pictures = [Image.open(io.BytesIO(each.picture)).convert("RGB") for each in ordered]
    return np.stack([np.asarray(picture, dtype=np.int64) for picture in pictures])


def _reports(cells: Cells, notes: list[str], command: str) -> list[TableReport]:
    means = {
        f"Poisson {LOAD}": f"Poisson arrivals at {LOAD} of what swapping can do",
        "burst": f"{BURST} requests at once",
    }
    reports = []
    for kind, words in means.items():
        keys = [key for key in cells if key[0] == kind]
        rows = [_row(cells, key) for key in keys]
        reports.append(TableReport(f"Serving-mix: {words}", command, HEADS, rows))
    rows = []
    for load in sorted((LOAD, *SWEEP)):
        for kind, subjects, name in cells:
            if kind == f"Poisson {load}" and subjects == SWEPT:
                row = _row(cells, (kind, subjects, name))
                rows.append((f"{load}", *row[1:]))
    heads = ("load", *HEADS[1:])
    title = f"Serving-mix: Poisson arrivals of {SWEPT} subjects, by load"
    num = len(cells[f"Poisson {LOAD}", SWEPT, Swapping.name].served)
    told = [
        f"Rank {RANK} on all layers, {STEPS} denoise steps, guidance {GUIDANCE:g}, native size, "
        f"at most {MAX_ROWS} images in a batch, {NUM_SLOTS} slots; {num} Poisson arrivals a row, "
        "the same for every system.",
        "Seconds are CPU seconds of the process (tests/bench/arrivals.py): other work on the "
        "machine does not count, our engine's decode and encode threads do.",
        "A p99 of fewer than 100 requests is the slowest of them; `--rounds` makes more.",
        "Ratios are to swapping at the same subjects; a p99 ratio below 1 is a shorter wait.",
        *notes,
    ]
    return [*reports, TableReport(title, command, heads, rows, told)]


def _row(cells: Cells, key: tuple[str, int, str]) -> tuple[str, ...]:
    cell, swapping = cells[key], cells[(key[0], key[1], Swapping.name)]
    return (
        str(key[1]),
        key[2],
        f"{cell.per_busy_s:.2f}",
        f"{cell.per_busy_s / swapping.per_busy_s:.2f}",
        f"{cell.first(0.5):.2f} / {cell.first(0.95):.2f}",
        *(f"{cell.done(share):.2f}" for share in (0.5, 0.95, 0.99)),
        f"{cell.done(0.99) / swapping.done(0.99):.2f}",
    )


def _adapter(sites: Sequence[Site], seed: int) -> AdapterTensors:
    """Strong enough that every subject's picture is another."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: LoraPair(
            torch.randn(site.down_shape(RANK), generator=generator) / RANK,
            torch.randn(site.up_shape(RANK), generator=generator) / 25,
        )
        for site in sites
    }


def _states(folder: Path, adapters: Sequence[AdapterTensors]) -> list[State]:
    """Each adapter as diffusers reads it from a file."""
    path = folder / "adapter.safetensors"
    states = []
    for adapter in adapters:
        save_adapter(path, adapter, 1.0)
        states.append({name: tensor.clone() for name, tensor in load_file(path).items()})
    return states
