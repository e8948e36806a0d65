"""Deadlines, retries and idempotency keys over a real service, by the `openai` client's habits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from raybooth.config import EngineConfig, LimitsConfig, ServeConfig, ServedBase
from raybooth.model.base import Base
from raybooth.store import Store
from raybooth_serving.service import Service
from raybooth_serving.wire.routes import make_app
from tests.raybooth_serving.published import publish

ROUTE = "/v1/images/generations"
BODY = {"model": "dog-a", "prompt": "a photo of sks dog", "num_inference_steps": 2}
SERVED = ServedBase(engine=EngineConfig(num_slots=1, max_rank=4, row_buckets=(1, 2, 4)))
CONFIG = ServeConfig(bases=(SERVED,), limits=LimitsConfig(max_inference_steps=1000))
LONG = {**BODY, "num_inference_steps": 900}


@pytest.fixture(scope="module")
def client(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    store = Store(tmp_path_factory.mktemp("home") / "models")
    publish(store, base, "dog-a", 0)
    service = Service(base, store, CONFIG, SERVED)
    app = make_app(service, CONFIG.limits)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client
        assert client.portal is not None
        client.portal.call(service.engine.close)


def post(client: TestClient, body: dict[str, Any], **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(ROUTE, json=body, headers=named)


def accepted(client: TestClient) -> int:
    return int(client.get("/metrics.json").json()["images_accepted"])


def test_a_deadline_that_passes_is_not_to_be_tried_again(client: TestClient) -> None:
    response = post(client, LONG, x_request_timeout_seconds="0.2")
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"
    assert response.headers["x-should-retry"] == "false"


def test_the_sdk_s_own_timeout_is_a_deadline_and_it_tries_once(client: TestClient) -> None:
    http: Any = client
    impatient = OpenAI(
        base_url="http://localhost/v1", api_key="x", http_client=http, max_retries=2, timeout=0.3
    )
    before = accepted(client)
    with pytest.raises(openai.InternalServerError) as error:
        impatient.images.generate(
            model="dog-a", prompt="a dog", extra_body={"num_inference_steps": 900}
        )
    assert error.value.status_code == 504
    assert accepted(client) <= before + 1


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_deadline_that_is_no_time(client: TestClient, value: str) -> None:
    response = post(client, BODY, x_request_timeout_seconds=value)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout-seconds"


def test_a_key_is_answered_alike_and_drawn_once(client: TestClient) -> None:
    before = accepted(client)
    first, second = (post(client, BODY, idempotency_key="one") for _ in range(2))
    assert first.status_code == second.status_code == 200
    assert first.content == second.content
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert accepted(client) == before + 1
    same = dict(reversed(BODY.items()))
    assert post(client, same, idempotency_key="one").content == first.content
    assert post(client, BODY, idempotency_key="two").content != first.content


def test_a_key_with_another_body_is_422_which_clients_do_not_retry(client: TestClient) -> None:
    http: Any = client
    sdk = OpenAI(base_url="http://localhost/v1", api_key="x", http_client=http, max_retries=2)
    headers = {"Idempotency-Key": "three"}
    sdk.images.generate(model="dog-a", prompt="a dog", n=1, extra_headers=headers)
    with pytest.raises(openai.UnprocessableEntityError) as error:
        sdk.images.generate(model="dog-a", prompt="a cat", n=1, extra_headers=headers)
    assert error.value.code == "idempotency_key_reused"


def test_a_failure_is_not_kept(client: TestClient) -> None:
    wrong = {**BODY, "model": "dgo-a"}
    for _ in range(2):
        response = post(client, wrong, idempotency_key="four")
        assert response.status_code == 404
        assert "idempotent-replayed" not in response.headers
    assert post(client, BODY, idempotency_key="four").status_code == 200


def test_a_stream_takes_no_key(client: TestClient) -> None:
    response = post(client, {**BODY, "stream": True}, idempotency_key="five")
    assert response.status_code == 400
    assert "takes no Idempotency-Key" in response.json()["error"]["message"]


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_keys_out_of_bounds(client: TestClient, key: str) -> None:
    response = post(client, BODY, idempotency_key=key)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "idempotency-key"
