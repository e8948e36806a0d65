from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from raybooth_serving.scale.spill import BALANCE, spill_order


@pytest.mark.parametrize(
    ("loads", "num_images", "num_free", "order"),
    [
        ({}, 1, 4, "abc"),
        ({"a": 3}, 1, 4, "abc"),  # one more fits the batch
        ({"a": 4}, 1, 4, "bca"),  # the batch is full
        ({"a": 4, "b": 4}, 1, 4, "cab"),
        ({"a": 40, "b": 40, "c": 40}, 1, 4, "abc"),  # all alike: within 1.25 of the mean
        ({"a": 52, "b": 40, "c": 30}, 1, 4, "bca"),
        ({"a": 9, "b": 8, "c": 7}, 10, 4, "cba"),  # nobody has room: the least loaded first
        ({"z": 99}, 1, 1, "abc"),  # of a replica that is gone
    ],
)
def test_order(loads: dict[str, int], num_images: int, num_free: int, order: str) -> None:
    assert "".join(spill_order("abc", loads, num_images, num_free)) == order


def test_no_replica_is_over_its_bound_whoever_is_hot() -> None:
    rng = random.Random(0)
    loads: Counter[int] = Counter()
    for count in range(1, 400):
        ring = rng.sample(range(5), 5) if rng.random() < 0.2 else [0, 1, 2, 3, 4]
        loads[spill_order(ring, loads, 1, 1)[0]] += 1
        assert max(loads.values()) <= math.ceil(BALANCE * count / 5)


def test_a_cool_subject_stays_where_it_is() -> None:
    loads = {"a": 2, "b": 7, "c": 0}
    assert spill_order("bac", loads, 1, 8)[0] == "b"
