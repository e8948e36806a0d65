"""What the gateway makes of replicas that die or are not there; scripted handles, as Ray's are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raybooth.errors import RayBoothError
from raybooth.store import Store
from raybooth_serving.errors import NoReplicaError, QueueFullError, ReplicaDiedError
from raybooth_serving.names.catalog import KnownBase
from raybooth_serving.names.lookup import Lookup
from raybooth_serving.scale.gateway import Engines
from raybooth_serving.wire.answers import answer
from raybooth_serving.wire.api import CompletedEvent, ImagesRequest, Note
from raybooth_serving.wire.caller import Caller

REQUEST = ImagesRequest(model="tiny", prompt="a dog")
DONE = CompletedEvent.model_construct(image_index=0)
DEATH = ActorDiedError()


class Events:
    """A stream that gives these, or raises those that are errors."""

    def __init__(self, script: Sequence[Any]) -> None:
        self.script = list(script)
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self.script:
            raise StopAsyncIteration
        event = self.script.pop(0)
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """A deployment that answers each call with the next of `script`."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.callers: list[Caller] = []
        self.method = ""

    def __getattr__(self, method: str) -> Handle:
        return self.options(method_name=method)

    def options(self, *, method_name: str, **rest: Any) -> Handle:
        self.method = method_name
        return self

    def remote(self, *values: Any) -> Any:
        if self.method == "describe":
            return self._say(KnownBase("tiny", "f" * 64))
        self.callers.append(values[1])
        outcome = self.script.pop(0)
        return outcome if isinstance(outcome, Events) else self._say(outcome)

    async def _say(self, outcome: Any) -> Any:
        await asyncio.sleep(0.01)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def engines_over(handle: Handle, tmp_path: Path) -> Any:
    engines: Any = Engines
    return engines([handle], None, Store(tmp_path / "models"), Lookup(5.0))


def generate(handle: Handle, tmp_path: Path, caller: Caller | None = None) -> Any:
    engines = engines_over(handle, tmp_path)
    return asyncio.run(engines.generate(REQUEST, caller or Caller()))


def stream(handle: Handle, tmp_path: Path) -> list[Any]:
    engines = engines_over(handle, tmp_path)
    told: list[Any] = []

    async def read() -> None:
        async for event in engines.stream(REQUEST, Caller()):
            told.append(event)

    try:
        asyncio.run(read())
    except RayBoothError as error:
        told.append(error)
    return told


def test_a_request_is_made_again_once_with_what_is_left_of_its_time(tmp_path: Path) -> None:
    handle = Handle(DEATH, "images")
    assert generate(handle, tmp_path, Caller(deadline_s=5.0)) == "images"
    first, second = (caller.deadline_s for caller in handle.callers)
    assert first is not None
    assert second is not None
    assert 4 < second < first <= 5.0


def test_a_second_death_is_told(tmp_path: Path) -> None:
    with pytest.raises(ReplicaDiedError) as error:
        generate(Handle(DEATH, DEATH, "images"), tmp_path)
    response = answer(error.value)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.headers["x-should-retry"] == "false", "a third time would be no better"


@pytest.mark.parametrize(
    ("raised", "kind", "status"),
    [
        (DeploymentUnavailableError(None), NoReplicaError, 503),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), QueueFullError, 429),
    ],
)
def test_nobody_who_could_answer_is_told_with_when_to_come_again(
    raised: Exception, kind: type[NoReplicaError | QueueFullError], status: int, tmp_path: Path
) -> None:
    with pytest.raises(kind) as error:
        generate(Handle(raised), tmp_path)
    response = answer(error.value)
    assert response.status_code == status
    assert int(response.headers["retry-after"]) == error.value.retry_after_s


def test_a_stream_without_a_picture_yet_is_begun_again(tmp_path: Path) -> None:
    first, note = Events([Note(text="step 1/4"), DEATH]), Note(text="step 1/4")
    assert stream(Handle(first, Events([note, DONE])), tmp_path) == [note, note, DONE]


def test_a_stream_with_a_picture_ends_in_an_error(tmp_path: Path) -> None:
    handle = Handle(Events([DONE, DEATH]), Events([DONE]))
    picture, error = stream(handle, tmp_path)
    assert picture == DONE
    assert isinstance(error, ReplicaDiedError)
    assert len(handle.script) == 1, "not asked again"


def test_a_reader_that_leaves_cancels_the_stream(tmp_path: Path) -> None:
    events = Events([DONE, DONE])
    engines = engines_over(Handle(events), tmp_path)

    async def read_one() -> None:
        reading = engines.stream(REQUEST, Caller())
        await anext(reading)
        await reading.aclose()

    asyncio.run(read_one())
    assert events.is_cancelled


def test_engines_are_asked_once_what_they_serve(tmp_path: Path) -> None:
    handle = Handle("one", "two")
    engines = engines_over(handle, tmp_path)

    async def ask() -> list[str]:
        started = time.monotonic()
        answers = [await engines.generate(REQUEST, Caller()) for _ in range(2)]
        assert time.monotonic() - started < 5
        return answers

    assert asyncio.run(ask()) == ["one", "two"]
