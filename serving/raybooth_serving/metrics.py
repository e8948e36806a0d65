"""What an engine counts: plain numbers, kept by the engine's own thread of control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one denoise step was."""

    num_rows: int
    bucket: int
    num_subjects: int
    seconds: float
    num_waiting: int
    num_running: int
    num_images: float = 0.0
    """What the step did of whole images: of each row, one over its number of denoise steps."""

    size: str = ""
    """Of the images in pixels, `WIDTHxHEIGHT`."""


@dataclass(slots=True)
class EngineMetrics:
    """Counters since the engine started; `snapshot()` adds the ratios that people ask for."""

    images_accepted: int = 0
    images_refused: int = 0
    images_finished: int = 0
    images_failed: int = 0
    images_cancelled: int = 0
    images_waiting: int = 0
    images_running: int = 0
    denoise_steps: int = 0
    denoised_rows: int = 0
    bucket_rows: int = 0
    mixed_steps: int = 0
    """Denoise steps whose rows belong to more than one subject."""

    steps_out_of_memory: int = 0
    """Denoise steps that did not fit the device's memory; narrower ones took their place."""

    step_seconds: float = 0.0
    queue_wait_seconds: float = 0.0
    images_joined: int = 0
    first_step_seconds: float = 0.0
    """From the arrival of an order to the end of an image's first denoise step, over all images."""

    first_steps: int = 0
    images_denoised: float = 0.0
    """Whole images by their denoise steps: also those that are not finished yet count in part."""

    backlog_s: float = 0.0
    """Seconds until all that waits and runs would be done."""

    slot_hits: int = 0
    slot_loads: int = 0
    slot_evictions: int = 0
    host_hits: int = 0
    host_loads: int = 0
    host_evictions: int = 0
    host_adapters: int = 0
    host_bytes: int = 0
    prompt_hits: int = 0
    prompt_encodes: int = 0
    prompt_bytes: int = 0
    store_away_requests: int = 0
    """Requests that the store could not be asked about."""

    observers: list[Callable[[StepReport], None]] = field(default_factory=list)

    def record_step(self, report: StepReport) -> None:
        """Count a denoise step and tell the observers."""
        self.denoise_steps += 1
        self.denoised_rows += report.num_rows
        self.bucket_rows += report.bucket
        self.mixed_steps += report.num_subjects > 1
        self.step_seconds += report.seconds
        self.images_denoised += report.num_images
        for observe in self.observers:
            observe(report)

    def snapshot(self) -> dict[str, float]:
        """Counters and means, by name."""
        counted = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name != "observers"
        }
        return {**counted, **_ratios(counted)}


def merge(snapshots: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Snapshots of several engines as one: counters added up, ratios of the sums."""
    total: Counter[str] = Counter()
    for snapshot in snapshots:
        total.update(snapshot)
    return {**EngineMetrics().snapshot(), **total, **_ratios(total), "replicas": len(snapshots)}


def _ratios(counted: Mapping[str, float]) -> dict[str, float]:
    return {
        name: counted[above] / counted[below] if counted[below] else 0.0
        for name, (above, below) in RATIOS.items()
    }


RATIOS = {
    "rows_per_step": ("denoised_rows", "denoise_steps"),
    "occupancy": ("denoised_rows", "bucket_rows"),
    "mean_step_seconds": ("step_seconds", "denoise_steps"),
    "mean_queue_wait_seconds": ("queue_wait_seconds", "images_joined"),
    "mean_first_step_seconds": ("first_step_seconds", "first_steps"),
}
"""What people ask for: one counter over another."""
