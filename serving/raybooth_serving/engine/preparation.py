"""Orders become rows off the tick: adapters to host memory, prompts to embeddings, first noise."""

from __future__ import annotations

import asyncio
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch import Tensor

from raybooth.errors import RequestError
from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.sampler import Row, SampleRequest, guides, start_row
from raybooth_serving.engine.forecast import Work
from raybooth_serving.engine.loader import HostAdapter, Loader
from raybooth_serving.engine.orders import MAX_PARTIAL_IMAGES, Order
from raybooth_serving.engine.prompts import PromptCache
from raybooth_serving.engine.scheduler import Lane

NUM_NEAR, NUM_FAR = 2, 8
"""Threads for orders that need no store, and for those that do."""


@dataclass(slots=True)
class Ready:
    """An order that may join the batch."""

    adapter: HostAdapter | None
    flat_P: Tensor | None
    """The adapter as a slot holds it, on the host (pinned where CUDA); None: it was in a slot, or
    has been written to one."""

    rows: list[Row]

    def write(self, bank: Bank, slot: int) -> None:
        """Put the adapter into `slot`; flattened here only where it was evicted meanwhile."""
        assert self.adapter is not None
        flat_P, self.flat_P = self.flat_P, None
        if flat_P is None:
            flat_P = bank.flatten(self.adapter.tensors, device="cpu")
        bank.write_flat(slot, flat_P)


class Preparation:
    """A store that is slow or away holds up the orders that need it, and no others."""

    def __init__(
        self, base: Base, bank: Bank, loader: Loader, prompts: PromptCache, *, most_rows: int
    ) -> None:
        self.base = base
        self.bank = bank
        self.loader = loader
        self.prompts = prompts
        self.most_rows = most_rows
        self._near = ThreadPoolExecutor(NUM_NEAR, "prepare")
        self._far = ThreadPoolExecutor(NUM_FAR, "load")

    def work(self, order: Order) -> list[Work]:
        """What each image asks of the engine; raises RequestError for what it never does."""
        if not 0 <= order.partial_images <= MAX_PARTIAL_IMAGES:
            found, do = str(order.partial_images), f"use 0 to {MAX_PARTIAL_IMAGES}"
            raise RequestError("the number of partial images is out of range", found, do)
        work = [self._work(order, sample) for sample in order.samples]
        least = max((item.num_rows for item in work), default=1)
        if order.bucket is not None and not least <= order.bucket <= self.most_rows:
            found, do = f"bucket {order.bucket}", f"pin one from {least} to {self.most_rows}"
            raise RequestError("the bucket cannot be pinned", found, do)
        return work

    async def ready(self, order: Order, in_slots: Container[str]) -> Ready:
        """The order, ready; raises what makes it impossible."""
        is_near = not order.parts or self.loader.holds(order.parts)
        executor = self._near if is_near else self._far
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor, lambda: self._ready(order, in_slots))

    def close(self) -> None:
        """Wait for what is being prepared, but for no store that hangs."""
        self._near.shutdown()
        self._far.shutdown(wait=False, cancel_futures=True)

    def _ready(self, order: Order, in_slots: Container[str]) -> Ready:
        adapter = self.loader.load(order.parts) if order.parts else None
        flat_P = None
        if adapter is not None and adapter.name not in in_slots:
            flat_P = self.bank.flatten(adapter.tensors, device="cpu")
            if self.base.device.type == "cuda":
                flat_P = flat_P.pin_memory()
        return Ready(
            adapter, flat_P, [self._row(order, sample, adapter) for sample in order.samples]
        )

    def _work(self, order: Order, sample: SampleRequest) -> Work:
        factor, native = self.base.vae_scale_factor, self.base.native_resolution
        height, width = (side or native for side in (sample.height, sample.width))
        lane = Lane((max(1, height // factor), max(1, width // factor)), order.bucket)
        num_rows = 2 if guides(sample) else 1
        return Work(order.tenant, lane, num_rows, max(1, sample.num_inference_steps))

    def _row(self, order: Order, sample: SampleRequest, adapter: HostAdapter | None) -> Row:
        scale = order.parts[0].scale if len(order.parts) == 1 else 1.0
        request = replace(
            sample,
            adapter_scale=sample.adapter_scale * scale,
            zero_terminal_snr=sample.zero_terminal_snr
            or any(part.record.zero_terminal_snr for part in order.parts),
        )
        cond, uncond = (
            self.prompts.encode(prompt, adapter, request.adapter_scale) if is_used else None
            for prompt, is_used in (
                (request.prompt, True),
                (request.negative_prompt, guides(request)),
            )
        )
        return start_row(self.base, request, cond=cond, uncond=uncond)
