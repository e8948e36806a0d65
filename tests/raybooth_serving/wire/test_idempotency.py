"""One request, worked on once: keys, retries in flight, what is kept and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from raybooth.errors import ServingError
from raybooth_serving.errors import KeyReusedError
from raybooth_serving.wire.idempotency import Answers, Sent


class Works:
    """Work that waits until it may end, and is counted."""

    def __init__(self, body: bytes = b"image", error: Exception | None = None) -> None:
        self.body, self.error = body, error
        self.num_started = self.num_cancelled = 0
        self.may_end = asyncio.Event()

    def __call__(self) -> Coroutine[Any, Any, bytes]:
        return self._run()

    async def _run(self) -> bytes:
        self.num_started += 1
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return self.body


def keyed(key: str = "k", digest: str = "d", tenant: str = "t") -> Sent:
    return Sent(tenant, digest, key)


def answers(**changes: Any) -> Answers:
    return Answers(**{"max_answers": 8, "max_bytes": 100, "keep_s": 60.0, **changes})


async def sent(store: Answers, what: Sent, work: Works) -> asyncio.Task[tuple[bytes, bool]]:
    task = asyncio.create_task(store.get(what, work))
    for _ in range(3):
        await asyncio.sleep(0)
    return task


def test_a_key_is_worked_on_once_and_answered_again() -> None:
    async def run() -> None:
        store, work = answers(), Works()
        first, second = [await sent(store, keyed(), work) for _ in range(2)]
        work.may_end.set()
        assert await first == (b"image", False)
        assert await second == (b"image", True)
        assert await store.get(keyed(), work) == (b"image", True)
        assert work.num_started == 1

    asyncio.run(run())


def test_keys_belong_to_their_tenant() -> None:
    async def run() -> None:
        store, work = answers(), Works()
        work.may_end.set()
        for tenant in ("a", "b"):
            assert await store.get(keyed(tenant=tenant), work) == (b"image", False)

    asyncio.run(run())


@pytest.mark.parametrize("is_done", [True, False])
def test_a_key_with_another_body_is_refused(is_done: bool) -> None:
    async def run() -> None:
        store, work = answers(), Works()
        first = await sent(store, keyed(), work)
        if is_done:
            work.may_end.set()
            await first
        with pytest.raises(KeyReusedError, match="another request; use a new key"):
            await store.get(keyed(digest="other"), work)
        work.may_end.set()
        await first

    asyncio.run(run())


def test_failures_reach_all_who_wait_and_are_not_kept() -> None:
    async def run() -> None:
        store, work = answers(), Works(error=ServingError("no"))
        waiting = [await sent(store, keyed(), work) for _ in range(2)]
        work.may_end.set()
        for task in waiting:
            with pytest.raises(ServingError, match="no"):
                await task
        work.error = None
        assert await store.get(keyed(), work) == (b"image", False)
        assert work.num_started == 2

    asyncio.run(run())


def test_a_keyed_request_goes_on_without_its_client() -> None:
    async def run() -> None:
        store, work = answers(), Works()
        (await sent(store, keyed(), work)).cancel()
        await asyncio.sleep(0)
        work.may_end.set()
        assert await store.get(keyed(), work) == (b"image", True)
        assert (work.num_started, work.num_cancelled) == (1, 0)

    asyncio.run(run())


def test_without_a_key_it_ends_with_the_last_who_waits() -> None:
    async def run() -> None:
        store, work = answers(), Works()
        first = await sent(store, Sent("t", "d"), work)
        retry = await sent(store, Sent("t", "d", is_retry=True), work)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert work.num_cancelled == 0
        retry.cancel()
        await asyncio.gather(retry, return_exceptions=True)
        await asyncio.sleep(0)
        assert (work.num_started, work.num_cancelled) == (1, 1)

    asyncio.run(run())


def test_only_a_retry_joins_without_a_key_and_nothing_is_kept() -> None:
    async def run() -> None:
        store, work = answers(), Works()
        first, second = [await sent(store, Sent("t", "d"), work) for _ in range(2)]
        retry = await sent(store, Sent("t", "d", is_retry=True), work)
        work.may_end.set()
        assert [await task for task in (first, second, retry)] == [
            (b"image", False),
            (b"image", False),
            (b"image", True),
        ]
        assert await store.get(Sent("t", "d", is_retry=True), work) == (b"image", False)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("changes", "size", "num_kept"),
    [
        ({"max_answers": 2}, 1, 2),
        ({"max_bytes": 100}, 30, 3),
        ({"max_bytes": 100}, 101, 0),
        ({"keep_s": 0.0}, 1, 0),
    ],
)
def test_what_is_kept_is_bounded(changes: dict[str, Any], size: int, num_kept: int) -> None:
    async def run() -> None:
        store, work = answers(**changes), Works(b"x" * size)
        work.may_end.set()
        for key in "abcde":
            await store.get(keyed(key), work)
        kept = [key for key in "edcba" if (await store.get(keyed(key), work))[1]]
        assert kept == list("edcba")[:num_kept]

    asyncio.run(run())
