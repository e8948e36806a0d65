"""One request, worked on once however often it is sent: idempotency keys and retries in flight.

A request with an `Idempotency-Key` goes on when its client leaves, for it will be asked for again;
its answer is kept for a while, within bounds. A retry without a key (`x-stainless-retry-count`)
joins the same request if that is still in progress. Failures are never kept. All of it is the
memory of one gateway.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from raybooth_serving.errors import KeyReusedError

Work = Callable[[], Coroutine[Any, Any, bytes]]


@dataclass(frozen=True, slots=True)
class Sent:
    """What is known of a request before its work."""

    tenant: str
    digest: str
    """SHA-256 of what it asks for."""

    key: str | None = None
    """Its Idempotency-Key."""

    is_retry: bool = False

    @property
    def name(self) -> tuple[str, str, str]:
        """Where its answer is."""
        if self.key is None:
            return self.tenant, "body", self.digest
        return self.tenant, "key", self.key


@dataclass(eq=False, slots=True)
class _InProgress:
    digest: str
    task: asyncio.Task[bytes]
    num_waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Kept:
    digest: str
    body: bytes
    until: float


class Answers:
    """Requests in progress and answers kept, the oldest out first."""

    def __init__(self, max_answers: int, max_bytes: int, keep_s: float) -> None:
        self.max_answers = max_answers
        self.max_bytes = max_bytes
        self.keep_s = keep_s
        self._running: dict[tuple[str, str, str], _InProgress] = {}
        self._kept: OrderedDict[tuple[str, str, str], _Kept] = OrderedDict()
        self._num_bytes = 0

    async def get(self, sent: Sent, work: Work) -> tuple[bytes, bool]:
        """The body of the answer, and whether the work was another request's.

        Raises KeyReusedError for a key that was given to another body, and what `work` raises.
        """
        self._forget_old()
        kept = self._kept.get(sent.name)
        if kept is not None:
            _check(sent, kept.digest)
            return kept.body, True
        running = self._running.get(sent.name)
        if running is not None and (sent.key is not None or sent.is_retry):
            _check(sent, running.digest)
            return await self._wait(sent, running), True
        return await self._wait(sent, self._start(sent, work)), False

    def _start(self, sent: Sent, work: Work) -> _InProgress:
        # In a context of its own: Ray Serve ends what a request called when its client leaves.
        task = asyncio.create_task(work(), context=contextvars.Context())
        running = _InProgress(sent.digest, task)
        self._running[sent.name] = running
        task.add_done_callback(lambda _: self._on_end(sent, running))
        return running

    async def _wait(self, sent: Sent, running: _InProgress) -> bytes:
        running.num_waiting += 1
        try:
            return await asyncio.shield(running.task)
        finally:
            running.num_waiting -= 1
            if running.num_waiting == 0 and sent.key is None:
                running.task.cancel()

    def _on_end(self, sent: Sent, running: _InProgress) -> None:
        if self._running.get(sent.name) is running:
            del self._running[sent.name]
        if running.task.cancelled() or running.task.exception() is not None or sent.key is None:
            return
        body = running.task.result()
        if len(body) > self.max_bytes:
            return
        self._kept[sent.name] = _Kept(running.digest, body, time.monotonic() + self.keep_s)
        self._num_bytes += len(body)
        while len(self._kept) > self.max_answers or self._num_bytes > self.max_bytes:
            self._forget_first()

    def _forget_old(self) -> None:
        now = time.monotonic()
        while self._kept and next(iter(self._kept.values())).until <= now:
            self._forget_first()

    def _forget_first(self) -> None:
        _, kept = self._kept.popitem(last=False)
        self._num_bytes -= len(kept.body)


def _check(sent: Sent, digest: str) -> None:
    if sent.digest != digest:
        what, do = "this Idempotency-Key was sent with another request", "use a new key"
        raise KeyReusedError(what, "", do)
