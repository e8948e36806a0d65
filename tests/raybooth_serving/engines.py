"""Engines for tests, and what their images are compared with."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from raybooth.config import EngineConfig
from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.lora import find_sites, load_adapter
from raybooth.model.sampler import SampleRequest, denoise_step, row_image, start_row
from raybooth.store import AdapterRecord, Store
from raybooth_serving.engine.loop import Engine
from raybooth_serving.engine.orders import GeneratedImage, Order, Part
from tests.raybooth_serving.published import weights_of

Result = TypeVar("Result")


def config(buckets: tuple[int, ...] = (4,), num_slots: int = 4, queue: int = 64) -> EngineConfig:
    return EngineConfig(
        num_slots=num_slots,
        max_rank=4,
        row_buckets=buckets,
        max_step_s=60,  # however busy the machine is
        max_queued_images=queue,
    )


def order(record: AdapterRecord | None, *samples: SampleRequest) -> Order:
    return Order(samples, () if record is None else (Part(record),))


def run(
    base: Base,
    store: Store,
    settings: EngineConfig,
    act: Callable[[Engine], Awaitable[Result]],
) -> Result:
    async def inside() -> Result:
        engine = Engine(base, store, settings)
        try:
            return await act(engine)
        finally:
            await engine.close()

    return asyncio.run(inside())


def alone(base: Base, record: AdapterRecord | None, store: Store, request: SampleRequest) -> bytes:
    """The same image by itself: one row in a bucket of four, a bank of one slot."""
    sites = find_sites(base.denoiser, "all")
    bank = Bank(base.denoiser, sites=sites, rank=4, num_slots=1, device="cpu")
    row = start_row(base, request)
    if record is not None:
        bank.write(1, load_adapter(weights_of(store, record)))
        row.slot = 1
    while not row.done:
        denoise_step(base, bank, [row], 4)
    bank.detach()
    file = io.BytesIO()
    row_image(base, row).save(file, "PNG")
    return file.getvalue()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int16)


async def together(
    engine: Engine, store: Store, jobs: Sequence[tuple[str | None, SampleRequest]], gap: int = 0
) -> list[bytes]:
    """All jobs, each sent `gap` denoise steps after the one before."""
    tasks: list[asyncio.Task[list[GeneratedImage]]] = []
    for subject, request in jobs:
        record = None if subject is None else store.fetch(subject)
        tasks.append(asyncio.create_task(engine.generate(order(record, request))))
        until = engine.metrics.denoise_steps + gap
        while engine.metrics.denoise_steps < until and not all(task.done() for task in tasks):
            await asyncio.sleep(0.001)
    return [(await task)[0].picture for task in tasks]
