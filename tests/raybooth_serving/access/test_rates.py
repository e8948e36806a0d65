"""Token buckets with given clocks."""

from __future__ import annotations

import pytest

from raybooth_serving.access.rates import Rates

A, B = "a", "b"


def test_a_bucket_starts_full_and_tells_how_long_to_wait() -> None:
    rates = Rates()
    assert rates.take(A, 60, 60, 0.0) == 0.0
    assert rates.take(A, 1, 60, 0.0) == pytest.approx(1.0)
    assert rates.take(A, 5, 60, 2.0) == pytest.approx(3.0)
    assert rates.take(A, 5, 60, 5.0) == 0.0, "what was promised holds"
    assert rates.take(A, 1, 60, 5.0) > 0


def test_a_refused_request_takes_nothing() -> None:
    rates = Rates()
    rates.take(A, 6, 6, 0.0)
    waits = [rates.take(A, 3, 6, 10.0) for _ in range(5)]
    assert waits == pytest.approx([20.0] * 5)


def test_no_more_than_a_minute_is_saved_up() -> None:
    rates = Rates()
    rates.take(A, 10, 10, 0.0)
    assert rates.take(A, 10, 10, 10_000.0) == 0.0
    assert rates.take(A, 1, 10, 10_000.0) == pytest.approx(6.0)


def test_over_any_hour_a_key_gets_its_rate_and_one_bucket() -> None:
    rates, made = Rates(), 0
    for second in range(3600):
        while rates.take(A, 3, 12, float(second)) == 0.0:
            made += 3
    assert 12 * 60 <= made <= 12 * 61 + 3


def test_more_than_a_minute_s_images_are_paid_back_first() -> None:
    rates = Rates()
    assert rates.take(A, 10, 4, 0.0) == 0.0
    assert rates.take(A, 1, 4, 0.0) == pytest.approx(7 * 15.0)
    assert rates.take(A, 10, 4, 0.0) == pytest.approx(10 * 15.0), "a full bucket is enough"
    assert rates.take(A, 10, 4, 150.0) == 0.0


def test_less_than_one_image_a_minute() -> None:
    rates = Rates()
    assert rates.take(A, 1, 0.5, 0.0) == 0.0
    assert rates.take(A, 1, 0.5, 0.0) == pytest.approx(120.0)
    assert rates.take(A, 1, 0.5, 120.0) == 0.0


def test_keys_do_not_share() -> None:
    rates = Rates()
    assert rates.take(A, 5, 5, 0.0) == 0.0
    assert rates.take(B, 5, 5, 0.0) == 0.0
    assert rates.take(A, 1, 5, 0.0) > 0


def test_what_was_not_made_is_given_back() -> None:
    rates = Rates()
    rates.take(A, 4, 4, 0.0)
    rates.give_back(A, 4)
    rates.give_back(A, 4)
    assert rates.take(A, 4, 4, 0.0) == 0.0
    assert rates.take(A, 1, 4, 0.0) > 0, "never above a full bucket"


def test_a_changed_rate_counts_at_once() -> None:
    rates = Rates()
    rates.take(A, 1, 600, 0.0)
    assert rates.take(A, 2, 2, 0.0) == 0.0
    assert rates.take(A, 1, 2, 0.0) == pytest.approx(30.0)


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    rates = Rates()
    rates.take(A, 6, 6, 100.0)
    assert rates.take(A, 1, 6, 50.0) == pytest.approx(10.0)
    assert rates.take(A, 1, 6, 105.0) == pytest.approx(5.0)
