"""What a slot's states cost: AdamW against its 8-bit kinds, and checkpoints as a share of training.

Memory is what torch's allocator held at most, counted in a round of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from raybooth.config import TrainConfig, find_config, load_config
from raybooth.model.base import Base, load_base
from raybooth.training.job import SlotJob
from raybooth.training.loop import train_pack
from raybooth.training.pack import Pack
from tests.bench.rounds import BenchReport, Contender, measure, most_bytes
from tests.bench.training import draw_job

SUBJECTS, STEPS, LOOP_STEPS = 4, 4, 20
OPTIMIZERS = ("adamw", "adamw8bit")
RHYTHMS = (LOOP_STEPS, 10, 5, 1)
"""Train steps between checkpoints; the first writes the last state alone."""


def run(rounds: int) -> list[BenchReport]:
    """The pocket base, four subjects."""
    train = load_config(TrainConfig, find_config("train", "pocket-lora"))
    return [_optimizers(train, rounds), _checkpoints(train, rounds)]


def _optimizers(train: TrainConfig, rounds: int) -> BenchReport:
    contenders, notes = [], []
    for name in OPTIMIZERS:
        optimizer = train.optimizer.model_copy(update={"name": name})
        jobs = _jobs(train.model_copy(update={"optimizer": optimizer}))
        contenders.append(Contender(f"pack of {SUBJECTS}, {name}", _steps(jobs), STEPS * SUBJECTS))
        most = most_bytes(partial(_two_steps, load_base("pocket"), jobs))
        notes.append(f"{name}: {most / 2**20:.1f} MiB beside the base at the most")
    title = f"Optimisers: subject-steps/s of a pack of {SUBJECTS}"
    reference, command = contenders[0].name, "python -m tests.bench states"
    return measure(title, "subject-steps/s", contenders, reference, rounds, command, notes)


def _checkpoints(train: TrainConfig, rounds: int) -> BenchReport:
    base = load_base("pocket")
    contenders, cpu_s = [], dict.fromkeys(RHYTHMS, 0.0)
    for every in RHYTHMS:
        checkpoint = train.checkpoint.model_copy(update={"every_steps": every})
        update = {"checkpoint": checkpoint, "num_train_steps": LOOP_STEPS}
        jobs = _jobs(train.model_copy(update=update))

        def turn(every: int = every, jobs: list[SlotJob] = jobs) -> None:
            started = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                train_pack(base, jobs, checkpoint_root=Path(folder))
            cpu_s[every] += time.process_time() - started

        word = "at the end alone" if every == LOOP_STEPS else f"every {every} train steps"
        contenders.append(Contender(f"checkpoints {word}", turn, LOOP_STEPS * SUBJECTS))
    title = f"Checkpoints: subject-steps/s of a pack of {SUBJECTS}, {LOOP_STEPS} train steps"
    reference, command = contenders[0].name, "python -m tests.bench states"
    notes = ["One less the ratio is the share of training that checkpoints take."]
    report = measure(title, "subject-steps/s", contenders, reference, rounds, command, notes)
    least, most = (cpu_s[every] / (rounds + 1) for every in (LOOP_STEPS, 1))
    one_s = (most - least) / (LOOP_STEPS - 1)
    in_steps = one_s / ((least - one_s) / LOOP_STEPS)
    rhythm = train.checkpoint.every_steps
    share = in_steps / (rhythm + in_steps)
    report.notes.append(
        f"In CPU seconds, without waits for the disk or for other work, a checkpoint of the pack "
        f"takes {one_s:.3f} s, as long as {in_steps:.2f} train steps; every {rhythm} train steps, "
        f"as in configs/train/pocket-lora, that is {share:.1%} of training."
    )
    return report


def _jobs(train: TrainConfig) -> list[SlotJob]:
    base = load_base("pocket")
    return [draw_job(base, train, index) for index in range(SUBJECTS)]


def _steps(jobs: list[SlotJob]) -> Callable[[], None]:
    pack = Pack(load_base("pocket"), jobs)

    def turn() -> None:
        for _ in range(STEPS):
            pack.step()

    return turn


def _two_steps(base: Base, jobs: list[SlotJob]) -> None:
    pack = Pack(base, jobs)
    pack.step()
    pack.step()
    pack.close()
