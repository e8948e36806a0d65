"""The adapters in the bank's slots, held so that the loader finds them without the store."""

from __future__ import annotations

from raybooth_serving.engine.loader import HostAdapter, is_of
from raybooth_serving.engine.scheduler import Join, JoinPlan
from raybooth_serving.engine.slots import SlotTable


class Residency:
    """The slot table of an engine, what is in its slots, and what must leave them."""

    def __init__(self, num_slots: int) -> None:
        self.table = SlotTable(num_slots)
        self.adapters: dict[str, HostAdapter] = {}
        """By name."""

        self._deleted: list[str] = []

    def begin(self, plan: JoinPlan) -> None:
        """Take the slot table of `plan`."""
        self.table = plan.table

    def join(self, join: Join, adapter: HostAdapter) -> None:
        """`adapter` is in its slot now, or about to be written to it."""
        if join.evicted is not None:
            del self.adapters[join.evicted]
        self.adapters[adapter.name] = adapter

    def leave(self, name: str) -> None:
        """An image of the adapter has left the batch."""
        self.table = self.table.unpin(name)

    def forget(self, subject_id: str) -> None:
        """The subject is deleted; any thread."""
        self._deleted.append(subject_id)

    def free_deleted(self) -> list[int]:
        """The slots of deleted subjects, to be zeroed; those in use once their images are done."""
        deleted, self._deleted = self._deleted, []
        freed = []
        for subject_id in deleted:
            held = [r for r in self.table.residents if is_of(r.adapter, subject_id)]
            for resident in held:
                if resident.num_pins == 0:
                    self.table = self.table.forget(resident.adapter)
                    del self.adapters[resident.adapter]
                    freed.append(resident.slot)
            if any(resident.num_pins for resident in held):
                self._deleted.append(subject_id)
        return freed
