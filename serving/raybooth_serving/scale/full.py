"""Full fine-tunes on demand: services with weights of their own, few in memory at a time."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import torch

from raybooth.config import ServeConfig, ServedBase
from raybooth.errors import StoreError
from raybooth.model.published import take_on
from raybooth.store import FullRecord, Store
from raybooth_serving.errors import DeadlineError
from raybooth_serving.metrics import merge
from raybooth_serving.service import Service, load_served


class FullModel(NamedTuple):
    """Which model: its base by its place in the config, and `subject@version`."""

    place: int
    reference: str


class FullModels:
    """Services by model, loaded one at a time, the least recently used closed for another.

    A service in use is never closed: the one that has to leave takes no new requests, and leaves
    when its last one is answered. So no model waits for ever for two that are always busy.
    """

    def __init__(
        self, load: Callable[[FullModel], Service], max_models: int, timeout_s: float
    ) -> None:
        self.load = load
        self.max_models = max_models
        self.timeout_s = timeout_s
        self.services: OrderedDict[FullModel, Service] = OrderedDict()
        self.retired: dict[str, float] = {}
        """Counters of services that are closed."""

        self._num_users: Counter[FullModel] = Counter()
        self._num_waiting: Counter[FullModel] = Counter()
        self._leaving: FullModel | None = None
        self._left = asyncio.Event()
        self._loads: dict[FullModel, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()

    @asynccontextmanager
    async def use(self, model: FullModel) -> AsyncIterator[Service]:
        """The service of `model`, kept open for the block.

        Raises DeadlineError when there was no room for it in `timeout_s`, and what loading raises.
        """
        try:
            async with asyncio.timeout(self.timeout_s):
                service = await self._take(model)
        except TimeoutError as error:
            what, do = "the model could not be loaded in time", "try again later"
            raise DeadlineError(what, f"over {self.timeout_s:g} s", do) from error
        try:
            yield service
        finally:
            self._num_users[model] -= 1
            self._left.set()

    def snapshot(self) -> dict[str, float]:
        """Counters of all services, also of those that are closed."""
        return merge([self.retired, *(each.engine.snapshot() for each in self.services.values())])

    async def forget(self, subject_id: str) -> None:
        """Close the services of a deleted subject, each when its last request is answered."""
        async with self._one_at_a_time:
            for model in [m for m in self.services if m.reference.startswith(f"{subject_id}@")]:
                await self._close(model)

    async def _take(self, model: FullModel) -> Service:
        while True:
            service = self.services.get(model)
            if service is not None and model != self._leaving:
                self.services.move_to_end(model)
                self._num_users[model] += 1
                return service
            if model not in self._loads:
                task = asyncio.create_task(self._load(model), name=f"load-{model.reference}")
                task.add_done_callback(lambda _: self._loads.pop(model))
                self._loads[model] = task
            self._num_waiting[model] += 1
            try:
                await asyncio.shield(self._loads[model])  # others may wait for it as well
            finally:
                self._num_waiting[model] -= 1

    async def _load(self, model: FullModel) -> None:
        async with self._one_at_a_time:
            if model in self.services:
                return
            while len(self.services) >= self.max_models:
                await self._close(next(iter(self.services)))
            self.services[model] = await asyncio.to_thread(self.load, model)

    async def _close(self, model: FullModel) -> None:
        """Free the memory of a model once nobody uses it."""
        while self._num_waiting[model]:  # it is loaded: those who waited are about to take it
            await asyncio.sleep(0)
        self._leaving = model
        while self._num_users[model]:
            self._left.clear()
            await self._left.wait()
        service = self.services.pop(model)
        del self._num_users[model]
        self._leaving = None
        self.retired = merge([self.retired, service.engine.snapshot()])
        await service.engine.close()
        del service
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_full_service(
    config: ServeConfig, served: ServedBase, store: Store, reference: str
) -> Service:
    """A service of `served` with the published weights of `reference` in the place of its own.

    Raises StoreError when they are missing or damaged, BaseModelError when they do not fit.
    """
    record = store.fetch(reference)
    assert isinstance(record, FullRecord)
    if wrong := store.verify(reference):
        do = "publish the subject again"
        raise StoreError(f"the weights of {reference} are damaged", "; ".join(wrong), do)
    base = load_served(served)
    take_on(base, record, store.folder(reference))
    bankless = {"num_slots": 1, "max_rank": 1, "targets": "attention"}  # adapters never join
    engine = served.engine.model_copy(update=bankless)
    return Service(base, store, config, served.model_copy(update={"engine": engine}), record)
