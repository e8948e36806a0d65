"""seconds(bucket, pixels) of a denoise step, as measured; and how many rows a step should have.

Rows are added to a step while they pay: each wider bucket must denoise at least a tenth more rows
a second than the widest that paid before it, stay within the seconds that a step may take, and
fit the device's memory. What was not measured yet is tried. Every PROBE_EVERY steps of a size the
next wider bucket is tried again, so one bad moment is not remembered for ever. Pure Python.

Pixels are those of a row's latents; a bucket is the rows of a denoiser call.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from itertools import pairwise
from math import log
from statistics import median

PAYS = 1.1
"""Rows a second of a wider bucket over those of a narrower one."""

NUM_SAMPLES = 5
"""The last ones; the first step of a shape is a warm-up and is not kept."""

ENOUGH_SAMPLES = 3
"""To judge by."""

PACE_STEPS = 10
"""Over which a pace is remembered."""

PROBE_EVERY = 256
LEAST_ROWS = 2
"""An image with guidance must always fit."""


class StepProfile:
    """What denoise steps have cost so far, by bucket and pixels."""

    def __init__(self, buckets: Sequence[int], max_step_s: float) -> None:
        self.buckets = tuple(buckets)
        self.max_step_s = max_step_s
        self._samples: dict[tuple[int, int], deque[float]] = {}
        self._steps = Counter[int]()
        self._pace: dict[int, float] = {}
        self._too_large: float = float("inf")

    def record(self, bucket: int, pixels: int, seconds: float) -> None:
        """A step was done."""
        self._steps[pixels] += 1
        samples = self._samples.get((bucket, pixels))
        if samples is None:
            self._samples[bucket, pixels] = deque(maxlen=NUM_SAMPLES)
        else:
            samples.append(seconds)

    def record_pace(self, pixels: int, row_seconds: float) -> None:
        """What a row of a step took while others waited, with all that is between two steps.

        Where there are fewer slots than subjects, steps have fewer rows than they could.
        """
        pace = self._pace.get(pixels, row_seconds)
        self._pace[pixels] = pace + (row_seconds - pace) / PACE_STEPS

    def run_out(self, bucket: int, pixels: int) -> None:
        """A step did not fit the device's memory; none of as many pixels is tried again."""
        self._too_large = min(self._too_large, bucket * pixels)

    def seconds(self, bucket: int, pixels: int) -> float | None:
        """Of one step; in proportion to the nearest that was measured; None before any was."""
        if self._samples.get((bucket, pixels)):
            return median(self._samples[bucket, pixels])
        measured = [shape for shape, samples in self._samples.items() if samples]
        if not measured:
            return None
        work = bucket * pixels
        nearest = min(measured, key=lambda shape: abs(log(shape[0] * shape[1] / work)))
        return median(self._samples[nearest]) * work / (nearest[0] * nearest[1])

    def row_limit(self, pixels: int) -> int:
        """The widest bucket that a step of this size should have."""
        limit = self._paying(pixels)
        if self._steps[pixels] % PROBE_EVERY >= PROBE_EVERY - ENOUGH_SAMPLES:
            wider = [b for b in self.buckets if b > limit and b * pixels < self._too_large]
            return min(wider, default=limit)
        return limit

    def row_seconds(self, pixels: int) -> float | None:
        """Of one row in one step: its pace of late, or that of the widest bucket of this size."""
        if pixels in self._pace:
            return self._pace[pixels]
        limit = self._paying(pixels)
        seconds = self.seconds(limit, pixels)
        return None if seconds is None else seconds / limit

    def _paying(self, pixels: int) -> int:
        usable = [bucket for bucket in self.buckets if bucket >= LEAST_ROWS]
        limit = judged = usable[0]
        for narrower, bucket in pairwise(usable):
            if bucket * pixels >= self._too_large or self._is_slow(bucket, pixels):
                break
            if self._is_judged(narrower, pixels):
                judged = narrower
            if self._stops_paying(judged, bucket, pixels):
                break
            limit = bucket
        return limit

    def _stops_paying(self, narrower: int, bucket: int, pixels: int) -> bool:
        if not (self._is_judged(narrower, pixels) and self._is_judged(bucket, pixels)):
            return False
        return self._rate(bucket, pixels) < PAYS * self._rate(narrower, pixels)

    def _is_slow(self, bucket: int, pixels: int) -> bool:
        """Over the budget; what is not measured may seem twice over, for wide rows are cheaper."""
        seconds = self.seconds(bucket, pixels)
        leeway = 1 if self._samples.get((bucket, pixels)) else 2
        return seconds is not None and seconds > leeway * self.max_step_s

    def _is_judged(self, bucket: int, pixels: int) -> bool:
        return len(self._samples.get((bucket, pixels), ())) >= ENOUGH_SAMPLES

    def _rate(self, bucket: int, pixels: int) -> float:
        """Rows a second at best: what else runs on the machine only ever adds seconds."""
        return bucket / min(self._samples[bucket, pixels])
