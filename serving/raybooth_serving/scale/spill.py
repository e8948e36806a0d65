"""Consistent hashing with bounded loads: a hot subject spills to the next replica of the ring.

Mirrokni, Thorup and Zadimoghaddam, SODA 2018 (arXiv 1608.01350): no replica carries more than
`balance` times the mean load, and what it cannot take goes on along the ring. Pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

Replica = TypeVar("Replica")

BALANCE = 1.25
"""The paper's c = 1 + epsilon: closer to 1 is more even, and moves more subjects."""


def spill_order(
    ring: Sequence[Replica], loads: Mapping[Replica, int], num_images: int, num_free: int
) -> list[Replica]:
    """The replicas of `ring`, those that may take `num_images` more first, in the ring's order.

    `loads` are images in flight. Up to `num_free` of them share one batch anyway, so that a
    replica with fewer is never hot. Those over their bound come last, the least loaded first.
    """
    total = sum(loads.get(replica, 0) for replica in ring) + num_images
    bound = max(num_free, math.ceil(BALANCE * total / max(1, len(ring))))
    cool = [replica for replica in ring if loads.get(replica, 0) + num_images <= bound]
    hot = [replica for replica in ring if replica not in cool]
    return cool + sorted(hot, key=lambda replica: loads.get(replica, 0))
