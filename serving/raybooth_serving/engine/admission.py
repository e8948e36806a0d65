"""Whether the queue has places for an order; pure Python.

They are shared by dynamic thresholds (Choudhury and Hahne 1998, for packet switches): a tenant may
hold at most THRESHOLD times as many places as are free, two thirds of the queue if it is alone. So
whoever fills it leaves room for who asks for little. Without API keys nobody can be told apart, and
all places are everybody's.
"""

from __future__ import annotations

from collections.abc import Mapping

THRESHOLD = 2.0


def no_place(
    num_images: int, tenant: str, waiting: Mapping[str, int], num_queued: int, capacity: int
) -> str | None:
    """Why `num_images` more of `tenant` (empty: keys are off) find no place, or None: they do.

    `waiting` counts the images that wait, by tenant; `num_queued` is all that has places.
    """
    num_free = capacity - num_queued
    if num_images > num_free:
        return f"{num_queued} of {capacity} images"
    num_held = waiting.get(tenant, 0)
    if tenant and num_held + num_images > THRESHOLD * num_free:
        return f"{num_held} images of this API key and {num_queued} of {capacity} in all"
    return None
