from __future__ import annotations

import random

import pytest

from raybooth_serving.engine.slots import Resident, SlotTable


def _placed(table: SlotTable, adapter: str) -> SlotTable:
    placement = table.place(adapter)
    assert placement is not None
    return placement.table


def test_free_slots_are_filled_in_order_and_never_the_null_slot() -> None:
    table = SlotTable(3)
    slots = []
    for adapter in "abc":
        placement = table.place(adapter)
        assert placement is not None
        assert not placement.is_loaded
        assert placement.evicted is None
        slots.append(placement.slot)
        table = placement.table
    assert slots == [1, 2, 3]


def test_the_least_recently_used_goes() -> None:
    table = SlotTable(2)
    for adapter in ("a", "b", "a"):
        table = _placed(table, adapter)
    placement = table.place("c")
    assert placement is not None
    assert placement.evicted == "b"
    assert placement.slot == 2


def test_a_resident_keeps_its_slot() -> None:
    table = _placed(_placed(SlotTable(2), "a"), "b")
    placement = table.place("a")
    assert placement is not None
    assert (placement.slot, placement.is_loaded, placement.evicted) == (1, True, None)


def test_a_pinned_adapter_stays_until_its_last_row_leaves() -> None:
    table = _placed(SlotTable(1), "a").pin("a").pin("a")
    assert table.place("b") is None
    assert table.unpin("a").place("b") is None
    placement = table.unpin("a").unpin("a").place("b")
    assert placement is not None
    assert placement.evicted == "a"


def test_a_forgotten_slot_is_free() -> None:
    table = _placed(SlotTable(1), "a").forget("a")
    placement = table.place("b")
    assert placement is not None
    assert placement.evicted is None


def test_any_walk_keeps_the_table_whole() -> None:
    chance = random.Random(0)
    table = SlotTable(4)
    pins: list[str] = []
    for _ in range(2000):
        adapter = f"s{chance.randrange(9)}"
        if pins and chance.random() < 0.5:
            table = table.unpin(pins.pop(chance.randrange(len(pins))))
        else:
            placement = table.place(adapter)
            if placement is None:
                assert len(set(pins)) == 4
                continue
            assert placement.evicted not in pins
            table = placement.table
            if chance.random() < 0.7:
                table = table.pin(adapter)
                pins.append(adapter)
        table.check_integrity()
        assert sorted(pins) == sorted(r.adapter for r in table.residents for _ in range(r.num_pins))


@pytest.mark.parametrize(
    "residents",
    [
        (Resident("a", 1), Resident("b", 1)),
        (Resident("a", 1), Resident("a", 2)),
        (Resident("a", 0),),
        (Resident("a", 3),),
        (Resident("a", 1, -1),),
    ],
)
def test_a_broken_table_is_noticed(residents: tuple[Resident, ...]) -> None:
    with pytest.raises(AssertionError):
        SlotTable(2, residents).check_integrity()
