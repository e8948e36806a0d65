from __future__ import annotations

from raybooth_serving.metrics import EngineMetrics, StepReport, merge


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


def test_engines_as_one_add_up_and_keep_their_ratios() -> None:
    busy, idle = EngineMetrics(), EngineMetrics()
    busy.record_step(StepReport(8, 8, 2, 0.5, 0, 8, num_images=0.4))
    idle.record_step(StepReport(1, 4, 1, 0.1, 0, 1, num_images=0.1))
    idle.backlog_s = 2.0
    total = merge([busy.snapshot(), idle.snapshot()])
    assert total["replicas"] == 2
    assert total["denoised_rows"] == 9
    assert total["images_denoised"] == 0.5
    assert total["backlog_s"] == 2.0
    assert total["rows_per_step"] == 4.5
    assert total["occupancy"] == 0.75, "of the sums, not the mean of 1 and 0.25"
    assert merge([])["occupancy"] == 0.0
