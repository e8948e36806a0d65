"""Denoise steps by the clock: each step of the engine, and every bucket once before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.sampler import Row, SampleRequest, denoise_step, start_row
from raybooth_serving.engine.step_profile import ENOUGH_SAMPLES, StepProfile


def timed_step(base: Base, bank: Bank, rows: Sequence[Row], bucket: int) -> float:
    """Seconds of one denoise step, until the device has done it.

    Raises torch.OutOfMemoryError; rows are then as they were, and the device's cache is empty.
    """
    started = time.perf_counter()
    try:
        denoise_step(base, bank, rows, bucket)
        if base.device.type == "cuda":
            torch.cuda.current_stream(base.device).synchronize()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise
    return time.perf_counter() - started


def calibrate(base: Base, bank: Bank, profile: StepProfile) -> None:
    """Measure each bucket at the base's own size, narrowest first, while wider ones pay."""
    for bucket in profile.buckets:
        guidance = 1.0 if bucket == 1 else 2.0
        row = start_row(base, SampleRequest("", num_inference_steps=100, guidance_scale=guidance))
        pixels = row.latents_CHW[0].numel()
        if bucket > profile.row_limit(pixels):
            return
        try:
            for _ in range(1 + ENOUGH_SAMPLES):
                profile.record(bucket, pixels, timed_step(base, bank, [row], bucket))
        except torch.OutOfMemoryError:
            profile.run_out(bucket, pixels)
            return
