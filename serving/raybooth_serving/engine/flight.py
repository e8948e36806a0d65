"""One image on its way through the engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from raybooth.model.sampler import Row
from raybooth_serving.engine.orders import Event, Finished, GeneratedImage, Order, Progress
from raybooth_serving.engine.preparation import Ready
from raybooth_serving.engine.scheduler import Lane, RunningImage, WaitingImage, choose_bucket
from raybooth_serving.engine.step_profile import StepProfile


@dataclass(eq=False, slots=True)
class Flight:
    """Image `index` of `order`; `done` is its caller's."""

    key: int
    order: Order
    index: int
    row: Row
    ready: Ready
    arrived: float
    """time.monotonic() when its order came in."""

    done: asyncio.Future[GeneratedImage] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    since: float = field(default_factory=time.monotonic)
    """When it began to wait."""

    trace: list[tuple[int, int]] = field(default_factory=list)
    """(bucket, denoise steps in it)."""

    partials: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def adapter_name(self) -> str | None:
        """Name and content of the adapter that its slot holds."""
        return None if self.ready.adapter is None else self.ready.adapter.name

    @property
    def lane(self) -> Lane:
        """Whom it may share a denoiser call with."""
        height, width = self.row.latents_CHW.shape[1:]
        return Lane((height, width), self.order.bucket)

    @property
    def num_steps_left(self) -> int:
        """Denoise steps to do."""
        return self.row.plan.num_steps - self.row.index

    @property
    def waiting(self) -> WaitingImage:
        """As the scheduler sees it before it joins."""
        row, tenant = self.row, self.order.tenant
        return WaitingImage(
            self.key, self.lane, self.adapter_name, tenant, row.num_rows, self.num_steps_left
        )

    @property
    def running(self) -> RunningImage:
        """As the scheduler sees it in the batch."""
        row, tenant = self.row, self.order.tenant
        return RunningImage(
            self.key, self.lane, self.adapter_name, self.num_steps_left, tenant, row.num_rows
        )

    def is_late(self, profile: StepProfile) -> bool:
        """Whether it cannot meet its deadline any more, even alone in the narrowest bucket."""
        if self.order.deadline is None:
            return False
        bucket = self.order.bucket or choose_bucket(self.row.num_rows, profile.buckets)
        step_s = profile.seconds(bucket, self.lane.pixels) or 0.0
        return time.monotonic() + self.num_steps_left * step_s > self.order.deadline

    def partial_index(self) -> int | None:
        """Which partial image is due after the denoise steps that are done, if any."""
        wanted, num_steps = self.order.partial_images, self.row.plan.num_steps
        due = [num_steps * (place + 1) // (wanted + 1) for place in range(wanted)]
        steps = sorted({step for step in due if 0 < step < num_steps})
        return steps.index(self.row.index) if self.row.index in steps else None

    def stepped(self, bucket: int) -> None:
        """Note a denoise step in `bucket` and tell it."""
        if self.trace and self.trace[-1][0] == bucket:
            self.trace[-1] = bucket, self.trace[-1][1] + 1
        else:
            self.trace.append((bucket, 1))
        self.tell(Progress(self.index, self.row.index, self.row.plan.num_steps))

    def finished(self) -> Finished:
        """What is known of the image now."""
        return Finished(self.index, self.row.request.seed, self.adapter_name, tuple(self.trace))

    def tell(self, event: Event) -> None:
        """Hand `event` to the order's listener, whose errors are not the engine's."""
        if self.order.on_event is not None and not self.done.done():
            asyncio.get_running_loop().call_soon(self.order.on_event, event)
