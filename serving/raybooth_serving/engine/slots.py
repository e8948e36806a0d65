"""Which adapter sits in which bank slot: an immutable table, least recently used out.

Slot 0 is the null adapter and never in the table; slots 1..num_slots are. A pinned adapter has
rows in flight and cannot be evicted. Every change returns a new table.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

NULL_SLOT = 0


@dataclass(frozen=True, slots=True)
class Resident:
    """An adapter in a slot; `num_pins` of its rows are in flight."""

    adapter: str
    slot: int
    num_pins: int = 0


@dataclass(frozen=True, slots=True)
class SlotTable:
    """Residents, least recently used first."""

    num_slots: int
    residents: tuple[Resident, ...] = ()

    def find(self, adapter: str) -> Resident | None:
        """The resident of that name, if any."""
        return next((r for r in self.residents if r.adapter == adapter), None)

    def place(self, adapter: str) -> Placement | None:
        """`adapter` in a slot, now the most recently used; None when every slot is pinned.

        A free slot is taken first, then that of the least recently used unpinned resident.
        """
        resident = self.find(adapter)
        if resident is not None:
            return Placement(self._with(resident), resident.slot, is_loaded=True, evicted=None)
        taken = {r.slot for r in self.residents}
        free = next((s for s in range(1, self.num_slots + 1) if s not in taken), None)
        if free is not None:
            table = self._with(Resident(adapter, free))
            return Placement(table, free, is_loaded=False, evicted=None)
        victim = next((r for r in self.residents if r.num_pins == 0), None)
        if victim is None:
            return None
        table = self.forget(victim.adapter)._with(Resident(adapter, victim.slot))
        return Placement(table, victim.slot, is_loaded=False, evicted=victim.adapter)

    def pin(self, adapter: str) -> SlotTable:
        """One more row of a resident is in flight."""
        return self._add_pins(adapter, 1)

    def unpin(self, adapter: str) -> SlotTable:
        """One row of a resident has left."""
        return self._add_pins(adapter, -1)

    def forget(self, adapter: str) -> SlotTable:
        """The table without an adapter (its slot is free)."""
        return replace(self, residents=tuple(r for r in self.residents if r.adapter != adapter))

    def check_integrity(self) -> None:
        """Raises AssertionError unless slots and adapters are unique and pins make sense."""
        slots = Counter(r.slot for r in self.residents)
        adapters = Counter(r.adapter for r in self.residents)
        assert all(count == 1 for count in slots.values()), f"slots used twice: {slots}"
        assert all(count == 1 for count in adapters.values()), f"adapters twice: {adapters}"
        assert all(1 <= slot <= self.num_slots for slot in slots), f"slots out of range: {slots}"
        assert all(r.num_pins >= 0 for r in self.residents), f"negative pins: {self.residents}"

    def _with(self, resident: Resident) -> SlotTable:
        others = tuple(r for r in self.residents if r.adapter != resident.adapter)
        return replace(self, residents=(*others, resident))

    def _add_pins(self, adapter: str, count: int) -> SlotTable:
        assert self.find(adapter) is not None, f"{adapter} is not resident"
        residents = tuple(
            replace(r, num_pins=r.num_pins + count) if r.adapter == adapter else r
            for r in self.residents
        )
        return replace(self, residents=residents)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an adapter goes, and what must happen for it."""

    table: SlotTable
    slot: int
    is_loaded: bool
    evicted: str | None
