from __future__ import annotations

from collections.abc import Callable

import pytest

from raybooth_serving.engine.step_profile import ENOUGH_SAMPLES, PROBE_EVERY, StepProfile

BUCKETS = (1, 2, 4, 8, 16, 32)
PIXELS = 4096


def _measured(
    seconds: Callable[[int], float], buckets: tuple[int, ...] = BUCKETS, budget_s: float = 1.0
) -> StepProfile:
    profile = StepProfile(BUCKETS, budget_s)
    for bucket in buckets:
        for _ in range(1 + ENOUGH_SAMPLES):
            profile.record(bucket, PIXELS, seconds(bucket))
    return profile


def test_nothing_is_known_before_a_step_was_measured() -> None:
    profile = StepProfile(BUCKETS, 1.0)
    assert profile.seconds(2, PIXELS) is None
    assert profile.row_seconds(PIXELS) is None
    assert profile.row_limit(PIXELS) == 32
    profile.record(2, PIXELS, 30.0)  # the first of a shape is a warm-up
    assert profile.seconds(2, PIXELS) is None


def test_a_step_is_the_median_of_the_last_few() -> None:
    profile = _measured(lambda bucket: 0.1)
    profile.record(4, PIXELS, 9.0)
    assert profile.seconds(4, PIXELS) == 0.1
    for _ in range(3):
        profile.record(4, PIXELS, 0.3)
    assert profile.seconds(4, PIXELS) == 0.3


def test_what_was_not_measured_is_in_proportion_to_the_nearest() -> None:
    profile = _measured(lambda bucket: 0.01 * bucket, buckets=(2, 8))
    assert profile.seconds(16, PIXELS) == pytest.approx(0.16)
    assert profile.seconds(2, 4 * PIXELS) == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        (lambda bucket: 0.01, 32),  # rows are free
        (lambda bucket: 0.01 * bucket, 2),  # rows pay nothing
        (lambda bucket: 0.01 * max(8, bucket), 8),  # a knee
        (lambda bucket: 0.01 * bucket**0.9, 2),  # 7 % a doubling
        (lambda bucket: 0.01 * bucket**0.8, 32),  # 15 % a doubling
    ],
)
def test_rows_are_added_while_they_pay_a_tenth(seconds: Callable[[int], float], limit: int) -> None:
    assert _measured(seconds).row_limit(PIXELS) == limit


@pytest.mark.parametrize(("budget_s", "limit"), [(10.0, 32), (0.9, 16), (0.3, 4), (0.01, 2)])
def test_a_step_stays_within_its_seconds_but_an_image_always_fits(
    budget_s: float, limit: int
) -> None:
    profile = _measured(lambda bucket: 0.1 * bucket**0.7, budget_s=budget_s)
    assert profile.row_limit(PIXELS) == limit


def test_a_wider_bucket_is_not_tried_where_it_would_be_far_over_the_budget() -> None:
    profile = _measured(lambda bucket: 0.9, buckets=(2,))
    assert profile.row_limit(PIXELS) == 4
    assert profile.row_limit(16 * PIXELS) == 2


def test_memory_that_ran_out_is_remembered_for_all_sizes() -> None:
    profile = _measured(lambda bucket: 0.01)
    profile.run_out(16, PIXELS)
    assert profile.row_limit(PIXELS) == 8
    assert profile.row_limit(4 * PIXELS) == 2
    assert profile.row_limit(PIXELS // 2) == 16


def test_one_bad_moment_is_not_remembered_for_ever() -> None:
    profile = _measured(lambda bucket: 0.01 if bucket < 8 else 0.5)
    seen = set()
    for _ in range(3 * PROBE_EVERY):
        limit = profile.row_limit(PIXELS)
        seen.add(limit)
        profile.record(limit, PIXELS, 0.01)
    assert seen == {4, 8, 16, 32}
    assert profile.row_limit(PIXELS) == 32


def test_what_does_not_pay_costs_few_probes() -> None:
    profile = _measured(lambda bucket: 0.01 * bucket)
    wide = 0
    for _ in range(4 * PROBE_EVERY):
        limit = profile.row_limit(PIXELS)
        wide += limit > 2
        profile.record(limit, PIXELS, 0.01 * limit)
    assert wide <= 4 * ENOUGH_SAMPLES


def test_the_pace_is_what_rows_took_of_late() -> None:
    profile = _measured(lambda bucket: 0.01)
    assert profile.row_seconds(PIXELS) == pytest.approx(0.01 / 32)
    profile.record_pace(PIXELS, 0.2)
    assert profile.row_seconds(PIXELS) == 0.2
    for _ in range(60):
        profile.record_pace(PIXELS, 0.1)
    assert profile.row_seconds(PIXELS) == pytest.approx(0.1, rel=0.01)
