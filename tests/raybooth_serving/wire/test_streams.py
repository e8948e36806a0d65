"""What happens while a request is worked on: in order, never silent, gone with its reader."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from raybooth.errors import ServingError
from raybooth_serving.wire.api import ErrorDetail, ErrorResponse, Note
from raybooth_serving.wire.streams import Events, sse, sse_error


def test_events_come_in_order_then_what_the_work_raised() -> None:
    seen = []

    async def run() -> None:
        events = Events()

        async def work() -> None:
            for text in ("one", "two"):
                events.put(Note(text=text))
                await asyncio.sleep(0)
            raise ServingError("three")

        async for event in events.during(work()):
            assert isinstance(event, Note)
            seen.append(event.text)

    with pytest.raises(ServingError, match="three"):
        asyncio.run(run())
    assert seen == ["one", "two"]


def test_a_silent_stream_beats() -> None:
    async def run() -> object:
        async with aclosing(Events(0.01).during(asyncio.sleep(60))) as stream:
            return await anext(stream)

    assert asyncio.run(run()) == Note(text="waiting")


def test_work_ends_with_its_reader() -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        async with aclosing(Events(0.01).during(work())) as stream:
            await anext(stream)
        assert ended.is_set()

    asyncio.run(run())


def test_lines() -> None:
    assert sse(Note(text="step 3/20")) == b": step 3/20\n\n"
    error = ErrorResponse(error=ErrorDetail(message="no", type="server_error"))
    assert sse_error(error).startswith(b'event: error\ndata: {"error":{"message":"no"')
