"""A replica that shuts down finishes what is inside and lets nothing more in."""

from __future__ import annotations

import asyncio

import pytest

from raybooth.config import EngineConfig, ServeConfig, ServedBase
from raybooth.model.base import Base
from raybooth.store import Store
from raybooth_serving.answers import answer
from raybooth_serving.api import CompletedEvent, ImagesRequest
from raybooth_serving.caller import Caller
from raybooth_serving.door import Door
from raybooth_serving.errors import DrainingError
from raybooth_serving.service import Service


def test_an_empty_room_closes_at_once_and_for_good() -> None:
    async def run() -> None:
        door = Door()
        with door.inside():
            pass
        await asyncio.wait_for(door.close(), 1)
        with pytest.raises(DrainingError, match="shutting down; try again in 2 s"), door.inside():
            pass
        await asyncio.wait_for(door.close(), 1)

    asyncio.run(run())


def test_those_inside_end_first_also_by_errors() -> None:
    async def run() -> None:
        door, left = Door(), []

        async def visit(seconds: float) -> None:
            with door.inside():
                await asyncio.sleep(seconds)
                left.append(seconds)
                raise ValueError

        visits = [asyncio.create_task(visit(seconds)) for seconds in (0.01, 0.03)]
        await asyncio.sleep(0)
        await door.close()
        assert left == [0.01, 0.03]
        await asyncio.gather(*visits, return_exceptions=True)

    asyncio.run(run())


def test_it_is_503_with_retry_after_which_clients_follow() -> None:
    response = answer(DrainingError("closed", "", "", 2))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert "x-should-retry" not in response.headers


def test_a_service_finishes_images_and_streams(base: Base, store: Store) -> None:
    served = ServedBase(engine=EngineConfig(num_slots=1, max_rank=4, row_buckets=(1, 2, 4)))

    async def run() -> None:
        service = Service(base, store, ServeConfig(bases=(served,)), served)
        request = ImagesRequest(model="dog-a", prompt="a dog", num_inference_steps=20)
        plain = asyncio.create_task(service.generate(request, Caller()))

        async def read() -> list[object]:
            return [event async for event in service.stream(request, Caller())]

        stream = asyncio.create_task(read())
        while service.engine.snapshot()["images_running"] < 2:
            await asyncio.sleep(0.01)
        drain = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        with pytest.raises(DrainingError):
            await service.generate(request, Caller())
        with pytest.raises(DrainingError):
            await anext(service.stream(request, Caller()))
        await drain
        assert len((await plain).data) == 1
        assert isinstance((await stream)[-1], CompletedEvent)
        await service.engine.close()

    asyncio.run(run())
