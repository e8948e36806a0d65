"""Names asked of the store for a bounded time: a store that does not answer counts as away.

A network file system whose server is gone can hold a thread for ever. Such threads are this file's
own and few; once all are held, nobody waits for the store until one of them has its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from raybooth_serving.names.catalog import Catalog
from raybooth_serving.wire.api import ModelCard

Result = TypeVar("Result")

NUM_THREADS = 8
LIST_PATIENCE = 12
"""A first list of thousands of subjects may take as long as so many names."""


class Lookup:
    """Questions to a catalog, off the event loop."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.num_held = 0
        """Threads that have waited longer than that, and still do."""

        self._threads = ThreadPoolExecutor(NUM_THREADS, "store")

    async def cards(self, catalog: Catalog, with_versions: bool) -> list[ModelCard]:
        """The list of models; StoreAwayError where the store is away or silent."""
        patience_s = LIST_PATIENCE * self.timeout_s
        return await self.ask(catalog, lambda it: it.cards(with_versions=with_versions), patience_s)

    async def ask(
        self,
        catalog: Catalog,
        act: Callable[[Catalog], Result],
        timeout_s: float | None = None,
    ) -> Result:
        """What `act` makes of `catalog`, or of what that remembers where the store is silent."""
        if self.num_held < NUM_THREADS:
            asked = asyncio.get_running_loop().run_in_executor(self._threads, act, catalog)
            done, _ = await asyncio.wait({asked}, timeout=timeout_s or self.timeout_s)
            if done:
                return asked.result()
            self.num_held += 1
            asked.add_done_callback(self._let_go)
        return act(catalog.unheard())

    def _let_go(self, asked: asyncio.Future[Any]) -> None:
        self.num_held -= 1
        if not asked.cancelled():
            asked.exception()  # came too late for whoever asked
