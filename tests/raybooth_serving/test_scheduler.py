from __future__ import annotations

import pytest

from raybooth_serving.scheduler import (
    RunningImage,
    WaitingImage,
    choose_bucket,
    plan_joins,
    plan_step,
)
from raybooth_serving.slots import SlotTable

SMALL, LARGE = (8, 8), (16, 16)


def _table(num_slots: int, *pinned: str) -> SlotTable:
    table = SlotTable(num_slots)
    for adapter in pinned:
        placement = table.place(adapter)
        assert placement is not None
        table = placement.table.pin(adapter)
    return table


def test_images_join_in_order_of_arrival_up_to_the_largest_bucket() -> None:
    waiting = [WaitingImage(key, SMALL, None) for key in (5, 3, 9)]
    plan = plan_joins(waiting, [RunningImage(1, SMALL, None, 4)], SlotTable(1), max_rows=3)
    assert [join.key for join in plan.joins] == [5, 3]


def test_a_full_size_does_not_hold_up_another() -> None:
    running = [RunningImage(key, SMALL, None, 4) for key in (1, 2)]
    waiting = [WaitingImage(3, SMALL, None), WaitingImage(4, LARGE, None)]
    plan = plan_joins(waiting, running, SlotTable(1), max_rows=2)
    assert [join.key for join in plan.joins] == [4]


def test_an_adapter_is_loaded_once_for_all_images_that_want_it() -> None:
    waiting = [
        WaitingImage(1, SMALL, "a"),
        WaitingImage(2, SMALL, "a"),
        WaitingImage(3, SMALL, "b"),
    ]
    plan = plan_joins(waiting, [], SlotTable(4), max_rows=8)
    assert [(j.slot, j.is_load) for j in plan.joins] == [(1, True), (1, False), (2, True)]
    assert {r.adapter: r.num_pins for r in plan.table.residents} == {"a": 2, "b": 1}


def test_images_without_a_slot_wait_and_others_pass() -> None:
    running = [RunningImage(1, SMALL, "a", 9)]
    waiting = [WaitingImage(2, SMALL, "b"), WaitingImage(3, SMALL, None)]
    plan = plan_joins(waiting, running, _table(1, "a"), max_rows=8)
    assert [(join.key, join.slot) for join in plan.joins] == [(3, 0)]


def test_the_slot_that_drains_first_is_kept_for_who_waits_for_one() -> None:
    running = [RunningImage(1, SMALL, "a", 9), RunningImage(2, SMALL, "b", 2)]
    waiting = [
        WaitingImage(3, SMALL, "c"),
        WaitingImage(4, SMALL, "b"),
        WaitingImage(5, SMALL, "a"),
    ]
    plan = plan_joins(waiting, running, _table(2, "a", "b"), max_rows=8)
    assert [join.key for join in plan.joins] == [5]


def test_images_before_the_blocked_one_still_join() -> None:
    running = [RunningImage(1, SMALL, "a", 2)]
    waiting = [
        WaitingImage(2, SMALL, "a"),
        WaitingImage(3, SMALL, "b"),
        WaitingImage(4, SMALL, "a"),
    ]
    plan = plan_joins(waiting, running, _table(1, "a"), max_rows=8)
    assert [join.key for join in plan.joins] == [2]


def test_two_blocked_adapters_reserve_two_slots() -> None:
    running = [RunningImage(1, SMALL, "a", 2), RunningImage(2, SMALL, "b", 3)]
    waiting = [WaitingImage(key, SMALL, name) for key, name in enumerate("cdab", 3)]
    plan = plan_joins(waiting, running, _table(2, "a", "b"), max_rows=8)
    assert plan.joins == ()


def test_sizes_take_turns() -> None:
    running = [RunningImage(1, SMALL, None, 4), RunningImage(2, LARGE, None, 4)]
    turns: dict[tuple[int, int], int] = {}
    order = []
    for tick in range(4):
        step = plan_step(running, (1, 2), turns)
        assert step is not None
        turns[step.size] = tick
        order.append(step.size)
    assert order == [SMALL, LARGE, SMALL, LARGE]


def test_a_step_takes_all_rows_of_a_size_in_the_smallest_bucket() -> None:
    running = [RunningImage(key, SMALL, None, 4) for key in (1, 2, 3)]
    step = plan_step(running, (1, 2, 4, 8), {})
    assert step is not None
    assert (step.keys, step.bucket) == ((1, 2, 3), 4)
    assert plan_step([], (1, 2), {}) is None


@pytest.mark.parametrize(("num_rows", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 16), (16, 16)])
def test_bucket(num_rows: int, bucket: int) -> None:
    assert choose_bucket(num_rows, (1, 2, 4, 16)) == bucket


def test_nobody_starves_under_endless_traffic_of_resident_subjects() -> None:
    """Two hot subjects hold both slots for ever; a third one must get in all the same."""
    table = SlotTable(2)
    running: dict[int, RunningImage] = {}
    waiting = [WaitingImage(key, SMALL, "ab"[key % 2]) for key in range(4)]
    arrival, cold_joined = 100, None
    for tick in range(200):
        if tick == 3:
            waiting.append(WaitingImage(99, SMALL, "cold"))
        waiting.append(WaitingImage(arrival, SMALL, "ab"[arrival % 2]))
        arrival += 1
        plan = plan_joins(waiting, list(running.values()), table, max_rows=8)
        table = plan.table
        for join in plan.joins:
            image = next(image for image in waiting if image.key == join.key)
            waiting.remove(image)
            running[image.key] = RunningImage(image.key, SMALL, image.adapter, 10)
            if join.key == 99:
                cold_joined = tick
        for key, row in list(running.items()):
            left = row.num_steps_left - 1
            running[key] = RunningImage(key, SMALL, row.adapter, left)
            if left == 0:
                del running[key]
                assert row.adapter is not None
                table = table.unpin(row.adapter)
        table.check_integrity()
        if cold_joined is not None:
            break
    assert cold_joined is not None
    assert cold_joined <= 30
