"""A full fine-tune against an adapter, and ZeRO's stages at two workers, on the pocket base.

Memory of the first is what torch's allocator held at most beside the base, counted in a round of
its own; that of the second is what each worker holds when backward has ended, tensor by tensor.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raybooth.config import TrainConfig, find_config, load_config
from raybooth.model.base import Base, load_base
from raybooth.training.full import FullRun
from raybooth.training.pack import Pack, SlotJob
from tests.bench.rounds import BenchReport, Contender, measure, most_bytes
from tests.bench.training import draw_job

STEPS, WORKERS = 4, 2
COMMAND = "python -m tests.bench full"
PROMPT, CLASS_PROMPT = "a photo of sks dog", "a photo of a dog"


def run(rounds: int) -> list[BenchReport]:
    """One subject, rows as in configs/train/pocket-lora and pocket-full-zero0..3."""
    return [_against_adapter(rounds), _zero_stages(rounds)]


def _against_adapter(rounds: int) -> BenchReport:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    base = load_base("pocket")
    lora = load_config(TrainConfig, find_config("train", "pocket-lora"))
    makers: dict[str, Callable[[Base], Callable[[], None]]] = {
        f"adapter, rank {lora.adapter.rank}": partial(_adapter, draw_job(base, lora, 0)),
        "full, denoiser": partial(_full, _full_job(base, 0, num_workers=1, text_encoder=False)),
        "full, denoiser and text": partial(_full, _full_job(base, 0, num_workers=1)),
    }
    notes = ["Held beside the base at the most, states and activations:"]
    for name, make in makers.items():
        turn = partial(_make_and_run, make, load_base("pocket"))
        notes.append(f"- {name}: {most_bytes(turn) / 2**20:.1f} MiB")
    contenders = [
        Contender(name, make(load_base("pocket")), STEPS) for name, make in makers.items()
    ]
    title = f"Full: train steps/s against an adapter, {lora.num_rows} rows, one process"
    reference = contenders[0].name
    return measure(title, "train steps/s", contenders, reference, rounds, COMMAND, notes)


def _make_and_run(make: Callable[[Base], Callable[[], None]], base: Base) -> None:
    make(base)()


def _adapter(job: SlotJob, base: Base) -> Callable[[], None]:
    pack = Pack(base, [job])
    return partial(_repeat, pack.step)


def _full(job: SlotJob, base: Base) -> Callable[[], None]:
    return partial(_repeat, FullRun(base, job).step)


def _repeat(step: Callable[[], object]) -> None:
    for _ in range(STEPS):
        step()


def _full_job(base: Base, stage: int, **full: Any) -> SlotJob:
    train = load_config(TrainConfig, find_config("train", f"pocket-full-zero{stage}"))
    train = train.model_copy(update={"full": train.full.model_copy(update=full)})
    job = draw_job(base, train, 0)
    tensors = replace(job.tensors, prompts=(PROMPT,))
    return replace(job, tensors=tensors, class_prompt=CLASS_PROMPT)


def _zero_stages(rounds: int) -> BenchReport:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
            _worker, (folder, rounds), nprocs=WORKERS
        )
        report: BenchReport = torch.load(Path(folder) / "report", weights_only=False)
        return report


def _worker(rank: int, folder: str, rounds: int) -> None:
    """One of two processes: every stage takes its turns on both at once; the first one reports."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=WORKERS)
    base = load_base("pocket")
    jobs = [_full_job(base, stage) for stage in range(4)]
    runs = [FullRun(load_base("pocket"), job) for job in jobs]
    contenders = [
        Contender(f"ZeRO {stage}", partial(_repeat, run.step), STEPS)
        for stage, run in enumerate(runs)
    ]
    title = f"ZeRO: train steps/s, {WORKERS} workers, {jobs[0].train.num_rows} rows in all"
    reference = contenders[0].name
    report = measure(title, "train steps/s", contenders, reference, rounds, COMMAND)
    report.notes.append(
        "Held by a worker when backward has ended (masters with the weights, no exchange buckets), "
        "and allocated by a train step, at the most:"
    )
    for stage, run in enumerate(runs):
        sizes = (f"{size / 2**20:.1f}" for size in (*_held(run), most_bytes(partial(_step, run))))
        words = "{} MiB of weights, {} of gradients, {} of moments; {} by a step".format(*sizes)
        report.notes.append(f"- ZeRO {stage}: {words}")
    if rank == 0:
        torch.save(report, Path(folder) / "report")
    dist.barrier()
    os._exit(0)  # DeepSpeed's engines are not worth the wait of taking apart


def _step(run: FullRun) -> None:
    run.step()


def _held(run: FullRun) -> tuple[int, int, int]:
    """Bytes of weights, gradients and moments of this worker after one more backward."""
    engine = run.engine
    for share in run._shares():
        loss = run._loss(share, torch.zeros(5, dtype=torch.float64))
        engine.backward(loss * WORKERS, is_last=True)
    parameters: list[Any] = list(engine.module.parameters())
    pieces = engine._pieces()
    weights = [*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")), *pieces]
    gradients = [p.grad for p in parameters if p.grad is not None]
    for group in getattr(engine._zero, "averaged_gradients", {}).values():
        gradients += group or []
    moments = [value for piece in pieces for value in engine._optimizer.state[piece].values()]
    found = _bytes(weights), _bytes(gradients), _bytes(moments)
    engine.step(0.0)
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors, each place in memory once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
