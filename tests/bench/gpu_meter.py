"""Seconds, bytes and FLOP/s of one device, as `tests.bench.gpu` measures them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "B200": 2250,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
}
"""Dense bf16 with fp32 sums, by the device's name; from NVIDIA's data sheets."""


class Meter:
    """Measures what runs on `cuda`, or on a CPU, where nothing counts bytes and FLOP/s."""

    def __init__(self, device: str, *, row_s: float) -> None:
        """`row_s` seconds go to each row of the table."""
        self._device = device
        self.row_s = row_s

    def rate(
        self, step: Callable[[], object], *, warm_up: int = 2, seconds: float | None = None
    ) -> float:
        """Calls of `step` a second."""
        for _ in range(warm_up):
            step()
        self.wait()
        started, calls = time.perf_counter(), 0
        lasts = self.row_s if seconds is None else seconds
        while not calls or time.perf_counter() - started < lasts:
            step()
            calls += 1
            self.wait()
        return calls / (time.perf_counter() - started)

    def start_counting(self) -> int | None:
        """Bytes allocated now, the peak set to them; None where nothing counts."""
        if self._device == "cpu":
            return None
        self.free()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        """The most that was allocated since `start_counting`."""
        return torch.cuda.max_memory_allocated()

    def room_bytes(self) -> int:
        """What is free on the device; a CPU is not asked."""
        return torch.cuda.mem_get_info()[0] if self._device != "cpu" else 1 << 62

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self._device != "cpu":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self._device != "cpu":
            torch.cuda.empty_cache()

    def mfu(self, flops_per_s: float) -> str:
        """Share of the device's published peak; `-` where that is not known."""
        if self._device == "cpu":
            return "-"
        name = torch.cuda.get_device_name()
        peaks = [peak for word, peak in PEAK_TFLOPS.items() if word in name]
        return f"{flops_per_s / (peaks[0] * 1e12):.0%}" if peaks else "-"
