from __future__ import annotations

import pytest

from raybooth_serving.engine.forecast import Work, backlog_s, expected_s
from raybooth_serving.engine.scheduler import Lane
from raybooth_serving.engine.step_profile import ENOUGH_SAMPLES, StepProfile

SMALL, LARGE = Lane((8, 8)), Lane((16, 16))


def _profile() -> StepProfile:
    """0.1 s a step of four rows at SMALL, 0.4 s at LARGE; 2 rows a tenth less each than half."""
    profile = StepProfile((2, 4), 1.0)
    for lane, seconds in ((SMALL, 0.1), (LARGE, 0.4)):
        for bucket, part in ((2, 0.6), (4, 1.0)):
            for _ in range(1 + ENOUGH_SAMPLES):
                profile.record(bucket, lane.pixels, seconds * part)
    return profile


def _expected(
    order: list[Work], others: list[Work], profile: StepProfile, is_crowded: bool = False
) -> float | None:
    return expected_s(order, others, profile, is_crowded=is_crowded)


def _work(tenant: str, num_images: int, num_steps: int = 10, lane: Lane = SMALL) -> list[Work]:
    return [Work(tenant, lane, 2, num_steps)] * num_images


def test_nothing_is_forecast_before_a_step_was_measured() -> None:
    assert _expected(_work("a", 1), [], StepProfile((2, 4), 1.0)) is None
    assert backlog_s(_work("a", 1), StepProfile((2, 4), 1.0)) is None


def test_an_image_alone_takes_its_own_steps() -> None:
    assert _expected(_work("a", 1), [], _profile()) == pytest.approx(0.6)
    assert _expected(_work("a", 1, lane=LARGE), [], _profile()) == pytest.approx(2.4)


def test_beside_one_other_in_the_batch_steps_are_wider_and_nothing_waits() -> None:
    assert _expected(
        _work("a", 1), _work("a", 1, 500), _profile(), is_crowded=False
    ) == pytest.approx(1.0)


def test_an_own_backlog_comes_first() -> None:
    found = _expected(_work("a", 1), _work("a", 9), _profile())
    assert found == pytest.approx(10 * 2 * 10 * 0.1 / 4)


def test_the_backlog_of_another_tenant_counts_no_more_than_ones_own_share() -> None:
    """a's two images beside a thousand of b's: a gets every other place."""
    found = _expected(_work("a", 2), _work("b", 1000), _profile())
    assert found == pytest.approx(2 * 2 * 2 * 10 * 0.1 / 4)


def test_another_size_takes_turns() -> None:
    beside = _expected(_work("a", 1), _work("b", 2, 1000, LARGE), _profile())
    assert beside == pytest.approx(2 * 0.6)
    short = _expected(_work("a", 1), _work("b", 2, 1, LARGE), _profile())
    assert short == pytest.approx(0.6 + 2 * 2 * 0.1)


def test_a_pinned_bucket_runs_at_its_own_step_time() -> None:
    pinned = Lane((8, 8), 4)
    assert _expected(_work("a", 1, lane=pinned), [], _profile(), is_crowded=False) == pytest.approx(
        1.0
    )


def test_where_others_wait_for_a_slot_the_pace_counts_and_not_the_room_in_the_bucket() -> None:
    profile, others = _profile(), _work("a", 1, 50)
    profile.record_pace(SMALL.pixels, 0.2)
    found = _expected(_work("a", 1), others, profile, is_crowded=True)
    assert found == pytest.approx((50 + 10) * 2 * 0.2)
