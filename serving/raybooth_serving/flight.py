"""One image on its way through the engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from raybooth.model.sampler import Row
from raybooth_serving.loader import HostAdapter
from raybooth_serving.orders import Event, Finished, GeneratedImage, Order, Progress
from raybooth_serving.scheduler import Size


@dataclass(eq=False, slots=True)
class Flight:
    """Image `index` of `order`; `done` is its caller's."""

    key: int
    order: Order
    index: int
    row: Row
    adapter: HostAdapter | None
    done: asyncio.Future[GeneratedImage]
    arrived: float
    since: float
    """time.monotonic() when its order came, and when it began to wait."""

    trace: list[tuple[int, int]] = field(default_factory=list)
    """(bucket, denoise steps in it)."""

    @property
    def adapter_name(self) -> str | None:
        """Name and content of the adapter that its slot holds."""
        return None if self.adapter is None else self.adapter.name

    @property
    def size(self) -> Size:
        """(height, width) of its latents."""
        height, width = self.row.latents_CHW.shape[1:]
        return height, width

    @property
    def num_steps_left(self) -> int:
        """Denoise steps to do."""
        return self.row.plan.num_steps - self.row.index

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
