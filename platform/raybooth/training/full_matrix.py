"""Which full runs can be trained: ZeRO stage x optimiser x text encoder x offload, by device.

Pure; `raybooth check` refuses by it, tests train every supported cell of the CPU, and the table
of platform/README.md is written by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from raybooth.config import TrainConfig

Device = Literal["cpu", "cuda"]

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
OFFLOADS = ("none", "optimizer", "all")

BUCKET_NUMBERS = 500_000_000
"""Gradients that the workers reduce at a time; DeepSpeed takes memory for as many at once."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of full run."""

    zero_stage: int
    optimizer: str
    text_encoder: bool
    offload: str


def cell_of(train: TrainConfig) -> Cell:
    """The place of a train config; a pack of adapters stands where a plain stage 0 would."""
    full = train.full
    return Cell(full.zero_stage, train.optimizer.name, full.text_encoder, full.offload)


def cells() -> Iterator[Cell]:
    """Every combination, supported or not."""
    for stage, optimizer, text_encoder, offload in product(
        range(4), OPTIMIZERS, (False, True), OFFLOADS
    ):
        yield Cell(stage, optimizer, text_encoder, offload)


def reason_against(cell: Cell, device: Device) -> str | None:
    """Why the cell cannot be trained on this device; None when it can."""
    least = {"none": 0, "optimizer": 1, "all": 3}[cell.offload]
    if cell.zero_stage < least:
        return f"offload: {cell.offload} needs zero_stage {least}"
    if cell.optimizer != "paged_adamw8bit":
        return None
    if device == "cpu":
        return "paged states need CUDA's unified memory"
    if cell.offload != "none":
        return "paged states leave the GPU by themselves; offload moves them there for good"
    return None


def table() -> str:
    """The matrix as a Markdown table: one row a stage and offload, one column an optimiser."""
    lines = [
        "| ZeRO stage | offload | " + " | ".join(OPTIMIZERS) + " |",
        "| --- | --- |" + " --- |" * len(OPTIMIZERS),
    ]
    for stage, offload in product(range(4), OFFLOADS):
        words = [_word(stage, optimizer, offload) for optimizer in OPTIMIZERS]
        lines.append(f"| {stage} | {offload} | " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def _word(stage: int, optimizer: str, offload: str) -> str:
    """One cell in words: the text encoder makes no difference, which is held by the assertion."""
    answers = set()
    for text_encoder in (False, True):
        cell = Cell(stage, optimizer, text_encoder, offload)
        answers.add((reason_against(cell, "cpu"), reason_against(cell, "cuda")))
    ((cpu, cuda),) = answers
    if cpu is None and cuda is None:
        return "CPU, GPU"
    if cuda is None:
        return f"GPU; CPU: {cpu}"
    return f"no: {cuda}"
