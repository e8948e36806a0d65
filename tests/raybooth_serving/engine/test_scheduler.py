from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import count, permutations

import pytest

from raybooth_serving.engine.scheduler import (
    Lane,
    RunningImage,
    WaitingImage,
    choose_bucket,
    count_step,
    keep_places,
    plan_joins,
    plan_step,
)
from raybooth_serving.engine.shares import Shares
from raybooth_serving.engine.slots import SlotTable

SMALL, LARGE = Lane((8, 8)), Lane((16, 16))


def _table(num_slots: int, *pinned: str) -> SlotTable:
    table = SlotTable(num_slots)
    for adapter in pinned:
        placement = table.place(adapter)
        assert placement is not None
        table = placement.table.pin(adapter)
    return table


def test_images_join_in_order_of_arrival_up_to_the_largest_bucket() -> None:
    waiting = [WaitingImage(key, SMALL, None) for key in (5, 3, 9)]
    plan = plan_joins(
        waiting, [RunningImage(1, SMALL, None, 4)], SlotTable(1), lambda lane: 3, Shares()
    )
    assert [join.key for join in plan.joins] == [5, 3]


def test_a_full_size_does_not_hold_up_another() -> None:
    running = [RunningImage(key, SMALL, None, 4) for key in (1, 2)]
    waiting = [WaitingImage(3, SMALL, None), WaitingImage(4, LARGE, None)]
    plan = plan_joins(waiting, running, SlotTable(1), lambda lane: 2, Shares())
    assert [join.key for join in plan.joins] == [4]


def test_an_adapter_is_loaded_once_for_all_images_that_want_it() -> None:
    waiting = [
        WaitingImage(1, SMALL, "a"),
        WaitingImage(2, SMALL, "a"),
        WaitingImage(3, SMALL, "b"),
    ]
    plan = plan_joins(waiting, [], SlotTable(4), lambda lane: 8, Shares())
    assert [(j.slot, j.is_load) for j in plan.joins] == [(1, True), (1, False), (2, True)]
    assert {r.adapter: r.num_pins for r in plan.table.residents} == {"a": 2, "b": 1}


def test_images_without_a_slot_wait_and_others_pass() -> None:
    running = [RunningImage(1, SMALL, "a", 9)]
    waiting = [WaitingImage(2, SMALL, "b"), WaitingImage(3, SMALL, None)]
    plan = plan_joins(waiting, running, _table(1, "a"), lambda lane: 8, Shares())
    assert [(join.key, join.slot) for join in plan.joins] == [(3, 0)]


def test_the_slot_that_drains_first_is_kept_for_who_waits_for_one() -> None:
    running = [RunningImage(1, SMALL, "a", 9), RunningImage(2, SMALL, "b", 2)]
    waiting = [
        WaitingImage(3, SMALL, "c"),
        WaitingImage(4, SMALL, "b"),
        WaitingImage(5, SMALL, "a"),
    ]
    plan = plan_joins(waiting, running, _table(2, "a", "b"), lambda lane: 8, Shares())
    assert [join.key for join in plan.joins] == [5]


def test_images_before_the_blocked_one_still_join() -> None:
    running = [RunningImage(1, SMALL, "a", 2)]
    waiting = [
        WaitingImage(2, SMALL, "a"),
        WaitingImage(3, SMALL, "b"),
        WaitingImage(4, SMALL, "a"),
    ]
    plan = plan_joins(waiting, running, _table(1, "a"), lambda lane: 8, Shares())
    assert [join.key for join in plan.joins] == [2]


def test_two_blocked_adapters_reserve_two_slots() -> None:
    running = [RunningImage(1, SMALL, "a", 2), RunningImage(2, SMALL, "b", 3)]
    waiting = [WaitingImage(key, SMALL, name) for key, name in enumerate("cdab", 3)]
    plan = plan_joins(waiting, running, _table(2, "a", "b"), lambda lane: 8, Shares())
    assert plan.joins == ()


def test_sizes_take_turns() -> None:
    running = [RunningImage(1, SMALL, None, 4), RunningImage(2, LARGE, None, 4)]
    turns = Shares()
    order = []
    for _ in range(4):
        step = plan_step(running, (1, 2), lambda lane: 2, turns)
        assert step is not None
        turns = count_step(turns, running, step.lane, 1.0)
        order.append(step.lane)
    assert order == [SMALL, LARGE, SMALL, LARGE]


