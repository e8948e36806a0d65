"""An engine's counters as Prometheus metrics of Ray, which adds the replica and its deployment.

Ray writes `ray_raybooth_<name>`, counters with `_total`; cluster/grafana-dashboard.json draws them.
Of a histogram's values Ray keeps the bins alone, so that its sum is a guess: means are of counters.
"""

from __future__ import annotations

from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from raybooth_serving.metrics import EngineMetrics, StepReport

COUNTERS = {
    "images_accepted": "Images taken into the queue.",
    "images_refused": "Images refused because the queue was full.",
    "images_finished": "Images answered.",
    "images_failed": "Images that ended in an error.",
    "images_cancelled": "Images whose caller left.",
    "images_joined": "Images that entered the batch.",
    "queue_wait_seconds": "Seconds that images waited to enter the batch.",
    "first_steps": "Images that did their first denoise step.",
    "first_step_seconds": "Seconds from arrival to the end of the first denoise step.",
    "slot_hits": "Images whose adapter was in a slot.",
    "slot_loads": "Adapters written to a slot.",
    "slot_evictions": "Adapters that left their slot for another.",
    "host_hits": "Orders whose adapter was in host memory.",
    "host_loads": "Adapters read from the store.",
    "host_evictions": "Adapters that left host memory for others.",
    "steps_out_of_memory": "Denoise steps that did not fit the device's memory.",
    "prompt_hits": "Prompts whose embedding was in memory.",
    "prompt_encodes": "Prompts encoded.",
}
"""Fields of EngineMetrics that only grow; each is `raybooth_<field>`, by base."""

STEP_COUNTERS = {
    "denoise_steps": "Denoise steps.",
    "denoised_rows": "Rows denoised.",
    "bucket_rows": "Rows of the buckets that they ran in.",
    "images_denoised": "Images denoised, in parts of an image.",
    "step_seconds": "Seconds of denoise steps.",
}
"""By base, bucket and size of the images."""

GAUGES = {
    "images_waiting": "Images in the queue.",
    "images_running": "Images in the batch.",
    "subjects_per_step": "Subjects in the last denoise step.",
    "backlog_s": "Seconds until all that waits and runs would be done.",
    "host_adapters": "Adapters in host memory.",
    "host_bytes": "Host memory of adapters.",
    "prompt_bytes": "Host memory of prompt embeddings.",
}
DURATION = "step_duration_seconds"
AGAIN, AWAY = "requests_again", "store_away_requests"
PREFIX = "raybooth_"
BOUNDS_S = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]


class Exporter:
    """Tells Ray what one engine counts: call it with each step, `refresh` it now and then."""

    def __init__(self, base: str, metrics: EngineMetrics) -> None:
        by_base: dict[str, Any] = {"tag_keys": ("base",)}
        by_step: dict[str, Any] = {"tag_keys": ("base", "bucket", "size")}
        self.base = {"base": base}
        self.metrics = metrics
        self.counters = {n: Counter(PREFIX + n, text, **by_base) for n, text in COUNTERS.items()}
        self.steps = {n: Counter(PREFIX + n, text, **by_step) for n, text in STEP_COUNTERS.items()}
        self.gauges = {n: Gauge(PREFIX + n, text, **by_base) for n, text in GAUGES.items()}
        self.seconds = Histogram(
            PREFIX + DURATION, "Seconds of a denoise step.", boundaries=BOUNDS_S, **by_step
        )
        self._told = dict.fromkeys(COUNTERS, 0.0)
        metrics.observers.append(self)

    def __call__(self, report: StepReport) -> None:
        """A denoise step is done."""
        tags = {**self.base, "bucket": str(report.bucket), "size": report.size}
        values = {
            "denoise_steps": 1,
            "denoised_rows": report.num_rows,
            "bucket_rows": report.bucket,
            "images_denoised": report.num_images,
            "step_seconds": report.seconds,
        }
        for name, value in values.items():
            self.steps[name].inc(value, tags)
        self.seconds.observe(report.seconds, tags)
        self.gauges["subjects_per_step"].set(report.num_subjects, self.base)
        self.refresh()

    def refresh(self) -> None:
        """Counters that gained since, and what waits and runs now."""
        for name, counter in self.counters.items():
            gained = getattr(self.metrics, name) - self._told[name]
            if gained > 0:
                counter.inc(gained, self.base)
                self._told[name] += gained
        for name in GAUGES.keys() - {"subjects_per_step"}:
            self.gauges[name].set(getattr(self.metrics, name), self.base)


class GatewayCounts:
    """What the gateway counts itself."""

    def __init__(self) -> None:
        self.again = Counter(PREFIX + AGAIN, "Requests made again because their replica died.")
        self.away = Counter(PREFIX + AWAY, "Requests that the store could not be asked about.")
        self._told_away = 0

    def tell_away(self, total: int) -> None:
        """So many requests by now found the store away."""
        if total > self._told_away:
            self.away.inc(total - self._told_away)
            self._told_away = total
