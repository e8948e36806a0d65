"""What happens in a fleet, as small records, and the mailbox that carries them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raybooth.fleet.queue import JobState


@dataclass(frozen=True, slots=True)
class StepEvent:
    """A slot has done a train step; the newest of a batch stands for all of them."""

    job_id: str
    train_step: int
    loss: float
    time: float = field(default_factory=time.time)
    curves: Mapping[str, float] = field(default_factory=dict)
    """Further figures of the step, for trackers."""


@dataclass(frozen=True, slots=True)
class StateEvent:
    """A job is in another state."""

    job_id: str
    state: JobState
    error: str | None = None
    reference: str | None = None
    """`subject@version`, once published."""
    train_step: int | None = None
    time: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class PriorEvent:
    """Images of a prior that are there, of those wanted."""

    digest: str
    num_done: int
    num_wanted: int


@dataclass(frozen=True, slots=True)
class PackEvent:
    """A pack's worker is up, or a pack is started again."""

    pack_id: str
    state: str
    text: str = ""
    process: int | None = None
    """Of a started worker."""


@dataclass(frozen=True, slots=True)
class NoteEvent:
    """Something that people should know and nothing depends on."""

    text: str


Event = StepEvent | StateEvent | PriorEvent | PackEvent | NoteEvent


@dataclass(frozen=True, slots=True)
class Orders:
    """What the dispatcher wants of every worker."""

    stop: bool = False
    """Write checkpoints and return."""
    cancelled: frozenset[str] = frozenset()
    """Jobs to take out of their packs."""


class Monitor:
    """The mailbox, a Ray actor: workers push events and read orders, the dispatcher drains."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._failed: dict[str, str] = {}
        self._orders = Orders()

    def push(self, events: Sequence[Event]) -> Orders:
        """Takes a worker's events; answers with the orders of the moment."""
        self._events.extend(events)
        for event in events:
            if isinstance(event, StateEvent) and event.state == "failed":
                self._failed[event.job_id] = event.error or "no reason given"
        return self._orders

    def report_prior(self, digest: str, num_done: int, num_wanted: int) -> None:
        """Progress of a prior task."""
        self._events.append(PriorEvent(digest, num_done, num_wanted))

    def failed(self) -> dict[str, str]:
        """Jobs that failed so far and why: a restarted worker does not try them again."""
        return dict(self._failed)

    def drain(self) -> list[Event]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events

    def give(self, orders: Orders) -> None:
        """Changes the orders."""
        self._orders = orders
