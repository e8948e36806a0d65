"""Store, host memory, slot: what is damaged, deleted or away harms its own requests alone."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from raybooth.config import EngineConfig, LimitsConfig, ServeConfig, ServedBase
from raybooth.errors import NotPublishedError, StoreError
from raybooth.model.base import Base
from raybooth.store import RECORD, AdapterRecord, Store
from raybooth_serving.engine.loop import Engine
from raybooth_serving.engine.orders import Order, Part
from raybooth_serving.errors import StoreAwayError
from raybooth_serving.names.catalog import Catalog
from raybooth_serving.names.lookup import NUM_THREADS
from raybooth_serving.service import Service
from raybooth_serving.wire.api import ImagesRequest
from raybooth_serving.wire.caller import Caller
from tests.raybooth_serving.published import weights_of

SERVED = ServedBase(
    engine=EngineConfig(num_slots=2, max_rank=4, row_buckets=(4,), max_host_adapters=1)
)


def run(
    base: Base,
    store: Store,
    act: Callable[[Service], Awaitable[None]],
    limits: LimitsConfig | None = None,
) -> None:
    config = ServeConfig(bases=(SERVED,), limits=limits or LimitsConfig())

    async def inside() -> None:
        service = Service(base, store, config, SERVED)
        try:
            await act(service)
        finally:
            await service.engine.close()

    asyncio.run(inside())


async def draw(service: Service, model: str, **body: Any) -> str:
    """The image's pixels, in short."""
    body = {"model": model, "prompt": "a photo of sks dog", "seed": 1, **body}
    request = ImagesRequest.model_validate({"num_inference_steps": 3, **body})
    (data,) = (await service.generate(request, Caller())).data
    return data.receipt.pixels_sha256


def test_a_damaged_and_a_deleted_adapter_fail_alone_in_a_mixed_batch(
    base: Base, store: Store
) -> None:
    """One file is truncated, one removed after its name was resolved."""

    async def act(service: Service) -> None:
        alone = [await draw(service, model) for model in ("dog-a", "tiny")]
        lost = service.catalog.resolve("robot-c")
        assert lost is not None
        store.delete("robot-c")
        cut = store.fetch("dog-b")
        assert isinstance(cut, AdapterRecord)
        os.truncate(weights_of(store, cut), 1000)
        sample = service._samples(ImagesRequest(model="tiny", prompt="a dog"), ())[0]
        found = await asyncio.gather(
            draw(service, "dog-a"),
            service.engine.generate(Order((sample,), (Part(lost),))),
            draw(service, "dog-b"),
            draw(service, "tiny"),
            draw(service, "tiny", adapters=[{"subject": "dog-a"}, {"subject": "dog-b"}]),
            return_exceptions=True,
        )
        assert [found[0], found[3]] == alone
        assert isinstance(found[1], NotPublishedError)
        for failed in (found[2], found[4]):
            assert isinstance(failed, StoreError)
            assert "dog-b@1 are damaged" in failed.what

    run(base, store, act)


def test_residents_go_on_while_the_store_is_away(base: Base, store: Store) -> None:
    """dog-a is in its slot alone, dog-b in host memory as well; robot-c is nowhere."""

    async def act(service: Service) -> None:
        await draw(service, "robot-c")
        before = [await draw(service, model) for model in ("dog-a", "dog-b")]
        assert service.engine.metrics.host_adapters == 1
        aside = store.root.with_name("aside")
        store.root.rename(aside)
        assert [await draw(service, model) for model in ("dog-a", "dog-b")] == before
        with pytest.raises(StoreAwayError, match="robot-c@1 is not in memory"):
            await draw(service, "robot-c")
        with pytest.raises(StoreAwayError, match="vase-d is not in memory"):
            await draw(service, "vase-d")
        assert (await service.metrics())["store_away_requests"] == 4
        aside.rename(store.root)
        assert await draw(service, "vase-d")

    run(base, store, act)


def test_a_store_that_hangs_holds_up_nobody_for_long(base: Base, store: Store) -> None:
    """A pipe in the place of a record: who opens it waits until somebody writes."""

    async def act(service: Service) -> None:
        before = [await draw(service, model) for model in ("dog-a", "dog-b")]
        record = store.folder("dog-a") / RECORD
        text = record.read_text("utf-8")
        record.unlink()
        os.mkfifo(record)
        try:
            both = await asyncio.gather(draw(service, "dog-a"), draw(service, "dog-b"))
            assert both == before
            with pytest.raises(StoreAwayError, match="found no answer in time"):
                await draw(service, "dog-a@latest")
            assert service.lookup.num_held == 2
        finally:
            os.close(os.open(record, os.O_RDWR))  # they read an empty file
            record.unlink()
            record.write_text(text, "utf-8")
        async with asyncio.timeout(20):
            while service.lookup.num_held:
                await asyncio.sleep(0.01)
        assert await draw(service, "dog-a@latest") == before[0]

    run(base, store, act, LimitsConfig(store_timeout_s=0.3))


def test_once_all_threads_are_held_nobody_waits(base: Base, store: Store) -> None:
    async def act(service: Service) -> None:
        lookup, may_answer = service.lookup, threading.Event()
        await draw(service, "dog-a")

        def ask(catalog: Catalog) -> bool:
            return catalog is service.catalog and may_answer.wait(20)

        try:
            silent = [lookup.ask(service.catalog, ask) for _ in range(NUM_THREADS)]
            assert not any(await asyncio.gather(*silent))
            assert lookup.num_held == NUM_THREADS
            lookup.timeout_s = 1000
            async with asyncio.timeout(20):
                assert await draw(service, "dog-a")
                with pytest.raises(StoreAwayError):
                    await service.models(False, Caller())
        finally:
            may_answer.set()

    run(base, store, act, LimitsConfig(store_timeout_s=0.2))


def test_a_deleted_subject_leaves_nothing_behind(base: Base, store: Store) -> None:
    async def act(service: Service) -> None:
        engine = service.engine
        both = [{"subject": "dog-a", "scale": 0.5}, {"subject": "dog-b", "scale": 0.5}]
        await draw(service, "dog-b")
        await draw(service, "tiny", adapters=both)
        assert _slots(engine) == ["dog-b", "dog-a+dog-b"]
        store.delete("dog-a")
        for _ in range(2):
            with pytest.raises(NotPublishedError):
                await draw(service, "dog-a")
            assert await draw(service, "dog-b")
        assert _slots(engine) == ["dog-b"]
        (kept,) = engine.slots.residents
        norms_S = engine.bank.flat_SP.norm(dim=1).tolist()
        assert [slot for slot, norm in enumerate(norms_S) if norm] == [kept.slot]

    run(base, store, act)


def _slots(engine: Engine) -> list[str]:
    names = [resident.adapter for resident in engine.slots.residents]
    return ["+".join(each.partition("@")[0] for each in name.split("+")) for name in names]
