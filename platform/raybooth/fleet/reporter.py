"""A worker's side of the mailbox: sends events now and then, never waits for an answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from raybooth.fleet.events import Event, Orders, StateEvent, StepEvent
from raybooth.fleet.queue import JobState

FLUSH_S = 0.5
LAST_FLUSH_S = 10.0


class Reporter:
    """Collects events and pushes them to the monitor actor in batches, fire and forget."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._events: list[Event] = []
        self._steps: dict[str, StepEvent] = {}
        self._orders = Orders()
        self._answer: Future[Orders] | None = None
        self._flushed = 0.0

    def step(
        self, job_id: str, train_step: int, loss: float, curves: Mapping[str, float] | None = None
    ) -> None:
        """A train step; only the newest of each job is sent."""
        self._steps[job_id] = StepEvent(job_id, train_step, loss, curves=curves or {})
        self._flush_if_due()

    def state(
        self,
        job_id: str,
        state: JobState,
        *,
        error: str | None = None,
        reference: str | None = None,
        train_step: int | None = None,
    ) -> None:
        """A job's change of state, sent at once."""
        self.send(StateEvent(job_id, state, error, reference, train_step))

    def send(self, event: Event) -> None:
        """An event, sent at once, after the steps before it."""
        self._take_steps()
        self._events.append(event)
        self._flush()

    def failed(self) -> dict[str, str]:
        """Jobs that failed already, in an earlier life of this worker."""
        answer: dict[str, str] = self._monitor.failed.remote().future().result()
        return answer

    def should_stop(self) -> bool:
        """Whether the dispatcher wants the pack to stop, or is gone."""
        self._flush_if_due()
        return self._orders.stop

    def cancelled(self) -> frozenset[str]:
        """Jobs to take out of the pack."""
        return self._orders.cancelled

    def close(self) -> None:
        """Everything is delivered, unless the dispatcher is gone."""
        self._take_steps()
        if self._answer is not None:
            self._read(timeout_s=LAST_FLUSH_S)
        if self._events:
            self._push()
            self._read(timeout_s=LAST_FLUSH_S)

    def _flush_if_due(self) -> None:
        if time.monotonic() - self._flushed >= FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        if self._answer is not None:
            if not self._answer.done():
                return  # the dispatcher is slow: what waits goes with the next batch
            self._read(timeout_s=0.0)
        self._take_steps()
        self._push()

    def _take_steps(self) -> None:
        self._events.extend(self._steps.values())
        self._steps.clear()

    def _push(self) -> None:
        events, self._events = self._events, []
        self._answer = self._monitor.push.remote(events).future()

    def _read(self, *, timeout_s: float) -> None:
        assert self._answer is not None
        answer, self._answer = self._answer, None
        try:
            error = answer.exception(timeout_s)
        except TimeoutError as late:
            error = late
        # Nobody listens any more: the dispatcher died, its Ray job ends, and so does this pack.
        self._orders = Orders(stop=True) if error is not None else answer.result()
