"""The denoising loop of one replica: images join and leave the batch at any denoise step.

    admit -> prepare (adapter to host memory, prompts encoded) -> wait -> join -> denoise steps
          -> leave -> decode and encode

The loop's task does one denoise step at a time on a thread of its own (the tick). Preparing and
decoding have their own threads, so that nothing but slot writes and denoiser calls is ever on
the tick. The scheduler decides; this file acts.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import NoReturn, TypeVar

import torch

from raybooth.config import EngineConfig
from raybooth.errors import RayBoothError, ServingError
from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.lora import find_sites
from raybooth.store import Store
from raybooth_serving.engine.admission import no_place
from raybooth_serving.engine.decoding import Decoder
from raybooth_serving.engine.flight import Flight
from raybooth_serving.engine.forecast import Work, backlog_s, expected_s
from raybooth_serving.engine.loader import Loader
from raybooth_serving.engine.orders import GeneratedImage, Order
from raybooth_serving.engine.preparation import Preparation
from raybooth_serving.engine.prompts import PromptCache
from raybooth_serving.engine.residency import Residency
from raybooth_serving.engine.scheduler import (
    Join,
    Lane,
    RunningImage,
    StepPlan,
    count_step,
    keep_places,
    plan_joins,
    plan_step,
)
from raybooth_serving.engine.shares import Shares
from raybooth_serving.engine.slots import SlotTable
from raybooth_serving.engine.step_profile import StepProfile
from raybooth_serving.engine.timing import calibrate, timed_step
from raybooth_serving.errors import DeadlineError, QueueFullError, too_late
from raybooth_serving.metrics import EngineMetrics, StepReport

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
            dtype=base.dtype,
        )
        self.residency = Residency(config.num_slots)
        self.profile = StepProfile(config.row_buckets, config.max_step_s)
        if config.calibrate:
            calibrate(base, self.bank, self.profile)
        self._shares, self._turns = Shares(), Shares()
        self._keys = count()
        self._preparing: dict[int, list[Work]] = {}
        self._waiting: dict[int, Flight] = {}
        self._running: dict[int, Flight] = {}
        self._places: tuple[int, ...] = ()
        """Keys of the images of the last step, in the places of their rows."""

        self._wake = asyncio.Event()
        self._step_ended = time.perf_counter()
        self._loop: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._tick = ThreadPoolExecutor(1, "denoise")
        self._preparation = Preparation(
            base, self.bank, self.loader, self.prompts, most_rows=config.row_buckets[-1]
        )
        self._decoder = Decoder(base, self._succeed, self._fail)

    async def generate(self, order: Order) -> list[GeneratedImage]:
        """The images of `order`, one for each sample, in their order.

        Raises QueueFullError at once when the queue has no room for all of them, DeadlineError at
        once when they cannot be ready in time and later when they are not, and whatever makes an
        image impossible (RequestError, BaseModelError, StoreError, ServingError). A caller that
        goes away takes its images out of the batch at the next denoise step.
        """
        self.check_health()
        arrived = time.monotonic()
        work = self._preparation.work(order)
        self._admit(order, work)
        deadline = order.deadline
        left_s = None if deadline is None else max(0.0, deadline - arrived)
        try:
            async with asyncio.timeout(left_s):
                return await self._make(order, work, arrived)
        except TimeoutError as error:
            raise too_late() from error

    @property
    def slots(self) -> SlotTable:
        """Which adapter sits in which slot."""
        return self.residency.table

    def forget(self, subject_id: str) -> None:
        """Let go of a deleted subject: in memory at once, in slots as images leave; any thread."""
        self.loader.forget(subject_id)
        self.prompts.forget(subject_id)
        self.residency.forget(subject_id)
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
            await asyncio.gather(self._loop, return_exceptions=True)
        self._tick.shutdown()
        self._preparation.close()
        await self._decoder.close()
        self.bank.detach()

    def snapshot(self) -> dict[str, float]:
        """The counters now."""
        self.metrics.images_waiting = self._waiting_by_tenant().total()
        self.metrics.images_running = len(self._running)
        self.metrics.backlog_s = self.backlog_s()
        return self.metrics.snapshot()

    def backlog_s(self) -> float:
        """Seconds until all that was asked for is denoised, by the step profile."""
        return backlog_s(self._backlog(), self.profile) or 0.0

    def fullness(self) -> float:
        """Rows in use over those of the largest bucket."""
        return sum(i.row.num_rows for i in self._running.values()) / self.config.row_buckets[-1]

    def retry_after_s(self) -> int:
        """When a refused caller may come again: once the backlog is done, within two minutes."""
        return max(1, min(120, math.ceil(self.backlog_s())))

    # Admission and preparation

    def _admit(self, order: Order, work: Sequence[Work]) -> None:
        num_images = len(work)
        beyond = max(0, len(self._running) - self.config.row_buckets[-1])
        waiting = self._waiting_by_tenant()
        num_queued = waiting.total() + self._decoder.num_finishing + beyond
        capacity = self.config.max_queued_images
        if found := no_place(num_images, order.tenant, waiting, num_queued, capacity):
            self._refuse(num_images, found)
        waiting_s = self.backlog_s()
        if waiting_s > self.config.max_backlog_s:
            self._refuse(num_images, f"{waiting_s:.0f} s of denoise steps")
        if order.deadline is not None and work:
            left_s, after_s = order.deadline - time.monotonic(), self._decoder.seconds
            is_crowded = any(image.lane == work[0].lane for image in self._waiting.values())
            needed_s = expected_s(work, self._backlog(), self.profile, is_crowded=is_crowded)
            if needed_s is not None and needed_s + after_s > left_s:
                found = f"about {needed_s + after_s:.1f} s, {left_s:.1f} s left"
                alone_s = expected_s(work, (), self.profile, is_crowded=False)
                if alone_s is not None and alone_s + after_s <= left_s:
                    self._refuse(num_images, found)
                self.metrics.images_refused += num_images
                do = "allow more time, or ask for fewer or smaller images"
                raise DeadlineError("the images cannot be ready in time", found, do)
        self.metrics.images_accepted += num_images

    def _refuse(self, num_images: int, found: str) -> NoReturn:
        self.metrics.images_refused += num_images
        after = self.retry_after_s()
        raise QueueFullError("the queue is full", found, f"try again in {after} s", after)

    async def _make(self, order: Order, work: list[Work], arrived: float) -> list[GeneratedImage]:
        images: list[Flight] = []
        key = next(self._keys)
        self._preparing[key] = work
        try:
            try:
                ready = await self._preparation.ready(order, self.residency.adapters)
                self.check_health()
            except RayBoothError:
                self.metrics.images_failed += len(work)
                raise
            finally:
                del self._preparing[key]
            for index, row in enumerate(ready.rows):
                image = Flight(next(self._keys), order, index, row, ready, arrived)
                images.append(image)
                self._waiting[image.key] = image
            self._start_loop()
            return list(await asyncio.gather(*(image.done for image in images)))
        finally:
            for image in images:
                image.done.cancel()
            self._wake.set()

    def _waiting_by_tenant(self) -> Counter[str]:
        preparing = Counter(item.tenant for work in self._preparing.values() for item in work)
        return preparing + Counter(image.order.tenant for image in self._waiting.values())

    def _backlog(self) -> list[Work]:
        flights = (*self._waiting.values(), *self._running.values())
        begun = [Work(i.order.tenant, i.lane, i.row.num_rows, i.num_steps_left) for i in flights]
        return [*(item for work in self._preparing.values() for item in work), *begun]

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
        error = ServingError("the engine has stopped", found, "try again")
        for image in [*self._waiting.values(), *self._running.values()]:
            self._fail(image, error)
        self._waiting.clear()
        self._running.clear()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            self._drop_ended()
            for slot in self.residency.free_deleted():
                await self._on_tick(partial(self.bank.clear, slot))
            if self._waiting or self._running:
                await self._advance()
            else:
                self.slots.check_integrity()
                await self._wake.wait()
                self._step_ended = time.perf_counter()

    async def _advance(self) -> None:
        """Let images join, then do one denoise step of one lane."""
        waiting = [image.waiting for image in self._waiting.values()]
        plan = plan_joins(waiting, self._in_batch(), self.slots, self._row_limit, self._shares)
        self.residency.begin(plan)
        self._shares = plan.shares
        joined = [(join, self._join(join)) for join in plan.joins]
        running = self._in_batch()
        step = plan_step(running, self.config.row_buckets, self._row_limit, self._turns)
        assert step is not None, "images wait, but none can join an empty batch"
        self._places = keep_places(self._places, step.keys)
        images = [self._running[key] for key in self._places]
        seconds = await self._on_tick(lambda: self._step(joined, images, step.bucket))
        if seconds is None:
            self._run_out(step, images)
            return
        self.profile.record(step.bucket, step.lane.pixels, seconds)
        self._turns = count_step(self._turns, running, step.lane, seconds)
        report = self._report(step, images, seconds)
        self.metrics.record_step(report)
        began, self._step_ended = self._step_ended, time.perf_counter()
        if self._waiting:
            row_s = (self._step_ended - began) / report.num_rows
            self.profile.record_pace(step.lane.pixels, row_s)
        for image in images:
            image.stepped(step.bucket)
            if image.row.index == 1:
                self.metrics.first_steps += 1
                self.metrics.first_step_seconds += time.monotonic() - image.arrived
            partial_index = image.partial_index()
            if partial_index is not None:
                self._decoder.show(image, partial_index)
            if image.row.done:
                self._leave(image.key)
                self._decoder.finish(image)

    def _drop_ended(self) -> None:
        """Images whose caller is gone, that have failed, or that cannot be ready in time."""
        for image in [*self._waiting.values(), *self._running.values()]:
            if not image.done.done() and image.is_late(self.profile):
                self._fail(image, too_late())
            if image.done.done():
                self.metrics.images_cancelled += image.done.cancelled()
                if self._waiting.pop(image.key, None) is None:
                    self._leave(image.key)

    def _join(self, join: Join) -> Flight:
        image = self._waiting.pop(join.key)
        self._running[image.key] = image
        image.row.slot = join.slot
        self.metrics.images_joined += 1
        self.metrics.queue_wait_seconds += time.monotonic() - image.since
        adapter = image.ready.adapter
        if adapter is not None:
            self.residency.join(join, adapter)
            self.metrics.slot_loads += join.is_load
            self.metrics.slot_hits += not join.is_load
            self.metrics.slot_evictions += join.evicted is not None
        return image

    def _leave(self, key: int) -> None:
        """Out of the batch; its tenant gets back what it did not use."""
        image = self._running.pop(key)
        self._shares = self._shares.refund(image.order.tenant, image.waiting.cost)
        if image.adapter_name is not None:
            self.residency.leave(image.adapter_name)

    def _row_limit(self, lane: Lane) -> int:
        return lane.bucket or self.profile.row_limit(lane.pixels)

    def _in_batch(self) -> list[RunningImage]:
        return [image.running for image in self._running.values()]

    def _run_out(self, step: StepPlan, images: Sequence[Flight]) -> None:
        """No memory for the step: the next ones have fewer rows, where there can be fewer."""
        self.metrics.steps_out_of_memory += 1
        self.profile.run_out(step.bucket, step.lane.pixels)
        if self._row_limit(step.lane) < step.bucket:
            return
        found, do = (
            f"{step.bucket} rows of {step.lane.pixels} latent pixels",
            "ask for a smaller one",
        )
        for image in images:
            self._fail(image, ServingError("the image does not fit the memory", found, do))

    # On the tick's thread

    async def _on_tick(self, act: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._tick, act)

    def _step(
        self, joined: Sequence[tuple[Join, Flight]], images: Sequence[Flight], bucket: int
    ) -> float | None:
        """Write the adapters that are not in the bank yet, denoise; None when memory runs out."""
        for join, image in joined:
            if join.is_load:
                image.ready.write(self.bank, join.slot)
        try:
            return timed_step(self.base, self.bank, [image.row for image in images], bucket)
        except torch.OutOfMemoryError:
            return None

    # Leaving

    def _succeed(self, image: Flight, picture: bytes) -> None:
        if not image.done.done():
            self.metrics.images_finished += 1
            image.done.set_result(GeneratedImage(picture, image.finished()))

    def _fail(self, image: Flight, error: BaseException) -> None:
        if not image.done.done():
            self.metrics.images_failed += 1
            image.done.set_exception(error)

    def _report(self, step: StepPlan, images: Sequence[Flight], seconds: float) -> StepReport:
        return StepReport(
            num_rows=sum(image.row.num_rows for image in images),
            bucket=step.bucket,
            num_subjects=len({image.adapter_name for image in images}),
            seconds=seconds,
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_images=sum(1 / image.row.plan.num_steps for image in images),
            size="x".join(str(s * self.base.vae_scale_factor) for s in reversed(step.lane.size)),
        )
