"""Streamed answers over real sockets, read by the unmodified `openai` clients."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from raybooth.config import EngineConfig, LimitsConfig, SamplingDefaults, ServeConfig, ServedBase
from raybooth.errors import ServingError
from raybooth.model.base import Base
from raybooth.model.lora import LoraPair
from raybooth.store import Store
from raybooth_serving.client import Client
from raybooth_serving.service import Service
from raybooth_serving.wire.routes import make_app
from tests.raybooth_serving.listening import listening
from tests.raybooth_serving.published import publish, random_adapter, weights_of

PROMPT = "a photo of sks dog"
SERVED = ServedBase(
    engine=EngineConfig(num_slots=2, max_rank=4, row_buckets=(2, 4, 8), max_queued_images=8),
    defaults=SamplingDefaults(num_inference_steps=4),
)
CONFIG = ServeConfig(bases=(SERVED,), limits=LimitsConfig(max_inference_steps=1000))


@pytest.fixture(scope="module")
def url(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = Store(tmp_path_factory.mktemp("home") / "models")
    publish(store, base, "dog-a", 0)
    weights_of(store, publish(store, base, "broken", 1)).write_bytes(b"no weights")
    huge = {
        name: LoraPair(pair.down, pair.up * 1e30) for name, pair in random_adapter(base, 2).items()
    }
    publish(store, base, "endless", 2, tensors=huge)
    service = Service(base, store, CONFIG, SERVED)
    with listening(make_app(service, CONFIG.limits), service) as url:
        yield url


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


def stream(client: OpenAI, **values: Any) -> Any:
    extra = values.pop("extra_body", {"seed": 3})
    return client.images.generate(
        **{"model": "dog-a", "prompt": PROMPT, "stream": True, **values}, extra_body=extra
    )


def lines(url: str, **values: Any) -> list[str]:
    """The raw lines of a stream."""
    body = {"model": "dog-a", "prompt": PROMPT, "stream": True, **values}
    request = urllib.request.Request(
        f"{url}/v1/images/generations",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        return [line for line in response.read().decode().split("\n") if line]


def size_of(event: Any) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size


def test_the_plain_client_streams(client: OpenAI) -> None:
    events = list(stream(client, partial_images=2, size="16x32"))
    *partials, completed = events
    assert [type(event) for event in partials] == [ImageGenPartialImageEvent] * 2
    assert [event.partial_image_index for event in partials] == [0, 1]
    assert type(completed) is ImageGenCompletedEvent
    assert {size_of(event) for event in events} == {(16, 32)}
    assert {event.size for event in events} == {"16x32"}
    assert completed.usage.total_tokens == 5 + 32
    assert completed.model_extra is not None
    assert completed.model_extra["receipt"]["seed"] == completed.model_extra["seed"] == 3
    for event in events:
        type(event).model_validate(event.model_dump(), strict=True)  # every field, typed
    assert len({event.b64_json for event in events}) == 3


def test_the_streamed_image_is_the_plain_one(client: OpenAI) -> None:
    (completed,) = stream(client, extra_body={"seed": 3, "deterministic": True})
    answer = client.images.generate(
        model="dog-a", prompt=PROMPT, extra_body={"seed": 3, "deterministic": True}
    )
    assert answer.data is not None
    assert completed.b64_json == answer.data[0].b64_json


@pytest.mark.parametrize(("n", "partial_images"), [(1, 0), (3, 0), (3, 1), (1, 3)])
def test_one_completed_event_for_each_image(client: OpenAI, n: int, partial_images: int) -> None:
    events = list(stream(client, n=n, partial_images=partial_images))
    completed = [event for event in events if event.type == "image_generation.completed"]
    assert sorted(event.model_extra["image_index"] for event in completed) == list(range(n))
    assert sorted(event.model_extra["seed"] for event in completed) == [3 + i for i in range(n)]
    assert len(events) == n * (1 + partial_images)


@pytest.mark.parametrize("form", ["webp", "jpeg"])
def test_formats(client: OpenAI, form: Any) -> None:
    for event in stream(client, partial_images=1, output_format=form, output_compression=70):
        assert event.output_format == form
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).format == form.upper()


def test_progress_is_in_comments(url: str) -> None:
    told = lines(url, num_inference_steps=5)
    assert [line for line in told if line.startswith(":")] == [
        f": step {step}/5" for step in range(1, 6)
    ]
    assert told[-1] == "data: [DONE]"
    many = [line for line in lines(url, n=2, num_inference_steps=1) if line.startswith(":")]
    assert sorted(many) == [": image 1 step 1/1", ": image 2 step 1/1"]


def test_the_async_client_streams_side_by_side(url: str) -> None:
    async def run() -> list[list[str]]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:

            async def one(seed: int) -> list[str]:
                events = await client.images.generate(
                    model="dog-a",
                    prompt=PROMPT,
                    stream=True,
                    partial_images=1,
                    extra_body={"seed": seed},
                )
                return [event.type async for event in events]

            return list(await asyncio.gather(*map(one, range(3))))

    expected = ["image_generation.partial_image", "image_generation.completed"]
    assert asyncio.run(run()) == [expected] * 3


def test_the_async_client_generates_and_sees_errors(url: str) -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            answer = await client.images.generate(model="dog-a", prompt=PROMPT, n=2)
            assert answer.data is not None
            assert len(answer.data) == 2
            assert answer.usage is not None
            assert answer.usage.output_tokens == 2 * 64
            with pytest.raises(openai.NotFoundError, match="did you mean dog-a"):
                await client.images.generate(model="dgo-a", prompt=PROMPT)
            with pytest.raises(openai.NotFoundError, match="did you mean dog-a"):
                await client.images.generate(model="dgo-a", prompt=PROMPT, stream=True)

    asyncio.run(run())


def test_what_fails_before_the_first_event_has_its_status(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        stream(client, size="17x32")
    assert error.value.param == "size"
    with pytest.raises(openai.InternalServerError, match="damaged") as broken:
        stream(client, model="broken")
    assert broken.value.status_code == 503
    with pytest.raises(openai.RateLimitError) as full:
        stream(client, n=9)
    assert int(full.value.response.headers["retry-after"]) >= 1


def test_what_fails_later_is_an_error_event(client: OpenAI, url: str) -> None:
    with pytest.raises(openai.APIError, match="came out as no numbers") as error:
        list(stream(client, model="endless"))
    assert error.value.code == "serving_error"
    assert error.value.type == "server_error"
    told = lines(url, model="endless", num_inference_steps=2)
    assert told[:2] == [": step 1/2", ": step 2/2"]
    assert told[2] == "event: error"
    assert told[4] == "data: [DONE]"


def test_the_small_client_streams(url: str) -> None:
    client = Client(url)
    *previews, image = client.stream("dog-a", PROMPT, partial_images=2, seed=4, deterministic=True)
    assert [event["partial_image_index"] for event in previews] == [0, 1]
    (plain,) = client.generate("dog-a", PROMPT, seed=4, deterministic=True)
    assert base64.b64decode(image["b64_json"]) == plain
    with pytest.raises(ServingError, match="came out as no numbers"):
        list(client.stream("endless", PROMPT))
    with pytest.raises(ServingError, match=r"404.*did you mean dog-a"):
        list(client.stream("dgo-a", PROMPT))


def test_a_reader_that_leaves_frees_its_rows(client: OpenAI, url: str) -> None:
    before = Client(url).metrics()
    events = stream(client, n=3, partial_images=1, extra_body={"num_inference_steps": 900})
    deadline = time.monotonic() + 30
    while Client(url).metrics()["images_running"] < 3:
        assert time.monotonic() < deadline
    events.close()
    while Client(url).metrics()["images_running"] > 0:
        assert time.monotonic() < deadline, "rows of a reader that left are still denoised"
    after = Client(url).metrics()
    assert after["images_cancelled"] == before["images_cancelled"] + 3
    assert after["images_finished"] == before["images_finished"]
