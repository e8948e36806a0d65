"""Seeded arrivals, a clock of CPU seconds, and what became of each request.

On a shared machine a wall clock measures the neighbours. Here time is what this process has
computed, all its threads together, and idle time until the next arrival is skipped: on a core of
its own, to the same work, the seconds would be those of a wall clock.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: an image of one subject."""

    at_s: float
    subject: int
    seed: int


@dataclass(frozen=True, slots=True)
class Served:
    """What became of it; both seconds count from its arrival."""

    arrival: Arrival
    first_step_s: float
    """Until its first denoise step was done: admission."""

    done_s: float
    picture: bytes


@dataclass(frozen=True, slots=True)
class Ran:
    """All requests of one turn, and the CPU seconds that they took together."""

    served: list[Served]
    busy_s: float


class CpuClock:
    """Seconds that this process has computed since the clock was made, and those skipped."""

    def __init__(self) -> None:
        self._origin = time.process_time()
        self._skipped_s = 0.0

    def now(self) -> float:
        """CPU seconds and skipped seconds."""
        return self.busy() + self._skipped_s

    def busy(self) -> float:
        """CPU seconds."""
        return time.process_time() - self._origin

    def skip_to(self, at_s: float) -> None:
        """Nothing is to be done until then."""
        self._skipped_s += max(0.0, at_s - self.now())


def poisson(rate_per_s: float, num: int, subjects: int, seed: int) -> list[Arrival]:
    """`num` arrivals with exponential gaps, each of any subject with equal chance."""
    draw = random.Random(seed)
    at_s, arrivals = 0.0, []
    for index in range(num):
        at_s += draw.expovariate(rate_per_s)
        arrivals.append(Arrival(at_s, draw.randrange(subjects), index))
    return arrivals


def bursts(rate_per_s: float, num: int, size: int, subjects: int, seed: int) -> list[Arrival]:
    """`num` arrivals, `size` at a time, the bursts evenly spaced; subjects as in `poisson`."""
    draw = random.Random(seed)
    return [
        Arrival(index // size * size / rate_per_s, draw.randrange(subjects), index)
        for index in range(num)
    ]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