def test_a_step_takes_all_rows_of_a_size_in_the_smallest_bucket() -> None:
    running = [RunningImage(key, SMALL, None, 4) for key in (1, 2, 3)]
    step = plan_step(running, (1, 2, 4, 8), lambda lane: 8, Shares())
    assert step is not None
    assert (step.keys, step.bucket) == ((1, 2, 3), 4)
    assert plan_step([], (1, 2), lambda lane: 2, Shares()) is None


@pytest.mark.parametrize(
    ("before", "keys", "placed"),
    [
        ((), (1, 2, 3), (1, 2, 3)),
        ((1, 2, 3), (3, 2, 1), (1, 2, 3)),
        ((1, 2, 3), (1, 3, 9), (1, 9, 3)),
        ((1, 2, 3), (2, 3), (3, 2)),
        ((1, 2, 3), (1, 2), (1, 2)),
        ((1, 2), (7, 8, 9), (7, 8, 9)),
    ],
)
def test_images_keep_their_places(
    before: tuple[int, ...], keys: tuple[int, ...], placed: tuple[int, ...]
) -> None:
    assert keep_places(before, keys) == placed


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
        plan = plan_joins(waiting, list(running.values()), table, lambda lane: 8, Shares())
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


# Properties under random arrivals ---------------------------------------------------------------


class _World:
    """Plans joins and steps as the engine does; a step of any lane takes one second a row."""

    def __init__(self, num_slots: int, most_rows: int = 4) -> None:
        self.table, self.shares, self.turns = SlotTable(num_slots), Shares(), Shares()
        self.most_rows, self.now = most_rows, 0.0
        self.waiting: dict[int, WaitingImage] = {}
        self.running: dict[int, RunningImage] = {}
        self.ended: dict[int, float] = {}
        self.served: Counter[str] = Counter()
        self.joined: Counter[str] = Counter()

    def limit(self, lane: Lane) -> int:
        return lane.bucket or self.most_rows

    def arrive(self, image: WaitingImage) -> None:
        self.waiting[image.key] = image

    def tick(self) -> None:
        running = list(self.running.values())
        plan = plan_joins(list(self.waiting.values()), running, self.table, self.limit, self.shares)
        self.table, self.shares = plan.table, plan.shares
        for join in plan.joins:
            image = self.waiting.pop(join.key)
            self.joined[image.tenant] += int(image.cost)
            self.running[image.key] = RunningImage(
                image.key, image.lane, image.adapter, image.num_steps, image.tenant, image.num_rows
            )
        running = list(self.running.values())
        for lane in {image.lane for image in running}:
            rows = sum(image.num_rows for image in running if image.lane == lane)
            assert rows <= self.limit(lane)
        buckets = tuple(range(1, self.most_rows + 1))
        step = plan_step(running, buckets, self.limit, self.turns)
        if step is None:
            assert not self.waiting
            return
        seconds = float(step.bucket)
        self.turns = count_step(self.turns, running, step.lane, seconds)
        self.now += seconds
        for key in step.keys:
            image = self.running[key]
            self.served[image.tenant] += image.num_rows * image.lane.pixels
            left = replace(image, num_steps_left=image.num_steps_left - 1)
            self.running[key] = left
            if left.num_steps_left == 0:
                del self.running[key]
                self.ended[key] = self.now
                if image.adapter is not None:
                    self.table = self.table.unpin(image.adapter)
        self.table.check_integrity()


@pytest.mark.parametrize("seed", range(6))
def test_every_image_ends_whatever_comes(seed: int) -> None:
    """Random tenants, sizes, rows, steps, pinned buckets and more subjects than slots."""
    chance = random.Random(seed)
    world = _World(num_slots=2)
    lanes = [SMALL, SMALL, SMALL, LARGE, Lane((8, 24)), Lane((8, 8), 2), Lane((8, 8), 4)]
    for key in range(300):
        adapter = chance.choice([None, *(f"s{place}" for place in range(6))])
        rows, steps = chance.choice((1, 2)), chance.randint(1, 9)
        tenant = chance.choice("aaab")
        world.arrive(WaitingImage(key, chance.choice(lanes), adapter, tenant, rows, steps))
        for _ in range(chance.choice((0, 0, 1, 3))):
            world.tick()
    for _ in range(20_000):
        if not world.waiting and not world.running:
            break
        world.tick()
    assert len(world.ended) == 300
    assert all(resident.num_pins == 0 for resident in world.table.residents)


