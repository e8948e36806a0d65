"""Which images join the batch and which are denoised next: pure decisions over values.

Images are served in order of arrival, but one that cannot join (no row of its size free, no slot
for its adapter) never holds up those that can. No image starves: sizes take turns, and an image
that finds every slot in use reserves the slot that drains first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raybooth_serving.slots import NULL_SLOT, SlotTable

Size = tuple[int, int]
"""(height, width) of an image's latents."""


@dataclass(frozen=True, slots=True)
class WaitingImage:
    """An image that is not yet in the batch."""

    key: int
    size: Size
    adapter: str | None


@dataclass(frozen=True, slots=True)
class RunningImage:
    """An image with a row in the batch."""

    key: int
    size: Size
    adapter: str | None
    num_steps_left: int


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
    """Who joins now, in order, and the slot table afterwards (joined rows pinned)."""

    joins: tuple[Join, ...]
    table: SlotTable


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One denoise step: rows of one size, padded to `bucket`."""

    size: Size
    keys: tuple[int, ...]
    bucket: int


def plan_joins(
    waiting: Sequence[WaitingImage],
    running: Sequence[RunningImage],
    table: SlotTable,
    max_rows: int,
) -> JoinPlan:
    """Images of `waiting` (in order of arrival) that join now, at most `max_rows` of each size."""
    rows = Counter(image.size for image in running)
    drain = _steps_until_free(running)
    reserved: dict[str, str] = {}
    joins: list[Join] = []
    for image in waiting:
        if rows[image.size] >= max_rows:
            continue
        if image.adapter is None:
            joins.append(Join(image.key, NULL_SLOT, None, is_load=False))
            rows[image.size] += 1
            continue
        if image.adapter in reserved.values():
            continue
        placement = table.place(image.adapter)
        if placement is None:
            if image.adapter not in reserved:
                _reserve(image.adapter, reserved, drain)
            continue
        table = placement.table.pin(image.adapter)
        rows[image.size] += 1
        drain[image.adapter] = _JUST_JOINED
        is_load = not placement.is_loaded
        joins.append(Join(image.key, placement.slot, image.adapter, is_load, placement.evicted))
    return JoinPlan(tuple(joins), table)


def plan_step(
    running: Sequence[RunningImage],
    buckets: Sequence[int],
    last_turns: Mapping[Size, int],
) -> StepPlan | None:
    """The next denoise step: the size whose last turn is longest ago, all of its rows."""
    if not running:
        return None
    sizes = dict.fromkeys(image.size for image in running)
    size = min(sizes, key=lambda size: last_turns.get(size, -1))
    keys = tuple(image.key for image in running if image.size == size)
    return StepPlan(size, keys, choose_bucket(len(keys), buckets))


def choose_bucket(num_rows: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `num_rows`."""
    return min(bucket for bucket in buckets if bucket >= num_rows)


_JUST_JOINED = 1 << 30


def _steps_until_free(running: Sequence[RunningImage]) -> dict[str, int]:
    steps: dict[str, int] = {}
    for image in running:
        if image.adapter is not None:
            steps[image.adapter] = max(steps.get(image.adapter, 0), image.num_steps_left)
    return steps


def _reserve(adapter: str, reserved: dict[str, str], drain: Mapping[str, int]) -> None:
    free = [name for name in drain if name not in reserved.values()]
    if free:
        reserved[adapter] = min(free, key=lambda name: drain[name])
