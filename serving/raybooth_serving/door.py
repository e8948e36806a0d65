"""A replica that shuts down finishes what is inside and lets nothing more in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from raybooth_serving.errors import DrainingError

RETRY_AFTER_S = 2
"""Another replica, or this one's successor, is asked next."""


class Door:
    """Counts who is inside; all calls from one event loop."""

    def __init__(self) -> None:
        self._num_inside = 0
        self._is_closed = False
        self._empty = asyncio.Event()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While one request is worked on; raises DrainingError once the door is closed."""
        if self._is_closed:
            do = f"try again in {RETRY_AFTER_S} s"
            raise DrainingError("this replica is shutting down", "", do, RETRY_AFTER_S)
        self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1
            if not self._num_inside:
                self._empty.set()

    async def close(self) -> None:
        """Let nothing more in and wait until nobody is inside."""
        self._is_closed = True
        if self._num_inside:
            self._empty.clear()
            await self._empty.wait()