@pytest.mark.parametrize("seed", range(4))
def test_tenants_that_both_wait_get_the_same_but_for_an_image_of_each(seed: int) -> None:
    """The bound of start-time fair queueing on what has joined; beside it, of what was served.

    b sends ten times as many images, c much larger ones.
    """
    chance = random.Random(seed)
    world, key = _World(num_slots=1), count()
    largest = {"a": 2 * 9 * 64, "b": 2 * 9 * 64, "c": 2 * 40 * 64}

    def refill() -> None:
        for tenant, most in (("a", 3), ("b", 30), ("c", 3)):
            own = sum(image.tenant == tenant for image in world.waiting.values())
            for _ in range(most - own):
                steps = chance.randint(20, 40) if tenant == "c" else chance.randint(1, 9)
                rows = chance.choice((1, 2))
                world.arrive(WaitingImage(next(key), SMALL, None, tenant, rows, steps))

    for _ in range(1500):
        refill()
        world.tick()
        for one, other in permutations(largest, 2):
            apart = abs(world.joined[one] - world.joined[other])
            assert apart <= largest[one] + largest[other]
    in_flight = 4 * 40 * 64
    for one, other in permutations(largest, 2):
        bound = largest[one] + largest[other] + in_flight
        assert abs(world.served[one] - world.served[other]) <= bound
    assert min(world.served.values()) > 10 * in_flight


def test_odd_sizes_do_not_hold_up_others() -> None:
    """Forty odd images, each of a size and a bucket of its own, beside a stream of usual ones."""
    alone = _World(num_slots=1)
    beside = _World(num_slots=1)
    for place in range(10):
        beside.arrive(WaitingImage(1000 + place, Lane((8, 32 + place)), None, "odd", 2, 20))
    for key in range(20):
        for world in (alone, beside):
            world.arrive(WaitingImage(key, SMALL, None, "usual", 2, 5))
    for world in (alone, beside):
        while world.waiting or world.running:
            world.tick()
    for key in range(20):
        wait, shared = alone.ended[key], beside.ended[key]
        assert shared <= 2 * wait + 11 * 2, "usual images have at least half of the seconds"


def test_an_image_of_two_rows_is_not_passed_for_ever_by_images_of_one() -> None:
    world, key = _World(num_slots=1, most_rows=3), count(1)
    for steps in (2, 3, 4):
        world.arrive(WaitingImage(next(key), SMALL, None, "", 1, steps))
    world.tick()
    world.arrive(WaitingImage(0, SMALL, None, "", 2, 1))
    for _ in range(12):
        world.arrive(WaitingImage(next(key), SMALL, None, "", 1, 4))
        world.tick()
    assert 0 in world.ended


def test_more_subjects_than_slots_keep_every_slot_busy() -> None:
    """Twelve subjects, three slots: three images in each step, whoever comes next."""
    world = _World(num_slots=3, most_rows=8)
    for key in range(60):
        world.arrive(WaitingImage(key, SMALL, f"s{key % 12}", "", 1, 4))
    steps = 0
    while world.waiting or world.running:
        world.tick()
        steps += 1
    assert steps <= 60 * 4 / 3 + 8


def test_a_pinned_bucket_is_exactly_that_bucket_and_shared_by_its_own() -> None:
    pinned = Lane((8, 8), 4)
    running = [
        RunningImage(1, pinned, None, 4, num_rows=2),
        RunningImage(2, SMALL, None, 4, num_rows=2),
        RunningImage(3, pinned, None, 4, num_rows=2),
        RunningImage(4, pinned, None, 4, num_rows=2),
    ]
    step = plan_step(running, (1, 2, 4, 8), lambda lane: lane.bucket or 8, Shares())
    assert step is not None
    assert (step.keys, step.bucket) == ((1, 3), 4)


def test_a_limit_that_shrank_leaves_the_others_in_the_batch_for_later() -> None:
    running = [RunningImage(key, SMALL, None, 4, num_rows=2) for key in (1, 2, 3)]
    step = plan_step(running, (1, 2, 4, 8), lambda lane: 4, Shares())
    assert step is not None
    assert (step.keys, step.bucket) == ((1, 2), 4)


def test_lanes_share_the_seconds_by_the_tenants_in_them() -> None:
    """Three tenants at SMALL, one at LARGE whose steps take ten times as long."""
    running = [RunningImage(key, SMALL, None, 9, tenant) for key, tenant in enumerate("abc")]
    running.append(RunningImage(9, LARGE, None, 9, "d"))
    turns, seconds = Shares(), Counter[Lane]()
    for _ in range(4000):
        step = plan_step(running, (1, 2, 4), lambda lane: 4, turns)
        assert step is not None
        took = 10 if step.lane == LARGE else 1
        turns = count_step(turns, running, step.lane, took)
        seconds[step.lane] += took
    assert seconds[SMALL] / seconds[LARGE] == pytest.approx(3, rel=0.05)
