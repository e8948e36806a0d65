from __future__ import annotations

import pytest

from tests.bench.arrivals import CpuClock, bursts, poisson, quantile


def test_arrivals_are_a_function_of_the_seed_and_come_at_their_rate() -> None:
    arrivals = poisson(2.0, 4000, 4, seed=1)
    assert arrivals == poisson(2.0, 4000, 4, seed=1)
    assert arrivals != poisson(2.0, 4000, 4, seed=2)
    assert arrivals[-1].at_s == pytest.approx(2000, rel=0.1)
    assert {arrival.subject for arrival in arrivals} == {0, 1, 2, 3}


def test_bursts_come_together_at_the_same_rate() -> None:
    arrivals = bursts(2.0, 12, 4, 3, seed=1)
    assert [arrival.at_s for arrival in arrivals] == [0.0] * 4 + [2.0] * 4 + [4.0] * 4


def test_the_clock_counts_computing_and_what_is_skipped() -> None:
    clock = CpuClock()
    clock.skip_to(100.0)
    before = clock.now()
    sum(range(200_000))
    assert 100.0 <= before < clock.now() < 101.0
    clock.skip_to(50.0)
    assert clock.now() < 101.0


@pytest.mark.parametrize(("share", "value"), [(0.5, 2.0), (0.75, 3.0), (0.99, 4.0), (0.0, 1.0)])
def test_a_quantile_is_one_of_the_values(share: float, value: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == value
