from __future__ import annotations

from raybooth_serving.metrics import EngineMetrics, StepReport


def test_ratios_are_of_what_was_counted_and_observers_are_told() -> None:
    told: list[StepReport] = []
    metrics = EngineMetrics(observers=[told.append])
    reports = [StepReport(3, 4, 2, 0.5, 1, 3), StepReport(1, 4, 1, 0.25, 0, 1)]
    for report in reports:
        metrics.record_step(report)
    counted = metrics.snapshot()
    assert told == reports
    assert counted["denoise_steps"] == 2
    assert counted["mixed_steps"] == 1
    assert counted["rows_per_step"] == 2.0
    assert counted["occupancy"] == 0.5
    assert counted["mean_step_seconds"] == 0.375
    assert "observers" not in counted


def test_nothing_counted_is_zero_everywhere() -> None:
    assert set(EngineMetrics().snapshot().values()) == {0}
