from __future__ import annotations

from typing import Any

from raybooth_serving.metrics import EngineMetrics, StepReport
from raybooth_serving.scale.prometheus import Exporter, GatewayCounts


class Told:
    """In the place of a metric of Ray: what it was told, by its tags."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], list[float]] = {}

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        self.values.setdefault(tuple((tags or {}).values()), []).append(value)

    set = observe = inc


def spied(metrics: EngineMetrics) -> Any:
    exporter: Any = Exporter("tiny", metrics)
    for table in (exporter.counters, exporter.steps, exporter.gauges):
        table.update({name: Told() for name in table})
    exporter.seconds = Told()
    return exporter


def test_each_step_is_told_by_bucket_and_size_and_counters_by_what_they_gained() -> None:
    metrics = EngineMetrics()
    exporter = spied(metrics)
    metrics.slot_hits, metrics.backlog_s = 3, 1.5
    metrics.record_step(StepReport(6, 8, 2, 0.25, 0, 3, num_images=0.3, size="64x32"))
    metrics.slot_hits = 5
    metrics.record_step(StepReport(1, 1, 1, 0.05, 0, 1, num_images=0.1, size="32x32"))
    big, small = ("tiny", "8", "64x32"), ("tiny", "1", "32x32")
    assert exporter.steps["denoised_rows"].values == {big: [6], small: [1]}
    assert exporter.steps["bucket_rows"].values == {big: [8], small: [1]}
    assert exporter.steps["images_denoised"].values == {big: [0.3], small: [0.1]}
    assert exporter.steps["step_seconds"].values == {big: [0.25], small: [0.05]}
    assert exporter.seconds.values == {big: [0.25], small: [0.05]}
    assert exporter.counters["slot_hits"].values == {("tiny",): [3, 2]}
    assert exporter.counters["slot_loads"].values == {}
    assert exporter.gauges["backlog_s"].values == {("tiny",): [1.5, 1.5]}


def test_what_changes_without_a_step_is_told_by_a_refresh() -> None:
    metrics = EngineMetrics()
    exporter = spied(metrics)
    metrics.images_refused, metrics.images_waiting = 4, 2
    exporter.refresh()
    exporter.refresh()
    assert exporter.counters["images_refused"].values == {("tiny",): [4]}
    assert exporter.gauges["images_waiting"].values == {("tiny",): [2, 2]}


def test_requests_that_found_the_store_away_are_told_once() -> None:
    counts: Any = GatewayCounts()
    counts.away = Told()
    for total in (0, 2, 2, 3):
        counts.tell_away(total)
    assert counts.away.values == {(): [2, 1]}
