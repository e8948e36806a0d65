"""What an engine counts: plain numbers, kept by the engine's own thread of control."""

from __future__ import annotations

from collections.abc import Callable
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

    step_seconds: float = 0.0
    queue_wait_seconds: float = 0.0
    images_joined: int = 0
    slot_hits: int = 0
    slot_loads: int = 0
    slot_evictions: int = 0
    host_hits: int = 0
    host_loads: int = 0
    prompt_hits: int = 0
    prompt_encodes: int = 0
    observers: list[Callable[[StepReport], None]] = field(default_factory=list)

    def record_step(self, report: StepReport) -> None:
        """Count a denoise step and tell the observers."""
        self.denoise_steps += 1
        self.denoised_rows += report.num_rows
        self.bucket_rows += report.bucket
        self.mixed_steps += report.num_subjects > 1
        self.step_seconds += report.seconds
        for observe in self.observers:
            observe(report)

    def snapshot(self) -> dict[str, float]:
        """Counters and means, by name."""
        counted = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name != "observers"
        }
        return {
            **counted,
            "rows_per_step": _ratio(self.denoised_rows, self.denoise_steps),
            "occupancy": _ratio(self.denoised_rows, self.bucket_rows),
            "mean_step_seconds": _ratio(self.step_seconds, self.denoise_steps),
            "mean_queue_wait_seconds": _ratio(self.queue_wait_seconds, self.images_joined),
        }


def _ratio(total: float, count: float) -> float:
    return total / count if count else 0.0
