"""When images will be ready, by the step profile: what admission and Retry-After are computed from.

Under equal shares (scheduler.py) the last of a tenant's images has been served once everything in
the engine has, or as many times its own work as there are tenants, whichever is sooner; and it
never ends before its own denoise steps. None: nothing has been measured yet. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raybooth_serving.engine.scheduler import Lane, choose_bucket
from raybooth_serving.engine.step_profile import StepProfile


@dataclass(frozen=True, slots=True)
class Work:
    """Denoise steps that an image still needs."""

    tenant: str
    lane: Lane
    num_rows: int
    num_steps: int


def backlog_s(work: Sequence[Work], profile: StepProfile) -> float | None:
    """Seconds of steps until all of it is done, in well filled buckets."""
    seconds = 0.0
    for item in work:
        row_s = _row_s(item.lane, profile)
        if row_s is None:
            return None
        seconds += row_s * item.num_rows * item.num_steps
    return seconds


def expected_s(
    order: Sequence[Work], others: Sequence[Work], profile: StepProfile, *, is_crowded: bool
) -> float | None:
    """Seconds until the last image of `order` is denoised, `others` being in the engine already.

    All images of an order have one tenant and one lane; `is_crowded` where others wait in it.
    """
    lane, tenant = order[0].lane, order[0].tenant
    limit = lane.bucket or profile.row_limit(lane.pixels)
    rows = sum(work.num_rows for work in (*order, *others) if work.lane == lane)
    bucket = lane.bucket or choose_bucket(min(rows, limit), profile.buckets)
    step_s = profile.seconds(bucket, lane.pixels)
    all_s = backlog_s([*order, *others], profile)
    mine_s = backlog_s([*order, *(work for work in others if work.tenant == tenant)], profile)
    beside_s = backlog_s([work for work in others if work.lane != lane], profile)
    if step_s is None or all_s is None or mine_s is None or beside_s is None:
        return None
    steps_s = step_s * max(work.num_steps for work in order)
    num_others = len({work.lane for work in others} - {lane})
    alone_s = steps_s + min(num_others * steps_s, beside_s)
    if rows <= limit and not is_crowded:
        return alone_s
    num_tenants = len({work.tenant for work in (*order, *others)})
    return max(alone_s, min(all_s, num_tenants * mine_s))


def _row_s(lane: Lane, profile: StepProfile) -> float | None:
    """Of one row in one step; a pinned lane's bucket is as wide as it is pinned."""
    if lane.bucket is None:
        return profile.row_seconds(lane.pixels)
    seconds = profile.seconds(lane.bucket, lane.pixels)
    return None if seconds is None else seconds / lane.bucket
