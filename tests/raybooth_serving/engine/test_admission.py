"""Places in the queue: bounded, and shared so that the modest are let in beside the greedy."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from raybooth_serving.engine.admission import no_place

CAPACITY = 16


@pytest.mark.parametrize(
    ("num_images", "tenant", "waiting", "num_queued", "finds_one"),
    [
        (16, "", {}, 0, True),
        (17, "", {}, 0, False),
        (1, "", {"": 15}, 15, True),
        (1, "", {"": 16}, 16, False),
        (16, "a", {}, 0, True),
        (1, "a", {"b": 15}, 15, True),  # the last place goes to who has none
        (1, "a", {"a": 9, "b": 2}, 11, True),
        (2, "a", {"a": 9, "b": 2}, 11, False),  # five free, eleven held
        (1, "a", {"a": 11}, 11, False),  # two thirds, though nobody else is there
        (1, "a", {"b": 16}, 16, False),
    ],
)
def test_places(
    num_images: int, tenant: str, waiting: dict[str, int], num_queued: int, finds_one: bool
) -> None:
    reason = no_place(num_images, tenant, waiting, num_queued, CAPACITY)
    assert (reason is None) == finds_one
    assert reason is None or f"{num_queued} of {CAPACITY}" in reason


def test_who_asks_for_little_is_let_in_beside_who_asks_for_much() -> None:
    """Twice what the engine makes, nine tenths of it from one tenant; equal shares out."""
    chance, waiting = random.Random(0), Counter[str]()
    asked, let_in = Counter[str](), Counter[str]()
    for tick in range(4000):
        tenant = "greedy" if chance.random() < 0.9 else "modest"
        asked[tenant] += 1
        if no_place(1, tenant, waiting, waiting.total(), CAPACITY) is None:
            waiting[tenant] += 1
            let_in[tenant] += 1
        if tick % 2:
            served = min(
                (name for name in waiting if waiting[name]), key=lambda name: waiting[name]
            )
            waiting[served] -= 1
    assert let_in["modest"] / asked["modest"] > 0.99
    assert let_in.total() / asked.total() > 0.49, "no place is kept empty for nothing"
