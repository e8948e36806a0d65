"""A streamed answer: OpenAI's server-sent events, and comments that its clients pass over.

    data: {"type": "image_generation.completed", "b64_json": ...}     one for each image
    : step 3/20                                                      progress, for who looks

Events of any other type would be read as partial images without a picture by the `openai`
clients, so progress is in comments, and an error is an event with `error` in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from raybooth_serving.wire.api import CompletedEvent, ErrorResponse, Note, PartialImageEvent

StreamEvent = CompletedEvent | PartialImageEvent | Note

DONE = b"data: [DONE]\n\n"
HEARTBEAT_S = 5.0
"""A stream is never silent for longer: proxies keep it, and a client that has left is noticed."""


class Events:
    """What happens while one request is worked on, in order; fed from the event loop's thread."""

    def __init__(self, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.heartbeat_s = heartbeat_s
        self._queue: asyncio.Queue[StreamEvent | None] = asyncio.Queue()

    def put(self, event: StreamEvent) -> None:
        """One more event."""
        self._queue.put_nowait(event)

    async def during(self, work: Coroutine[Any, Any, object]) -> AsyncGenerator[StreamEvent, None]:
        """Run `work` and give its events as they come; raises what it raises, after them.

        Work that is still going on when the reader leaves is cancelled and waited for.
        """
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._queue.put_nowait(None))
        try:
            while True:
                try:
                    event = await asyncio.wait_for(self._queue.get(), self.heartbeat_s)
                except TimeoutError:
                    event = Note(text="waiting")
                if event is None:
                    break
                yield event
            task.result()
        finally:
            task.cancel()
            await asyncio.wait([task])


def sse(event: StreamEvent) -> bytes:
    """The lines of one event."""
    if isinstance(event, Note):
        return f": {event.text}\n\n".encode()
    data = event.model_dump_json(exclude_none=True)
    return f"event: {event.type}\ndata: {data}\n\n".encode()


def sse_error(error: ErrorResponse) -> bytes:
    """The lines of what ends a stream early; the clients raise it as APIError."""
    return f"event: error\ndata: {error.model_dump_json()}\n\n".encode()
