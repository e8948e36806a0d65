"""The denoising loop of one replica: images join and leave the batch at any denoise step.

    admit -> prepare (adapter to host memory, prompts encoded) -> wait -> join -> denoise steps
          -> leave -> decode and encode

The loop's task does one denoise step at a time on a thread of its own (the tick). Preparing and
finishing have their own threads, so that nothing but slot writes and denoiser calls is ever on
the tick. The scheduler decides; this file acts.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TypeVar

import torch

from raybooth.config import EngineConfig
from raybooth.errors import RayBoothError, ServingError
from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.lora import find_sites
from raybooth.model.sampler import Row, denoise_step, row_image, start_row
from raybooth.store import Store
from raybooth_serving.errors import QueueFullError
from raybooth_serving.flight import Flight
from raybooth_serving.loader import HostAdapter, Loader, is_of
from raybooth_serving.metrics import EngineMetrics, StepReport
from raybooth_serving.orders import GeneratedImage, Order
from raybooth_serving.prompts import PromptCache
from raybooth_serving.scheduler import (
    Join,
    RunningImage,
    Size,
    StepPlan,
    WaitingImage,
    plan_joins,
    plan_step,
)
from raybooth_serving.slots import SlotTable

Result = TypeVar("Result")


class Engine:
    """Mixed subjects, prompts, steps, solvers and guidance in one batch over one bank."""

    def __init__(self, base: Base, store: Store, config: EngineConfig) -> None:
        self.base = base
        self.config = config
        self.metrics = EngineMetrics()
        self.loader = Loader(
            store,
            base,
            max_rank=config.max_rank,
            max_adapters=config.max_host_adapters,
            max_bytes=config.max_host_bytes,
            metrics=self.metrics,
        )
        self.prompts = PromptCache(
            base,
            max_prompts=config.max_prompt_cache,
            max_bytes=config.max_prompt_bytes,
            metrics=self.metrics,
        )
        self.bank = Bank(
            base.denoiser,
            sites=find_sites(base.denoiser, config.targets),
            rank=config.max_rank,
            num_slots=config.num_slots,
            device=base.device,
        )
        self.slots = SlotTable(config.num_slots)
        self._in_slots: dict[int, HostAdapter] = {}
        """Held, so that the loader finds them without the store."""

        self._deleted: list[str] = []
        self._keys = count()
        self._num_preparing = 0
        self._waiting: dict[int, Flight] = {}
        self._running: dict[int, Flight] = {}
        self._finishing: set[asyncio.Task[None]] = set()
        self._last_turns: dict[Size, int] = {}
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._tick = ThreadPoolExecutor(1, "denoise")
        self._prepare = ThreadPoolExecutor(1, "prepare")
        self._finish = ThreadPoolExecutor(1, "finish")

    async def generate(self, order: Order) -> list[GeneratedImage]:
        """The images of `order`, one for each sample, in their order.

        Raises QueueFullError at once when the queue has no room for all of them, and whatever
        makes an image impossible (RequestError, BaseModelError, StoreError, ServingError).
        A caller that goes away takes its images out of the batch at the next denoise step.
        """
        self.check_health()
        arrived = time.monotonic()
        self._admit(len(order.samples))
        images: list[Flight] = []
        try:
            try:
                adapter, rows = await self._on(self._prepare, lambda: self._ready(order))
                self.check_health()
            except RayBoothError:
                self.metrics.images_failed += len(order.samples)
                raise
            finally:
                self._num_preparing -= len(order.samples)
            images = [self._enqueue(order, i, adapter, row, arrived) for i, row in enumerate(rows)]
            self._start_loop()
            return list(await asyncio.gather(*(image.done for image in images)))
        finally:
            for image in images:
                image.done.cancel()
            self._wake.set()

    def forget(self, subject_id: str) -> None:
        """Let go of a deleted subject: in memory at once, in slots as rows leave; any thread."""
        self.loader.forget(subject_id)
        self.prompts.forget(subject_id)
        self._deleted.append(subject_id)
        if self._loop is not None:
            self._loop.get_loop().call_soon_threadsafe(self._wake.set)

    def check_health(self) -> None:
        """Raises ServingError if the loop has died."""
        if self._failure is not None:
            found = f"{type(self._failure).__name__}: {self._failure}"
            raise ServingError("the engine has stopped", found, "its replica is being replaced")

    async def close(self) -> None:
        """Stop the loop, fail what is in flight, take the bank off the denoiser."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, *self._finishing, return_exceptions=True)
        for executor in (self._tick, self._prepare, self._finish):
            executor.shutdown()
        self.bank.detach()

    def snapshot(self) -> dict[str, float]:
        """The counters now."""
        self.metrics.images_waiting = len(self._waiting) + self._num_preparing
        self.metrics.images_running = len(self._running)
        self.metrics.backlog_s = self.backlog_s()
        return self.metrics.snapshot()

    def backlog_s(self) -> float:
        """Seconds until all that waits and runs is denoised, by the mean step so far."""
        images = [*self._waiting.values(), *self._running.values()]
        steps = sum(image.num_steps_left for image in images) / max(self.config.row_buckets)
        return steps * self.metrics.step_seconds / max(1, self.metrics.denoise_steps)

    def fullness(self) -> float:
        """Rows in use over those of the largest bucket."""
        return len(self._running) / max(self.config.row_buckets)

    def retry_after_s(self) -> int:
        """When a refused caller may come again: once the backlog is done, within two minutes."""
        return max(1, min(120, math.ceil(self.backlog_s())))

    # Admission and preparation

    def _admit(self, num_images: int) -> None:
        num_queued = self._num_preparing + len(self._waiting)
        if num_queued + num_images > self.config.max_queued_images:
            self.metrics.images_refused += num_images
            found = f"{num_queued} of {self.config.max_queued_images} images waiting"
            after = self.retry_after_s()
            raise QueueFullError("the queue is full", found, f"try again in {after} s", after)
        self.metrics.images_accepted += num_images
        self._num_preparing += num_images

    def _ready(self, order: Order) -> tuple[HostAdapter | None, list[Row]]:
        """The adapter in host memory and each image's row at its first noise."""
        adapter = self.loader.load(order.parts) if order.parts else None
        scale = order.parts[0].scale if len(order.parts) == 1 else 1.0
        zero_snr = any(part.record.zero_terminal_snr for part in order.parts)
        rows = []
        for sample in order.samples:
            request = replace(
                sample,
                adapter_scale=sample.adapter_scale * scale,
                zero_terminal_snr=sample.zero_terminal_snr or zero_snr,
            )
            cond, uncond = (
                self.prompts.encode(prompt, adapter, request.adapter_scale)
                for prompt in (request.prompt, request.negative_prompt)
            )
            rows.append(start_row(self.base, request, cond=cond, uncond=uncond))
        return adapter, rows

    def _enqueue(
        self, order: Order, index: int, adapter: HostAdapter | None, row: Row, arrived: float
    ) -> Flight:
        done: asyncio.Future[GeneratedImage] = asyncio.get_running_loop().create_future()
        key = next(self._keys)
        image = Flight(key, order, index, row, adapter, done, arrived, time.monotonic())
        self._waiting[key] = image
        return image

    # The loop

    def _start_loop(self) -> None:
        if self._loop is None:
            self._loop = asyncio.create_task(self._run(), name="raybooth-engine")
            self._loop.add_done_callback(self._on_loop_end)
        self._wake.set()

    def _on_loop_end(self, loop: asyncio.Task[None]) -> None:
        """Whatever ended the loop: nobody may wait for a dead one."""
        self._failure = asyncio.CancelledError() if loop.cancelled() else loop.exception()
        found = f"{type(self._failure).__name__}: {self._failure}"
        self._fail_all(ServingError("the engine has stopped", found, "try again"))

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            self._drop_cancelled()
            await self._clear_deleted()
            if self._waiting or self._running:
                await self._advance()
            else:
                self.slots.check_integrity()
                await self._wake.wait()

    async def _advance(self) -> None:
        """Let images join, then do one denoise step of one size."""
        waiting = [WaitingImage(i.key, i.size, i.adapter_name) for i in self._waiting.values()]
        plan = plan_joins(waiting, self._in_batch(), self.slots, max(self.config.row_buckets))
        self.slots = plan.table
        joining = [(join, self._waiting.pop(join.key)) for join in plan.joins]
        for join, image in joining:
            image.row.slot = join.slot
            self._running[image.key] = image
            self._count_join(join, image)
        broken = await self._on(self._tick, lambda: self._write_slots(joining))
        for _, image in joining:
            if image.adapter_name in broken:
                self._fail(self._leave(image.key), broken[image.adapter_name])
        for name in broken:
            self.slots = self.slots.forget(name)
        step = plan_step(self._in_batch(), self.config.row_buckets, self._last_turns)
        if step is None:
            return
        images = [self._running[key] for key in step.keys]
        started = time.perf_counter()
        await self._on(self._tick, lambda: self._denoise(step, images))
        self._last_turns[step.size] = self.metrics.denoise_steps
        self.metrics.record_step(self._report(step, images, time.perf_counter() - started))
        for image in images:
            image.stepped(step.bucket)
            if image.row.index == 1:
                self.metrics.first_steps += 1
                self.metrics.first_step_seconds += time.monotonic() - image.arrived
            if image.row.done:
                self._leave(image.key)
                task = asyncio.create_task(self._finish_image(image))
                self._finishing.add(task)
                task.add_done_callback(self._finishing.discard)

    async def _clear_deleted(self) -> None:
        """Zero the slots of deleted subjects; those with rows in flight when these are done."""
        deleted, self._deleted = self._deleted, []
        for subject_id in deleted:
            held = [r for r in self.slots.residents if is_of(r.adapter, subject_id)]
            for resident in held:
                if resident.num_pins == 0:
                    self.slots = self.slots.forget(resident.adapter)
                    self._in_slots.pop(resident.slot, None)
                    await self._on(self._tick, partial(self.bank.clear, resident.slot))
            if any(resident.num_pins for resident in held):
                self._deleted.append(subject_id)

    def _drop_cancelled(self) -> None:
        for key in [key for key, image in self._waiting.items() if image.done.done()]:
            del self._waiting[key]
            self.metrics.images_cancelled += 1
        for key in [key for key, image in self._running.items() if image.done.done()]:
            self._leave(key)
            self.metrics.images_cancelled += 1

    def _in_batch(self) -> list[RunningImage]:
        return [
            RunningImage(i.key, i.size, i.adapter_name, i.num_steps_left)
            for i in self._running.values()
        ]

    def _leave(self, key: int) -> Flight:
        image = self._running.pop(key)
        if image.adapter_name is not None:
            self.slots = self.slots.unpin(image.adapter_name)
        return image

    # On the tick's thread

    def _write_slots(self, joining: Sequence[tuple[Join, Flight]]) -> dict[str, RayBoothError]:
        """Write the adapters that are not in the bank yet; those that do not fit, by name."""
        broken: dict[str, RayBoothError] = {}
        for join, image in joining:
            if image.adapter is not None and join.is_load:
                try:
                    self.bank.write(join.slot, image.adapter.tensors)
                    self._in_slots[join.slot] = image.adapter
                except RayBoothError as error:
                    self.bank.clear(join.slot)
                    broken[image.adapter.name] = error
        return broken

    def _denoise(self, step: StepPlan, images: Sequence[Flight]) -> None:
        denoise_step(self.base, self.bank, [image.row for image in images], step.bucket)

    # Leaving

    async def _finish_image(self, image: Flight) -> None:
        try:
            picture = await self._on(self._finish, lambda: self._encode(image))
        except RayBoothError as error:
            self._fail(image, error)
            return
        if not image.done.done():
            self.metrics.images_finished += 1
            image.done.set_result(GeneratedImage(picture, image.finished()))

    def _encode(self, image: Flight) -> bytes:
        if not torch.isfinite(image.row.latents_CHW).all():
            do = "lower guidance_scale or adapter_scale; if it stays, train the subject again"
            raise ServingError("the image came out as no numbers", "NaN or infinity", do)
        return image.order.encode(row_image(self.base, image.row), image.finished())

    def _fail(self, image: Flight, error: RayBoothError) -> None:
        if not image.done.done():
            self.metrics.images_failed += 1
            image.done.set_exception(error)

    def _fail_all(self, error: ServingError) -> None:
        for image in [*self._waiting.values(), *self._running.values()]:
            self._fail(image, error)
        self._waiting.clear()
        self._running.clear()
        self.slots = SlotTable(self.config.num_slots)

    def _count_join(self, join: Join, image: Flight) -> None:
        self.metrics.images_joined += 1
        self.metrics.queue_wait_seconds += time.monotonic() - image.since
        if join.adapter is not None:
            self.metrics.slot_loads += join.is_load
            self.metrics.slot_hits += not join.is_load
            self.metrics.slot_evictions += join.evicted is not None

    def _report(self, step: StepPlan, images: Sequence[Flight], seconds: float) -> StepReport:
        return StepReport(
            num_rows=len(images),
            bucket=step.bucket,
            num_subjects=len({image.adapter_name for image in images}),
            seconds=seconds,
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_images=sum(1 / image.row.plan.num_steps for image in images),
            size="x".join(str(side * self.base.vae_scale_factor) for side in reversed(step.size)),
        )

    async def _on(self, executor: ThreadPoolExecutor, act: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(executor, act)
