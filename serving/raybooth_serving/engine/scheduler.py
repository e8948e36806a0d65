"""Which images join the batch and which are denoised next: pure decisions over values.

Tenants get equal shares of the engine, counted in denoiser rows x denoise steps x latent pixels
(shares.py); the images of one tenant go in order of arrival. An image that cannot join (no row of
its lane free, no slot for its adapter) never holds up those of other lanes or slots. No image
starves: one that waits for rows keeps its lane closed to those behind it, one that finds every
slot in use reserves the slot that drains first, and lanes take turns by the seconds they use.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raybooth_serving.engine.shares import Shares
from raybooth_serving.engine.slots import NULL_SLOT, SlotTable

Size = tuple[int, int]
"""(height, width) of an image's latents."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Images that may share a denoiser call: of one size, and pinned to one bucket or to none."""

    size: Size
    bucket: int | None = None

    @property
    def pixels(self) -> int:
        """Of one row's latents."""
        return self.size[0] * self.size[1]


@dataclass(frozen=True, slots=True)
class WaitingImage:
    """An image that is not yet in the batch."""

    key: int
    lane: Lane
    adapter: str | None
    tenant: str = ""
    num_rows: int = 1
    """Of a denoiser call: 2 with guidance."""

    num_steps: int = 1

    @property
    def cost(self) -> float:
        """Denoiser rows x denoise steps x latent pixels."""
        return float(self.num_rows * self.num_steps * self.lane.pixels)


@dataclass(frozen=True, slots=True)
class RunningImage:
    """An image with rows in the batch."""

    key: int
    lane: Lane
    adapter: str | None
    num_steps_left: int
    tenant: str = ""
    num_rows: int = 1


@dataclass(frozen=True, slots=True)
class Join:
    """An image enters the batch; `is_load` when its adapter must first be written to the slot."""

    key: int
    slot: int
    adapter: str | None
    is_load: bool
    evicted: str | None = None


@dataclass(frozen=True, slots=True)
class JoinPlan:
    """Who joins now, in order; slots (joined images pinned) and shares afterwards."""

    joins: tuple[Join, ...]
    table: SlotTable
    shares: Shares


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One denoise step: images of one lane, padded to `bucket` rows."""

    lane: Lane
    keys: tuple[int, ...]
    bucket: int


RowLimit = Callable[[Lane], int]
"""The most denoiser rows of one call in a lane."""


def plan_joins(
    waiting: Sequence[WaitingImage],
    running: Sequence[RunningImage],
    table: SlotTable,
    limit: RowLimit,
    shares: Shares,
) -> JoinPlan:
    """Images of `waiting` (in order of arrival) that join now, at most `limit` rows of a lane."""
    queues: dict[str, deque[WaitingImage]] = {}
    for image in waiting:
        queues.setdefault(image.tenant, deque()).append(image)
    shares = shares.among(queues)
    rows = Counter[Lane]()
    for runner in running:
        rows[runner.lane] += runner.num_rows
    limits = {lane: limit(lane) for lane in {image.lane for image in waiting}}
    closed: set[Lane] = set()
    drain = _steps_until_free(running)
    reserved: dict[str, str] = {}
    joins: list[Join] = []
    turns = [(shares.of(tenant), queue[0].key, tenant) for tenant, queue in queues.items()]
    heapq.heapify(turns)
    while turns:
        _, _, tenant = heapq.heappop(turns)
        image = queues[tenant].popleft()
        if image.lane not in closed and rows[image.lane] + image.num_rows > limits[image.lane]:
            closed.add(image.lane)
        if image.lane not in closed:
            placed = _placed(image, table, reserved, drain)
            if placed is not None:
                join, table = placed
                joins.append(join)
                rows[image.lane] += image.num_rows
                shares = shares.grant(tenant, image.cost)
        if queues[tenant]:
            heapq.heappush(turns, (shares.of(tenant), queues[tenant][0].key, tenant))
    return JoinPlan(tuple(joins), table, shares)


def plan_step(
    running: Sequence[RunningImage], buckets: Sequence[int], limit: RowLimit, turns: Shares
) -> StepPlan | None:
    """The next denoise step: the lane that has had least time, as many of its images as fit.

    Images are taken in the order in which they joined; others stay in the batch for a later step.
    """
    if not running:
        return None
    lanes = dict.fromkeys(image.lane for image in running)
    lane = min(lanes, key=lambda lane: turns.of(lane))
    most = limit(lane)
    keys, num_rows = list[int](), 0
    for image in running:
        if image.lane == lane and (not keys or num_rows + image.num_rows <= most):
            keys.append(image.key)
            num_rows += image.num_rows
    return StepPlan(lane, tuple(keys), lane.bucket or choose_bucket(num_rows, buckets))


def keep_places(before: Sequence[int], keys: Sequence[int]) -> tuple[int, ...]:
    """`keys` in the places that they had: who is new, or else who was last, fills a gap.

    The bank gathers adapters again only for rows that changed.
    """
    kept = [key for key in before if key in keys]
    new = [key for key in keys if key not in before]
    placed: list[int] = []
    for key in before:
        if key in kept:
            placed.append(key)
        elif new:
            placed.append(new.pop(0))
        elif kept[-1:] and kept[-1] not in placed:
            placed.append(kept.pop())
    return (*dict.fromkeys(placed), *new)


def count_step(
    turns: Shares, running: Sequence[RunningImage], lane: Lane, seconds: float
) -> Shares:
    """`turns` after a step of `lane`: its seconds over the tenants' shares that the lane holds.

    A tenant with images in several lanes has one share, cut over them.
    """
    pairs = {(image.tenant, image.lane) for image in running}
    num_lanes = Counter(tenant for tenant, _ in pairs)
    weight = sum(1 / num_lanes[tenant] for tenant, where in pairs if where == lane)
    return turns.among(where for _, where in pairs).grant(lane, seconds / weight)


def choose_bucket(num_rows: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `num_rows`."""
    return min(bucket for bucket in buckets if bucket >= num_rows)


_JUST_JOINED = 1 << 30


def _placed(
    image: WaitingImage, table: SlotTable, reserved: dict[str, str], drain: dict[str, int]
) -> tuple[Join, SlotTable] | None:
    """The image in a slot, pinned; None when it must wait for one."""
    if image.adapter is None:
        return Join(image.key, NULL_SLOT, None, is_load=False), table
    if image.adapter in reserved.values():
        return None
    placement = table.place(image.adapter)
    if placement is None:
        if image.adapter not in reserved:
            _reserve(image.adapter, reserved, drain)
        return None
    drain[image.adapter] = _JUST_JOINED
    is_load = not placement.is_loaded
    join = Join(image.key, placement.slot, image.adapter, is_load, placement.evicted)
    return join, placement.table.pin(image.adapter)


def _steps_until_free(running: Sequence[RunningImage]) -> dict[str, int]:
    steps: dict[str, int] = {}
    for image in running:
        if image.adapter is not None:
            steps[image.adapter] = max(steps.get(image.adapter, 0), image.num_steps_left)
    return steps


def _reserve(adapter: str, reserved: dict[str, str], drain: dict[str, int]) -> None:
    free = [name for name in drain if name not in reserved.values()]
    if free:
        reserved[adapter] = min(free, key=lambda name: drain[name])
