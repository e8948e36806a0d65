"""Several subjects in one image through the API: `adapters`, its contradictions, its receipts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from raybooth.config import EngineConfig, SamplingDefaults, ServeConfig, ServedBase
from raybooth.model.base import Base
from raybooth.model.sampler import SampleRequest
from raybooth.store import AdapterRecord, Store
from raybooth_serving.engine.loop import Engine
from raybooth_serving.engine.orders import GeneratedImage, Order, Part
from raybooth_serving.pictures.receipt import Receipt
from raybooth_serving.pictures.replay import compare, redraw
from raybooth_serving.service import Service
from raybooth_serving.wire.routes import make_app
from tests.raybooth_serving.published import publish

SERVED = ServedBase(
    engine=EngineConfig(num_slots=4, max_rank=4, row_buckets=(4,)),
    defaults=SamplingDefaults(num_inference_steps=3),
)
BOTH = [{"subject": "dog-a", "scale": 0.8}, {"subject": "robot-c@1", "scale": 0.5}]


@pytest.fixture
def service(base: Base, store: Store) -> Service:
    return Service(base, store, ServeConfig(bases=(SERVED,)), SERVED)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    app = make_app(service, service.config.limits)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client
        assert client.portal is not None
        client.portal.call(service.engine.close)


def post(client: TestClient, **body: Any) -> Any:
    return client.post(
        "/v1/images/generations",
        json={"model": "tiny", "prompt": "a photo of sks dog", "seed": 1, **body},
    ).json()


def picture(client: TestClient, **body: Any) -> str:
    return str(post(client, **body)["data"][0]["receipt"]["pixels_sha256"])


def test_subjects_share_an_image_and_its_receipt_draws_it_again(
    client: TestClient, service: Service, base: Base, store: Store
) -> None:
    answer = post(client, adapters=BOTH)
    assert answer["model"] == "dog-a@1+robot-c@1"
    (data,) = answer["data"]
    pixels = data["receipt"]["pixels_sha256"]
    assert picture(client, adapters=BOTH, model="dog-a") == pixels
    receipt = Receipt.model_validate_json(json.dumps(data["receipt"]))
    used = [(adapter.reference, adapter.scale) for adapter in receipt.adapters]
    assert used == [("dog-a@1", 0.8), ("robot-c@1", 0.5)]
    alone = [picture(client, model=each["subject"]) for each in BOTH]
    swapped = picture(client, adapters=[{**each, "scale": 0.2} for each in BOTH])
    assert len({pixels, *alone, swapped}) == 4
    assert client.portal is not None
    client.portal.call(service.engine.close)  # its bank leaves the base to that of the replay
    report = compare(redraw(base, store, receipt), receipt, service.fingerprint, None)
    assert report.equal


def test_one_of_adapters_is_that_subject_at_that_scale(client: TestClient) -> None:
    alone = picture(client, model="dog-b", adapter_scale=0.5)
    assert picture(client, adapters=[{"subject": "dog-b", "scale": 0.5}]) == alone
    assert picture(client, adapters=[]) == picture(client)


CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "dog-b"}, "model", "contradict each other: found model dog-b, and dog-a first"),
    ({"adapter_scale": 0.5}, "adapter_scale", "has no effect here: found 0.5 with adapters"),
    ({"adapters": [*BOTH, {"subject": "dog-a@latest"}]}, "adapters", "twice: found dog-a@1"),
    ({"adapters": [{"subject": "tiny"}]}, "adapters", "the base is not an adapter"),
    ({"adapters": [{"subject": "dog-z"}]}, "model", "no subject 'dog-z' is published"),
    ({"adapters": [{"subject": "dog-a", "scale": 11}]}, "adapters.0.scale", "less than or"),
    ({"adapters": [{"name": "dog-a"}]}, "adapters.0.subject", "missing"),
    ({"adapters": [{"subject": "dog-a"}] * 17}, "adapters", "at most 16"),
]


def test_contradictions_are_refused(client: TestClient) -> None:
    for body, param, message in CONTRADICTIONS:
        error = post(client, **{"adapters": BOTH, **body})["error"]
        assert error["param"] == param, body
        assert message in error["message"], body


def test_ranks_that_do_not_fit_are_refused_and_harm_nobody(client: TestClient) -> None:
    adapters = [{"subject": "robot-c"}, {"subject": "vase-d"}]
    assert (
        "ranks 3 + 4 at one site, at most 4" in post(client, adapters=adapters)["error"]["message"]
    )
    assert picture(client, adapters=BOTH)


def test_several_subjects_in_a_mixed_batch_are_the_image_alone(base: Base, store: Store) -> None:
    """Bitwise, beside each of them alone, another pair and the plain base."""
    dog, robot = store.fetch("dog-a"), store.fetch("robot-c")
    other = publish(store, base, "other", 9, rank=1)
    assert isinstance(dog, AdapterRecord)
    assert isinstance(robot, AdapterRecord)
    orders = [
        Order((SampleRequest("a photo of sks dog", seed=seed, num_inference_steps=3),), parts)
        for seed, parts in enumerate(
            [
                (Part(dog, 0.8), Part(robot, 0.5)),
                (Part(dog),),
                (Part(other), Part(dog, -0.5)),
                (),
            ]
        )
    ]

    async def drawn(*orders: Order) -> list[bytes]:
        engine = Engine(base, store, SERVED.engine)
        try:
            answers: list[list[GeneratedImage]] = await asyncio.gather(
                *map(engine.generate, orders)
            )
        finally:
            await engine.close()
        assert len(orders) == 1 or engine.metrics.mixed_steps
        return [image.picture for images in answers for image in images]

    together = asyncio.run(drawn(*orders))
    assert together == [asyncio.run(drawn(order))[0] for order in orders]
    assert len(set(together)) == 4
